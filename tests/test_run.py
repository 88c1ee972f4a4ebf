"""What a run leaves behind: metrics, pictures, checkpoints, and the exported pipeline."""

import argparse
import copy
import fnmatch
import json
import re
import shlex
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader
from transformers import CLIPTextModel

import infer
import sd_config
from conftest import DENOISING_STEPS, ROOT, assert_same, assert_same_state, files, learned, trainer, weights

SHORT = ("--train_batch_size=2", "--max_train_steps=2", "--learning_rate=1e-3")
PROMPTS = ("--validation_prompts", "a cat", "a rocket")


@pytest.fixture
def whole(train_once, monkeypatch):
    """A run with an average, pictures as users see them, and a prediction type that is not the base model's."""
    monkeypatch.setattr(sd_config, "DENOISING_STEPS", DENOISING_STEPS)
    return train_once(*SHORT, "--use_ema", "--prediction_type=v_prediction", *PROMPTS)


# -- the exported pipeline ---------------------------------------------------------------------------------------


def test_the_export_is_a_complete_pipeline(whole, assets):
    """It has the files of the base model, and few others. Of the base model's parts only the UNet has changed."""
    base = files(assets[0]) - {"tokenizer/special_tokens_map.json"}
    added = {"README.md", "tokenizer/tokenizer.json", "unet/diffusion_pytorch_model.non_ema.safetensors"}
    exported = {name for name in files(whole.output) if not name.startswith(("checkpoint-2/", "samples/", "."))}
    assert exported == base | added
    for name in ("vocab.json", "merges.txt"):  # which transformers 4 reads
        paths = (folder / "tokenizer" / name for folder in (assets[0], whole.output))
        one, other = (path.read_text(encoding="utf-8") for path in paths)
        assert (json.loads(one) == json.loads(other)) if name == "vocab.json" else one == other
    for part in ("vae", "text_encoder", "safety_checker"):
        name = "diffusion_pytorch_model.safetensors" if part == "vae" else "model.safetensors"
        assert_same(weights(assets[0] / part, name), weights(whole.output / part, name))
    pipeline, start = (StableDiffusionPipeline.from_pretrained(folder) for folder in (whole.output, assets[0]))
    assert pipeline.tokenizer("Naruto").input_ids == start.tokenizer("Naruto").input_ids
    assert type(pipeline.scheduler) is type(start.scheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction" != start.scheduler.config.prediction_type
    before, after = start.unet.state_dict(), pipeline.unet.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_computes_in_its_own_precision_and_exports_frozen_parts_in_theirs(
    train, assets, tmp_path, monkeypatch, precision
):
    """Otherwise a bf16 run would round them, and an export would be larger than a base model in half precision.

    A validation computes in the precision of the run, too.
    """
    seen, original = [], infer.sample

    def sample(pipeline, *args, **kwargs):
        seen.append((torch.is_autocast_enabled("cpu"), pipeline.vae.dtype, pipeline.safety_checker))
        assert not seen[-1][0] or torch.get_autocast_dtype("cpu") == torch.bfloat16
        return original(pipeline, *args, **kwargs)

    monkeypatch.setattr(infer, "sample", sample)
    base = shutil.copytree(assets[0], tmp_path / "base")
    CLIPTextModel.from_pretrained(base / "text_encoder").half().save_pretrained(base / "text_encoder")
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.vae.to(torch.bfloat16).save_pretrained(base / "vae")
    pipeline.unet.half().save_pretrained(base / "unet")
    run = train(*SHORT, f"--mixed_precision={precision}", "--validation_prompts=a cat", model=base)
    half = precision == "bf16"
    assert seen == [(half, torch.bfloat16 if half else torch.float32, None)]
    for part, name in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        assert_same(weights(base / part, name), weights(run.output / part, name))
    assert {value.dtype for value in weights(run.output / "unet").values()} == {torch.float32}


@pytest.mark.parametrize("form", ["variant", "bin"])
def test_half_precision_files_are_exported_in_half_precision(train, assets, tmp_path, form):
    """The dtype in their configuration does not count, nor the float32 in which the libraries load them."""
    base = shutil.copytree(assets[0], tmp_path / "base")
    stems = {"vae": "diffusion_pytorch_model", "text_encoder": "model", "safety_checker": "model"}
    for part, stem in stems.items():
        halves = {name: value.half() for name, value in weights(base / part, f"{stem}.safetensors").items()}
        if part == "text_encoder":  # as in SD1.5's own file, where it comes before most weights
            halves = {"text_model.embeddings.position_ids": torch.arange(77)[None]} | halves
        if form == "variant":
            save_file(halves, base / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        else:
            (base / part / f"{stem}.safetensors").unlink()
            torch.save(halves, base / part / f"{'pytorch_model' if stem == 'model' else stem}.bin")
    run = train(*SHORT, *(["--variant=fp16"] if form == "variant" else []), model=base)
    for part, stem in stems.items():
        stored, exported = (weights(folder / part, f"{stem}.safetensors") for folder in (assets[0], run.output))
    (checkpoint,) = sd_config.checkpoints(run.output)
    for folder in (checkpoint, run.output):
        modes = {file.stat().st_mode for file in folder.rglob("*.safetensors")}
        assert modes == {(run.output / "README.md").stat().st_mode}
        assert_same({name: value.half() for name, value in stored.items()}, exported)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_readmes_snippet_draws_with_any_export(train, assets, tmp_path, monkeypatch, dtype):
    """Whatever precision the base is stored in. The export keeps it, and the names of the tensors, old or new."""
    base, prefix = shutil.copytree(assets[0], tmp_path / "base"), "" if dtype is torch.float16 else "text_model."
    for file in base.glob("*/*.safetensors"):
        tensors = weights(file.parent, file.name).items()
        tensors = {name.replace("text_model.", prefix): value.to(dtype) for name, value in tensors}
        save_file(tensors, file, metadata={"format": "pt"})
    output = train(*SHORT, "--max_train_steps=1", model=base, output="sd-naruto-model").output
    for file in ("vae/diffusion_pytorch_model", "text_encoder/model", "safety_checker/model"):
        one, other = (weights(folder, f"{file}.safetensors") for folder in (base, output))
        assert_same(one, other)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace('.to("cuda")', ""))
    assert Image.open("result.png").size == (64, 64)


def test_a_base_without_a_safety_checker_works(train, assets, tmp_path):
    base = tmp_path / "base"
    StableDiffusionPipeline.from_pretrained(
        assets[0], safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(base)
    run = train(*SHORT, model=base)
    assert not (run.output / "safety_checker").exists()
    assert files(run.output / "unet") == {"config.json", "diffusion_pytorch_model.safetensors"}  # without an average
    assert StableDiffusionPipeline.from_pretrained(run.output).safety_checker is None


def test_average_and_raw_weights_both_load(whole):
    average, raw = (UNet2DConditionModel.from_pretrained(whole.output / "unet", variant=v) for v in (None, "non_ema"))
    assert all(map(torch.equal, average.parameters(), whole.run.average.weights))
    assert all(map(torch.equal, raw.parameters(), whole.run.unet.parameters()))
    assert not torch.equal(average.conv_in.bias, raw.conv_in.bias)
    pipeline = StableDiffusionPipeline.from_pretrained(whole.output, variant="non_ema")
    assert torch.equal(pipeline.unet.conv_in.bias, raw.conv_in.bias)


def test_the_optimizer_runs_fused(whole):
    assert whole.run.optimizer.adamw.param_groups[0]["fused"]


ODD = "a | b\nc `d` <img src=x> **e** _f_ __n_o__ [g](h) ~~i~~ &lt; $j$ \\| k\\"


def card_of(whole, **changed):
    """The model card of a run, had its arguments been others."""
    run = copy.copy(whole.run)
    run.args = argparse.Namespace(**vars(whole.run.args) | changed)
    return trainer.model_card(run, "")


def test_the_model_card_shows_every_value_as_it_is(whole):
    """What Markdown would read in it is escaped, so that a table keeps its rows and columns."""
    args = {
        "validation_prompts": ODD,
        "validation_negative_prompt": ODD,
        "dataset_name": ODD,
        "tracker_project_name": "|",
    }
    card = card_of(whole, **args)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(vars(whole.run.args))  # with the heading
    cells = [re.findall(r"((?:\\.|[^|\\])*)\|", row)[1:] for row in rows]
    assert {len(row) for row in cells} == {2}
    shown = {name.strip(): value.strip() for name, value in cells}
    for name, value in args.items():
        bare = re.sub(r"\\.|<br>", "", shown[name])
        assert not re.search(r"[`*<>|\[\]&$~]|\b_|_\b", bare), bare
        assert re.sub(r"\\(.)", r"\1", shown[name].replace("<br>", "\n")) == value
    (title,) = re.findall("^# .*", card, re.M)
    assert title.endswith(f"fine-tuned on {shown['dataset_name']}")


@pytest.mark.parametrize(
    ("base", "data", "known"),
    [
        (sd_config.MODEL, sd_config.DATA, {"base_model": sd_config.MODEL, "license": "creativeml-openrail-m"}),
        ("someone/model", sd_config.DATA, {"base_model": "someone/model"}),
        ("licensed", None, {"license": "cc-by-4.0"}),
        ("quoted", None, {"license": '"mit"'}),
        ("unsaid", None, {}),
        ("bare", "bare", {}),
    ],
)
def test_the_model_card_names_base_data_and_licence_where_they_are_known(
    whole, tmp_path, monkeypatch, base, data, known
):
    """Hub ids, and what the card of a local base model says at its top: nothing is invented."""
    monkeypatch.chdir(tmp_path)
    heads = {"licensed": "license: cc-by-4.0\ntags: [a]", "quoted": 'tags: [a]\nlicense: "mit"', "unsaid": "tags: [a]"}
    for name, head in heads.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{head}\n---\n# Base\nlicense: gpl\n---\n", encoding="utf-8")
    (tmp_path / "bare").mkdir()
    card = card_of(whole, pretrained_model_name_or_path=base, dataset_name=data)
    head = card.split("---\n")[1].splitlines()
    written = dict(line.split(": ", 1) for line in head)
    usual = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    usual["tags"] = "[stable-diffusion, text-to-image, full-fine-tune]"
    datasets = {"datasets": f"[{data}]"} if data == sd_config.DATA else {}
    assert written == usual | known | datasets


def test_the_commands_of_the_model_card_publish_nothing_but_the_model(whole, tmp_path):
    """Their patterns are those of fnmatch, in both clients."""
    card = card_of(whole, logging_dir="jour nal/new")
    (hf,), (modelscope,) = (re.findall(f"^    ({name} upload .*)", card, re.M) for name in ("hf", "modelscope"))
    hf, modelscope = shlex.split(hf), shlex.split(modelscope)
    assert hf[:4] == ["hf", *modelscope[1:4]] == ["hf", "upload", "OWNER/NAME", "."]
    patterns = modelscope[5:]
    assert modelscope[4] == "--exclude"  # which takes all that follow; that of hf is given once for each
    assert hf[4:] == [word for pattern in patterns for word in ("--exclude", pattern)]
    there = files(whole.output) | {"encoded-0123456789abcdef/pictures.arrow", "jour nal/new/run-1/x.swanlab"}
    sent = {name for name in there if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    assert {name.split("/")[0] for name in sent} == {*sd_config.PARTS, "samples", "README.md", "model_index.json"}
    assert {name for name in files(whole.output) if name.startswith(("unet/", "samples/"))} <= sent


def test_the_model_card_tells_how_it_was_made(whole, assets):
    card = (whole.output / "README.md").read_text(encoding="utf-8")
    assert f"# {trainer.escaped(assets[0])}, fine-tuned on {trainer.escaped(assets[1])}\n" in card
    assert f"The loss of the last step was {whole.logs[2]['train/loss']:.4f}." in card
    for name in vars(whole.run.args):
        assert f"| {name} | " in card
    grid = re.search(r"!\[samples\]\((.+)\)", card)[1]
    assert Image.open(whole.output / grid).width == 2 * (256 + 8) + 8


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_precision_that_accelerate_was_configured_for_is_remembered(train, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(*SHORT)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    train(*SHORT, "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert "warning: --mixed_precision: bf16 so far, no from here" in capsys.readouterr().out


def test_a_run_does_not_start_beside_a_checkpoint_that_it_has_not_seen(train, monkeypatch, capsys):
    """A run that was stopped may still save when the next one has already looked for the last checkpoint."""
    flags = (*SHORT, "--checkpointing_steps=1")
    last, original = train(*flags).output / "checkpoint-2", trainer.check_plan
    last.rename(last.with_name("late"))

    def check_plan(*args):
        original(*args)
        last.with_name("late").rename(last)

    monkeypatch.setattr(trainer, "check_plan", check_plan)
    with pytest.raises(SystemExit) as end:
        train(*flags, "--resume_from_checkpoint=latest")
    assert end.value.code == 2
    assert "checkpoint-2 was saved by another process just now; start again" in capsys.readouterr().err


# -- validation ----------------------------------------------------------------------------------------------------


def test_validation_pictures_are_the_ones_that_inference_draws(whole, tmp_path):
    """They are drawn with averaged weights, the run's seed and 20 steps, so the export draws the last ones again."""
    again = tmp_path / "again.png"
    flags = (f"--model_path={whole.output}", "--prompt=a rocket", "--seed=7", "--num_inference_steps=20")
    infer.main(infer.parse_args([*flags, f"--output={again}"]))
    picture = Image.open(whole.output / "samples/step-2/1-a-rocket.png")
    assert picture.tobytes() == Image.open(again).tobytes()
    assert infer.settings_of(picture)["prompt"] == "a rocket"


def test_one_prompt_does_not_change_the_picture_of_another(train):
    flags = (*SHORT, "--max_train_steps=1", "--validation_prompts")
    one = train(*flags, "a cat", "a cup", output="one").output / "samples/step-1"
    other = train(*flags, "Ein Hut, groß!", "a dog", "a cup", output="other").output / "samples/step-1"
    assert files(one) == {"0-a-cat.png", "1-a-cup.png", "grid.png"}
    assert files(other) == {"0-ein-hut-groß.png", "1-a-dog.png", "2-a-cup.png", "grid.png"}
    assert Image.open(one / "1-a-cup.png").tobytes() == Image.open(other / "2-a-cup.png").tobytes()


def test_validation_leaves_training_alone(train, monkeypatch):
    """It changes neither what is trained nor the state of torch's global generator."""
    flags = ("--train_batch_size=7", "--max_train_steps=5", "--validation_epochs=1", "--use_ema", "--random_flip")
    quiet, original, states = train(*flags, output="quiet"), trainer.validate, []

    def validate(*args):
        states.append(torch.get_rng_state())
        original(*args)
        assert torch.equal(states[-1], torch.get_rng_state())

    monkeypatch.setattr(trainer, "validate", validate)
    drawn = train(*flags, *PROMPTS, output="drawn")
    assert len(states) == 3
    assert_same(weights(quiet.output / "unet"), weights(drawn.output / "unet"))
    assert learned(quiet) == learned(drawn)


def test_a_run_that_repeats_steps_draws_their_pictures_again(train):
    """A run that goes on from an older checkpoint replaces the pictures that were drawn after that checkpoint."""
    flags = ("--train_batch_size=7", "--max_train_steps=2", "--checkpointing_steps=1", *PROMPTS)
    before = train(*flags).output / "samples/step-2/grid.png"
    old = before.read_bytes()
    shutil.rmtree(before.parents[2] / "checkpoint-2")
    train(*flags, "--resume_from_checkpoint=latest", "--learning_rate=0.05")
    assert before.read_bytes() != old


def test_in_mixed_precision_average_and_moments_have_the_memory_layout_of_their_weight(train):
    """Tensor cores want weights with channels last. One kernel can update them all only if they share a layout."""
    flags = (*SHORT, "--mixed_precision=bf16", "--use_ema", "--checkpointing_steps=1")
    whole = train(*flags, output="whole")
    halfway = whole.output / "checkpoint-1"
    again = train(*flags, "--resume_from_checkpoint", halfway, output="again")
    plain = train(*flags, "--mixed_precision=no", "--max_train_steps=1", output="plain").output / "checkpoint-1"
    other = train(*flags, "--resume_from_checkpoint", plain, output="other")
    back = train(*flags, "--mixed_precision=no", "--resume_from_checkpoint", halfway, output="back")
    for run in (whole.run, again.run, other.run, back.run):
        weights = list(run.unet.parameters())
        assert all(weight.is_contiguous() for weight in weights) == (run is back.run)
        moments = run.optimizer.adamw.state_dict()["state"].values()
        for weight, average, state in zip(weights, run.average.weights, moments, strict=True):
            assert {tensor.stride() for tensor in (average, state["exp_avg"], state["exp_avg_sq"])} == {weight.stride()}
    assert_same_state(whole.output / "checkpoint-2", again.output / "checkpoint-2")


# -- metrics and trackers ------------------------------------------------------------------------------------------


def test_metrics_stand_at_the_step_they_describe(train):
    """Every step logs all of them. The rate is the one that the step used; the epoch is what it reached."""
    flags = ("--train_batch_size=1", "--gradient_accumulation_steps=4", "--max_train_steps=6")
    run = train(*flags, "--lr_scheduler=linear", "--learning_rate=6e-4")
    assert list(run.logs) == list(range(1, 7))
    names = {f"train/{name}" for name in ("loss", "lr", "grad_norm", "images_per_sec", "epoch")}
    for step, values in run.logs.items():
        assert values.keys() == names
        assert values["train/lr"] == pytest.approx(1e-4 * (7 - step))
        assert values["train/epoch"] == step / 4
        # The loss of a random network is about 1. A quarter of that would be the loss of one micro-batch's share.
        assert 0.5 < values["train/loss"] < 2
        assert values["train/images_per_sec"] > 0


def test_swanlab_has_every_loss_the_captioned_pictures_and_all_arguments(train):
    flags = ("--train_batch_size=4", "--max_train_steps=6", "--validation_samples=2", "--checkpointing_steps=3")
    run = train(*flags, "--report_to=swanlab", *PROMPTS)
    (folder,) = (run.output / "logs").glob("run-*")
    scalars, pictures, settings = read_swanlab(folder)
    assert scalars["train/loss"] == {step: pytest.approx(run.logs[step]["train/loss"]) for step in range(1, 7)}
    assert scalars["val/loss"] == {step: pytest.approx(run.logs[step]["val/loss"]) for step in (0, 3, 6)}
    assert scalars["train/epoch"][6] == 2
    assert sorted(pictures) == [3, 6]
    for step, items in pictures.items():
        assert [caption for caption, _ in items] == ["a cat", "a rocket"]
        for index, (_, picture) in enumerate(items):
            saved = next((run.output / f"samples/step-{step}").glob(f"{index}-*.png"))
            assert Image.open(folder / "media/image" / picture).tobytes() == Image.open(saved).tobytes()
    config = (folder / "files/config.yaml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name}:", config, re.M) for name in vars(run.run.args))
    assert re.search(r"^best:(\n.*)*value: .*best.*val/loss 0\.\d{4}", config, re.M)
    assert "SD-Naruto" in settings
    assert "SD1-5_火影忍者" in settings


def read_swanlab(folder):
    """The scalars {key: {step: value}}, pictures {step: [(caption, file)]} and the first records of an offline run."""
    scalars, pictures, start = {}, {}, ""
    reader = DataStoreReader()
    reader.open(str(next(folder.glob("*.swanlab"))))
    for data in reader:
        record = Record()
        record.ParseFromString(data)
        if record.HasField("start"):
            start = str(record.start)
        for scalar in [record.scalar] if record.HasField("scalar") else []:
            scalars.setdefault(scalar.key, {})[scalar.step] = scalar.value.number
        for media in [record.media] if record.HasField("media") else []:
            pictures[media.step] = [(item.caption, item.filename) for item in media.value.items]
    return scalars, pictures, start


def test_swanlab_without_a_key_or_a_terminal_keeps_the_run_offline(train, monkeypatch, tmp_path, capsys):
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path))  # where this machine's user has left no key
    run = train(*SHORT, "--report_to=swanlab")
    (folder,) = (run.output / "logs").glob("run-*")
    losses = {step: pytest.approx(values["train/loss"]) for step, values in run.logs.items()}
    assert read_swanlab(folder)[0]["train/loss"] == losses
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == printed.count("warning: swanlab cannot start") == 1
    assert f"Offline run in {run.output / 'logs'}: upload it with swanlab sync." in printed


def test_swanlab_environment_is_respected(train, monkeypatch, tmp_path):
    for name, value in {"SWANLAB_LOG_DIR": str(tmp_path / "mine"), "SWANLAB_EXP_NAME": "my name"}.items():
        monkeypatch.setenv(name, value)
    train(*SHORT, "--report_to=swanlab")
    (folder,) = (tmp_path / "mine").glob("run-*")
    assert "my name" in read_swanlab(folder)[2]
