"""Whatever kills a run, damages its checkpoints or fills its disk, what was saved is whole, and the run can go on.

Each run is a fork of a process that has imported everything and done nothing else, because imports take seconds.
"""

import collections
import functools
import itertools
import multiprocessing
import os
import random
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
import types
from multiprocessing import forkserver
from pathlib import Path

import pytest

import faults
import sd_config
from conftest import ROOT, assert_same_state, command_line, litter, make_file, samples, steps, trainer
from test_run import read_swanlab

IMPORTED_BY = os.getpid()
# Flags for everything that has a state which a killed run could lose.
RANDOM = (
    *("--random_flip", "--caption_dropout=0.3", "--use_ema", "--lr_scheduler=cosine", "--learning_rate=1e-4"),
    *("--train_batch_size=1", "--gradient_accumulation_steps=2"),
)
TWELVE = (*RANDOM, "--max_train_steps=12", "--validation_epochs=100")
SIX = (*RANDOM, "--max_train_steps=6", "--checkpointing_steps=2")
LATEST = "--resume_from_checkpoint=latest"
Ended = collections.namedtuple("Ended", "code printed")


# -- Runs in processes of their own --------------------------------------------------------------------------------


def attempt(argv, log, before, _held):
    """Run the trainer in this process, a fork of one that has imported it, and have all that it prints in a file.

    This process and its children hold one end of a pipe as long as they live, which tells whether any of them does.
    """
    assert os.getppid() == IMPORTED_BY, "the fork server has not imported this module, so each run has to"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(write_through=True)  # so that what is printed before a SIGKILL is in the file
    if before:
        before()
    trainer.main(sd_config.parse_args(argv))


@pytest.fixture(scope="module")
def start(assets, tmp_path_factory):
    """A function that starts the trainer, and returns its process and a function that waits for its end.

    To plant a fault, `before` is called in the new process before the trainer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server does not inherit sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    logs, count = tmp_path_factory.mktemp("logs"), itertools.count()

    def start(*flags, output, before=None):
        log = logs / str(next(count))  # not in the output folder, whose disk may be full
        log.touch()  # the process may be killed before it opens it
        watched, held = context.Pipe(duplex=False)
        process = context.Process(target=attempt, args=(command_line(assets, output, *flags), log, before, held))
        process.start()
        held.close()

        def wait():
            process.join(240)
            process.kill()
            process.join()
            assert watched.poll(120), "a worker has outlived the run"
            return Ended(process.exitcode, log.read_text())

        return process, wait

    return start


@pytest.fixture
def run(start, tmp_path):
    """A function that runs the trainer to its end in `tmp_path`/run."""
    return lambda *flags, before=None: start(*flags, output=tmp_path / "run", before=before)[1]()


def exported(output):
    """The exported files by their names, without the one that names the folder from which the UNet was loaded."""
    files = [file for part in sd_config.PARTS for file in (output / part).rglob("*") if file.is_file()]
    named = {file.relative_to(output).as_posix(): file.read_bytes() for file in [*files, output / "model_index.json"]}
    return {name: content for name, content in named.items() if name != "unet/config.json"}


def assert_same_end(output, reference):
    """A run has ended in the same state as another one, and left nothing unfinished."""
    last = sd_config.checkpoints(reference)[-1].name
    assert_same_state(output / last, reference / last)
    assert exported(output) == exported(reference)
    assert not litter(output)


# -- Killed at any instant -----------------------------------------------------------------------------------------

# What to wait for before a kill. (Each kind may happen once before the kill, without being disturbed.)
AIMS = {
    "writing": f"{sd_config.OWN}/checkpoint-*",
    "sealing": f"{sd_config.OWN}/checkpoint-*/optimizer.pt",
    "deleting": f"{sd_config.OWN}/old-checkpoint-*",
    "export": f"{sd_config.OWN}/export",
}


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The output folder of a run of twelve steps that is never killed, and the seconds that it takes."""
    output, begun = tmp_path_factory.mktemp("never-killed") / "run", time.perf_counter()
    ended = start(*TWELVE, "--validation_prompts", "a cat", "--checkpointing_steps=6", output=output)[1]()
    assert ended.code == 0, ended.printed
    return output, time.perf_counter() - begun


def kill(process, output, aim, whole, rng, seen):
    """Kill a run when what `aim` names is under way, or at a random instant.

    The instant is in the first half of the `whole` seconds that a run takes. As a run is started again after each kill,
    it gets to its second half all the same. The steps of the checkpoints that appear meanwhile are added to `seen`.
    """
    begun, found = time.perf_counter(), set()
    passes, delay = rng.randint(1, 2), rng.uniform(0, 0.06)
    if aim in ("deleting", "export"):
        passes, delay = 1, delay * (aim == "export")
    instant = rng.uniform(0, whole / 2) if aim == "instant" else 240
    while process.is_alive() and time.perf_counter() - begun < instant:
        seen |= {*steps(output, check=False)}
        found |= set(output.glob(AIMS.get(aim, "instant")))
        if len(found) == passes:
            time.sleep(delay)
            break
        time.sleep(0.0005)
    process.kill()


def struck(output, since):
    """What a run was doing when it was killed, which its unfinished files tell that are newer than `since`."""
    kinds = ("writing", "deleting", "export")
    fresh = {kind for kind in kinds for path in output.glob(AIMS[kind]) if path.stat().st_ctime > since}
    return fresh or {"else"}


def crash(begin, output, limit, aims, rng, whole):
    """Kill a run at each of `aims`, start it again each time, and check that it never loses a checkpoint.

    Returns what the run was doing at each kill, and how often it was started.
    """
    strikes, seen, starts, aims = [], set(), 0, [*aims]
    while True:
        newest, since, starts = max(steps(output), default=0), time.time(), starts + 1
        process, wait = begin()
        aim = aims.pop(0) if aims else None
        if aim:
            kill(process, output, aim, whole, rng, seen)
        ended = wait()
        assert ended.code in ((0, -9) if aim else (0,)), ended.printed
        # Each start goes on from the newest checkpoint. That one is whole, as are all others.
        assert "skipped" not in ended.printed
        resumed = re.findall(r"Resuming from \S+/checkpoint-(\d+):", ended.printed)
        assert resumed in ([str(newest)] if newest else [], []), ended.printed
        found = {*steps(output)}
        seen |= found
        assert found >= set(sorted(seen)[-limit:] if limit else seen)
        assert max(found, default=0) >= newest
        if ended.code == 0:
            assert limit is None or len(found) == limit
            return strikes, starts
        strikes.append(struck(output, since))


# Names that resemble those of a run's own files. None of them may be touched.
FOREIGN = """.checkpoint-3/x .old-checkpoint-3/x .export/x .mybest-checkpoint-5/x .lock manifest.json checkpoint-best/x
    checkpoint-3.bak samples/mine.txt samples/step-best/x encoded-mine/x unet.bak/x logs/mine"""


def test_killed_at_random_instants_nothing_is_lost(start, reference, tmp_path, request):
    """The crash test, of which `--kills 100` is the long form."""
    wanted, seed, begun = request.config.getoption("kills"), secrets.randbits(32), time.perf_counter()
    print(f"seed {seed}")  # shown if the test fails
    rng, strikes, starts, runs = random.Random(seed), [], 0, 0

    def share(*kinds):
        return sum(not strike.isdisjoint(kinds) for strike in strikes) / max(1, len(strikes))

    # Where an aim was missed, there are a few more kills than wanted.
    while len(strikes) < wanted or share("writing") < 1 / 3 or share("deleting", "export") < 1 / 10:
        output, limit = tmp_path / f"run-{runs}", (2, None)[runs % 2]
        foreign = [make_file(output, name) for name in FOREIGN.split()]
        flags = (*TWELVE, "--checkpointing_steps=1", f"--checkpoints_total_limit={limit}")
        if limit is None:
            flags = (*TWELVE, "--validation_prompts", "a cat", "--checkpointing_steps=2")
        aims = ["writing", "sealing", "instant", "deleting" if limit else "instant"]
        aims = [*rng.sample(aims, len(aims)), "export"]
        begin = functools.partial(start, *flags, LATEST, output=output)
        more, started = crash(begin, output, limit, aims, rng, reference[1])
        strikes, starts, runs = strikes + more, starts + started, runs + 1
        assert_same_end(output, reference[0])
        assert limit or samples(output) == samples(reference[0])
        assert {path.read_text(encoding="utf-8") for path in foreign} == {"mine"}
        shutil.rmtree(output)
        assert len(strikes) < 2 * wanted + 10, strikes
    counts = collections.Counter(kind for strike in strikes for kind in strike)
    seconds = time.perf_counter() - begun
    print(f"{len(strikes)} kills ({dict(counts)}), {runs} runs, {starts} starts, {seconds:.0f} s")
    assert share("writing") >= 1 / 3
    assert share("deleting", "export") >= 1 / 10


@pytest.fixture(scope="module")
def six(start, tmp_path_factory):
    """The output folder of a run with the checkpoints 2, 4 and 6, to which nothing happened."""
    output = tmp_path_factory.mktemp("six") / "run"
    ended = start(*SIX, output=output)[1]()
    assert ended.code == 0, ended.printed
    return output


@pytest.fixture
def upto(six, tmp_path):
    """A function that makes `tmp_path`/run what the output folder of `six` was when it had saved a checkpoint."""

    def copy(step, output=tmp_path / "run", copy_function=os.link):
        for folder in sd_config.checkpoints(six):
            if sd_config.step_of(folder) <= step:
                shutil.copytree(folder, output / folder.name, copy_function=copy_function)
        return output

    return copy


# -- Ended by signals (test_faults.py has the cases that need no process of their own) -----------------------------


def signal_to_group():
    """Have another process send a signal to this process and its workers."""
    os.setpgrp()
    faults.plant_in_step(4, lambda: os.system("kill -TERM 0") or time.sleep(1))


def test_a_signal_to_the_process_group_does_not_take_the_workers(run, six, tmp_path):
    """systemd and `timeout` signal a whole group. The tracker is closed, too, so that its run has every loss."""
    output = tmp_path / "run"
    ended = run(*SIX, "--dataloader_num_workers=2", "--report_to=swanlab", before=signal_to_group)
    assert ended.code == 143, ended.printed
    assert "Error" not in ended.printed
    assert ended.printed.count("Stopping: ") == 1
    last = f"Stopped at step 4. Last checkpoint: {output / 'checkpoint-4'}: add --resume_from_checkpoint latest"
    assert last in ended.printed
    for step in (2, 4):
        assert_same_state(output / f"checkpoint-{step}", six / f"checkpoint-{step}")
    (folder,) = output.glob("logs/run-*")
    losses = read_swanlab(folder)[0]["train/loss"]
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] == pytest.approx(sd_config.read_state(output / "checkpoint-4").loss)


def signal_in_step_and_in_save():
    """Have a signal come in step 4, and a second one more than a second later, in the save of its checkpoint."""

    def interrupt(_folder=None):
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt_again(folder):
        if folder.name == "checkpoint-4":
            time.sleep(1.1)
            interrupt()
            time.sleep(60)

    faults.plant_in_step(4, interrupt)
    faults.plant(while_saving=interrupt_again)


def test_a_second_signal_stops_at_once(run, six, tmp_path):
    """It comes in the save after the first: the checkpoint before is as it was, and half a checkpoint is hidden."""
    ended = run(*SIX, before=signal_in_step_and_in_save)
    assert ended.code == 128 + signal.SIGINT, ended.printed
    assert litter(tmp_path / "run") == ["checkpoint-4"]
    assert steps(tmp_path / "run") == [2]
    assert_same_state(tmp_path / "run/checkpoint-2", six / "checkpoint-2")


def signal_before_training():
    """Have a signal come when the models are about to be loaded."""
    trainer.load_models = lambda _: os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_training_stops_at_once(run, tmp_path):
    ended = run(*SIX, before=signal_before_training)
    assert ended.code == -signal.SIGTERM, ended.printed
    assert "Traceback" not in ended.printed
    assert not steps(tmp_path / "run")


# -- Damaged checkpoints (every kind of damage is in test_config.py) -----------------------------------------------


def truncate(file):
    """Remove the last byte of a file, but not of the other names that the file may have."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1])


def test_training_goes_on_from_before_the_damage(run, upto, six):
    """A limit of two keeps two whole checkpoints, and does not count damaged ones, so checkpoint-4 stays."""
    output = upto(6)
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-5")
    truncate(output / "checkpoint-5/optimizer.pt")
    truncate(output / "checkpoint-6/unet/diffusion_pytorch_model.safetensors")
    ended = run(*SIX, LATEST, "--checkpoints_total_limit=2")
    assert ended.code == 0, ended.printed
    assert re.findall(r"note: \S+/checkpoint-(\d): skipped", ended.printed) == ["6", "5"]
    assert f"Resuming from {output / 'checkpoint-4'}: step 4 of 6" in ended.printed
    assert steps(output) == [4, 6]
    assert_same_state(output / "checkpoint-4", six / "checkpoint-4")
    assert_same_end(output, six)


def test_no_whole_checkpoint_is_deleted_in_favour_of_a_damaged_later_one(run, upto):
    """With a limit of one, the save at step 5 must not keep the damaged checkpoint-6 in place of its own."""
    output = upto(6)
    truncate(output / "checkpoint-6/optimizer.pt")
    flags = (*SIX, "--checkpointing_steps=1", "--checkpoints_total_limit=1", LATEST)
    ended = run(*flags, before=functools.partial(break_save, "checkpoint-6", OSError))
    assert ended.code == 1, ended.printed
    assert sd_config.find_damage(output / "checkpoint-5") is None


def die_deleting():
    """Have the process killed when it has deleted the first file of a folder."""
    rmtree = shutil.rmtree

    def begin(folder, **kwargs):
        if folder.exists():
            next(path for path in folder.rglob("*") if path.is_file()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(folder, **kwargs)

    shutil.rmtree = begin


def test_half_a_deleted_checkpoint_does_not_have_its_name(run, upto, six):
    """A run is killed while it deletes an old checkpoint, which a random kill seldom hits."""
    output, flags = upto(4), (*SIX, LATEST, "--checkpoints_total_limit=1")
    assert run(*flags, before=die_deleting).code == -9
    assert litter(output) == ["old-checkpoint-2"]
    assert len(steps(output)) == 2
    assert run(*flags).code == 0
    assert_same_end(output, six)


def die_exporting():
    """Have the process killed when it has put the second part of the export in its place."""
    rename, count = Path.rename, itertools.count()

    def put(path, target):
        rename(path, target)
        if path.parent.name == "export" and next(count):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = put


def test_half_an_export_does_not_pass_for_a_pipeline(run, upto, six):
    """Where an export replaces an older one, the index is deleted first, without which a folder is no pipeline.

    The run is started again when its training is over, and its export is the same as that of `six`.
    """
    output = upto(6)
    shutil.copy2(six / "model_index.json", output)
    assert run(*SIX, LATEST, before=die_exporting).code == -9
    assert litter(output) == ["export"]
    assert not (output / "model_index.json").exists()
    assert run(*SIX, LATEST).code == 0
    assert_same_end(output, six)


# -- A full disk, and a save that fails for another reason ---------------------------------------------------------


def files_of(output):
    """Name, size and time of writing of every file of a run."""
    found = {path: path.stat() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    return {str(path.relative_to(output)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def assert_not_written(ended, output, before, what, last):
    """`what` was not written at step 6. All files are as before, and one message says why, and how to go on."""
    assert ended.code == 1, ended.printed
    assert files_of(output) == before
    assert not litter(output)
    (error,) = re.findall("^error: (.*)", ended.printed, re.M)
    assert re.match(re.escape(what) + r" needed, \d+\.\d\d GB free\): ", error), error
    assert f"Stopped at step 6. Last checkpoint: {output / last}: add --resume_from_checkpoint latest" in ended.printed
    assert "Traceback" not in ended.printed


def limit_files(size):
    """Have every write beyond `size` bytes of a file fail. (Python ignores SIGXFSZ, so it is an OSError.)"""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def break_save(part, kind):
    """Have an error of this `kind` raised by the writing of the manifest, or by the renaming to `part`."""

    def fail(*args, **kwargs):
        raise kind("planted")

    if part == sd_config.MANIFEST:
        sd_config.write_manifest = fail
    else:
        rename = Path.rename
        Path.rename = lambda path, target: fail() if Path(target).name == part else rename(path, target)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (functools.partial(limit_files, 3_000_000), "SafetensorError"),  # in the weights
        (functools.partial(limit_files, 8_000_000), ""),  # in the moments
        (functools.partial(break_save, sd_config.MANIFEST, KeyError), "KeyError: 'planted'\n"),
        (functools.partial(break_save, "checkpoint-6", PermissionError), "PermissionError: planted\n"),
    ],
    ids=["weights", "moments", "manifest", "name"],
)
def test_a_save_that_fails_in_the_middle(run, upto, fault, says):
    output = upto(4)
    before = files_of(output)
    ended = run(*SIX, LATEST, "--checkpoints_total_limit=1", before=fault)
    assert_not_written(ended, output, before, f"{output}/checkpoint-6 cannot be written (0.03 GB", "checkpoint-4")
    assert says in ended.printed


def test_an_export_that_fails_in_the_middle(run, upto, six):
    """When there is room again, the resumed run exports what was trained."""
    output = upto(6)
    before = files_of(output)
    ended = run(*SIX, LATEST, before=functools.partial(limit_files, 3_000_000))
    assert_not_written(ended, output, before, f"the pipeline in {output} cannot be written (0.01 GB", "checkpoint-6")
    assert run(*SIX, LATEST).code == 0
    assert_same_end(output, six)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 MB at `tmp_path`/disk. Where none may be mounted, the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", folder]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, room):
    """Have a file take all but `room` bytes of the disk when the training begins."""
    filler = folder / "filler"

    def write(*_):
        if not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(folder).free - room))

    faults.plant(before_micro_batch=write)


@pytest.mark.parametrize("room", [0, 20_000_000], ids=["nothing", "of the moments"])
def test_the_disk_fills_up_while_a_checkpoint_is_written(start, upto, small_disk, room):
    output = upto(4, small_disk / "run", shutil.copy2)
    before = files_of(output)
    ended = start(*SIX, LATEST, output=output, before=functools.partial(fill, small_disk, room))[1]()
    assert_not_written(ended, output, before, f"{output}/checkpoint-6 cannot be written (0.03 GB", "checkpoint-4")
    assert re.search(r" needed, 0\.0\d GB free\)", ended.printed), ended.printed


def test_too_little_room_is_found_before_weights_are_loaded(train, upto, monkeypatch, capfd):
    output = upto(4)
    monkeypatch.setattr(trainer, "load_models", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000_000))
    with pytest.raises(SystemExit) as end:
        train(*SIX, LATEST)
    assert end.value.code == 2
    needed = "0.04 GB needed (1 checkpoint(s) of 0.03 GB, an export of 0.01 GB)"
    printed = capfd.readouterr().err
    assert printed.endswith(f"error: --output_dir {output}: 0.01 GB free, at least {needed}\n")
    assert printed.count("error: ") == 1
    assert steps(output) == [2, 4]


# -- No second trainer -----------------------------------------------------------------------------------------------


def test_a_second_trainer_is_kept_out_until_the_first_ends(train, monkeypatch):
    """Also after a save. (A process loses its lock when it closes any handle of the locked file.)"""
    lock = "import pathlib, sys, sd_config; sd_config.lock(pathlib.Path(sys.argv[1], sd_config.OWN), '--output_dir')"
    answers = []

    def second(folder):
        command = [sys.executable, "-c", lock, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    faults.plant(monkeypatch.setattr, before_micro_batch=lambda run, _: answers.append(second(run.args.output_dir)))
    output = train("--train_batch_size=1", "--max_train_steps=2", "--checkpointing_steps=1").output
    assert answers == [(2, "error: --output_dir: another process is training into it\n")] * 2
    assert second(output) == (0, "")
