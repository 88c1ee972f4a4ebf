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
import time

import accelerate
import pytest
import swanlab
import torch
from accelerate.tracking import TensorBoardTracker
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


def send(number):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def steps(folder):
    """The steps of the checkpoints in an output folder, all of which must be whole."""
    found = sd_config.checkpoints(folder)
    assert [sd_config.find_damage(path) for path in found] == [None] * len(found)
    return [sd_config.step_of(path) for path in found]


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


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_be_finished_and_saved(whole, stopped, finish, monkeypatch, tmp_path, number):
    plant(monkeypatch, 3, send(number))
    code, printed = stopped()
    assert code == 128 + number
    assert "Traceback" not in printed
    explains(printed, tmp_path / "run", 3)
    assert steps(tmp_path / "run") == [2, 3]
    assert_same_state(whole.output / "checkpoint-3", tmp_path / "run/checkpoint-3")
    finish(after=3)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_cuts_a_validation_short_which_is_then_made_up_for(
    whole, stopped, finish, monkeypatch, tmp_path, step
):
    """After an epoch, and at the end, where a resumed run has nothing else to do."""
    drawn, original = [], infer.sample
    last = {3: 1, 6: 3}[step]  # pictures drawn by then, of the two that a validation has

    def sample(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        if len(drawn) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn[-1]

    monkeypatch.setattr(infer, "sample", sample)
    assert stopped(*PROMPTS)[0] == 143
    assert len(drawn) == last
    assert not (tmp_path / f"run/samples/step-{step}").exists()
    assert steps(tmp_path / "run")[-1] == step
    output = finish(*PROMPTS).output
    assert samples(output) == samples(whole.output)
    # The checkpoint that the signal left holds the weights that drew them.
    assert f"run/checkpoint-{step} " in Image.open(output / f"samples/step-{step}/0-a-cat.png").text["command"]


def test_a_signal_during_a_save_saves_once(stopped, finish, monkeypatch, tmp_path):
    """The one that was being written while the training went on, and that of the step at which it stopped."""
    sealed = []

    def signal_once(folder):
        sealed.append(folder.name)
        if len(sealed) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    faults.plant(monkeypatch.setattr, while_saving=signal_once)
    assert stopped()[0] == 143
    assert sealed[0] == ".checkpoint-2"
    saved = steps(tmp_path / "run")
    assert sorted(sealed) == [f".checkpoint-{step}" for step in saved]
    finish(after=saved[-1])


FAULTY = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import faults
trainer, Run, calls = faults.trainer, faults.trainer.Run, []

def in_step(run, micro_batch):
    calls.append(run.step)
    last = run.accelerator.process_index == run.accelerator.num_processes - 1
    if last and run.step == {step} - 1 and calls.count(run.step) == 2:
        {in_step}

def before_load(*args):
    {before_load}
    return Run(*args)

def in_save(folder):
    if folder.name.endswith("-{step}"):
        {in_save}

faults.plant(before_micro_batch=in_step, while_saving=in_save)
trainer.Run = before_load
trainer.main(trainer.sd_config.parse_args())
"""
SIGNAL = "os.kill(os.getpid(), signal.{})"


@pytest.fixture
def start(assets, tmp_path):
    """A function that runs the trainer as processes of their own, and returns the exit code and what was printed.

    Python code stands for a fault: within a step of the last process, in the save after it, or before loading.
    """

    def run(*flags, output="run", processes=1, step=4, **faults):
        script, none = tmp_path / "faulty.py", dict.fromkeys(("in_step", "in_save", "before_load"), "pass")
        script.write_text(FAULTY.format_map(none | faults | {"root": str(ROOT), "step": step}))
        folders = {"pretrained_model_name_or_path": assets[0], "train_data_dir": assets[1]}
        folders["output_dir"] = tmp_path / output
        paths = [f"--{flag}={folder}" for flag, folder in folders.items()]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), script, *paths, *FLAGS, *flags],
            cwd=tmp_path,
            env=os.environ | ({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # with a process group of its own
        )
        try:
            # Waits for whoever holds the pipe: a worker left over would be noticed.
            printed = process.communicate(timeout=120)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(process.communicate()[0])
        return process.returncode, printed

    return run


def test_a_signal_to_the_process_group_does_not_take_the_workers(whole, start, finish, tmp_path):
    """As systemd and `timeout` send it. And the tracker's run is whole: it was finished, too."""
    group = "os.system('kill -TERM 0'); time.sleep(1)"  # from another process: a parent's SIGTERM is nothing unusual
    code, printed = start("--dataloader_num_workers=2", "--report_to=swanlab", in_step=group)
    assert code == 143, printed
    assert "Error" not in printed
    assert printed.count("Stopping: ") == 1
    explains(printed, tmp_path / "run", 4)
    assert steps(tmp_path / "run") == [2, 4]
    assert_same_state(whole.output / "checkpoint-4", tmp_path / "run/checkpoint-4")
    (folder,) = (tmp_path / "run/logs").glob("run-*")
    losses = read_swanlab(folder)[0]["train/loss"]
    assert losses == {step: pytest.approx(whole.logs[step]["train/loss"]) for step in range(1, 5)}
    finish(after=4)


def test_a_second_signal_stops_at_once(start, finish, tmp_path):
    """In the middle of the save after the first: what was saved before is as it was, and half a save is cleaned up."""
    later = "time.sleep(1.1); " + SIGNAL.format("SIGINT") + "; time.sleep(60)"
    code, printed = start(in_step=SIGNAL.format("SIGINT"), in_save=later)
    assert code == 128 + signal.SIGINT, printed
    assert (tmp_path / "run/.checkpoint-4").exists()
    assert steps(tmp_path / "run") == [2]
    finish(after=2)


def test_a_signal_before_training_stops_at_once(start, tmp_path):
    code, printed = start(before_load=SIGNAL.format("SIGTERM"))
    assert code == -signal.SIGTERM, printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_that_a_launcher_passes_on_as_well_is_one_signal(stopped, finish, monkeypatch, tmp_path):
    """systemd and Slurm signal every process, and torchrun passes on to its own what it gets itself."""

    def both():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    plant(monkeypatch, 3, both)
    assert stopped()[0] == 143
    assert steps(tmp_path / "run")[-1] == 3
    finish(after=3)


@pytest.mark.parametrize(("error", "state"), [(RuntimeError("planted"), "crashed"), (None, "aborted")])
def test_swanlab_is_told_how_a_run_ended(stopped, monkeypatch, error, state):
    told, original = [], trainer.Tracker.attempt

    def attempt(tracker, send, *args, **kwargs):
        told.append(kwargs)
        original(tracker, send, *args, **kwargs)

    monkeypatch.setattr(trainer.Tracker, "attempt", attempt)
    plant(monkeypatch, 3, failing(error) if error else send(signal.SIGINT))
    assert stopped("--report_to=swanlab")[0] == (1 if error else 130)
    assert told[-1]["state"] == state


def test_a_signal_in_a_validation_that_is_made_up_for(whole, stopped, monkeypatch, tmp_path):
    """The resumed run has no step left in which it could notice, and must not go on to the export."""
    for name in ("checkpoint-6", "samples"):
        shutil.copytree(whole.output / name, tmp_path / "run" / name)
    shutil.rmtree(tmp_path / "run/samples/step-6")
    original = infer.sample

    def sample(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(infer, "sample", sample)
    assert stopped(*PROMPTS, LATEST)[0] == 143
    assert not (tmp_path / "run/model_index.json").exists()


# -- exceptions ----------------------------------------------------------------------------------------------------


def test_a_signal_after_an_error_leaves_the_save_alone(stopped, finish, monkeypatch, tmp_path):
    """A launcher sends one to all processes when one has failed, and the others end with an error of their own."""
    failed = threading.Event()

    def fail():
        failed.set()
        raise RuntimeError("planted")

    def signal_later(folder):
        if folder.name == ".checkpoint-2":
            failed.wait(60)
            time.sleep(0.5)  # for the error to leave the loop
            os.kill(os.getpid(), signal.SIGTERM)

    ended = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        plant(monkeypatch, 3, fail)
        faults.plant(monkeypatch.setattr, while_saving=signal_later)
        assert stopped()[0] == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended
    assert steps(tmp_path / "run") == [2]
    finish(after=2)


def in_forward(error):
    """A fault: an error in the second micro-batch of step 4."""
    return lambda monkeypatch: plant(monkeypatch, 4, failing(error))


def in_loader(monkeypatch):
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


@pytest.mark.parametrize(
    ("fault", "flags"),
    [
        (in_forward(RuntimeError("unexpected")), ()),
        (in_forward(torch.OutOfMemoryError("unexpected")), ()),
        (in_loader, ()),
        (in_loader, ("--dataloader_num_workers=1",)),
        (in_validation, PROMPTS),
    ],
    ids=["forward", "memory", "loader", "worker", "validation"],
)
def test_an_error_in_a_run_saves_the_last_whole_step(whole, stopped, finish, monkeypatch, tmp_path, fault, flags):
    fault(monkeypatch)
    code, printed = stopped("--report_to=tensorboard", *flags)
    assert code == 1
    assert "unexpected" in printed
    explains(printed, tmp_path / "run", 3)
    assert steps(tmp_path / "run") == [2, 3]
    assert list(logged(tmp_path / "run")) == [1, 2, 3]
    assert_same_state(whole.output / "checkpoint-3", tmp_path / "run/checkpoint-3")
    finish("--report_to=tensorboard", *flags, after=3)
    losses = {step: pytest.approx(values["train/loss"]) for step, values in whole.logs.items()}
    assert logged(tmp_path / "run") == losses


def test_a_worker_that_is_killed(stopped, finish, monkeypatch, tmp_path):
    """As a system that runs out of memory does. When the run notices is not certain: it may be in any step."""
    original = trainer.SampleStream.__getitem__

    def getitem(stream, position):
        if position == 4 * 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(stream, position)

    monkeypatch.setattr(trainer.SampleStream, "__getitem__", getitem)
    code, printed = stopped("--dataloader_num_workers=1", "--checkpointing_steps=1")
    assert code == 1
    last = steps(tmp_path / "run")[-1]
    assert last <= 4
    explains(printed, tmp_path / "run", last)
    finish("--dataloader_num_workers=1", after=last)


@pytest.mark.parametrize(("owner", "name"), [(torch.optim.AdamW, "step"), (trainer.Average, "update")])
def test_an_error_amid_the_optimizer_step_saves_nothing(stopped, finish, monkeypatch, tmp_path, owner, name):
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
    assert steps(tmp_path / "run") == [2]
    assert list(logged(tmp_path / "run")) == [1, 2, 3]
    finish(after=2)


# -- trackers ------------------------------------------------------------------------------------------------------


def only_once(owner, name):
    """Let the third call of a tracker's function fail, and no other."""

    def fault(monkeypatch):
        original, calls = getattr(owner, name), []

        def fail_once(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise ConnectionError("unexpected")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, fail_once)

    return fault


def always(owner, name):
    """Let every call of a tracker's function fail."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, failing(ConnectionError("unexpected")))


@pytest.mark.parametrize(
    ("fault", "missing", "flags"),
    [
        (only_once(TensorBoardTracker, "log"), {3}, ()),
        (always(TensorBoardTracker, "log"), {1, 2, 3, 4, 5, 6}, ()),
        (always(TensorBoardTracker, "log_images"), set(), PROMPTS),
        (always(TensorBoardTracker, "start"), {1, 2, 3, 4, 5, 6}, ()),
        (always(TensorBoardTracker, "finish"), set(), ()),
    ],
    ids=["log-once", "log", "images", "start", "finish"],
)
def test_a_tracker_that_fails_does_not_stop_the_training(whole, train, monkeypatch, capfd, fault, missing, flags):
    fault(monkeypatch)
    run = train(*FLAGS, *flags, "--report_to=tensorboard")
    printed = "".join(capfd.readouterr())
    assert printed.count("warning: ") == 1
    assert printed.count("unexpected") == 1
    assert set(logged(run.output)) == {1, 2, 3, 4, 5, 6} - missing
    assert_same_state(whole.output / "checkpoint-6", run.output / "checkpoint-6")
    assert not flags or files(run.output / "samples") == files(whole.output / "samples")


@pytest.mark.parametrize("answers", ["later", "never"])
def test_swanlab_goes_on_offline_where_its_server_does_not_answer(train, monkeypatch, capfd, answers):
    """`never` is what a server out of reach does: every run that is not offline fails to start."""
    monkeypatch.delenv("SWANLAB_MODE")
    monkeypatch.setenv("SWANLAB_API_KEY", "key")
    original, calls = swanlab.init, []

    def init(*args, **kwargs):
        calls.append(kwargs.get("mode"))
        if kwargs.get("mode") != "offline" and (answers == "never" or len(calls) == 1):
            raise ConnectionError("unexpected")
        return original(*args, **kwargs | {"mode": "offline"})

    monkeypatch.setattr(swanlab, "init", init)
    run = train(*FLAGS, "--report_to=swanlab", "--max_train_steps=2")
    printed = "".join(capfd.readouterr())
    assert printed.count("warning: ") == 1
    assert "swanlab sync" in printed
    assert calls == [None, "offline"]
    (folder,) = (run.output / "logs").glob("run-*")
    assert read_swanlab(folder)[0]["train/loss"] == {
        step: pytest.approx(values["train/loss"]) for step, values in run.logs.items()
    }


def test_swanlab_that_cannot_start_at_all_does_not_stop_the_training(train, monkeypatch, capfd):
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", failing(ConnectionError("unexpected")))
    run = train(*FLAGS, "--report_to=swanlab", "--max_train_steps=2")
    assert "warning: " in "".join(capfd.readouterr())
    assert steps(run.output) == [2]


# -- numbers that are none -----------------------------------------------------------------------------------------

SHORT = ("--train_batch_size=2", "--gradient_accumulation_steps=1", "--max_train_steps=12")
EIGHT_BITS = ("--use_8bit_adam", "--checkpointing_steps=1", "--max_train_steps=5")


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
        (9, 10, [4, 8], poison, ()),
        (10, 10, [4, 8], poison, ()),
        (11, 10, [4, 8], poison, ()),
        (7, 10, [4], poison_gradient, ()),
        (2, 10, [1], poison, ("--checkpointing_steps=1",)),
        (6, 1000, [4], poison, ()),
        (6, 1000, [], poison, ("--checkpointing_steps=100",)),
        # The same positions in a shorter interval: in Python, torchao takes its time.
        (1, 3, [], poison, EIGHT_BITS),
        (2, 3, [1], poison, EIGHT_BITS),
        (3, 3, [1, 2], poison_gradient, EIGHT_BITS),
        (4, 3, [1, 2, 3], poison, EIGHT_BITS),
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


@pytest.mark.parametrize(("overflows", "last"), [({2, 3, 4}, 4), ({2, 3, 5, 6}, None)])
def test_steps_that_overflow_in_a_row_stop_the_run(train, stopped, monkeypatch, tmp_path, overflows, last):
    """fp16's scaler, on the CPU. One step that does not overflow makes the count start anew."""
    build, starts = trainer.Run, []

    def before_micro_batch(run, micro_batch):
        if run.step == 1 and not starts:
            starts.append({name: value.clone() for name, value in run.unet.state_dict().items()})
        if run.step + 1 in overflows:
            micro_batch["noise"].fill_(math.inf)

    def with_scaler(*args):
        run = build(*args)
        adamw = run.optimizer.adamw
        run.accelerator.scaler = adamw.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        adamw.__setstate__({})  # as accelerate does for an optimizer with a scaler
        adamw.optimizer.__dict__.pop("found_inf", None)  # the scaler has its own
        monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *args: torch.tensor(1.0))
        return run

    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 3)
    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    monkeypatch.setattr(trainer, "Run", with_scaler)
    if last is None:
        assert steps(train(*FLAGS, *SHORT, "--max_train_steps=6", "--checkpointing_steps=100").output) == [6]
        return
    code, printed = stopped(*SHORT, "--checkpointing_steps=100")
    assert code == 1
    assert "Traceback" not in printed
    assert "3 steps in a row" in printed
    assert steps(tmp_path / "run") == [last]
    explains(printed, tmp_path / "run", last)
    assert_same(starts[0], weights(tmp_path / f"run/checkpoint-{last}/unet"))


# -- several processes ---------------------------------------------------------------------------------------------

PAIR = ("--train_batch_size=1",)  # with two processes, the effective batch of one


@pytest.fixture
def pair(whole, start, once, tmp_path_factory):
    """Two processes that take over from one after step 2, until one of them fails in step 6.

    The exit code, what was printed, and the output folder, with a checkpoint of every step.
    """
    if "pair" not in once:
        flags = (*PAIR, after_two(whole), "--checkpointing_steps=1")
        output = tmp_path_factory.mktemp("pair")
        ended = start(*flags, output=output, processes=2, step=6, in_step="raise RuntimeError('unexpected')")
        once["pair"] = (*ended, output)
    return once["pair"]


def after_two(whole):
    """The flag that goes on after the second step of the whole run."""
    return f"--resume_from_checkpoint={whole.output / 'checkpoint-2'}"


def test_an_error_in_one_process_ends_all(pair):
    """Though the others wait for that one: `start` does not wait for ever."""
    code, printed, output = pair
    assert code != 0
    assert "RuntimeError: unexpected" in printed
    explains(printed, output, 5)
    assert steps(output) == [3, 4, 5]


def test_one_process_two_and_one_again(whole, pair, train, assets):
    """Two take over from one after step 2, and one from them after step 4."""
    output, begin = pair[-1], weights(assets[0] / "unet")
    again = train(*FLAGS, f"--resume_from_checkpoint={output / 'checkpoint-4'}")
    assert list(again.logs) == [5, 6]
    for folder, step in ((output, 5), (again.output, 6)):
        for part in ("unet", "unet_ema"):
            one, other = (weights(path / f"checkpoint-{step}" / part) for path in (folder, whole.output))
            assert difference(one, other, begin) <= 1e-4


def test_a_signal_to_one_of_two_processes(whole, pair, start, tmp_path):
    """They stop at the same step, with one checkpoint, and go on to where two that were left alone went."""
    fault = SIGNAL.format("SIGTERM")
    code, printed = start(*PAIR, after_two(whole), "--checkpointing_steps=9", processes=2, in_step=fault)
    assert code != 0  # the launcher's own
    assert re.search(r"exitcode *: 143", printed), printed
    assert steps(tmp_path / "run") == [4]
    code, printed = start(*PAIR, LATEST, "--checkpointing_steps=1", processes=2)
    assert code == 0, printed
    assert steps(tmp_path / "run") == [4, 5, 6]
    assert_same_state(pair[-1] / "checkpoint-5", tmp_path / "run/checkpoint-5")


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
    run = train(*FLAGS, checkpoint, data=moved)
    assert_same_state(whole.output / "checkpoint-6", run.output / "checkpoint-6")
    content = bytearray((moved / "coffee.png").read_bytes())
    content[-1] ^= 1  # of a checksum
    (moved / "coffee.png").write_bytes(content)
    code, printed = stopped(checkpoint, data=moved, output="other")
    assert code == 2
    assert "fingerprint of the data set" in printed
    assert not (tmp_path / "other").exists()
