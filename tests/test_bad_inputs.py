"""Bad inputs of every kind end with exit code 2 and one message, which names the flag or the row."""

import collections
import functools
import io
import json
import random
import shutil

import accelerate
import datasets
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import save_file

import sd_config
from conftest import assert_says, learned, trainer, weights

MODEL, DATA, RESUME = "--pretrained_model_name_or_path", "--train_data_dir", "--resume_from_checkpoint"
STATE = "trainer_state.json"
# When a bad input can be found: before weights are loaded, while they are (or rows are encoded), and by the loop.
STAGES = EARLY, LOADING, TRAINING = "before weights", "weights", "training"
FIRST_CALLS = {LOADING: "load_models", TRAINING: "train"}
# `stage` is the last one at which the input may be found. `prepare` is given the `Lab`, and returns the flags. `says`
# are the messages, as `assert_says` takes them. {here} stands for the folder of the test.
Case = collections.namedtuple("Case", "stage prepare says")
# Of four pictures, the row that a run with seed 7 and batches of one trains on in its third step.
THIRD = trainer.permutation(7, 0, 4)[2]
ROW = f"row {THIRD} ({{here}}/photos/{THIRD:02}.png)"


class Malicious:
    """An object whose pickle makes a file called `executed` when it is loaded."""

    def __reduce__(self):
        return open, ("executed", "w")


def encoded(image, kind="PNG"):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


NOISE = Image.frombytes("L", (64, 64), random.Random(0).randbytes(64 * 64))
GOOD, JPEG = encoded(NOISE), encoded(NOISE, "JPEG")
UNDECODABLE = {
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "OSError"),
    "flipped byte in a PNG": (GOOD[:200] + bytes([GOOD[200] ^ 1]) + GOOD[201:], "Error: "),
    "text for a picture": (b"not a picture at all", "UnidentifiedImageError"),
    "decompression bomb": (encoded(Image.new("1", (20000, 10000))), "DecompressionBombError"),
}


class Lab:
    """What a case may use to make its input."""

    def __init__(self, here, assets, train, train_once, monkeypatch):
        self.here, self.assets, self.train, self.train_once, self.patch = here, assets, train, train_once, monkeypatch
        self.model = assets[0]

    def copy_model(self):
        """Have the run train a copy of the base model, which may be broken, and return its folder."""
        self.model = shutil.copytree(self.assets[0], self.here / "model")
        return self.model

    def finished_run(self):
        """Put a run of two steps into the output folder, and return its checkpoint."""
        run = self.train_once("--max_train_steps=2", "--train_batch_size=1", "--use_ema")
        return shutil.copytree(run.output, self.here / "run") / "checkpoint-2"

    def pictures(self, captions=("a", "b", "c", "d"), contents=(), metadata=None):
        """Write four good pictures, or these `contents`, with these captions or this `metadata` file."""
        folder = self.here / "photos"
        folder.mkdir()
        for number, content in enumerate(contents or [GOOD] * 4):
            (folder / f"{number:02}.png").write_bytes(content)
        rows = [json.dumps({"file_name": f"{row:02}.png", "text": text}) for row, text in enumerate(captions)]
        (folder / "metadata.jsonl").write_bytes("\n".join(rows).encode() if metadata is None else metadata)
        return f"{DATA}={folder}"

    def table(self, image=({"bytes": GOOD, "path": None},) * 2, text=("a", "b")):
        """Write a parquet file with two good pictures and captions, or with these (the columns `image` and `text`)."""
        rows = datasets.Dataset.from_dict({"image": image, "text": text[: len(image)]})
        (self.here / "table").mkdir()
        rows.cast_column("image", datasets.Image()).to_parquet(self.here / "table/train.parquet")
        return "--dataset_name=table"

    def but(self, flags, how, file):
        """Change a file by `how`, and return the flags."""
        how(self.here / file)
        return flags


def model(stage, file, how, *says):
    """A case of a base model with one file or folder changed by `how`."""
    return Case(stage, lambda lab: lab.but("", how, lab.copy_model() / file), says)


def early(prepare, *says):
    """A case of a data set, or of the machine: it must be found before weights are loaded."""
    return Case(EARLY, prepare, says)


def third(content):
    """The contents of four pictures, of which row `THIRD` is `content`."""
    return [content if number == THIRD else GOOD for number in range(4)]


def undecodable(content, says, flags="", stage=TRAINING):
    """A case of a picture that cannot be decoded, which is found in the third step, or before the first."""
    says = (f"{ROW}: … {says} … --skip_bad_rows",)
    return Case(stage, lambda lab: f"{lab.pictures(contents=third(content))} --train_batch_size=1 {flags}", says)


def resumed(stage, file, how, flags, *says):
    """A case of a run that is resumed from a checkpoint with one file or folder changed by `how`."""

    def prepare(lab):
        checkpoint = lab.finished_run()
        how(checkpoint / file)
        (checkpoint / "manifest.json").unlink()
        sd_config.write_manifest(checkpoint)  # otherwise it would be found to be damaged
        return f"--max_train_steps=4 --train_batch_size=1 --use_ema {RESUME}=latest {flags}"

    return Case(stage, prepare, says)


def remove(path):
    """Delete a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(content):
    """Return a function that writes something else into a file."""
    return lambda path: path.write_text(content, encoding="utf-8")


def change(value, *keys):
    """Return a function that sets an entry of a JSON file."""

    def edit(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        functools.reduce(dict.__getitem__, keys[:-1], content)[keys[-1]] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return edit


def without_a_tensor(path):
    """Take one tensor out of a safetensors file."""
    tensors = weights(path.parent, path.name)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


def pickled(name):
    """Return a function that puts a malicious pickle in the place of a safetensors file."""

    def swap(path):
        path.unlink()
        torch.save({"weight": Malicious()}, path.with_name(name))

    return swap


def own_code(path):
    """Have the index name a class that is defined in a file of the model's own."""
    (path / "own_code.py").write_text("open('executed', 'w')\nclass UNet: pass\n", encoding="utf-8")
    change(["own_code", "UNet"], "unet")(path.parent / "model_index.json")


BROKEN = '{"broken": '
IN_MODEL, CHECKPOINT = f"{MODEL} {{here}}/model: … ", f"{RESUME} {{here}}/run/checkpoint-2"
UNLOADABLE = f"{MODEL} {{here}}/model: cannot be loaded (check the folder): "
UNLOADED = f"{DATA} {{here}}/photos: cannot be loaded"
UNREADABLE_ROW = "1 row(s) without a readable picture; --skip_bad_rows trains on the others"
CONFIG, UNET = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
INDEX, SCHEDULER, TEXT_ENCODER = "model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"
# One input for each kind of error, and for each message.
CASES = {
    # The machine, and how it is used
    "fp16 without a GPU": early(lambda lab: "--mixed_precision=fp16", "--mixed_precision fp16: needs a GPU"),
    "graphs without a GPU": early(lambda lab: "--cuda_graphs", "--cuda_graphs: needs a CUDA device … on cpu"),
    "launch unknown to accelerate": early(lambda lab: lab.patch.setenv("WORLD_SIZE", "2") or "", "WORLD_SIZE 2: "),
    **{
        f"configured for {kind.value}": early(
            lambda lab, kind=kind: lab.patch.setattr(accelerate.Accelerator, "distributed_type", kind) or "",
            "accelerate's configuration asks for … only plain data parallelism",
        )
        for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    },
    **{
        f"{name} unknown to accelerate": early(
            lambda lab, name=name: lab.patch.setenv(name, "bogus") or "", f"{starts} … bogus"
        )
        for name, starts in {
            "ACCELERATE_TORCH_DEVICE": "the device, --mixed_precision None or accelerate's configuration: ",
            "ACCELERATE_MIXED_PRECISION": "accelerate's configuration asks for ",
        }.items()
    },
    "accelerate's own compilation": early(
        lambda lab: lab.patch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager") or "",
        "accelerate's configuration asks for dynamo",
    ),
    # Models, from their small files
    "unet's configuration broken": model(EARLY, CONFIG, text(BROKEN), UNLOADABLE),
    "unet's configuration impossible": model(EARLY, CONFIG, change(7, "norm_num_groups"), f"{IN_MODEL}7"),
    "class that is not there": model(EARLY, INDEX, change(["diffusers", "NoVAE"], "vae"), f"{IN_MODEL}NoVAE"),
    "library that is not there": model(
        LOADING, INDEX, change(["nowhere", "AutoencoderKL"], "vae"), f"{IN_MODEL}nowhere"
    ),
    "wrong kind of unet": model(
        EARLY, INDEX, change(["diffusers", "AutoencoderKL"], "unet"), f"{IN_MODEL}but must be UNet2DConditionModel"
    ),
    **{
        f"unet with another {name}": model(EARLY, CONFIG, change(value, name), f"{IN_MODEL}another {name}")
        for name, value in {"in_channels": 9, "num_class_embeds": 3, "cross_attention_dim": 64}.items()
    },
    "text encoder's configuration broken": model(LOADING, "text_encoder/config.json", text(BROKEN), UNLOADABLE),
    "unet with code of its own": model(EARLY, "unet", own_code, f"{IN_MODEL}own_code"),
    "variant that is not there": Case(LOADING, lambda lab: "--variant=bf8", (f"{MODEL} … bf8",)),
    "model that is not in the cache": early(
        lambda lab: f"{MODEL}=owner/name", f"{MODEL} owner/name: … or give a local folder"
    ),
    "tokenizer folder empty": model(
        EARLY, "tokenizer", lambda path: (remove(path), path.mkdir()), f"{IN_MODEL}its tokenizer lacks"
    ),
    "tokenizer without vocabulary": model(EARLY, "tokenizer/vocab.json", remove, UNLOADABLE),
    "tokenizer's vocabulary broken": model(EARLY, "tokenizer/vocab.json", truncate, UNLOADABLE),
    "tokenizer without configuration": model(
        EARLY, "tokenizer/tokenizer_config.json", remove, f"{IN_MODEL}its tokenizer lacks"
    ),
    "scheduler without configuration": model(EARLY, SCHEDULER, remove, UNLOADABLE),
    "scheduler's configuration broken": model(EARLY, SCHEDULER, text(BROKEN), UNLOADABLE),
    "scheduler of an unknown schedule": model(EARLY, SCHEDULER, change("steep", "beta_schedule"), UNLOADABLE),
    "scheduler that predicts something else": model(
        EARLY, SCHEDULER, change("sample", "prediction_type"), "--prediction_type: the base model predicts 'sample'"
    ),
    # Models, from their weights
    "no weights in the text encoder": model(LOADING, TEXT_ENCODER, remove, f"{IN_MODEL}text_encoder"),
    "unet's weights truncated": model(LOADING, UNET, truncate, UNLOADABLE),
    "unet's weights of other shapes": model(LOADING, CONFIG, change(48, "block_out_channels", 0), UNLOADABLE),
    "a tensor of the unet missing": model(
        LOADING, UNET, without_a_tensor, f"{IN_MODEL}unet has 439 of its 440 tensors"
    ),
    "text encoder's weights truncated": model(LOADING, TEXT_ENCODER, truncate, UNLOADABLE),
    "a tensor of the text encoder missing": model(
        LOADING, TEXT_ENCODER, without_a_tensor, f"{IN_MODEL}text_encoder has 35 of its 36 tensors"
    ),
    "unet's weights are a malicious pickle": model(LOADING, UNET, pickled("diffusion_pytorch_model.bin"), UNLOADABLE),
    "text encoder's weights are a malicious pickle": model(
        LOADING, TEXT_ENCODER, pickled("pytorch_model.bin"), UNLOADABLE
    ),
    # Data sets
    "empty split": early(lambda lab: lab.table(image=()), "--dataset_name table: … "),
    "folder without pictures": early(lambda lab: f"{DATA}=empty", f"{DATA} empty: "),
    "neither column": early(
        lambda lab: f"{lab.table()} --image_column=picture --caption_column=caption",
        "--image_column picture: the columns are image, text",
        "--caption_column caption: the columns are image, text",
    ),
    "broken parquet": early(
        lambda lab: lab.but(lab.table(), truncate, "table/train.parquet"), "--dataset_name table: cannot be loaded"
    ),
    "saved data set without its rows": early(
        lambda lab: lab.but("--dataset_name=empty", text('{"splits": ["train"]}'), "empty/dataset_dict.json"),
        "--dataset_name empty: cannot be loaded",
    ),
    "metadata names a file that is not there": early(
        lambda lab: lab.pictures(captions="abcde"),
        "row 4 ({here}/photos/04.png): the picture cannot be read: … No such file",
        UNREADABLE_ROW,
    ),
    "metadata in another encoding": early(
        lambda lab: lab.pictures(metadata=b'{"file_name": "\xe9.png"}'), f"{UNLOADED} … can't decode byte 0xe9"
    ),
    "captions are numbers": early(
        lambda lab: lab.table(text=[1, 2]), "--caption_column text: holds Value('int64'), not text"
    ),
    "metadata is one JSON array": early(
        lambda lab: lab.pictures(metadata=b'[{"file_name": "00.png", "text": "a"}]'), UNLOADED
    ),
    "metadata is no JSON": early(lambda lab: lab.pictures(metadata=BROKEN.encode()), UNLOADED),
    "metadata without names": early(lambda lab: lab.pictures(metadata=b'{"text": "a"}'), f"{UNLOADED} … file_name"),
    "metadata is empty": early(lambda lab: lab.pictures(metadata=b""), UNLOADED),
    "no metadata": early(
        lambda lab: lab.but(lab.pictures(), remove, "photos/metadata.jsonl"),
        "--caption_column text: the columns are image",
    ),
    "no caption": early(lambda lab: lab.pictures(["a", None, "c", "d"]), "--caption_column text: 1 row(s) … : 1"),
    # Pictures' files
    "empty file": early(lambda lab: lab.pictures(contents=third(b"")), f"{ROW}: the picture is empty", UNREADABLE_ROW),
    "no picture in a row": early(
        lambda lab: lab.table(image=[{"bytes": GOOD, "path": None}, None]),
        "row 1: the picture is empty",
        UNREADABLE_ROW,
    ),
    "none is readable": early(
        lambda lab: f"{lab.table(image=[{'bytes': b'', 'path': None}] * 2)} --skip_bad_rows",
        "--skip_bad_rows: of 2 rows, 2 of them bad, none is left to train on",
    ),
    "as many kept out of training as there are": early(
        lambda lab: f"{lab.pictures()} --validation_samples=4",
        "--validation_samples 4: of 4 rows, 0 of them bad, none is left to train on",
    ),
    **{name: undecodable(*case) for name, case in UNDECODABLE.items()},
    "truncated JPEG, read by a worker": undecodable(
        JPEG[: len(JPEG) // 2], "OSError: image file is truncated", "--dataloader_num_workers=1"
    ),
    "truncated JPEG, encoded before training": undecodable(
        JPEG[: len(JPEG) // 2], "OSError", "--center_crop --cache_latents=on", LOADING
    ),
    # Checkpoints
    "state that no trainer wrote": resumed(EARLY, STATE, text("{}"), "", f"{CHECKPOINT}: its {STATE}"),
    "another run": resumed(
        EARLY,
        STATE,
        change(True, "args", "use_8bit_adam"),
        "--seed=8 --train_batch_size=2",
        f"--seed: 8 here, but 7 in the run that {RESUME}",
        "--train_batch_size x … : 2 here, but 1 in the run",
        "--use_8bit_adam (which --low_memory sets): False here, but True in the run",
    ),
    "checkpoint without its unet": resumed(LOADING, "unet", remove, "", f"{CHECKPOINT}: cannot be loaded"),
    "unet of another shape in a checkpoint": resumed(
        LOADING, CONFIG, change(64, "cross_attention_dim"), "", f"{CHECKPOINT}: cannot be loaded"
    ),
    "a checkpoint's moments are a malicious pickle": resumed(
        LOADING, "optimizer.pt", pickled("optimizer.pt"), "", f"{CHECKPOINT}/optimizer.pt: cannot be loaded"
    ),
    "checkpoint without its moments": resumed(
        LOADING, "optimizer.pt", remove, "", f"{CHECKPOINT}/optimizer.pt: cannot be loaded"
    ),
}


@pytest.fixture
def lab(tmp_path, assets, train, train_once, monkeypatch):
    """The `Lab` of a test, in its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    return Lab(tmp_path, assets, train, train_once, monkeypatch)


def train_with(lab, given):
    """Run the trainer with the flags of a case. A --dataset_name replaces the usual --train_data_dir."""
    named = "--dataset_name" in given
    return lab.train("--max_train_steps=4", *given.split(), model=lab.model, data=None if named else lab.assets[1])


@pytest.fixture
def stages(monkeypatch):
    """A function that returns a list, in which the stages that a run comes to from then on are noted."""

    def watch():
        met = [EARLY]
        for stage, name in FIRST_CALLS.items():
            original = getattr(trainer, name)

            def noted(*args, stage=stage, original=original):
                met.append(stage)
                return original(*args)

            monkeypatch.setattr(trainer, name, noted)
        return met

    return watch


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_one_message(lab, stages, capfd, case):
    given = case.prepare(lab)
    met = stages()
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train_with(lab, given)
    out, err = capfd.readouterr()
    assert exit_info.value.code == 2
    assert not (lab.here / "executed").exists()
    assert "Traceback" not in out + err
    lines = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(case.says), err
    for line, says in zip(lines, case.says, strict=True):
        assert_says(line, says.format(here=lab.here))
    assert STAGES.index(met[-1]) <= STAGES.index(case.stage)
    if case.stage == "training":
        last = lab.here / "run/checkpoint-2"
        assert sd_config.find_damage(last) is None
        assert f"Stopped at step 2. Last checkpoint: {last}: add --resume_from_checkpoint latest" in err


def test_bad_rows_are_skipped_once_they_are_known(lab, capfd, monkeypatch):
    """--skip_bad_rows leaves out, and names, the pictures that would stop a run. The next run knows them already."""
    faults = [says for _, says in UNDECODABLE.values()]
    contents = [content for content, _ in UNDECODABLE.values()]
    for number in (0, 3, 6):
        contents.insert(number, GOOD)
        faults.insert(number, None)
    captions = [f"picture {number}" for number in range(len(contents))]
    given = f"{lab.pictures(captions, contents)} --skip_bad_rows --train_batch_size=1 --max_train_steps=6"
    decoded, original = [], trainer.map_once

    def map_once(function, *args):
        return original(lambda numbers: decoded.extend(numbers) or function(numbers), *args)

    monkeypatch.setattr(trainer, "map_once", map_once)

    result = train_with(lab, given)
    out, _ = capfd.readouterr()
    card = (result.output / "README.md").read_text(encoding="utf-8")
    assert decoded == list(range(7))
    for number, says in enumerate(faults):
        place = f"row {number} ({lab.here}/photos/{number:02}.png)"
        noted = [line for line in out.splitlines() if line.startswith(f"note: left out {place}: ")]
        listed = [line for line in card.splitlines() if line.startswith(f"- row {number}: ")]
        assert len(noted) == len(listed) == (says is not None)
        assert all(says in line for line in noted + listed)
    assert "4 rows were left out, " in card
    assert (result.run.step, result.run.plan.rows, result.run.stream.rows.kept) == (6, 3, [0, 3, 6])
    order = [3 * index for epoch in (0, 1) for index in trainer.permutation(7, epoch, 3)]
    assert [result.run.stream.rows.kept[result.run.stream.index(position)] for position in range(6)] == order

    decoded.clear()
    again = train_with(lab, f"{given} --output_dir={lab.here / 'again'}")
    assert decoded == []
    assert (again.run.stream.rows.bad, again.run.stream.rows.kept) == (result.run.stream.rows.bad, [0, 3, 6])
    assert learned(again) == learned(result)


def test_run_that_a_bad_row_stopped_goes_on_without_it(lab, capfd):
    given = CASES["truncated JPEG"].prepare(lab)
    with pytest.raises(SystemExit):
        train_with(lab, given)
    result = train_with(lab, f"{given} --skip_bad_rows {RESUME}=latest")
    out, _ = capfd.readouterr()
    assert "warning: --skip_bad_rows: False so far, True from here" in out
    assert (result.run.step, THIRD in result.run.stream.rows.kept) == (4, False)
    assert sorted(learned(result)) == [3, 4]
