"""Bad inputs of every kind: each ends with exit code 2 and one message that names the flag or the row."""

import collections
import io
import json
import random
import shutil
import zlib

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sd_config
from conftest import learned, trainer, weights

MODEL, DATA = "--pretrained_model_name_or_path", "--train_data_dir"
# Where an input can be met: by the parser, before weights load, while they do, and by the loop.
FIRST_CALLS = {"before weights": "create_accelerator", "weights": "load_models", "training": "train"}
STAGES = ["flags", *FIRST_CALLS]
# `stage` is the last at which the input may be met. `prepare` is given the `Lab`, and returns the flags. Of each
# message expected, the text before the first " … " begins it, and the others are in it; {here} is the test's folder.
Case = collections.namedtuple("Case", "stage prepare says")
# Of four pictures, the row that a run with seed 7 and batches of one meets third.
THIRD = trainer.permutation(7, 0, 4)[2]
ROW = f"row {THIRD} ({{here}}/photos/{THIRD:02}.png)"


class Malicious:
    """An object whose pickle, where it is loaded, leaves a file called `executed`."""

    def __reduce__(self):
        return open, ("executed", "w")


# Pictures


def encoded(image, kind="PNG", **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunked(content, index, value):
    """A PNG whose header chunk has another byte at `index`, and the checksum to go with it.

    Width and height are the bytes from 4 and from 8 on, then come depth, colour, compression, filter and interlacing.
    """
    header = bytearray(content[12:29])
    header[index] = value
    return content[:12] + bytes(header) + zlib.crc32(header).to_bytes(4, "big") + content[33:]


NOISE = Image.frombytes("L", (64, 64), random.Random(0).randbytes(64 * 64))
GOOD, JPEG = encoded(NOISE), encoded(NOISE, "JPEG")
UNDECODABLE = {
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "OSError"),
    "truncated PNG": (GOOD[: len(GOOD) // 2], "OSError"),
    "flipped byte in a PNG": (GOOD[:200] + bytes([GOOD[200] ^ 1]) + GOOD[201:], "Error: "),
    "text for a picture": (b"not a picture at all", "UnidentifiedImageError"),
    "decompression bomb": (encoded(Image.new("1", (20000, 10000))), "DecompressionBombError"),
    "picture of no width": (chunked(GOOD, 7, 0), "UnidentifiedImageError"),
    "picture of no height": (chunked(GOOD, 11, 0), "UnidentifiedImageError"),
    "unknown filter": (chunked(GOOD, 15, 7), "UnidentifiedImageError"),
}


class Lab:
    """What a case may use to make its input."""

    def __init__(self, here, assets, shelf, train):
        self.here, self.assets, self.shelf, self.train = here, assets, shelf, train
        self.model = assets[0]

    def copy_model(self):
        """Have a base model of our own, to be broken."""
        self.model = shutil.copytree(self.assets[0], self.here / "model")
        return self.model

    def finished_run(self):
        """Put a run of two steps where --output_dir expects one (it is trained once), and return its checkpoint."""
        if not (self.shelf / "run").exists():
            shutil.move(self.train("--max_train_steps=2", "--train_batch_size=1", "--use_ema").output, self.shelf)
        return shutil.copytree(self.shelf / "run", self.here / "run") / "checkpoint-2"

    def pictures(self, captions=("a", "b", "c", "d"), contents=(), metadata=None):
        """Write four pictures, or as many as there are `contents`, with captions or another `metadata` file."""
        folder = self.here / "photos"
        folder.mkdir()
        for number, content in enumerate(contents or [GOOD] * 4):
            (folder / f"{number:02}.png").write_bytes(content)
        rows = [json.dumps({"file_name": f"{row:02}.png", "text": text}) for row, text in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("\n".join(rows) if metadata is None else metadata, encoding="utf-8")
        return f"{DATA}={folder}"

    def table(self, name="train", **columns):
        """Write a parquet file of two rows, whose pictures are given as bytes."""
        columns = {"image": [{"bytes": GOOD, "path": None}] * 2, "text": ["a", "b"]} | columns
        columns = {column: values for column, values in columns.items() if values is not None}
        is_image = "image" in columns and all(isinstance(value, dict | None) for value in columns["image"])
        rows = datasets.Dataset.from_dict(columns)
        if is_image:
            rows = rows.cast_column("image", datasets.Image())
        (self.here / "table").mkdir()
        rows.to_parquet(self.here / f"table/{name}.parquet")
        return "--dataset_name=table"


def flags(text, *says):
    """A case that the command line alone makes, beside a `file` and a folder `empty`."""
    return Case("flags", lambda lab: text, says)


def model(stage, file, how, *says):
    """A case of a base model of which one file or folder was changed by `how`."""

    def prepare(lab):
        how(lab.copy_model() / file)
        return ""

    return Case(stage, prepare, says)


def data(prepare, *says):
    """A case of a data set that must be met before weights load."""
    return Case("before weights", prepare, says)


def third(content):
    """The contents of four pictures, of which row `THIRD` is `content`."""
    return [content if number == THIRD else GOOD for number in range(4)]


def undecodable(content, says):
    """A case of one picture, met in the third step."""
    return Case(
        "training",
        lambda lab: f"{lab.pictures(contents=third(content))} --train_batch_size=1",
        (f"{ROW}: … {says}",),
    )


def resumed(stage, change, flags, *says, reseal=True):
    """A case of a run that goes on from a checkpoint, which was changed (and given a new manifest)."""

    def prepare(lab):
        checkpoint = lab.finished_run()
        change(checkpoint)
        if reseal:
            (checkpoint / "manifest.json").unlink()
            sd_config.write_manifest(checkpoint)
        return f"--max_train_steps=4 --train_batch_size=1 --use_ema --resume_from_checkpoint=latest {flags}"

    return Case(stage, prepare, says)


def nothing(path):
    """Leave it as it is."""


def remove(path):
    """Delete a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(content):
    """Return a function that writes something else into a file."""
    return lambda path: path.write_text(content, encoding="utf-8")


def change(*keys, value=None):
    """Return a function that sets, or without a value removes, an entry of a JSON file."""

    def edit(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        *outer, last = keys
        place = content
        for key in outer:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
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
    """Have a model's index name a class of a file that comes with the model."""
    (path / "own_code.py").write_text("open('executed', 'w')\nclass UNet: pass\n", encoding="utf-8")
    change("unet", value=["own_code", "UNet"])(path.parent / "model_index.json")


BROKEN = '{"broken": '
IN_MODEL = f"{MODEL} {{here}}/model: … "
UNLOADABLE = f"{MODEL} {{here}}/model: cannot be loaded (check the folder): "
UNLOADED = f"{DATA} {{here}}/photos: cannot be loaded"
UNET, TEXT_ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
RESUME = "--resume_from_checkpoint"
STATE = "trainer_state.json"
CASES = {
    # Flags
    "typo": flags("--learing_rate=1", "--learing_rate: no such flag; did you mean --learning_rate?"),
    "more digits than Python reads": flags(f"--seed={'9' * 5000}", "--seed 999"),
    "encoding random crops once": flags("--cache_latents=on", "--cache_latents on: … add --center_crop"),
    "micro-batches that do not make a step": flags(
        "--train_batch_size=3 --gradient_accumulation_steps=2 --micro_batch_size=4",
        "--micro_batch_size 4: must be a divisor of --train_batch_size x --gradient_accumulation_steps = 6, or auto",
    ),
    "low memory in fp16": flags(
        "--low_memory --mixed_precision=fp16", "--mixed_precision fp16: --low_memory needs bf16"
    ),
    "three at once": flags(
        "--seed=x --resolution=7 --use_em",
        "--use_em: no such flag",
        "--resolution 7: must be",
        "--seed x: must be",
    ),
    # Paths
    "no such model": flags(f"{MODEL}=missing", f"{MODEL} missing: no such folder"),
    "output below a file": flags("--output_dir=file/run", "--output_dir file/run: "),
    "output of too long a name": flags(f"--output_dir={'x' * 300}", "--output_dir xxx"),
    "logs are a file": flags("--output_dir=blocked --report_to=swanlab", "--output_dir blocked: logs in it is a file"),
    "samples are a file": flags("--output_dir=drawn --validation_prompts=cat", "--output_dir drawn: "),
    "output holds a file of a part's name": flags("--output_dir=foreign", "--output_dir foreign: holds unet, of no"),
    "cache is a file": Case("flags", lambda lab: f"--cache_dir=file {lab.pictures()}", ("--cache_dir file: … ",)),
    # Models, from their index alone
    # Models, from their small files
    "unet without configuration": model("before weights", "unet/config.json", remove, UNLOADABLE),
    "unet's configuration broken": model("before weights", "unet/config.json", text(BROKEN), UNLOADABLE),
    "unet's configuration impossible": model(
        "before weights", "unet/config.json", change("norm_num_groups", value=7), f"{IN_MODEL}7"
    ),
    "unet of unknown blocks": model(
        "before weights", "unet/config.json", change("down_block_types", value=["NoBlock"] * 4), f"{IN_MODEL}NoBlock"
    ),
    "vae's configuration broken": model("weights", "vae/config.json", text(BROKEN), UNLOADABLE),
    "text encoder's configuration broken": model("weights", "text_encoder/config.json", text(BROKEN), UNLOADABLE),
    "class that is not there": model(
        "weights", "model_index.json", change("vae", value=["diffusers", "NoSuchVAE"]), f"{IN_MODEL}NoSuchVAE"
    ),
    "library that is not there": model(
        "weights", "model_index.json", change("vae", value=["nowhere", "AutoencoderKL"]), f"{IN_MODEL}nowhere"
    ),
    "index without a unet": model("weights", "model_index.json", change("unet"), f"{IN_MODEL}unet"),
    "wrong kind of unet": model(
        "weights",
        "model_index.json",
        change("unet", value=["diffusers", "AutoencoderKL"]),
        UNLOADABLE,
    ),
    "unet with code of its own": model("weights", "unet", own_code, f"{IN_MODEL}own_code"),
    "variant that is not there": Case("weights", lambda lab: "--variant=bf8", (f"{MODEL} … bf8",)),
    "model that is not in the cache": Case(
        "before weights", lambda lab: f"{MODEL}=owner/name", (f"{MODEL} owner/name: … or give a local folder",)
    ),
    "tokenizer folder empty": model(
        "before weights", "tokenizer", lambda path: (remove(path), path.mkdir()), f"{MODEL} {{here}}/model: "
    ),
    "tokenizer without vocabulary": model("before weights", "tokenizer/vocab.json", remove, UNLOADABLE),
    "tokenizer without merges": model("before weights", "tokenizer/merges.txt", remove, UNLOADABLE),
    "tokenizer's vocabulary broken": model("before weights", "tokenizer/vocab.json", truncate, UNLOADABLE),
    "tokenizer without configuration": model(
        "before weights", "tokenizer/tokenizer_config.json", remove, f"{MODEL} {{here}}/model: "
    ),
    "tokenizer's configuration broken": model(
        "before weights", "tokenizer/tokenizer_config.json", text(BROKEN), UNLOADABLE
    ),
    "scheduler without configuration": model("before weights", "scheduler/scheduler_config.json", remove, UNLOADABLE),
    "scheduler's configuration broken": model(
        "before weights", "scheduler/scheduler_config.json", text(BROKEN), UNLOADABLE
    ),
    "scheduler of an unknown schedule": model(
        "before weights", "scheduler/scheduler_config.json", change("beta_schedule", value="steep"), UNLOADABLE
    ),
    "scheduler that predicts something else": model(
        "before weights",
        "scheduler/scheduler_config.json",
        change("prediction_type", value="sample"),
        "--prediction_type: the base model predicts 'sample'",
    ),
    # Models, from their weights
    "no weights in unet": model("weights", UNET, remove, f"{IN_MODEL}unet"),
    "no weights in the text encoder": model("weights", TEXT_ENCODER, remove, f"{IN_MODEL}text_encoder"),
    "unet's weights truncated": model("weights", UNET, truncate, UNLOADABLE),
    "unet's weights empty": model("weights", UNET, text(""), UNLOADABLE),
    "unet's weights are text": model("weights", UNET, text("no weights at all"), UNLOADABLE),
    "unet's weights of other shapes": model(
        "weights", "unet/config.json", change("cross_attention_dim", value=64), UNLOADABLE
    ),
    "a tensor of the unet missing": model(
        "weights", UNET, without_a_tensor, f"{IN_MODEL}unet has 439 of its 440 tensors"
    ),
    "text encoder's weights truncated": model("weights", TEXT_ENCODER, truncate, UNLOADABLE),
    "a tensor of the text encoder missing": model(
        "weights", TEXT_ENCODER, without_a_tensor, f"{IN_MODEL}text_encoder has 35 of its 36 tensors"
    ),
    "unet's weights are a malicious pickle": model("weights", UNET, pickled("diffusion_pytorch_model.bin"), UNLOADABLE),
    "text encoder's weights are a malicious pickle": model(
        "weights", TEXT_ENCODER, pickled("pytorch_model.bin"), UNLOADABLE
    ),
    # Data sets
    "no train split": data(lambda lab: lab.table("test"), "--dataset_name table: has no split named train, only test"),
    "empty split": data(lambda lab: lab.table(image=[], text=[]), "--dataset_name table: … "),
    "empty folder": data(lambda lab: "--dataset_name=empty", "--dataset_name empty: cannot be loaded"),
    "folder without pictures": data(lambda lab: f"{DATA}=empty", f"{DATA} empty: "),
    "data set that is not in the cache": data(
        lambda lab: "--dataset_name=owner/name", "--dataset_name owner/name: cannot be … or give a local folder"
    ),
    "no image column": data(lambda lab: lab.table(image=None), "--image_column image: the columns are text"),
    "no caption column": data(lambda lab: lab.table(text=None), "--caption_column text: the columns are image"),
    "neither column": data(
        lambda lab: f"{lab.table()} --image_column=picture --caption_column=caption",
        "--image_column picture: the columns are image, text",
        "--caption_column caption: the columns are image, text",
    ),
    "image column of text": data(
        lambda lab: lab.table(image=["a.png", "b.png"]), "--image_column image: holds Value('string'), not images"
    ),
    "image column of numbers": data(
        lambda lab: lab.table(image=[1, 2]), "--image_column image: holds Value('int64'), not images"
    ),
    "captions in the wrong column": data(
        lambda lab: f"{lab.table()} --caption_column=image", "--caption_column image: … "
    ),
    "broken parquet": data(
        lambda lab: (lab.table(), truncate(lab.here / "table/train.parquet"))[0], "--dataset_name table: cannot be"
    ),
    "parquet that is text": data(
        lambda lab: (lab.table(), text("text")(lab.here / "table/train.parquet"))[0], "--dataset_name table: cannot be"
    ),
    "saved data set without its rows": data(
        lambda lab: (text('{"splits": ["train"]}')(lab.here / "empty/dataset_dict.json"), "--dataset_name=empty")[1],
        "--dataset_name empty: cannot be loaded",
    ),
    "metadata names a file that is not there": data(
        lambda lab: lab.pictures(captions="abcde"),
        "row 4 ({here}/photos/04.png): the picture cannot be read: … No such file",
        "1 row(s) without a readable picture; --skip_bad_rows trains on the others",
    ),
    "metadata in another encoding": data(
        lambda lab: (lab.pictures(), (lab.here / "photos/metadata.jsonl").write_bytes(b'{"file_name": "\xe9.png"}'))[0],
        UNLOADED,
    ),
    "half a character in a caption": data(
        lambda lab: lab.pictures(["a", "b", "c", "\ud800"]), f"{DATA} {{here}}/photos: … "
    ),
    "metadata is no JSON": data(lambda lab: lab.pictures(metadata=BROKEN), UNLOADED),
    "metadata without file names": data(lambda lab: lab.pictures(metadata='{"text": "a"}'), f"{UNLOADED} … file_name"),
    "metadata is empty": data(lambda lab: lab.pictures(metadata=""), UNLOADED),
    "no metadata": data(
        lambda lab: (lab.pictures(), remove(lab.here / "photos/metadata.jsonl"))[0],
        "--caption_column text: the columns are image",
    ),
    # Captions
    "no caption": data(lambda lab: lab.pictures(["a", None, "c", "d"]), "--caption_column text: 1 row(s) … : 1"),
    "empty caption": data(lambda lab: lab.pictures(["a", "b", "", "d"]), "--caption_column text: 1 row(s) … : 2"),
    "blank caption": data(lambda lab: lab.pictures([" \n", "b", " ", "d"]), "--caption_column text: 2 row(s) … : 0, 2"),
    "captions are numbers": data(lambda lab: lab.pictures([1, 2, 3, 4]), "--caption_column text: 4 row(s) … : 0, 1, 2"),
    "no caption in a list": data(lambda lab: lab.table(text=[["a", "b"], []]), "--caption_column text: 1 row(s) … : 1"),
    "empty caption in a list": data(
        lambda lab: lab.table(text=[["a", ""], ["b"]]), "--caption_column text: 1 row(s) … : 0"
    ),
    # Pictures' files
    "empty file": data(
        lambda lab: lab.pictures(contents=third(b"")),
        f"{ROW}: the picture is empty",
        "1 row(s) without a readable picture; --skip_bad_rows",
    ),
    "no picture in a row": data(
        lambda lab: lab.table(image=[{"bytes": GOOD, "path": None}, None]),
        "row 1: the picture is empty",
        "1 row(s) without a readable picture; --skip_bad_rows trains on the others",
    ),
    "none is readable": data(
        lambda lab: f"{lab.table(image=[{'bytes': b'', 'path': None}] * 2)} --skip_bad_rows",
        "--skip_bad_rows: of 2 rows, 2 of them bad, none is left to train on",
    ),
    **{name: undecodable(*case) for name, case in UNDECODABLE.items()},
    "truncated JPEG, met by a worker": Case(
        "training",
        lambda lab: f"{CASES['truncated JPEG'].prepare(lab)} --dataloader_num_workers=1",
        (f"{ROW}: OSError: image file is truncated",),
    ),
    # Checkpoints
    "state that no trainer wrote": resumed(
        "before weights", lambda path: text("{}")(path / STATE), "", f"{RESUME} {{here}}/run/checkpoint-2: its {STATE}"
    ),
    "state without its entries": resumed(
        "before weights",
        lambda path: change("seed")(path / STATE),
        "",
        f"{RESUME} {{here}}/run/checkpoint-2: its {STATE}",
    ),
    "another seed": resumed("before weights", nothing, "--seed=8", f"--seed: 8 here, but 7 in the run that {RESUME}"),
    "another batch and an 8-bit optimizer": resumed(
        "before weights",
        lambda path: change("args", "use_8bit_adam", value=True)(path / STATE),
        "--train_batch_size=2",
        "--train_batch_size x … : 2 here, but 1 in the run",
        "--use_8bit_adam (which --low_memory sets): False here, but True in the run",
    ),
    "another data set": Case(
        "before weights",
        lambda lab: f"{CASES['another seed'].prepare(lab).replace('--seed=8', '')} {lab.pictures()}",
        ("fingerprint of the data set: ",),
    ),
    "checkpoint without its unet": resumed(
        "weights", lambda path: remove(path / "unet"), "", f"{RESUME} {{here}}/run/checkpoint-2: cannot be loaded"
    ),
    "checkpoint without its moments": resumed(
        "weights",
        lambda path: remove(path / "optimizer.pt"),
        "",
        f"{RESUME} {{here}}/run/checkpoint-2/optimizer.pt: cannot be loaded",
    ),
    "moments are a malicious pickle": resumed(
        "weights",
        lambda path: torch.save({0: Malicious()}, path / "optimizer.pt"),
        "",
        f"{RESUME} {{here}}/run/checkpoint-2/optimizer.pt: cannot be loaded",
    ),
    "unet of another shape in a checkpoint": resumed(
        "weights",
        lambda path: change("cross_attention_dim", value=64)(path / "unet/config.json"),
        "",
        f"{RESUME} {{here}}/run/checkpoint-2: cannot be loaded",
    ),
}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder in which a trained run is kept, so that it need not be trained for every case."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def lab(tmp_path, assets, shelf, train, monkeypatch):
    """The `Lab` of a test, in its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for file in ("foreign/unet", "blocked/logs", "drawn/samples"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    return Lab(tmp_path, assets, shelf, train)


def train_with(lab, given):
    """Run the trainer with a case's flags; a data set that they name takes the place of the usual one."""
    named = "--dataset_name" in given
    return lab.train("--max_train_steps=4", *given.split(), model=lab.model, data=None if named else lab.assets[1])


@pytest.fixture
def stages(monkeypatch):
    """A function that from its call on notes the stages that a run comes to."""

    def watch():
        met = ["flags"]
        for stage, name in FIRST_CALLS.items():
            note(stage, name, met)
        return met

    def note(stage, name, met):
        original = getattr(trainer, name)

        def noted(*args):
            met.append(stage)
            return original(*args)

        monkeypatch.setattr(trainer, name, noted)

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
        start, *rest = says.format(here=lab.here).split(" … ")
        assert line.startswith(start)
        assert all(part in line for part in rest), line
    assert STAGES.index(met[-1]) <= STAGES.index(case.stage)
    if case.stage == "training":
        last = lab.here / "run/checkpoint-2"
        assert sd_config.find_damage(last) is None
        assert f"Stopped at step 2. Last checkpoint: {last}: add --resume_from_checkpoint latest" in err


def test_bad_rows_are_skipped_once_they_are_known(lab, capfd, monkeypatch):
    """The pictures that stop a run are left out with --skip_bad_rows, named, and remembered by the next run."""
    faults = [says for _, says in UNDECODABLE.values()]
    contents = [content for content, _ in UNDECODABLE.values()]
    for number in (0, 3, 6, 9):
        contents.insert(number, GOOD)
        faults.insert(number, None)
    captions = [f"picture {number}" for number in range(len(contents))]
    given = f"{lab.pictures(captions, contents)} --skip_bad_rows --train_batch_size=1 --max_train_steps=8"
    decoded, original = [], trainer.decoding_fault
    monkeypatch.setattr(trainer, "decoding_fault", lambda *args: decoded.append(args[1]) or original(*args))

    result = train_with(lab, given)
    out, _ = capfd.readouterr()
    card = (result.output / "README.md").read_text(encoding="utf-8")
    assert decoded == list(range(12))
    for number, says in enumerate(faults):
        place = f"row {number} ({lab.here}/photos/{number:02}.png)"
        noted = [line for line in out.splitlines() if line.startswith(f"note: left out {place}: ")]
        listed = [line for line in card.splitlines() if line.startswith(f"- row {number}: ")]
        assert len(noted) == len(listed) == (says is not None)
        assert all(says in line for line in noted + listed)
    assert "Rows left out, 8, " in card
    assert (result.run.step, result.run.plan.rows, result.run.stream.rows.kept) == (8, 4, [0, 3, 6, 9])
    order = [3 * trainer.permutation(7, epoch, 4)[index] for epoch in (0, 1) for index in range(4)]
    assert [result.run.stream.rows.kept[result.run.stream.index(position)] for position in range(8)] == order

    decoded.clear()
    again = train_with(lab, f"{given} --output_dir={lab.here / 'again'}")
    assert decoded == []
    assert (again.run.stream.rows.bad, again.run.stream.rows.kept) == (result.run.stream.rows.bad, [0, 3, 6, 9])
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
