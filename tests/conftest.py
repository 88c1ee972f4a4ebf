"""What the tests share: a tiny model and data set, and runs of the trainer in this process."""

import collections
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Set before any library reads them: no network, no account, no cache but our own, and a single thread, because a tiny
# model is trained fastest by one.
HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HF_HOME.name, "SWANLAB_MODE": "offline", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/demo")]

import sd_config

with contextlib.redirect_stdout(None):  # otherwise pytest prints below its summary what this says
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
del os.environ["DIFFUSERS_VERBOSITY"]  # the scripts that tests start set it themselves
# Two denoising steps are enough for validation pictures of which it does not matter what they show.
DENOISING_STEPS, sd_config.DENOISING_STEPS = sd_config.DENOISING_STEPS, 2
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
    """The folders of the tiny model and of the photographs. The vocabulary is small, because each run reads it."""
    return tiny_sd15.build(tmp_path_factory.mktemp("assets"), merges=1000)


def command_line(assets, output, *flags, seed=7):
    """The arguments of a run on a model and a data set. Of a flag that is given twice, the last counts."""
    model, data = assets
    named = {"pretrained_model_name_or_path": model, "train_data_dir": data, "output_dir": output, "seed": seed}
    given = [f"--{name}={value}" for name, value in named.items() if value is not None]
    shared = ("--resolution=64", "--report_to=none", "--lr_warmup_steps=0", "--validation_prompts")
    return [*given, *shared, *map(str, flags)]


@pytest.fixture
def train(assets, tmp_path, monkeypatch):
    """A function that runs the trainer in this process, with the flags given in addition to those of `command_line`.

    It returns the output folder, what was logged (by step), and the trainer's `Run`. A data set that the flags name
    needs `data=None`.
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
        trainer.main(sd_config.parse_args(command_line((model, data), tmp_path / output, *flags, seed=seed)))
        monkeypatch.setattr(trainer, "Run", original)
        return Result(tmp_path / output, dict(logs), runs[0] if runs else None)

    return run


@pytest.fixture(scope="module")
def kept_runs():
    """The runs that `train_once` has made for the tests of a file, by their arguments."""
    return {}


@pytest.fixture
def train_once(train, kept_runs, tmp_path_factory):
    """Like `train`, but all tests of a file share one run with the same arguments, and must leave it as it is."""

    def run(*flags, **options):
        key = (*flags, *options.items())
        if key not in kept_runs:
            kept_runs[key] = train(*flags, output=tmp_path_factory.mktemp("shared"), **options)
        return kept_runs[key]

    return run


@pytest.fixture
def uncompiled(monkeypatch):
    """`torch.compile` changes nothing: torchao would have its AdamW compiled, which takes long on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def start(*command, folder, processes=1, fails=False):
    """Run Python with a `command` in `folder`, or in several `processes` on CPUs, and return what it prints.

    The exit code must be 0, or not if it `fails`. This waits until nobody holds the output any more, so that a process
    left over is noticed.
    """
    launcher, environment = [], {}
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # which makes it the leader of a process group
    )
    try:
        printed = process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(process.communicate()[0])
    assert (process.returncode != 0) == fails, printed
    return printed


def only(items):
    """The item of a list that must have exactly one."""
    assert len(items) == 1, items
    return items[0]


def assert_says(message, says):
    """A message begins with what stands before the first " … " of `says`, and contains the other parts."""
    start, *rest = says.split(" … ")
    assert message.startswith(start), message
    assert all(part in message for part in rest), message


def weights(folder, name="diffusion_pytorch_model.safetensors"):
    """The tensors of a safetensors file in `folder`."""
    return safetensors.torch.load_file(Path(folder) / name)


def difference(one, other, start):
    """The L2 distance of two sets of trained weights, relative to how far training has moved the second one."""
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
    """The validation pictures of an output folder by their names: their pixels, and their text without the command."""
    images = {file.relative_to(output).as_posix(): Image.open(file) for file in output.glob("samples/step-[0-9]*/*")}
    return {
        name: (image.tobytes(), {key: value for key, value in infer.settings_of(image).items() if key != "command"})
        for name, image in images.items()
    }


def steps(output, *, check=True):
    """The steps of the checkpoints in an output folder, ascending. With `check`, all of them must be whole."""
    found = sd_config.checkpoints(output)
    if check:
        assert [sd_config.find_damage(folder) for folder in found] == [None] * len(found)
    return [sd_config.step_of(folder) for folder in found]


def files(folder):
    """The names of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def make_file(folder, name):
    """Put somebody's file into a folder, which a run has nothing to do with, unless there is a folder of that name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        path.write_text("mine", encoding="utf-8")
    return path


def litter(output):
    """What a run has not finished writing, or deleting, in an output folder."""
    return sorted({path.name for path in (output / sd_config.OWN).glob("*")} - {sd_config.LOCK, sd_config.MANIFEST})


def learned(result, *names):
    """What a run logged by step, without its speed, which is never the same twice."""
    names = names or ("train/loss", "train/lr", "train/grad_norm", "train/epoch")
    return {step: {name: values[name] for name in names} for step, values in result.logs.items() if names[0] in values}
