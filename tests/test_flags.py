"""The flags that no other file tests: each of these tests fails if its flag is ignored.

test_oracle.py has the flags of the loss and of the learning rate, test_config.py those of batches and steps,
test_stream.py those of crops, flips and captions, test_saving.py and test_crash.py those of checkpoints.
"""

import json
import re
import shlex
import shutil
import sys
import types

import accelerate
import datasets
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import faults
import portraits
import sd_config
from conftest import DENOISING_STEPS, ROOT, TUTORIAL, assert_same, trainer, weights

SHORT = ("--train_batch_size=2", "--max_train_steps=2", "--learning_rate=1e-4")
FROZEN = ("--train_batch_size=1", "--max_train_steps=1", "--learning_rate=0")
ADAM = ("--adam_beta1=0.5", "--adam_beta2=0.9", "--adam_weight_decay=0.5", "--adam_epsilon=1e-3", "--use_8bit_adam")


@pytest.mark.parametrize("flag", [*ADAM, "--scale_lr", "--image_interpolation_mode=nearest"])
@pytest.mark.usefixtures("uncompiled")
def test_flag_changes_what_is_trained(train, train_once, flag):
    one, other = (weights(run.output / "unet") for run in (train_once(*SHORT), train(*SHORT, flag)))
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_every_flag_is_read():
    flags = set(vars(sd_config.parse_args([])))
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("sd_config.py", "train_sd1-5_naruto.py"))
    assert flags <= set(re.findall(r"args\.(\w+)", source))


# -- model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(assets, tmp_path_factory):
    """A cache like that of the Hub's client, with the model acme/tiny, and a revision `v` that differs from `main`."""
    cache = tmp_path_factory.mktemp("cache")
    for index, revision in enumerate(("main", "v")):
        commit = str(index) * 40
        snapshot = cache / "models--acme--tiny/snapshots" / commit
        shutil.copytree(assets[0], snapshot)
        for name, scale in (("diffusion_pytorch_model", 1 + index), ("diffusion_pytorch_model.fp16", 3 + index)):
            for part in ("unet", "vae"):
                tensors = load_file(assets[0] / part / "diffusion_pytorch_model.safetensors")
                dtype = torch.float16 if name.endswith("fp16") else torch.float32
                save_file(
                    {key: (value * scale).to(dtype) for key, value in tensors.items()},
                    snapshot / part / f"{name}.safetensors",
                )
        if revision == "v":
            file = snapshot / "scheduler/scheduler_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
            (snapshot / "tokenizer/marked").touch()
        (cache / "models--acme--tiny/refs").mkdir(exist_ok=True)
        (cache / "models--acme--tiny/refs" / revision).write_text(commit)
    return f"--cache_dir={cache}"


def scale_of(run, assets, part="unet"):
    """The factor between the weights that a run of rate 0 has exported, and so has loaded, and the tiny model's."""
    name = next(name for name, value in weights(assets[0] / part).items() if value.abs().min() > 0)
    return (weights(run.output / part)[name].float() / weights(assets[0] / part)[name]).median().item()


@pytest.mark.parametrize(
    ("flag", "unet", "vae", "prediction_type"),
    [
        ("--revision=v", 2, 2, "v_prediction"),
        ("--variant=fp16", 3, 3, "epsilon"),
        ("--non_ema_revision=v", 2, 1, "epsilon"),
    ],
)
def test_flags_of_the_base_model(train, hub, assets, flag, unet, vae, prediction_type):
    """They, and --cache_dir, decide which UNet, VAE and scheduler are trained with and exported."""
    run = train(*FROZEN, hub, flag, model="acme/tiny")
    assert scale_of(run, assets) == pytest.approx(unet, rel=1e-3)
    assert scale_of(run, assets, "vae") == pytest.approx(vae, rel=1e-3)
    exported = json.loads((run.output / "scheduler/scheduler_config.json").read_text())
    assert run.run.loss_options["prediction_type"] == exported["prediction_type"] == prediction_type


# -- data ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(assets, tmp_path_factory):
    """A folder with data sets of every form."""
    folder = tmp_path_factory.mktemp("data")
    rows = datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train")
    for name, count in (("plain", 14), ("nested", 14), ("nested/part", 5), ("configs/few", 3), ("configs/many", 9)):
        (folder / name).mkdir(parents=True)
        rows.select(range(count)).to_parquet(folder / name / "train-00000-of-00001.parquet")
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("few", "many"))
    (folder / "configs/README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    renamed = rows.rename_columns({"image": "picture", "text": "words"})
    datasets.DatasetDict(train=renamed).save_to_disk(folder / "renamed")
    return folder


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ("--dataset_name=plain", 14),
        ("--dataset_name=nested --train_data_dir=part", 5),
        ("--dataset_name=configs --dataset_config_name=many", 9),
        ("--dataset_name=renamed --image_column=picture --caption_column=words", 14),
    ],
)
def test_flags_of_the_data(train, data, monkeypatch, flags, count):
    monkeypatch.chdir(data)
    run = train(*FROZEN, *flags.split(), data=None)
    assert run.run.plan.rows == count
    assert list(run.logs) == [1]


def test_flag_skip_bad_rows(train, assets, tmp_path, capsys):
    """In a subset, other rows take the place of the bad ones, and the order of the rest stays."""
    photos = shutil.copytree(assets[1], tmp_path / "photos")
    broken = json.loads((photos / "metadata.jsonl").read_text().splitlines()[3])["file_name"]
    (photos / broken).write_bytes((photos / broken).read_bytes()[:400])
    run = train(*FROZEN, "--max_train_samples=12", "--skip_bad_rows", data=photos, seed=11)
    assert re.search(rf"note: left out row 3 \(\S*{broken}\): \w+Error", capsys.readouterr().out)
    order = trainer.permutation(11, "subset", 14)
    assert run.run.stream.rows.kept == [number for number in order if number != 3][:12] != sorted(order)[:12]


# -- optimisation, memory and speed ----------------------------------------------------------------------------


def test_flags_of_speed_and_memory(train, train_once, monkeypatch):
    """They do not change what is trained. (test_compile.py compares what a network that is compiled trains.)"""
    plain, compiled = train_once(*SHORT), []
    monkeypatch.setattr(torch, "compile", lambda network, **options: compiled.append((network, options)) or network)
    assert plain.run.network is plain.run.unet
    assert not plain.run.unet.is_gradient_checkpointing
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        run = train(*SHORT, "--torch_compile", "--gradient_checkpointing", "--allow_tf32")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert compiled == [(run.run.unet, {"fullgraph": True, "dynamic": False})]
    assert run.run.unet.is_gradient_checkpointing
    assert_same(weights(plain.output / "unet"), weights(run.output / "unet"))


def test_flag_enable_xformers_memory_efficient_attention(train, monkeypatch):
    """It is enabled before the first step, and not only by the first validation."""
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    sys.modules["xformers"].__spec__ = types.SimpleNamespace(origin="a file")
    events = []
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_xformers_memory_efficient_attention", lambda self: events.append("enabled")
    )
    faults.plant(monkeypatch.setattr, after_step=lambda run: events.append("step"))
    train(*FROZEN, "--enable_xformers_memory_efficient_attention")
    assert events == ["enabled", "step"]


# -- checkpoints -----------------------------------------------------------------------------------------------


def test_flag_overwrite_output_dir(train):
    """What the old run wrote is deleted, and nothing else."""
    first = train(*FROZEN, "--max_train_steps=2", "--checkpointing_steps=1", "--validation_prompts=a cat")
    (first.output / "notes.txt").write_text("mine")
    second = train(*FROZEN, "--overwrite_output_dir")
    assert [path.name for path in sd_config.checkpoints(second.output)] == ["checkpoint-1"]
    assert (second.output / "notes.txt").read_text() == "mine"
    assert not (second.output / "samples").exists()


def test_flag_dry_run(train, capsys):
    """The plan is printed after every check, but no weights are loaded and nothing is written."""
    result = train("--train_batch_size=4", "--max_train_steps=10", "--checkpointing_steps=4", "--dry_run", "--use_ema")
    assert result.run is None
    assert not result.output.exists()
    printed = capsys.readouterr().out
    assert re.search(r"steps +10 \(4 per epoch, 2.5 epochs\)", printed)
    assert re.search(r"checkpoints +3, 3 of them kept: 0.03 GB each, 0.08 GB in all", printed)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "601, drawing is 28.6% of the UNet's passes"),
        ("--validation_steps=500", "30, drawing is 2.0% of the UNet's passes"),
    ],
)
def test_a_run_that_draws_much_is_warned(train, tmp_path, monkeypatch, capsys, flags, says):
    """The tutorial's flags, on 20 pictures."""
    monkeypatch.setattr(sd_config, "DENOISING_STEPS", DENOISING_STEPS)
    monkeypatch.chdir(tmp_path)
    portraits.write(tmp_path / "ninja", "ninja", 20)
    prompts = ("--validation_prompts", *sd_config.FLAGS["validation"][0][1])
    train(*shlex.split(TUTORIAL), *flags.split(), "--dry_run", *prompts, data=tmp_path / "ninja")
    printed = capsys.readouterr().out
    assert re.search(f"validations +{says}", printed)
    warned = "warning: 28.6% of the UNet's passes draw validation pictures; a larger --validation_steps"
    assert (warned in printed) == (flags == "")


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--center_crop --train_batch_size=2 --cache_latents=on", True),
        ("--center_crop --cache_latents=off", False),
        ("--center_crop", True),
        ("--center_crop --max_train_steps=1", False),
        ("--center_crop --random_flip", False),
        ("", False),
    ],
)
def test_flag_cache_latents(monkeypatch, tmp_path, flags, kept):
    """`auto` encodes once if the crop is fixed, a picture is used more than once, and the disk has room."""
    usual = (f"--output_dir={tmp_path / 'new'}", "--train_batch_size=14", "--max_train_steps=2")

    def plan(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
        return sd_config.Plan(sd_config.parse_args([*usual, *flags.split()]), rows=14, processes=1, parameters=1000)

    large = plan(free=10**12)
    assert bool(large.encoded) == kept
    needed = 2 * large.checkpoint_bytes + large.export_bytes + large.encoded_bytes
    assert bool(plan(free=needed).encoded) == kept
    assert bool(plan(free=needed - 1).encoded) == ("--cache_latents=on" in flags)


# -- logging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [("none", None), ("swanlab", "run-*/*.swanlab"), ("tensorboard", "other/events.out*"), ("wandb", None)],
)
def test_flags_of_the_tracker(train, monkeypatch, name, file):
    """A tracker gets metrics and captioned pictures, in the folder and project that the flags name."""
    if name == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
        monkeypatch.setattr("accelerate.tracking._available_trackers", [accelerate.utils.LoggerType.WANDB])
    flags = (f"--report_to={name}", "--tracker_project_name=other", "--logging_dir=journal/new")
    run = train(*FROZEN, *flags, "--validation_samples=1", "--validation_prompts=a cat")
    assert [tracker.name for tracker in run.run.accelerator.trackers] == ([] if name == "none" else [name])
    for pattern in ("run-*/*.swanlab", "other/events.out*"):
        assert bool(list(run.output.glob(f"journal/new/{pattern}"))) == (pattern == file)
    assert not (run.output / "logs").exists()
    assert (run.output / "journal").exists() == (name != "none")
    if name == "wandb":
        settings = {"project": "other", "name": "SD1-5_火影忍者", "dir": str(run.output / "journal/new")}
        assert sys.modules["wandb"].started == settings
        logged = run.run.accelerator.trackers[0].run.logged
        assert logged[0] == ({"val/loss": run.logs[0]["val/loss"]}, 0)
        assert logged[1][0]["train/loss"] > 0
        best = f"The last checkpoint is the best: val/loss {run.logs[1]['val/loss']:.4f}."
        assert run.run.accelerator.trackers[0].run.summary == {"best": best}
        assert logged[-1] == ({"validation": [("image", "a cat")]}, 1)
    if name == "tensorboard":
        events = EventAccumulator(str(run.output / "journal/new/other")).Reload()
        assert [event.step for event in events.Scalars("val/loss")] == [0, 1]


def fake_wandb():
    """As much of wandb as the trainer calls. The real one would need an account or a server."""
    module, run = types.ModuleType("wandb"), types.SimpleNamespace(logged=[], summary={}, finish=lambda: None)
    module.__spec__ = types.SimpleNamespace(origin="a file")
    run.log = lambda values, step=None, **kwargs: run.logged.append((values, step))
    module.init = lambda **kwargs: vars(module).update(started=kwargs) or run
    module.config = types.SimpleNamespace(update=lambda *args, **kwargs: None)
    module.Image = lambda image, caption: ("image", caption)
    return module
