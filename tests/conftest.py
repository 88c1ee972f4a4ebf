"""What the tests share: a tiny model and data set, and runs of the trainer in this process."""

import collections
import contextlib
import importlib
import os
import sys
import tempfile
from pathlib import Path

# Before any library reads them: no network, no account, no cache but our own, and one thread, which for a tiny model
# is the fastest.
HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HF_HOME.name, "SWANLAB_MODE": "offline", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/demo")]

import sd_config

with contextlib.redirect_stdout(None):  # pytest would print after its closing line what is said while it imports this
    sd_config.announce_imports()

import accelerate
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import infer
import tiny_sd15

trainer = importlib.import_module("train_sd1-5_naruto")
del os.environ["DIFFUSERS_VERBOSITY"]  # scripts that tests start see to that themselves
# The flags of the tutorial, as it writes them.
TUTORIAL = """
  --use_ema \
  --resolution=512 --center_crop --random_flip \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --gradient_checkpointing \
  --max_train_steps=15000 \
  --learning_rate=1e-05 \
  --max_grad_norm=1 \
  --seed=42 \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --output_dir="sd-naruto-model"
"""
Result = collections.namedtuple("Result", "output logs run")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="kills of the crash test; its long form has 100")


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """The folders of the tiny model and of the photographs."""
    return tiny_sd15.build(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def train(assets, tmp_path, monkeypatch):
    """A function that runs the trainer in this process.

    It returns the output folder, what was logged (by step), and the trainer's `Run`.
    """

    def run(*flags, output="run", model=assets[0], data=assets[1], seed=7):
        logs = collections.defaultdict(dict)

        def record(self, values, step=None, **kwargs):
            logs[step].update(values)
            for tracker in self.trackers:
                tracker.log(values, step=step)

        runs, original = [], trainer.Run
        monkeypatch.setattr(trainer, "Run", lambda *args: runs.append(original(*args)) or runs[-1])
        monkeypatch.setattr(accelerate.Accelerator, "log", record)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        argv = [
            f"--pretrained_model_name_or_path={model}",
            *([f"--train_data_dir={data}"] if data else []),
            f"--output_dir={tmp_path / output}",
            *([] if seed is None else [f"--seed={seed}"]),
            *("--resolution=64", "--report_to=none", "--lr_warmup_steps=0", "--validation_prompts"),
            *map(str, flags),  # of a flag given twice the last one counts
        ]
        trainer.main(sd_config.parse_args(argv))
        monkeypatch.setattr(trainer, "Run", original)
        return Result(tmp_path / output, dict(logs), runs[0] if runs else None)

    return run


def weights(folder, name="diffusion_pytorch_model.safetensors"):
    """The tensors of a safetensors file in `folder`."""
    return safetensors.torch.load_file(Path(folder) / name)


def difference(one, other, start):
    """L2 distance of two trained sets of weights, over the length of the way that training has moved the second."""
    gap = sum((one[name].double() - other[name].double()).square().sum() for name in start)
    way = sum((other[name].double() - start[name].double()).square().sum() for name in start)
    assert way > 0
    return (gap / way).sqrt().item()


def assert_same(one, other):
    """Two dictionaries of tensors agree bit by bit."""
    assert one.keys() == other.keys()
    for name in one:
        values = [tensor.dequantize() if hasattr(tensor, "codes") else tensor for tensor in (one[name], other[name])]
        assert torch.equal(*values), name


def assert_same_state(one, other):
    """Two checkpoint folders hold the same weights, average, moments and counters, bit by bit."""
    for part in ("unet", "unet_ema"):
        assert (one / part).exists() == (other / part).exists()
        if (one / part).exists():
            assert_same(weights(one / part), weights(other / part))
    moments = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for index in moments[0]:
        assert_same(moments[0][index], moments[1][index])
    states = [sd_config.read_state(folder) for folder in (one, other)]
    for name in ("step", "seed", "ema_step", "loss"):
        assert getattr(states[0], name) == getattr(states[1], name)


def samples(output):
    """The validation pictures of an output folder by their names: pixels, and text but for the command."""
    images = {file.relative_to(output).as_posix(): Image.open(file) for file in output.glob("samples/*/*")}
    return {
        name: (image.tobytes(), {key: value for key, value in infer.settings_of(image).items() if key != "command"})
        for name, image in images.items()
    }


def litter(output):
    """The hidden names in an output folder: what a run has not finished writing, or deleting."""
    return sorted(path.name for path in output.iterdir() if path.name.startswith(".") and path.name != ".lock")


def learned(result, *names):
    """What a run logged of loss, rate and gradient norm, by step (its speed is never twice the same)."""
    names = names or ("train/loss", "train/lr", "train/grad_norm", "train/epoch")
    return {step: {name: values[name] for name in names} for step, values in result.logs.items() if names[0] in values}
