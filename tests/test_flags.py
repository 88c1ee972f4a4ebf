"""One test for each flag that fails if the flag is ignored: `test_flag[NAME]` or `test_flag_NAME`."""

import json
import re
import shutil
import sys
import types

import accelerate
import datasets
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import faults
import sd_config
from conftest import ROOT, assert_same, weights

SHORT = ("--train_batch_size=2", "--max_train_steps=2", "--learning_rate=1e-4")

# Flags that change what is trained: the flag, and what both runs that are compared have besides.
TRAINING = {
    "resolution": ("--resolution=128",),
    "center_crop": ("--center_crop",),
    "random_flip": ("--random_flip",),
    "image_interpolation_mode": ("--image_interpolation_mode=nearest",),
    "caption_dropout": ("--caption_dropout=1",),
    "max_train_samples": ("--max_train_samples=3",),
    "max_train_steps": ("--max_train_steps=1",),
    "train_batch_size": ("--train_batch_size=3",),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps=2",),
    "learning_rate": ("--learning_rate=2e-4",),
    "scale_lr": ("--scale_lr",),
    "lr_scheduler": ("--lr_scheduler=linear",),
    "lr_warmup_steps": ("--lr_warmup_steps=2", "--lr_scheduler=constant_with_warmup"),
    "adam_beta1": ("--adam_beta1=0.5",),
    "adam_beta2": ("--adam_beta2=0.9",),
    "adam_weight_decay": ("--adam_weight_decay=0.5",),
    "adam_epsilon": ("--adam_epsilon=1e-3",),
    "max_grad_norm": ("--max_grad_norm=1e-6",),
    "prediction_type": ("--prediction_type=v_prediction",),
    "snr_gamma": ("--snr_gamma=0.1",),
    "noise_offset": ("--noise_offset=0.1",),
    "input_perturbation": ("--input_perturbation=0.1",),
    "dream_training": ("--dream_training",),
    "dream_detail_preservation": ("--dream_detail_preservation=9", "--dream_training"),
    "mixed_precision": ("--mixed_precision=bf16",),
}


@pytest.fixture(scope="module")
def plain():
    """The weights that runs without the flag have led to, by what they had besides."""
    return {}


@pytest.mark.parametrize("name", TRAINING)
def test_flag(train, plain, name):
    flag, *besides = TRAINING[name]
    if tuple(besides) not in plain:
        plain[tuple(besides)] = weights(train(*SHORT, *besides, output="plain").output / "unet")
    one, other = plain[tuple(besides)], weights(train(*SHORT, *besides, flag).output / "unet")
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_every_flag_is_read():
    flags = set(vars(sd_config.parse_args([])))
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("sd_config.py", "train_sd1-5_naruto.py"))
    assert flags <= set(re.findall(r"args\.(\w+)", source))


# -- model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(assets, tmp_path_factory):
    """A cache of the Hub as its client leaves it, with acme/tiny: `main`, and a revision `v` in which all differs."""
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
    """By what factor the weights that a run loaded differ from the tiny model's (a rate of 0 does not move them)."""
    name = next(name for name, value in weights(assets[0] / part).items() if value.abs().min() > 0)
    return (weights(run.output / part)[name].float() / weights(assets[0] / part)[name]).median().item()


FROZEN = ("--train_batch_size=1", "--max_train_steps=1", "--learning_rate=0")


def test_flag_cache_dir(train, hub, assets):
    with pytest.raises(SystemExit) as error:
        train(*FROZEN, model="acme/tiny")
    assert error.value.code == 2
    assert scale_of(train(*FROZEN, hub, model="acme/tiny"), assets) == pytest.approx(1)


def test_flag_revision(train, hub, assets):
    """It reaches every part: UNet, VAE, and the scheduler both trained with and exported."""
    run = train(*FROZEN, hub, "--revision=v", model="acme/tiny")
    assert scale_of(run, assets) == pytest.approx(2)
    assert scale_of(run, assets, "vae") == pytest.approx(2)
    assert run.run.loss_options["prediction_type"] == "v_prediction"
    assert json.loads((run.output / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_flag_variant(train, hub, assets):
    """It reaches UNet and VAE; parts that do not have it come in the plain one. The UNet trains in float32."""
    run = train(*FROZEN, hub, "--variant=fp16", model="acme/tiny")
    assert scale_of(run, assets) == pytest.approx(3, rel=1e-3)
    assert {value.dtype for value in weights(run.output / "unet").values()} == {torch.float32}
    exported = weights(run.output / "vae")
    assert {value.dtype for value in exported.values()} == {torch.float16}
    stored = (weights(assets[0] / "vae")["encoder.conv_in.weight"] * 3).half()
    assert torch.equal(exported["encoder.conv_in.weight"], stored)


def test_flag_non_ema_revision(train, hub, assets):
    run = train(*FROZEN, hub, "--non_ema_revision=v", model="acme/tiny")
    assert scale_of(run, assets) == pytest.approx(2)
    assert scale_of(run, assets, "vae") == pytest.approx(1)


def test_flag_pretrained_model_name_or_path(train, assets, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(assets[0], other)
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    with torch.no_grad():
        unet.conv_in.bias.fill_(5)
    unet.save_pretrained(other / "unet")
    run = train(*FROZEN, model=other)
    assert_same(weights(run.output / "unet"), weights(other / "unet"))


# -- data ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(assets):
    return datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train")


def trained_rows(run):
    return run.run.plan.rows


def test_flag_train_data_dir(train, assets, tmp_path):
    """Alone it is the data set; with a local --dataset_name it is the subfolder to take."""
    assert trained_rows(train(*SHORT)) == 14
    (tmp_path / "all/part").mkdir(parents=True)
    for name in ("all", "all/part"):
        for file in assets[1].iterdir():
            shutil.copy(file, tmp_path / name)
    lines = (assets[1] / "metadata.jsonl").read_text().splitlines()
    for line in lines[5:]:
        (tmp_path / "all/part" / json.loads(line)["file_name"]).unlink()
    (tmp_path / "all/part/metadata.jsonl").write_text("\n".join(lines[:5]))
    within = train(*SHORT, f"--dataset_name={tmp_path / 'all'}", "--train_data_dir=part", data=None, output="within")
    assert trained_rows(within) == 5


@pytest.mark.parametrize("form", ["parquet", "imagefolder", "saved", "saved with splits"])
def test_flag_dataset_name(train, rows, assets, tmp_path, form):
    folder = tmp_path / "data"
    if form == "parquet":
        folder.mkdir()
        rows.to_parquet(folder / "train-00000-of-00001.parquet")
    elif form == "imagefolder":
        shutil.copytree(assets[1], folder)
    else:
        (rows if form == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(folder)
    plain = train(*SHORT, "--max_train_steps=1")
    run = train(*SHORT, "--max_train_steps=1", f"--dataset_name={folder}", data=None, output="form")
    assert trained_rows(run) == 14
    assert set(run.logs) == set(plain.logs)


def test_flag_dataset_config_name(train, rows, tmp_path):
    folder = tmp_path / "data"
    for name, count in (("few", 3), ("many", 9)):
        (folder / name).mkdir(parents=True)
        rows.select(range(count)).to_parquet(folder / name / "train.parquet")
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("few", "many"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    run = train(*SHORT, f"--dataset_name={folder}", "--dataset_config_name=many", data=None)
    assert trained_rows(run) == 9


@pytest.mark.parametrize(("flag", "column"), [("image_column", "picture"), ("caption_column", "words")])
def test_columns(train, rows, tmp_path, capsys, flag, column):
    rows.rename_columns({"image": "picture", "text": "words"}).save_to_disk(tmp_path / "data")
    both = ("--image_column=picture", "--caption_column=words")
    data = f"--dataset_name={tmp_path / 'data'}"
    assert train(*SHORT, data, *both, data=None).logs
    with pytest.raises(SystemExit) as error:
        train(*SHORT, data, *(given for given in both if flag not in given), data=None, output="without")
    assert error.value.code == 2
    assert re.search(rf"error: --{flag} \w+: the columns are picture, words", capsys.readouterr().err)


test_flag_image_column = test_flag_caption_column = test_columns


def test_flag_dataloader_num_workers(train, monkeypatch):
    seen, original = [], torch.utils.data.DataLoader.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(self.num_workers)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", spy)
    train(*FROZEN, "--dataloader_num_workers=1")
    assert seen == [1]


# -- optimisation, memory and speed ----------------------------------------------------------------------------


def test_flag_num_train_epochs(train):
    run = train("--train_batch_size=4", "--num_train_epochs=2", "--learning_rate=0")
    assert max(run.logs) == 8  # twice ceil(14 / 4)
    assert run.logs[8]["train/epoch"] == 2


def test_flag_use_ema(train):
    run = train(*SHORT, "--max_train_steps=4", "--use_ema")
    raw, average = (
        weights(run.output / "unet", f"diffusion_pytorch_model{name}.safetensors") for name in (".non_ema", "")
    )
    assert any(not torch.equal(raw[key], average[key]) for key in raw)
    assert_same(raw, weights(run.output / "checkpoint-4/unet"))
    assert_same(average, weights(run.output / "checkpoint-4/unet_ema"))
    without = train(*SHORT, output="without")
    assert sorted(path.name for path in (without.output / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_flag_use_8bit_adam(train, monkeypatch):
    from torchao.optim import AdamW8bit  # noqa: PLC0415 (slow)
    from torchao.optim.subclass_8bit import OptimState8bit  # noqa: PLC0415

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # it takes minutes on a CPU
    run = train(*SHORT, "--use_8bit_adam", "--checkpointing_steps=1", "--lr_scheduler=linear")
    assert isinstance(run.run.optimizer.adamw.optimizer, AdamW8bit)
    assert any(isinstance(s["exp_avg"], OptimState8bit) for s in run.run.optimizer.adamw.state.values())
    checkpoint = f"--resume_from_checkpoint={run.output / 'checkpoint-1'}"
    resumed = train(*SHORT, "--use_8bit_adam", "--lr_scheduler=linear", checkpoint, output="resumed")
    assert_same(weights(run.output / "unet"), weights(resumed.output / "unet"))
    assert resumed.logs[2]["train/lr"] == run.logs[2]["train/lr"] == pytest.approx(5e-5)


def test_flag_allow_tf32(train):
    train(*FROZEN)
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        train(*FROZEN, "--allow_tf32", output="tf32")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_flag_gradient_checkpointing(train):
    plain, checkpointed = train(*SHORT), train(*SHORT, "--gradient_checkpointing", output="checkpointed")
    assert not plain.run.unet.is_gradient_checkpointing
    assert checkpointed.run.unet.is_gradient_checkpointing
    assert_same(weights(plain.output / "unet"), weights(checkpointed.output / "unet"))


def test_flag_enable_xformers_memory_efficient_attention(train, monkeypatch):
    """From the first training step on, and not from the first validation."""
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    sys.modules["xformers"].__spec__ = types.SimpleNamespace()
    events = []
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_xformers_memory_efficient_attention", lambda self: events.append("enabled")
    )
    faults.plant(monkeypatch.setattr, after_step=lambda run: events.append("step"))
    train(*FROZEN, "--enable_xformers_memory_efficient_attention")
    assert events == ["enabled", "step"]


# -- checkpoints -----------------------------------------------------------------------------------------------


def saved_steps(run):
    return [int(path.name.split("-")[1]) for path in sd_config.checkpoints(run.output)]


def test_flag_checkpointing_steps(train):
    """Every so many steps, and at the end."""
    assert saved_steps(train(*FROZEN, "--max_train_steps=5", "--checkpointing_steps=2")) == [2, 4, 5]


def test_flag_checkpoints_total_limit(train, monkeypatch):
    """The oldest go, and only once the new one is there."""
    present, original = [], sd_config.discard

    def discard(folder):
        present.append((folder.name, [path.name for path in sd_config.checkpoints(folder.parent)]))
        original(folder)

    flags = ("--max_train_steps=3", "--checkpointing_steps=1", "--checkpoints_total_limit=1")
    monkeypatch.setattr(sd_config, "discard", discard)
    assert saved_steps(train(*FROZEN, *flags)) == [3]
    assert ("checkpoint-1", ["checkpoint-1", "checkpoint-2"]) in present
    assert ("checkpoint-2", ["checkpoint-2", "checkpoint-3"]) in present


def test_flag_overwrite_output_dir(train):
    """What the old run wrote goes (but for its logs), and nothing else."""
    first = train(*FROZEN, "--max_train_steps=2", "--checkpointing_steps=1", "--validation_prompts=a cat")
    (first.output / "notes.txt").write_text("mine")
    second = train(*FROZEN, "--overwrite_output_dir")
    assert saved_steps(second) == [1]
    assert (second.output / "notes.txt").read_text() == "mine"
    assert not (second.output / "samples").exists()


def test_flag_dry_run(train, capsys, tmp_path):
    """Every check and the plan, but no weights are loaded and nothing is written."""
    result = train("--train_batch_size=4", "--max_train_steps=10", "--checkpointing_steps=4", "--dry_run", "--use_ema")
    assert result.run is None
    assert not result.output.exists()
    printed = capsys.readouterr().out
    assert re.search(r"steps +10 \(4 per epoch, 2.5 epochs\)", printed)
    assert re.search(r"checkpoints +3, 3 of them kept: 0.03 GB each, 0.08 GB in all", printed)


# -- validation and logging --------------------------------------------------------------------------------------


def test_flag_validation_prompts(train):
    run = train(*FROZEN, "--validation_prompts", "a cat", "Ein Hut, groß!")
    assert sorted(path.name for path in (run.output / "samples/step-1").iterdir()) == [
        "0-a-cat.png",
        "1-ein-hut-groß.png",
        "grid.png",
    ]


def test_flag_validation_guidance_scale(train):
    pictures = []
    for scale in (7.5, 1):
        run = train(
            *FROZEN, "--validation_prompts=a cat", f"--validation_guidance_scale={scale}", output=f"run-{scale}"
        )
        pictures.append(Image.open(run.output / "samples/step-1/0-a-cat.png").tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("name", ["none", "swanlab", "tensorboard", "wandb"])
def test_flag_report_to(train, monkeypatch, name):
    """Each tracker gets the metrics and the captioned pictures; none gets nothing."""
    if name == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
        monkeypatch.setattr("accelerate.tracking._available_trackers", [accelerate.utils.LoggerType.WANDB])
    run = train(*FROZEN, f"--report_to={name}", "--validation_prompts=a cat")
    found = {path.suffix for path in run.output.rglob("logs/**/*")}
    assert (".swanlab" in found) == (name == "swanlab")
    assert any(path.name.startswith("events.out") for path in run.output.rglob("*")) == (name == "tensorboard")
    assert [tracker.name for tracker in run.run.accelerator.trackers] == ([] if name == "none" else [name])
    if name == "wandb":
        assert sys.modules["wandb"].started == {
            "project": "SD-Naruto",
            "name": "SD1-5_火影忍者",
            "dir": str(run.output / "logs"),
        }
        logged = run.run.accelerator.trackers[0].run.logged
        assert logged[0][0]["train/loss"] > 0
        assert logged[-1] == ({"validation": [("image", "a cat")]}, 1)


def fake_wandb():
    """As much of wandb as is called: an installed one would want an account, or a server."""
    module, run = types.ModuleType("wandb"), types.SimpleNamespace(logged=[], finish=lambda: None)
    module.__spec__ = types.SimpleNamespace()
    run.log = lambda values, step=None, **kwargs: run.logged.append((values, step))
    module.init = lambda **kwargs: vars(module).update(started=kwargs) or run
    module.config = types.SimpleNamespace(update=lambda *args, **kwargs: None)
    module.Image = lambda image, caption: ("image", caption)
    return module


def test_flag_tracker_project_name(train):
    run = train(*FROZEN, "--report_to=tensorboard", "--tracker_project_name=other")
    assert (run.output / "logs/other").is_dir()


@pytest.mark.parametrize(("tracker", "file"), [("swanlab", "run-*/*.swanlab"), ("tensorboard", "SD-Naruto/events.*")])
def test_flag_logging_dir(train, tracker, file):
    run = train(*FROZEN, f"--report_to={tracker}", "--logging_dir=journal/new")
    assert list(run.output.glob(f"journal/new/{file}"))
    assert not (run.output / "logs").exists()


def test_flag_skip_bad_rows(train, assets, tmp_path, capsys):
    """A picture that cannot be decoded is left out before training, instead of stopping it."""
    photos = shutil.copytree(assets[1], tmp_path / "photos")
    broken = json.loads((photos / "metadata.jsonl").read_text().splitlines()[3])["file_name"]
    (photos / broken).write_bytes((photos / broken).read_bytes()[:400])
    run = train(*FROZEN, "--skip_bad_rows", "--validation_prompts", data=photos)
    assert re.search(rf"note: left out row 3 \(\S*{broken}\): \w+Error", capsys.readouterr().out)
    assert run.run.stream.rows.kept == [0, 1, 2, *range(4, 14)]
    subset = train(*FROZEN, "--max_train_samples=12", output="whole").run.stream.rows.kept
    assert subset != list(range(12))
    run = train(*FROZEN, "--max_train_samples=12", "--skip_bad_rows", data=photos, output="subset")
    assert [number for number in subset if number != 3] == run.run.stream.rows.kept[: 12 - (3 in subset)]


def test_flag_cache_latents(train, assets, tmp_path, monkeypatch):
    """`auto` encodes once where that changes nothing and pays."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**12))
    long = ("--center_crop", "--train_batch_size=14", "--max_train_steps=2")
    for flags, kept in (
        (("--cache_latents=on", "--center_crop"), True),
        ((*long, "--cache_latents=off"), False),
        (long, True),
        ((*long, "--max_train_steps=1"), False),
        ((*long, "--random_flip"), False),
        (long[1:], False),
    ):
        run = train(*SHORT, *flags, output=f"run-{len(list(tmp_path.iterdir()))}")
        assert bool(run.run.stream.encoded) == kept
        assert len(list(run.output.glob("encoded-*/*.arrow"))) == 2 * kept
    needed = 2 * run.run.plan.checkpoint_bytes + run.run.plan.export_bytes + run.run.plan.encoded_bytes
    for free, kept in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        assert bool(train(*SHORT, *long, output=f"disk-{free}").run.stream.encoded) == kept


def test_flag_torch_compile(train, monkeypatch):
    """The UNet, whole; what it then trains is compared in test_compile.py."""
    compiled = []

    def compile_network(network, **options):
        compiled.append((network, options))
        return network

    monkeypatch.setattr(torch, "compile", compile_network)
    train(*SHORT)
    assert compiled == []
    run = train(*SHORT, "--torch_compile", output="compiled")
    assert compiled == [(run.run.unet, {"fullgraph": True, "dynamic": False})]
