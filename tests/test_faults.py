"""What a run does about signals, exceptions, trackers that fail, and numbers that are not finite.

Whatever stopped a run, the one that goes on from what was saved must end as if nothing had happened, bit by bit.
"""

import itertools
import math
import os
import re
import shutil
import signal
import threading

import pytest
import torch
from accelerate.tracking import SwanLabTracker, TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import faults
import infer
from conftest import (
    ROOT,
    assert_same,
    assert_same_state,
    command_line,
    difference,
    files,
    litter,
    samples,
    start,
    steps,
    trainer,
    weights,
)
from test_run import PROMPTS

# Six steps of three micro-batches of two samples; an epoch, and with it a validation, is three steps. The rate moves
# and the samples are random, so that a run that goes on at a wrong step differs.
FLAGS = (
    *("--train_batch_size=2", "--gradient_accumulation_steps=3", "--max_train_steps=6", "--checkpointing_steps=2"),
    *("--random_flip", "--caption_dropout=0.3", "--lr_scheduler=cosine", "--lr_warmup_steps=2"),
    *("--use_ema", "--snr_gamma=5", "--validation_epochs=1"),
)
LATEST = "--resume_from_checkpoint=latest"


@pytest.fixture
def whole(train_once):
    """A run to which nothing happens, with a checkpoint after every step, and validations."""
    return train_once(*FLAGS, *PROMPTS, "--checkpointing_steps=1")


@pytest.fixture
def stopped(train, monkeypatch, capfd):
    """A function that trains until something stops the run, and returns the exit code and what was printed.

    Afterwards the faults that the test has planted are gone.
    """

    def run(*flags, **options):
        with pytest.raises(SystemExit) as end:
            train(*FLAGS, *flags, **options)
        monkeypatch.undo()
        return end.value.code, "".join(capfd.readouterr())

    return run


@pytest.fixture
def finish(train, whole):
    """A function that resumes a run from its last checkpoint, and compares its end with that of `whole`."""

    def run(*flags, after=None, **options):
        result = train(*FLAGS, *flags, LATEST, **options)
        assert after is None or min(result.logs) == after + 1
        assert_same_state(whole.output / "checkpoint-6", result.output / "checkpoint-6")
        assert_same(weights(whole.output / "unet"), weights(result.output / "unet"))
        assert not litter(result.output)
        return result

    return run


def failing(error, after=0):
    """A function that returns None for the first `after` calls, and raises `error` from then on."""
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


def saved(output, whole):
    """The steps of the checkpoints in an output folder, each of which must be the same as that of the whole run."""
    for step in steps(output):
        assert_same_state(output / f"checkpoint-{step}", whole.output / f"checkpoint-{step}")
    return steps(output)


def explains(printed, output, step):
    """Assert that what was printed names the checkpoint to go on from, and the flag that does so."""
    assert str(output / f"checkpoint-{step}") in printed
    assert "--resume_from_checkpoint latest" in printed


def logged(output, name="train/loss"):
    """The values of a metric that TensorBoard has, by step."""
    found = {}
    for folder in {path.parent for path in output.rglob("events.*")}:
        events = EventAccumulator(str(folder)).Reload()
        if name in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(name)}
    return found


# -- signals and exceptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "fault", "code", "state"),
    [
        (3, send(signal.SIGTERM, signal.SIGTERM), 143, "aborted"),  # from a launcher and from whoever stopped it
        (3, send(signal.SIGINT), 130, "aborted"),
        (4, failing(torch.OutOfMemoryError("unexpected")), 1, "crashed"),
    ],
    ids=["SIGTERM", "SIGINT", "error"],
)
def test_a_signal_and_an_error_leave_the_last_whole_step(
    whole, stopped, monkeypatch, tmp_path, step, fault, code, state
):
    """After a signal the step is finished, and after an error it is given up. SwanLab is told how the run ended."""
    told, original = [], trainer.Tracker.attempt

    def attempt(tracker, send, *args, **kwargs):
        told.append(kwargs)
        original(tracker, send, *args, **kwargs)

    monkeypatch.setattr(trainer.Tracker, "attempt", attempt)
    faults.plant_in_step(step, fault, monkeypatch.setattr)
    ended, printed = stopped("--report_to=swanlab")
    assert ended == code
    assert ("Traceback" in printed) == ("unexpected" in printed) == (code == 1)
    explains(printed, tmp_path / "run", 3)
    assert saved(tmp_path / "run", whole) == [2, 3]
    assert told[-1]["state"] == state


def test_a_validation_that_a_signal_cuts_short_is_repeated_by_the_resumed_run(
    whole, stopped, finish, monkeypatch, tmp_path
):
    """A signal comes in the validation after an epoch, in the one at the end, and in the repetition of the latter.

    The last of these runs has no step left to do, and must not go on to the export.
    """
    original, run = infer.sample, tmp_path / "run"
    for step, last, flags in ((3, 1, ()), (6, 3, (LATEST,)), (6, 1, (LATEST,))):  # `last`: the picture at the signal
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

    monkeypatch.setattr(trainer, "free_memory", lambda: 0)  # so that the training waits until it is saved
    faults.plant(monkeypatch.setattr, while_saving=signal_each_time)
    assert stopped()[0] == 143
    assert sealed == ["checkpoint-2"]
    assert saved(tmp_path / "run", whole) == [2]


def test_a_signal_after_an_error_leaves_the_save_alone(whole, stopped, monkeypatch, tmp_path):
    """When a process has failed, a launcher sends a signal to the others, which may be saving after an error, too."""
    failed, original, ended = threading.Event(), trainer.rescue, []

    def rescue(*args):
        failed.set()
        original(*args)

    def signal_later(_folder):
        assert failed.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        monkeypatch.setattr(trainer, "rescue", rescue)
        faults.plant_in_step(3, failing(RuntimeError("planted")), monkeypatch.setattr)
        faults.plant(monkeypatch.setattr, while_saving=signal_later)
        assert stopped()[0] == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended
    assert saved(tmp_path / "run", whole) == [2]


def in_worker(monkeypatch):
    """Plant an error that has nothing to do with a picture in a sample of step 4."""
    fail = failing(ValueError("unexpected"))
    faults.plant(monkeypatch.setattr, in_sample=lambda position: fail() if position == 3 * 6 + 2 else None)


def in_validation(monkeypatch):
    """Plant an error in the validation after step 3, while the network has the averaged weights."""
    monkeypatch.setattr(infer, "sample", failing(RuntimeError("unexpected")))


@pytest.mark.parametrize(("fault", "flags"), [(in_worker, ("--dataloader_num_workers=1",)), (in_validation, PROMPTS)])
def test_an_error_between_two_steps_saves_the_first(whole, stopped, finish, monkeypatch, tmp_path, fault, flags):
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
    """A system that runs out of memory kills one. The run may notice in that step or in an earlier one."""

    def kill(position):
        if position == 4 * 6 and torch.utils.data.get_worker_info():  # otherwise this is no worker
            os.kill(os.getpid(), signal.SIGKILL)

    faults.plant(monkeypatch.setattr, in_sample=kill)
    code, printed = stopped("--dataloader_num_workers=1", "--checkpointing_steps=1")
    assert code == 1
    last = saved(tmp_path / "run", whole)[-1]
    assert last <= 4
    explains(printed, tmp_path / "run", last)


@pytest.mark.parametrize(("owner", "name"), [(torch.optim.AdamW, "step"), (trainer.Average, "update")])
def test_an_error_amid_the_optimizer_step_saves_nothing(whole, stopped, monkeypatch, tmp_path, owner, name):
    """Then some weights, moments or averages have moved and others have not, which is the state of no step."""
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
    """The tracker fails at two steps, at all pictures and at its own end, and the run warns once."""
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
    assert printed.count("warning: tensorboard ") == printed.count("unexpected") == 1
    assert set(logged(run.output)) == {1, 2, 5, 6}
    assert saved(run.output, whole) == [2, 4, 6]
    assert files(run.output / "samples") == files(whole.output / "samples")


@pytest.mark.parametrize(("tracker", "warnings"), [(TensorBoardTracker, 1), (SwanLabTracker, 2)])
def test_a_tracker_that_cannot_start_does_not_stop_the_training(train, monkeypatch, capfd, tracker, warnings):
    """SwanLab has two warnings, because an offline run is tried in place of the one that cannot start."""
    monkeypatch.setattr(tracker, "start", failing(ConnectionError("unexpected")))
    run = train(*FLAGS, f"--report_to={tracker.name}", "--max_train_steps=2")
    printed = "".join(capfd.readouterr())
    assert printed.count("warning: ") == printed.count("unexpected") == warnings
    assert not logged(run.output)
    assert steps(run.output) == [2]


# -- numbers that are not finite -----------------------------------------------------------------------------------

SHORT = ("--train_batch_size=2", "--gradient_accumulation_steps=1", "--max_train_steps=12")
EIGHT_BITS = ("--use_8bit_adam", "--max_train_steps=5")


def nan_loss(run, micro_batch):
    """Make the loss NaN."""
    micro_batch["noise"].fill_(math.nan)


def overflow(run, micro_batch):
    """Make the loss infinite, or NaN."""
    micro_batch["noise"].fill_(math.inf)


def nan_gradient(run, micro_batch):
    """Make one number of one gradient NaN, and leave the loss as it is."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[0] = math.nan
        return gradient

    run.unet.conv_out.bias.register_hook(spoil)


@pytest.mark.parametrize(
    ("step", "every", "saved", "fault", "flags"),
    [
        (1, 10, [], nan_loss, ()),
        (7, 10, [4], nan_gradient, ()),
        (9, 10, [4, 8], overflow, ()),
        (6, 1000, [], nan_loss, ("--checkpointing_steps=100",)),
        (1, 1000, [], nan_loss, (*EIGHT_BITS, "--checkpointing_steps=100")),
        (3, 3, [1, 2], nan_gradient, (*EIGHT_BITS, "--checkpointing_steps=1")),
    ],
)
@pytest.mark.usefixtures("uncompiled")
def test_what_is_not_finite_never_reaches_the_weights(stopped, monkeypatch, tmp_path, step, every, saved, fault, flags):
    """From the faulty `step` until the host reads the metrics, no step of the optimizer may change the weights.

    The host reads the metrics every so many steps (`every`), before it saves, and at the end.
    """
    runs, states, timesteps = [], [], []

    def before_micro_batch(run, micro_batch):
        if run.step >= step - 1:
            runs.append(run)
            states.append([parameter.detach().clone() for parameter in run.unet.parameters()])
        if run.step == step - 1:
            timesteps.extend(micro_batch["timesteps"].tolist())
            fault(run, micro_batch)

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    monkeypatch.setattr(trainer, "LOG_EVERY", every)
    code, printed = stopped(*SHORT, "--checkpointing_steps=4", "--lr_warmup_steps=0", *flags)
    assert code == 1
    assert "Traceback" not in printed
    loss = r"[\d.]+" if fault is nan_gradient else "(nan|inf)"
    assert re.search(rf"error: step {step}: loss {loss}, gradient norm nan\.", printed)
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
def test_nothing_is_saved_after_a_loss_that_is_not_finite(stopped, monkeypatch, tmp_path, fault):
    """A signal or an error that comes before the host has noticed would otherwise have the step saved."""
    faults.plant_in_step(4, fault, monkeypatch.setattr)

    def before_micro_batch(run, micro_batch):
        if run.step == 2:
            nan_loss(run, micro_batch)

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    code, printed = stopped("--checkpointing_steps=100", "--report_to=tensorboard")
    assert code == 1
    assert "error: step 3: " in printed
    assert not steps(tmp_path / "run")
    assert list(logged(tmp_path / "run"))[:2] == [1, 2]


def test_steps_that_overflow_are_skipped_and_stop_the_run_in_the_end(stopped, monkeypatch, tmp_path):
    """fp16's scaler, here on the CPU, skips them: weights and average stay as they are, but the steps count.

    The five that overflow bring its scale from 1024 to 32.
    """
    build, runs, states, overflowing = trainer.Run, [], [], (1, 2, 4, 5, 6)

    def before_micro_batch(run, micro_batch):
        if run.step + 1 in overflowing:
            overflow(run, micro_batch)

    def note(run):
        parameters = (*run.unet.parameters(), *run.average.weights)
        states.append([parameter.detach().clone() for parameter in parameters])

    def with_scaler(*args):
        run = build(*args)
        runs.append(run)
        note(run)
        adamw = run.optimizer.adamw = run.accelerator.prepare(run.optimizer.adamw)
        run.accelerator.scaler = adamw.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        adamw.__setstate__({})  # as accelerate does for an optimizer with a scaler
        adamw.optimizer.__dict__.pop("found_inf", None)  # the scaler has its own
        monkeypatch.setattr(trainer, "clip_gradients", lambda run: torch.tensor(1.0))
        return run

    monkeypatch.setattr(trainer, "LEAST_LOSS_SCALE", 50)
    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch, after_step=note)
    monkeypatch.setattr(trainer, "Run", with_scaler)
    code, printed = stopped(*SHORT, "--checkpointing_steps=2", "--lr_warmup_steps=0", "--report_to=tensorboard")
    assert code == 1
    assert "Traceback" not in printed
    assert "even at a loss scale of 3e+01" in printed
    assert steps(tmp_path / "run") == [2, 4, 6]
    explains(printed, tmp_path / "run", 6)
    assert_same(weights(tmp_path / "run/checkpoint-6/unet"), runs[0].unet.state_dict())
    assert logged(tmp_path / "run", "train/skipped") == {step: step in overflowing for step in range(1, 6)}
    note(runs[0])  # after the last step, which was not noted, as the run stopped in it
    assert len(states) == 1 + 6
    for step, (before, after) in enumerate(itertools.pairwise(states), 1):
        unchanged = list(map(torch.equal, before, after))
        assert all(unchanged) if step in overflowing else not any(unchanged[:50])
    assert runs[0].average.updates == 1


# -- several processes ---------------------------------------------------------------------------------------------

FAULTY = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import faults

def fault():
    if os.environ["RANK"] == "1":
        FAULT

faults.plant_in_step(STEP, fault)
faults.trainer.main(faults.sd_config.parse_args())
"""


@pytest.fixture
def launch(assets, tmp_path):
    """A function that trains in two processes, which fail, and returns what was printed.

    The fault is Python code that the second process runs in the middle of a step.
    """

    def run(*flags, step, fault):
        script = tmp_path / "faulty.py"
        script.write_text(FAULTY.replace("STEP", str(step)).replace("FAULT", fault))
        arguments = command_line(assets, tmp_path / "run", *FLAGS, "--train_batch_size=1", *flags)
        return start(script, *arguments, folder=tmp_path, processes=2, fails=True)

    return run


def test_two_processes_stop_together_and_go_on_from_one_which_goes_on_from_them(whole, launch, train, assets, tmp_path):
    """Two go on after step 2 of one until a signal comes, and from their step 3 until an error; one ends the run."""
    run, begin = tmp_path / "run", weights(assets[0] / "unet")
    first = f"--resume_from_checkpoint={whole.output / 'checkpoint-2'}"
    printed = launch(first, "--checkpointing_steps=3", step=4, fault="os.kill(os.getpid(), signal.SIGTERM)")
    assert re.search(r"exitcode *: 143", printed), printed
    assert steps(run) == [3, 4]

    signalled = (run / "checkpoint-4").rename(tmp_path / "signalled")
    # This ends, although the process without the error waits for the other one.
    printed = launch(LATEST, "--checkpointing_steps=1", step=6, fault="raise RuntimeError('unexpected')")
    assert "RuntimeError: unexpected" in printed
    explains(printed, run, 5)
    assert steps(run) == [3, 4, 5]
    assert_same_state(signalled, run / "checkpoint-4")

    assert list(train(*FLAGS, LATEST).logs) == [6]
    for step in (5, 6):
        for part in ("unet", "unet_ema"):
            one, other = (weights(output / f"checkpoint-{step}" / part) for output in (run, whole.output))
            assert difference(one, other, begin) <= 1e-4


# -- the data ------------------------------------------------------------------------------------------------------


def test_a_run_is_not_resumed_on_other_pictures(whole, stopped, train, assets, tmp_path):
    """One byte makes another picture, even if it looks the same. The folder may have moved."""
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
