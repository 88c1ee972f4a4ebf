"""Whatever kills a run, damages its checkpoints or fills its disk: what was saved is there, and the run goes on.

Each run is a fork of a process that has imported everything and done nothing, which spares the seconds of imports.
"""

import collections
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import sd_config
from conftest import ROOT, assert_same_state, litter, samples, trainer

IMPORTED_BY = os.getpid()
# Everything that has a state of its own to lose.
RANDOM = (
    *("--random_flip", "--caption_dropout=0.3", "--use_ema", "--lr_scheduler=cosine", "--learning_rate=1e-4"),
    *("--train_batch_size=1", "--gradient_accumulation_steps=2"),
)
TWELVE = (*RANDOM, "--max_train_steps=12", "--validation_epochs=100")
SIX = (*RANDOM, "--max_train_steps=6", "--checkpointing_steps=2")
LATEST = "--resume_from_checkpoint=latest"
Ended = collections.namedtuple("Ended", "code printed")


# ------------------------------------------------------------------------------------------------------------
# Runs in processes of their own
# ------------------------------------------------------------------------------------------------------------


def attempt(argv, log, before):
    """Run the trainer in this process, a fork of one that has imported it, with all that it prints in a file."""
    assert os.getppid() == IMPORTED_BY, "the fork server has not imported this module, and each start pays for it"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(write_through=True)  # what is printed before a SIGKILL is to be seen
    trainer.DENOISING_STEPS = 2
    before()
    trainer.main(sd_config.parse_args(argv))


def nothing():
    """What happens before most attempts."""


@pytest.fixture(scope="module")
def start(assets, tmp_path_factory):
    """A function that starts the trainer, and returns its process and a function that waits for its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    logs, count = tmp_path_factory.mktemp("logs"), itertools.count()

    def start(*flags, output, before=nothing):
        log = logs / str(next(count))  # not beside the output: that disk may be full
        process = context.Process(target=attempt, args=([*common(assets, output), *flags], log, before))
        process.start()

        def wait():
            process.join(240)
            process.kill()
            process.join()
            return Ended(process.exitcode, log.read_text())

        return process, wait

    return start


def common(assets, output):
    """The flags of every run."""
    paths = (f"--pretrained_model_name_or_path={assets[0]}", f"--train_data_dir={assets[1]}", f"--output_dir={output}")
    return (*paths, "--seed=7", "--resolution=64", "--report_to=none", "--lr_warmup_steps=0", "--validation_prompts")


@pytest.fixture
def run(start, tmp_path):
    """A function that runs the trainer to its end in `tmp_path`/run."""
    return lambda *flags, before=nothing: start(*flags, output=tmp_path / "run", before=before)[1]()


def exported(output):
    """The exported files by their names, but for those that tell where the UNet was loaded from."""
    files = [file for part in sd_config.PARTS for file in (output / part).rglob("*") if file.is_file()]
    named = {file.relative_to(output).as_posix(): file.read_bytes() for file in [*files, output / "model_index.json"]}
    return {name: content for name, content in named.items() if name != "unet/config.json"}


def assert_same_end(output, reference):
    """A run has ended where another one did, and left nothing unfinished."""
    last = sd_config.checkpoints(reference)[-1].name
    assert_same_state(output / last, reference / last)
    one, other = exported(output), exported(reference)
    # That the tokenizer's file is the same too has a test of its own.
    assert one | {"tokenizer/tokenizer.json": None} == other | {"tokenizer/tokenizer.json": None}
    assert not litter(output)


# ------------------------------------------------------------------------------------------------------------
# Killed at any instant
# ------------------------------------------------------------------------------------------------------------

# What to wait for before killing; a few checkpoints may be let through first.
AIMS = {
    "writing": ".checkpoint-*",
    "sealing": ".checkpoint-*/optimizer.pt",
    "deleting": ".old-checkpoint-*",
    "export": ".export",
}


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The output folder of a run of twelve steps that was never killed, and the seconds that it took."""
    output, begun = tmp_path_factory.mktemp("never-killed") / "run", time.perf_counter()
    ended = start(*TWELVE, "--validation_prompts", "a cat", "--checkpointing_steps=6", output=output)[1]()
    assert ended.code == 0, ended.printed
    return output, time.perf_counter() - begun


def kill(process, output, aim, whole, rng, seen):
    """Kill a run when what `aim` names is under way, or at any instant of half the `whole` seconds that one takes.

    (Started again and again, it comes to its second half all the same.)
    The steps of the checkpoints that come into being meanwhile are added to `seen`.
    """
    begun, found = time.perf_counter(), set()
    passes, delay = rng.randint(1, 2), rng.uniform(0, 0.06)
    if aim in ("deleting", "export"):
        passes, delay = 1, delay * (aim == "export")
    instant = rng.uniform(0, whole / 2) if aim == "instant" else 240
    while process.is_alive() and time.perf_counter() - begun < instant:
        seen |= steps(output)
        found |= set(output.glob(AIMS.get(aim, "instant")))
        if len(found) == passes:
            time.sleep(delay)
            break
        time.sleep(0.0005)
    process.kill()


def steps(output):
    """The steps of all checkpoints in an output folder."""
    return {sd_config.step_of(folder) for folder in sd_config.checkpoints(output)}


def struck(output, since):
    """What a run was doing when it was killed, as what it has left behind since the time `since` tells."""
    marks = {"writing": ".checkpoint-*", "deleting": ".old-checkpoint-*", "export": ".export"}
    fresh = {name for name, mark in marks.items() for path in output.glob(mark) if path.stat().st_ctime > since}
    return fresh or {"else"}


def crash(begin, output, limit, aims, rng, whole):
    """Kill a run for each of `aims`, start it again each time, and check that it never loses a checkpoint.

    Returns what the run was doing at each kill, and the number of starts.
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
        # Each start goes on from the newest checkpoint, which is whole, as are all.
        assert "skipped" not in ended.printed
        resumed = re.findall(r"Resuming from \S+/checkpoint-(\d+):", ended.printed)
        assert resumed in ([str(newest)] if newest else [], []), ended.printed
        found = steps(output)
        assert {n: sd_config.find_damage(output / f"checkpoint-{n}") for n in found} == dict.fromkeys(found)
        seen |= found
        assert found >= set(sorted(seen)[-limit:] if limit else seen)
        assert max(found, default=0) >= newest
        if ended.code == 0:
            assert limit is None or len(found) == limit
            return strikes, starts
        strikes.append(struck(output, since))


def test_killed_at_random_instants_nothing_is_lost(start, reference, tmp_path, request):
    """The crash test: `--kills 100` is its long form."""
    wanted, seed, begun = request.config.getoption("kills"), secrets.randbits(32), time.perf_counter()
    print(f"seed {seed}")  # shown if the test fails
    rng, strikes, starts, runs = random.Random(seed), [], 0, 0

    def share(*kinds):
        return sum(not strike.isdisjoint(kinds) for strike in strikes) / max(1, len(strikes))

    # An aim can be missed: then there are a few more kills than wanted.
    while len(strikes) < wanted or share("writing") < 1 / 3 or share("deleting", "export") < 1 / 10:
        output, limit = tmp_path / f"run-{runs}", (2, None)[runs % 2]
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
        shutil.rmtree(output)
        assert len(strikes) < 2 * wanted + 10, strikes
    counts = collections.Counter(kind for strike in strikes for kind in strike)
    seconds = time.perf_counter() - begun
    print(f"{len(strikes)} kills ({dict(counts)}), {runs} runs, {starts} starts, {seconds:.0f} s")
    assert share("writing") >= 1 / 3
    assert share("deleting", "export") >= 1 / 10


def test_an_export_made_again_is_the_same(run, upto, six):
    """Whether the process that exports has trained before, as here the first has and the second has not."""
    output = upto(6)
    assert run(*SIX, LATEST).code == 0
    assert exported(output) == exported(six)


class Script(subprocess.Popen):
    """A process that can be asked in the same words as those of `multiprocessing`."""

    def is_alive(self):
        return self.poll() is None


def test_the_script_itself_killed_and_started_again(assets, reference, tmp_path):
    """As a user starts it: killed while it writes a checkpoint, then at any instant, then not."""
    seed, output, printed = secrets.randbits(32), tmp_path / "run", tmp_path / "log"
    print(f"seed {seed}")
    rng, whole, codes = random.Random(seed), 0, []
    command = [sys.executable, ROOT / "train_sd1-5_naruto.py", *common(assets, output), *TWELVE, LATEST]
    for aim in ("writing", "instant", None):
        begun = time.perf_counter()
        with open(printed, "w") as log:
            process = Script([*command, "--checkpointing_steps=3"], stdout=log, stderr=log)
        if aim:
            kill(process, output, aim, whole, rng, set())
        codes.append(process.wait(240))
        whole = time.perf_counter() - begun
        assert all(sd_config.find_damage(folder) is None for folder in sd_config.checkpoints(output))
    assert codes == [-9, -9, 0], printed.read_text()
    assert_same_end(output, reference[0])


# ------------------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six(start, tmp_path_factory):
    """The output folder of a whole run with the checkpoints 2, 4 and 6."""
    output = tmp_path_factory.mktemp("six") / "run"
    ended = start(*SIX, output=output)[1]()
    assert ended.code == 0, ended.printed
    return output


@pytest.fixture
def upto(six, tmp_path):
    """A function that makes `tmp_path`/run the run of `six` as it was when it had saved a checkpoint."""

    def copy(step, output=tmp_path / "run", copy_function=os.link):
        for folder in sd_config.checkpoints(six):
            if sd_config.step_of(folder) <= step:
                shutil.copytree(folder, output / folder.name, copy_function=copy_function)
        return output

    return copy


def harm(folder, name, how):
    """Damage a file of a checkpoint (whose files may be linked elsewhere), and return what is then wrong with it."""
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    size = len(content)
    if how == "removed":
        return f"{name} is missing"
    flipped = content[: size // 2] + bytes([content[size // 2] ^ 255]) + content[size // 2 + 1 :]
    content = {"truncated": content[:-1], "flipped": flipped}[how]
    file.write_bytes(content)
    if name == sd_config.MANIFEST:
        with pytest.raises(ValueError) as error:
            json.loads(content.decode())
        return f"{name} or what it lists cannot be read: {error.value}"
    if how == "truncated":
        return f"{name} has {size - 1} bytes instead of {size}"
    return f"{name} is not as it was saved (its checksum differs)"


FILES = [
    f"{part}/{file}" for part in ("unet", "unet_ema") for file in ("config.json", "diffusion_pytorch_model.safetensors")
]
FILES += ["optimizer.pt", "trainer_state.json", sd_config.MANIFEST]


@pytest.mark.parametrize(
    ("name", "how", "limit"),
    [("optimizer.pt", "truncated", 3), ("trainer_state.json", "removed", 2), (FILES[1], "flipped", 1)],
)
def test_training_goes_on_from_before_the_damage(run, upto, six, name, how, limit):
    output = upto(6)
    last = output / "checkpoint-6"
    assert sorted(FILES) == sorted(path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file())
    wrong = harm(last, name, how)
    ended = run(*SIX, LATEST, f"--checkpoints_total_limit={limit}", "--checkpointing_steps=2")
    assert ended.code == 0, ended.printed
    assert ended.printed.count("note: ") == ended.printed.count(f"whole checkpoint: {wrong}\n") == 1
    assert f"Resuming from {output / 'checkpoint-4'}: step 4 of 6" in ended.printed
    assert steps(output) == {2, 4, 6} - set((2, 4)[: 3 - limit])
    assert sd_config.find_damage(output / "checkpoint-6") is None
    assert_same_end(output, six)


def test_no_good_checkpoint_goes_for_a_damaged_later_one(run, upto):
    """The save at step 5 counts neither itself out nor the damaged checkpoint-6 in."""
    output = upto(6)
    harm(output / "checkpoint-6", "optimizer.pt", "truncated")
    flags = (*SIX, "--checkpointing_steps=1", "--checkpoints_total_limit=1", LATEST)
    ended = run(*flags, before=functools.partial(break_save, "checkpoint-6", OSError))
    assert ended.code == 1, ended.printed
    assert sd_config.find_damage(output / "checkpoint-5") is None


def test_no_good_checkpoint_goes_for_a_damaged_earlier_one(run, upto):
    """A checkpoint between the one resumed from and the one saved is one that was passed over: it does not count."""
    output = upto(4)
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-5")
    harm(output / "checkpoint-5", "optimizer.pt", "truncated")
    ended = run(*SIX, LATEST, "--checkpoints_total_limit=2")
    assert ended.code == 0, ended.printed
    assert [folder.name for folder in sd_config.checkpoints(output) if not sd_config.find_damage(folder)] == [
        "checkpoint-4",
        "checkpoint-6",
    ]


def die_deleting():
    """Have the process be killed when it has deleted the first file of a folder."""
    rmtree = shutil.rmtree

    def begin(folder, **kwargs):
        if folder.exists():
            next(path for path in folder.rglob("*") if path.is_file()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(folder, **kwargs)

    shutil.rmtree = begin


def test_half_a_checkpoint_is_never_to_be_seen(run, upto, six):
    """The instant that a random kill meets most seldom: older checkpoints are being deleted."""
    output, flags = upto(4), (*SIX, LATEST, "--checkpoints_total_limit=1")
    assert run(*flags, before=die_deleting).code == -9
    assert litter(output) == [".old-checkpoint-2"]
    assert [sd_config.find_damage(folder) for folder in sd_config.checkpoints(output)] == [None, None]
    assert run(*flags).code == 0
    assert_same_end(output, six)


def die_exporting():
    """Have the process be killed when it has put the second part of the export in its place."""
    replace, count = Path.replace, itertools.count()

    def put(path, target):
        replace(path, target)
        if path.parent.name == ".export" and next(count):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = put


def test_half_an_export_does_not_pass_for_a_pipeline(run, upto, six):
    """Where it replaces an older one: without its index, a folder is no pipeline."""
    output = upto(6)
    shutil.copy2(six / "model_index.json", output)
    assert run(*SIX, LATEST, before=die_exporting).code == -9
    assert litter(output) == [".export"]
    assert not (output / "model_index.json").exists()
    assert run(*SIX, LATEST).code == 0
    assert_same_end(output, six)


# ------------------------------------------------------------------------------------------------------------
# A full disk, and a save that fails for another reason
# ------------------------------------------------------------------------------------------------------------


def files_of(output):
    """Name, size and time of writing of every file of a run."""
    found = {path: path.stat() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    return {str(path.relative_to(output)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def assert_not_saved(ended, output, before, *, step=6):
    """A checkpoint was not written: everything is as before, and one message says why."""
    assert ended.code == 1, ended.printed
    assert files_of(output) == before
    assert not litter(output)
    assert all(sd_config.find_damage(folder) is None for folder in sd_config.checkpoints(output))
    needed = r" cannot be written \(0\.03 GB needed, \d+\.\d\d GB free\): "
    assert len(re.findall(f"^error: {re.escape(str(output))}/checkpoint-{step}{needed}", ended.printed, re.M)) == 1
    assert len(re.findall("^error: ", ended.printed, re.M)) == 1
    last = f"Stopped at step {step}. Last checkpoint: {output / 'checkpoint-4'}: add --resume_from_checkpoint latest"
    assert last in ended.printed
    assert "Traceback" not in ended.printed


def limit_files(size):
    """Let no file grow beyond `size` bytes. (Python ignores SIGXFSZ, so that writing on is an OSError.)"""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [3_000_000, 8_000_000], ids=["of the weights", "of the moments"])
def test_a_file_cannot_be_written_whole(run, upto, size):
    output = upto(4)
    before = files_of(output)
    ended = run(*SIX, LATEST, before=functools.partial(limit_files, size))
    assert_not_saved(ended, output, before)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes at `tmp_path`/disk; skips the test where it may not."""
    folder = tmp_path / "disk"

    def mount(size):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no mount: {error}")
        if done.returncode:
            pytest.skip(f"mounting is refused: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_dir() and folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def fill(folder, room):
    """Have a file take all but `room` bytes of the disk when training begins."""
    original = trainer.train

    def train(run):
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - room))
        original(run)

    trainer.train = train


@pytest.mark.parametrize("room", [0, 4_000_000, 20_000_000], ids=["nothing", "of the weights", "of the moments"])
def test_the_disk_fills_up_while_a_checkpoint_is_written(start, upto, small_disk, room):
    disk = small_disk("128m")
    output = upto(4, disk / "run", shutil.copy2)
    before = files_of(output)
    ended = start(*SIX, LATEST, output=output, before=functools.partial(fill, disk, room))[1]()
    (disk / "filler").unlink()
    assert_not_saved(ended, output, before)
    free = int(re.search(r"(\d+)\.\d\d GB free", ended.printed)[1])
    assert free == 0


def assert_export_explained(ended, output):
    """One message says what could not be written and why, and how to go on."""
    assert ended.code == 1, ended.printed
    assert len(re.findall(f"^error: .*{re.escape(str(output))}.*GB needed, .*GB free", ended.printed, re.M)) == 1, (
        ended.printed
    )
    assert f"Stopped at step 6. Last checkpoint: {output / 'checkpoint-6'}: add" in ended.printed
    assert "Traceback" not in ended.printed


def test_the_disk_fills_up_during_the_export(start, upto, small_disk, six):
    disk = small_disk("128m")
    output = upto(4, disk / "run", shutil.copy2)
    ended = start(*SIX, LATEST, output=output, before=functools.partial(fill, disk, 35_000_000))[1]()
    (disk / "filler").unlink()
    assert sd_config.find_damage(output / "checkpoint-6") is None
    assert not (output / "model_index.json").exists()
    # With room again the run that is resumed exports what was trained.
    again = start(*SIX, LATEST, output=output)[1]()
    assert again.code == 0, again.printed
    assert_same_end(output, six)
    assert_export_explained(ended, output)


def test_the_export_cannot_be_written_whole(run, upto):
    output = upto(6)
    before = files_of(output)
    ended = run(*SIX, LATEST, before=functools.partial(limit_files, 3_000_000))
    assert_export_explained(ended, output)
    assert files_of(output) == before
    assert not litter(output)


def no_weights(free=None):
    """Forbid to load weights, and have the disk be nearly full."""
    trainer.load_models = None
    if free is not None:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(free, 0, free)


@pytest.mark.parametrize("there", [0, 4], ids=["fresh", "resumed"])
def test_too_little_room_is_found_before_weights_are_loaded(run, upto, there):
    output = upto(there)
    ended = run(*SIX, *([LATEST] if there else []), before=functools.partial(no_weights, 10_000_000))
    assert ended.code == 2, ended.printed
    needed = "0.05 GB needed (1 checkpoint(s)" if there else "0.07 GB needed (3 checkpoint(s)"
    message = f"error: --output_dir {output}: 0.01 GB free, at least {needed} of 0.03 GB, an export of 0.02 GB)\n"
    assert ended.printed.count(message) == len(re.findall("^error: ", ended.printed, re.M)) == 1
    assert steps(output) == set(range(2, there + 1, 2))


def break_save(part, kind):
    """Have what a checkpoint is made of fail: `torch.save`, `seal`, or the renaming to a name."""

    def fail(*args, **kwargs):
        raise kind("planted")

    if part == "torch.save":
        torch.save = fail
    elif part == "seal":
        sd_config.write_manifest = fail
    else:
        rename = Path.rename
        Path.rename = lambda path, target: fail() if Path(target).name == part else rename(path, target)


@pytest.mark.parametrize(
    ("part", "kind"),
    [("torch.save", RuntimeError), ("seal", OSError), ("checkpoint-6", PermissionError)],
)
def test_a_save_that_fails_in_the_middle(run, upto, part, kind):
    output = upto(4)
    before = files_of(output)
    ended = run(*SIX, LATEST, "--checkpoints_total_limit=1", before=functools.partial(break_save, part, kind))
    assert_not_saved(ended, output, before)
    assert ended.printed.count(": planted\n") == 1


def test_a_save_that_fails_as_nobody_foresaw(run, upto):
    """An error that is none of the disk's shows its traceback, and harms nothing that was saved."""
    output = upto(4)
    before = files_of(output)
    ended = run(*SIX, LATEST, "--checkpoints_total_limit=1", before=functools.partial(break_save, "seal", KeyError))
    assert ended.code == 1, ended.printed
    assert {name: stat for name, stat in files_of(output).items() if name[0] != "."} == before
    assert "KeyError: 'planted'" in ended.printed
    assert f"Stopped at step 6. Last checkpoint: {output / 'checkpoint-4'}: add" in ended.printed


# ------------------------------------------------------------------------------------------------------------
# No pickle
# ------------------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled as usual, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["torch's format", "a bare pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "unet/diffusion_pytorch_model.bin"])
def test_no_pickle_is_executed(run, upto, tmp_path, name, zipped):
    """The checkpoint's manifest fits: it says that a file is what was written, not who wrote it."""
    output, proof = upto(4), tmp_path / "executed"
    folder = output / "checkpoint-4"
    for stale in (folder / name, (folder / name).with_suffix(".safetensors"), folder / sd_config.MANIFEST):
        stale.unlink(missing_ok=True)
    content = {0: Malicious(proof)}
    if zipped:
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    sd_config.write_manifest(folder)
    ended = run(*SIX, LATEST)
    assert not proof.exists()
    assert ended.code in (1, 2), ended.printed
    assert re.search(f"^error: .*{re.escape(str(folder))}", ended.printed, re.M), ended.printed
    assert name.split("/")[-1] in ended.printed
    assert "Traceback" not in ended.printed


def test_a_second_trainer_is_kept_out_until_the_first_ends(train, monkeypatch):
    """Before and after a save, which touches every file it writes: a lock goes when its file is closed anywhere."""
    hold = "import pathlib, sys, sd_config; sd_config.lock(pathlib.Path(sys.argv[1]))"
    answers, original = [], trainer.train_step

    def second(folder):
        done = subprocess.run(
            [sys.executable, "-c", hold, folder], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.returncode, "another process is training into it" in done.stderr

    def train_step(run, batch):
        answers.append(second(run.args.output_dir))
        return original(run, batch)

    monkeypatch.setattr(trainer, "train_step", train_step)
    result = train("--train_batch_size=1", "--max_train_steps=2", "--checkpointing_steps=1")
    assert answers == [(2, True)] * 2
    assert second(result.output) == (0, False)
