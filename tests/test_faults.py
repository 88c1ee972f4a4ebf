"""What happens to a run when something happens to it: signals, exceptions, trackers that fail, numbers that are none.

Whatever it is, the run that goes on from what was saved must become the run to which nothing happened, bit by bit.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import accelerate
import pytest
import swanlab
import torch
from accelerate.tracking import SwanLabTracker, TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import faults
import infer
import sd_config
from conftest import ROOT, assert_same, assert_same_state, difference, litter, samples, trainer, weights
from test_run import PROMPTS, files, read_swanlab

# Six steps of two samples in three micro-batches; an epoch, and so a validation, every three. The rate moves, and the
# samples are random, so that a run which goes on at a wrong step cannot go unnoticed.
FLAGS = (
    "--seed=7",
    "--resolution=64",
    "--train_batch_size=2",
    "--gradient_accumulation_steps=3",
    "--max_train_steps=6",
    "--checkpointing_steps=2",
    "--use_ema",
    "--snr_gamma=5",
    "--random_flip",
    "--caption_dropout=0.3",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=2",
    "--report_to=none",
    "--validation_epochs=1",
    "--validation_prompts",
)
LATEST = "--resume_from_checkpoint=latest"


@pytest.fixture(scope="module")
def once():
    """What is computed once for all tests of this file, by its name."""
    return {}


@pytest.fixture(autouse=True)
def sketches():
    """Validation pictures of three denoising steps: what they show does not matter here."""
    with pytest.MonkeyPatch.context() as patch:  # `stopped` undoes the other one
        patch.setattr(trainer, "DENOISING_STEPS", 3)
        yield


@pytest.fixture
def whole(train, once, tmp_path_factory):
    """The run to which nothing happened, with a checkpoint of every step and its validations."""
    if "whole" not in once:
        once["whole"] = train(*FLAGS, *PROMPTS, "--checkpointing_steps=1", output=tmp_path_factory.mktemp("whole"))
    return once["whole"]


@pytest.fixture
def stopped(train, monkeypatch, capfd):
    """A function that runs until something stops it, and returns the exit code and what was printed.

    What the test had broken is whole again afterwards.
    """

    def run(*flags, **options):
        with pytest.raises(SystemExit) as end:
            train(*FLAGS, *flags, **options)
        monkeypatch.undo()
        return end.value.code, "".join(capfd.readouterr())

    return run


@pytest.fixture
def finish(train, whole):
    """A function that goes on with a run from its last checkpoint, which must lead where the whole run went."""

    def run(*flags, after=None, **options):
        result = train(*FLAGS, *flags, LATEST, **options)
        assert after is None or min(result.logs) == after + 1
        assert_same_state(whole.output / "checkpoint-6", result.output / "checkpoint-6")
        assert_same(weights(whole.output / "unet"), weights(result.output / "unet"))
        assert not litter(result.output)
        return result

    return run


def plant(monkeypatch, step, fault):
    """Call `fault` in the middle of a step: before the second of its micro-batches."""
    calls = []

    def before_micro_batch(run, _micro_batch):
        calls.append(run.step)
        if run.step == step - 1 and calls.count(run.step) == 2:
            fault()

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)


def failing(error, after=0):
    """A function that does what `error` says: raise it, from a given call on."""
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise error

    return fail


def send(*numbers):
    """A function that sends this process signals."""

    def fault():
        for number in numbers:
            os.kill(os.getpid(), number)

    return fault


def steps(folder):
    """The steps of the checkpoints in an output folder, all of which must be whole."""
    found = sd_config.checkpoints(folder)
    assert [sd_config.find_damage(path) for path in found] == [None] * len(found)
    return [sd_config.step_of(path) for path in found]


def saved(output, whole):
    """The steps of the checkpoints in an output folder, all of which must be those of the whole run."""
    for step in steps(output):
        assert_same_state(output / f"checkpoint-{step}", whole.output / f"checkpoint-{step}")
    return steps(output)


def explains(printed, output, step):
    """What was printed names the checkpoint to go on from, and how."""
    assert str(output / f"checkpoint-{step}") in printed
    assert "--resume_from_checkpoint latest" in printed


def logged(output):
    """The losses that TensorBoard has, by step."""
    found = {}
    for folder in {path.parent for path in output.rglob("events.*")}:
        events = EventAccumulator(str(folder)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    return found


# -- signals and exceptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "fault", "code", "state"),
    [
        (3, send(signal.SIGTERM, signal.SIGTERM), 143, "aborted"),  # a launcher passes on what its processes get, too
        (3, send(signal.SIGINT), 130, "aborted"),
        (4, failing(torch.OutOfMemoryError("unexpected")), 1, "crashed"),
    ],
    ids=["SIGTERM", "SIGINT", "error"],
)
def test_a_signal_and_an_error_leave_the_last_whole_step(
    whole, stopped, monkeypatch, tmp_path, step, fault, code, state
):
    """A signal lets the step be finished. SwanLab is told how the run ended."""
    told, original = [], trainer.Tracker.attempt

    def attempt(tracker, send, *args, **kwargs):
        told.append(kwargs)
        original(tracker, send, *args, **kwargs)

    monkeypatch.setattr(trainer.Tracker, "attempt", attempt)
    plant(monkeypatch, step, fault)
    ended, printed = stopped("--report_to=swanlab")
    assert ended == code
    assert ("Traceback" in printed) == ("unexpected" in printed) == (code == 1)
    explains(printed, tmp_path / "run", 3)
    assert saved(tmp_path / "run", whole) == [2, 3]
    assert told[-1]["state"] == state


def test_a_signal_cuts_a_validation_short_which_is_then_made_up_for(whole, stopped, finish, monkeypatch, tmp_path):
    """After an epoch; at the end; and in a resumed run, which has nothing else to do and must not go on to the export.

    Each validation has two pictures.
    """
    original, run = infer.sample, tmp_path / "run"
    for step, last, flags in ((3, 1, ()), (6, 3, (LATEST,)), (6, 1, (LATEST,))):
        drawn = []

        def sample(*args, drawn=drawn, last=last, **kwargs):
            drawn.append(original(*args, **kwargs))
            if len(drawn) == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return drawn[-1]

        monkeypatch.setattr(infer, "sample", sample)
        assert stopped(*PROMPTS, *flags)[0] == 143
        assert len(drawn) == last
        assert saved(run, whole)[-1] == step
        assert not (run / f"samples/step-{step}").exists()
        assert not (run / "model_index.json").exists()
    finish(*PROMPTS)
    assert samples(run) == samples(whole.output)
    for step in (3, 6):  # the checkpoints that the signals left hold the weights that drew them
        picture = Image.open(run / f"samples/step-{step}/0-a-cat.png")
        assert f"run/checkpoint-{step} " in infer.settings_of(picture)["command"]


def test_a_signal_during_a_save_saves_once(whole, stopped, monkeypatch, tmp_path):
    sealed = []

    def signal_each_time(folder):
        sealed.append(folder.name)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "free_memory", lambda: 0)  # too little to go on meanwhile
    faults.plant(monkeypatch.setattr, while_saving=signal_each_time)
    assert stopped()[0] == 143
    assert sealed == [".checkpoint-2"]
    assert saved(tmp_path / "run", whole) == [2]


def test_a_signal_after_an_error_leaves_the_save_alone(whole, stopped, monkeypatch, tmp_path):
    """A launcher sends one to all processes when one has failed, and the others end with an error of their own."""
    explained, original, ended = threading.Event(), trainer.explain, []

    def explain(*args):
        original(*args)
        explained.set()

    def signal_later(_folder):
        assert explained.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        monkeypatch.setattr(trainer, "explain", explain)
        plant(monkeypatch, 3, failing(RuntimeError("planted")))
        faults.plant(monkeypatch.setattr, while_saving=signal_later)
        assert stopped()[0] == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended
    assert saved(tmp_path / "run", whole) == [2]


def in_worker(monkeypatch):
    """A fault: an error that is not a picture's, in a sample of step 4."""
    original = trainer.SampleStream.__getitem__

    def getitem(stream, position):
        if position == 3 * 6 + 2:
            raise ValueError("unexpected")
        return original(stream, position)

    monkeypatch.setattr(trainer.SampleStream, "__getitem__", getitem)


def in_validation(monkeypatch):
    """A fault: an error while the averaged weights are the network's, after step 3."""
    monkeypatch.setattr(infer, "sample", failing(RuntimeError("unexpected")))


@pytest.mark.parametrize(("fault", "flags"), [(in_worker, ("--dataloader_num_workers=1",)), (in_validation, PROMPTS)])
def test_an_error_beside_the_steps_saves_the_last_one(whole, stopped, finish, monkeypatch, tmp_path, fault, flags):
    fault(monkeypatch)
    code, printed = stopped("--report_to=tensorboard", *flags)
    assert code == 1
    assert "unexpected" in printed
    explains(printed, tmp_path / "run", 3)
    assert saved(tmp_path / "run", whole) == [2, 3]
    assert list(logged(tmp_path / "run")) == [1, 2, 3]
    finish("--report_to=tensorboard", *flags, after=3)
    losses = {step: pytest.approx(values["train/loss"]) for step, values in whole.logs.items()}
    assert logged(tmp_path / "run") == losses


def test_a_worker_that_is_killed(whole, stopped, monkeypatch, tmp_path):
    """As a system that runs out of memory does. When the run notices is not certain: it may be in any step."""
    original = trainer.SampleStream.__getitem__

    def getitem(stream, position):
        if position == 4 * 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(stream, position)

    monkeypatch.setattr(trainer.SampleStream, "__getitem__", getitem)
    code, printed = stopped("--dataloader_num_workers=1", "--checkpointing_steps=1")
    assert code == 1
    last = saved(tmp_path / "run", whole)[-1]
    assert last <= 4
    explains(printed, tmp_path / "run", last)


@pytest.mark.parametrize(("owner", "name"), [(torch.optim.AdamW, "step"), (trainer.Average, "update")])
def test_an_error_amid_the_optimizer_step_saves_nothing(whole, stopped, monkeypatch, tmp_path, owner, name):
    """What is in memory then belongs to no step: some weights, moments or averages have moved, others have not."""
    original, fail = getattr(owner, name), failing(RuntimeError("unexpected"), after=3)

    def step(*args, **kwargs):
        original(*args, **kwargs)
        fail()

    monkeypatch.setattr(owner, name, step)
    code, printed = stopped("--report_to=tensorboard")
    assert code == 1
    assert "unexpected" in printed
    explains(printed, tmp_path / "run", 2)
    assert saved(tmp_path / "run", whole) == [2]
    assert list(logged(tmp_path / "run")) == [1, 2, 3]


# -- trackers ------------------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_does_not_stop_the_training(whole, train, monkeypatch, capfd):
    """It misses two steps, all pictures and its own end, and the run says so once."""
    original, calls = TensorBoardTracker.log, []

    def log(*args, **kwargs):
        calls.append(args)
        if len(calls) in (3, 4):
            raise ConnectionError("unexpected")
        return original(*args, **kwargs)

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    for name in ("log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, failing(ConnectionError("unexpected")))
    run = train(*FLAGS, *PROMPTS, "--report_to=tensorboard")
    printed = "".join(capfd.readouterr())
    assert printed.count("warning: ") == printed.count("unexpected") == 1
    assert set(logged(run.output)) == {1, 2, 5, 6}
    assert saved(run.output, whole) == [2, 4, 6]
    assert files(run.output / "samples") == files(whole.output / "samples")


@pytest.mark.parametrize(("tracker", "warnings"), [(TensorBoardTracker, 1), (SwanLabTracker, 2)])
def test_a_tracker_that_cannot_start_does_not_stop_the_training(train, monkeypatch, capfd, tracker, warnings):
    """Of SwanLab, an offline run is tried as well."""
    monkeypatch.setattr(tracker, "start", failing(ConnectionError("unexpected")))
    run = train(*FLAGS, f"--report_to={tracker.name}", "--max_train_steps=2")
    printed = "".join(capfd.readouterr())
    assert printed.count("warning: ") == printed.count("unexpected") == warnings
    assert not logged(run.output)
    assert steps(run.output) == [2]


def test_swanlab_goes_on_offline_where_its_server_does_not_answer(train, monkeypatch, capfd):
    monkeypatch.delenv("SWANLAB_MODE")
    monkeypatch.setenv("SWANLAB_API_KEY", "key")
    original, calls = swanlab.init, []

    def init(*args, **kwargs):
        calls.append(kwargs.get("mode"))
        if kwargs.get("mode") != "offline":
            raise ConnectionError("unexpected")
        return original(*args, **kwargs)

    monkeypatch.setattr(swanlab, "init", init)
    run = train(*FLAGS, "--report_to=swanlab", "--max_train_steps=2")
    printed = "".join(capfd.readouterr())
    assert printed.count("warning: ") == 1
    assert "swanlab sync" in printed
    assert calls == [None, "offline"]
    (folder,) = (run.output / "logs").glob("run-*")
    losses = {step: pytest.approx(values["train/loss"]) for step, values in run.logs.items()}
    assert read_swanlab(folder)[0]["train/loss"] == losses


# -- numbers that are none -----------------------------------------------------------------------------------------

SHORT = ("--train_batch_size=2", "--gradient_accumulation_steps=1", "--max_train_steps=12")
EIGHT_BITS = ("--use_8bit_adam", "--max_train_steps=5")


def poison(run, micro_batch):
    """Make the loss NaN."""
    micro_batch["noise"].fill_(math.nan)


def poison_gradient(run, micro_batch):
    """Make one number of one gradient NaN; the loss stays what it is."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[0] = math.nan
        return gradient

    run.unet.conv_out.bias.register_hook(spoil)


@pytest.mark.parametrize(
    ("step", "every", "saved", "how", "flags"),
    [
        (1, 10, [], poison, ()),
        (7, 10, [4], poison_gradient, ()),
        (9, 10, [4, 8], poison, ()),
        (6, 1000, [], poison, ("--checkpointing_steps=100",)),
        (1, 1000, [], poison, (*EIGHT_BITS, "--checkpointing_steps=100")),
        (3, 3, [1, 2], poison_gradient, (*EIGHT_BITS, "--checkpointing_steps=1")),
    ],
)
def test_numbers_that_are_none_never_reach_the_weights(stopped, monkeypatch, tmp_path, step, every, saved, how, flags):
    """From the step on, until the host notices, all that the optimizer does must do nothing.

    It notices when it reads the metrics, `every` so many steps, before it saves, and at the end.
    """
    runs, states, timesteps = [], [], []

    def before_micro_batch(run, micro_batch):
        if run.step >= step - 1:
            runs.append(run)
            states.append([parameter.detach().clone() for parameter in run.unet.parameters()])
        if run.step == step - 1:
            timesteps.extend(micro_batch["timesteps"].tolist())
            how(run, micro_batch)

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    monkeypatch.setattr(trainer, "LOG_EVERY", every)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # which torchao would do, for minutes
    code, printed = stopped(*SHORT, "--checkpointing_steps=4", "--lr_warmup_steps=0", *flags)
    assert code == 1
    assert "Traceback" not in printed
    assert f"error: step {step}: " in printed
    stream = runs[0].stream
    for position, timestep in zip(range(2 * step - 2, 2 * step), timesteps, strict=True):
        assert f"{stream.rows.kept[stream.index(position)]} ({timestep})" in printed
    for state in (*states, list(runs[0].unet.parameters())):
        assert all(map(torch.equal, states[0], state))
    assert steps(tmp_path / "run") == saved
    if saved:
        explains(printed, tmp_path / "run", saved[-1])
    if step - 1 in saved:
        assert_same(weights(tmp_path / f"run/checkpoint-{step - 1}/unet"), runs[0].unet.state_dict())
    assert not (tmp_path / "run/model_index.json").exists()


@pytest.mark.parametrize("fault", [send(signal.SIGTERM), failing(RuntimeError("unexpected"))], ids=["signal", "error"])
def test_what_comes_after_a_number_that_is_none_is_not_saved(stopped, monkeypatch, tmp_path, fault):
    """Neither by a signal nor by an error that comes before the host has noticed."""
    plant(monkeypatch, 4, fault)

    def before_micro_batch(run, micro_batch):
        if run.step == 2:
            poison(run, micro_batch)

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    code, printed = stopped("--checkpointing_steps=100", "--report_to=tensorboard")
    assert code == 1
    assert "error: step 3: " in printed
    assert not steps(tmp_path / "run")
    assert list(logged(tmp_path / "run"))[:2] == [1, 2]


def test_steps_that_overflow_whatever_the_loss_scale_stop_the_run(stopped, monkeypatch, tmp_path):
    """fp16's scaler, on the CPU: five steps that overflow bring its scale from 1024 to 32."""
    build, starts = trainer.Run, []

    def before_micro_batch(run, micro_batch):
        if run.step == 4:
            starts.append({name: value.clone() for name, value in run.unet.state_dict().items()})
        if run.step + 1 in (2, 3, 5, 6, 7):
            micro_batch["noise"].fill_(math.inf)

    def with_scaler(*args):
        run = build(*args)
        adamw = run.optimizer.adamw
        run.accelerator.scaler = adamw.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        adamw.__setstate__({})  # as accelerate does for an optimizer with a scaler
        adamw.optimizer.__dict__.pop("found_inf", None)  # the scaler has its own
        monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *args: torch.tensor(1.0))
        return run

    monkeypatch.setattr(trainer, "LEAST_LOSS_SCALE", 50)
    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    monkeypatch.setattr(trainer, "Run", with_scaler)
    code, printed = stopped(*SHORT, "--checkpointing_steps=100")
    assert code == 1
    assert "Traceback" not in printed
    assert "even at a loss scale of 3e+01" in printed
    assert steps(tmp_path / "run") == [7]
    explains(printed, tmp_path / "run", 7)
    assert_same(starts[0], weights(tmp_path / "run/checkpoint-7/unet"))


# -- several processes ---------------------------------------------------------------------------------------------

FAULTY = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import faults
calls = []

def in_step(run, micro_batch):
    calls.append(run.step)
    if run.accelerator.process_index == 1 and run.step == STEP - 1 and calls.count(run.step) == 2:
        FAULT

faults.plant(before_micro_batch=in_step)
faults.trainer.main(faults.trainer.sd_config.parse_args())
"""


@pytest.fixture
def launch(assets, tmp_path):
    """A function that trains in two processes, and returns the exit code and what was printed.

    Python code stands for a fault: within a step of the second process.
    """

    def run(*flags, step, fault):
        script = tmp_path / "faulty.py"
        script.write_text(FAULTY.replace("STEP", str(step)).replace("FAULT", fault))
        folders = {"pretrained_model_name_or_path": assets[0], "train_data_dir": assets[1]}
        paths = [f"--{flag}={folder}" for flag, folder in (folders | {"output_dir": tmp_path / "run"}).items()]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
        process = subprocess.Popen(
            [*launcher, *paths, *FLAGS, "--train_batch_size=1", *flags],
            cwd=tmp_path,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # with a process group of its own
        )
        try:
            # Waits for whoever holds the pipe: a process left over would be noticed.
            printed = process.communicate(timeout=240)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(process.communicate()[0])
        return process.returncode, printed

    return run


def test_two_processes_stop_together_and_take_over_from_each_other_and_from_one(whole, launch, train, assets, tmp_path):
    """Two go on after one's step 2 until a signal, again after 3 until an error, and then one goes on after their 5."""
    run, begin = tmp_path / "run", weights(assets[0] / "unet")
    first = f"--resume_from_checkpoint={whole.output / 'checkpoint-2'}"
    code, printed = launch(first, "--checkpointing_steps=3", step=4, fault="os.kill(os.getpid(), signal.SIGTERM)")
    assert code != 0  # the launcher's own
    assert re.search(r"exitcode *: 143", printed), printed
    assert steps(run) == [3, 4]

    signalled = (run / "checkpoint-4").rename(tmp_path / "signalled")
    code, printed = launch(LATEST, "--checkpointing_steps=1", step=6, fault="raise RuntimeError('unexpected')")
    assert code != 0  # though the other process waits for that one: `launch` does not wait for ever
    assert "RuntimeError: unexpected" in printed
    explains(printed, run, 5)
    assert steps(run) == [3, 4, 5]
    assert_same_state(signalled, run / "checkpoint-4")

    assert list(train(*FLAGS, LATEST).logs) == [6]
    for step in (5, 6):
        for part in ("unet", "unet_ema"):
            one, other = (weights(output / f"checkpoint-{step}" / part) for output in (run, whole.output))
            assert difference(one, other, begin) <= 1e-4


def test_a_launch_that_accelerate_does_not_see_is_refused(stopped, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = stopped()
    assert code == 2
    assert "WORLD_SIZE 2: " in printed


# -- the data ------------------------------------------------------------------------------------------------------


def test_other_pictures_are_another_run(whole, stopped, train, assets, tmp_path):
    """One byte is enough, where neither the captions nor what is seen have changed; another place is not."""
    moved = shutil.copytree(assets[1], tmp_path / "moved")
    checkpoint = f"--resume_from_checkpoint={whole.output / 'checkpoint-5'}"
    train(*FLAGS, checkpoint, "--dry_run", data=moved)
    content = bytearray((moved / "coffee.png").read_bytes())
    content[-1] ^= 1  # of a checksum
    (moved / "coffee.png").write_bytes(content)
    code, printed = stopped(checkpoint, data=moved, output="other")
    assert code == 2
    assert "fingerprint of the data set" in printed
    assert not (tmp_path / "other").exists()
