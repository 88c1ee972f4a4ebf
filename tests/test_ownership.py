"""A run deletes and overwrites only what it can prove to have written, and does not go on where it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sd_config
from conftest import ROOT, litter, make_file, trainer

FLAGS = ("--max_train_steps=4", "--checkpointing_steps=2", "--train_batch_size=2", "--use_ema")
PICTURES = ("--validation_epochs=1", "--validation_prompts=a cat")
OVERWRITE = "--overwrite_output_dir"
RESUME = "--resume_from_checkpoint"
OWN = f"{sd_config.OWN}@"


def snapshot(folder):
    """What lies in a folder, but for the program's own: {path: content, or where a link points}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(folder)] = os.readlink(path)
        elif path.is_file() and sd_config.OWN not in path.parts:
            found[path.relative_to(folder)] = path.read_bytes()
    return found


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def output(train, kept, tmp_path):
    """The folder of a finished run with checkpoints, pictures and an export; the run is done once, and copied."""
    if not kept.exists():
        shutil.copytree(train(*FLAGS, *PICTURES, "--center_crop", "--cache_latents=on").output, kept)
        shutil.rmtree(tmp_path / "run")
    return shutil.copytree(kept, tmp_path / "run")


def make(folder, name):
    """Put somebody's file into a folder; a name that ends in @ is a link to nowhere near a run."""
    path = make_file(folder, name.removesuffix("@"))
    if name.endswith("@"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(folder.parent / "elsewhere")
    elif path.suffix == ".png":
        Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.fixture
def refused(train, capsys):
    """A function that runs the trainer, which must end with exit code 2, and returns what it said."""

    def run(*flags, **kwargs):
        with pytest.raises(SystemExit) as end:
            train(*FLAGS, *flags, **kwargs)
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        return said

    return run


STRANGERS = """samples/step-3/mine.txt samples/step-3/mine.png checkpoint-500/model.bin README.md model_index.json
    unet/x image_encoder/x"""


@pytest.mark.parametrize("name", [*STRANGERS.split(), "unet@", "samples@", "checkpoint-2@", "samples/step-4@", OWN])
@pytest.mark.parametrize("flag", [None, OVERWRITE])
def test_files_of_no_run_stop_a_run_that_needs_their_place(refused, tmp_path, name, flag):
    """Not even an empty folder of a checkpoint's name makes them a run's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/checkpoint-7").mkdir(parents=True)
    path = make(tmp_path / "run", name)
    (tmp_path / "elsewhere/mine.txt").touch()
    before = snapshot(tmp_path)
    assert f"no run wrote {path.relative_to(tmp_path / 'run')} in it" in refused(*filter(None, [flag]))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["unet/mine.txt", "samples/step-4/mine.txt", "checkpoint-4/mine.txt", "README.md", "vae@"]
)
def test_files_among_a_runs_own_stop_a_run_that_would_delete_them(refused, output, name):
    make(output, name)
    before = snapshot(output)
    assert f"no run wrote {name.removesuffix('@')} in it" in refused(OVERWRITE)
    assert snapshot(output) == before


def test_nothing_else_is_touched(train, output):
    """Neither by a start, which clears away what was left unfinished, nor by starting over."""
    names = """.mybest-checkpoint-500/x .notes-on-checkpoint-500.txt .checkpoint-2/x samples/mine.txt samples/grid.png
        encoded-mine/x encoded-0123456789abcdef/mine.txt checkpoint-best/x checkpoint-0/x checkpoint-0500/x
        samples/step-0/x mine/unet/x logs/mine.txt manifest.json .lock"""
    mine = [make(output, name) for name in names.split()]
    unfinished = make(output / sd_config.OWN, "checkpoint-500/unet/x")
    before = {path: path.read_bytes() for path in mine}
    train(*FLAGS, f"{RESUME}=latest", "--max_train_steps=5")
    assert {path: path.read_bytes() for path in mine} == before
    assert not unfinished.parent.exists()
    train(*FLAGS, OVERWRITE, "--max_train_steps=2")
    assert {path: path.read_bytes() for path in mine} == before
    assert [path.name for path in sd_config.checkpoints(output)] == ["checkpoint-2"]
    assert [path.name for path in output.glob("samples/step-*")] == ["step-0"]
    assert sorted(path.name for path in output.glob("encoded-*")) == ["encoded-0123456789abcdef", "encoded-mine"]
    assert not litter(output)


def test_files_of_no_run_in_the_programs_own_folder_stay(train, output):
    mine = make(output / sd_config.OWN, "mine.txt")
    train(*FLAGS, OVERWRITE, "--max_train_steps=1")
    assert mine.exists()


def test_a_checkpoint_that_was_renamed_is_skipped(train, output, capsys):
    (output / "checkpoint-4").rename(output / "checkpoint-9")
    train(*FLAGS, f"{RESUME}=latest", "--max_train_steps=10", output="run")
    printed = capsys.readouterr()
    assert "checkpoint-9: skipped, not a whole checkpoint: it holds step 4, so its name was changed" in printed.err
    assert "checkpoint-2: step 2 of 10" in printed.out


def test_an_export_that_cannot_take_its_place_waits(train, output, monkeypatch, capsys):
    rename = Path.rename

    def refuse(path, target):
        if path.name == "vae":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SystemExit) as end:
        train(*FLAGS, f"{RESUME}=latest", "--max_train_steps=5")
    assert end.value.code == 1
    assert "Permission denied; what has not been moved yet is in " in capsys.readouterr().err
    assert (output / sd_config.OWN / "export/model_index.json").exists()


@pytest.mark.parametrize("older", [False, True])
def test_a_start_over_that_is_killed_can_be_started_again(train, output, monkeypatch, older):
    """At whatever folder it is killed, what is left is known as a run's."""
    if older:
        shutil.rmtree(output / sd_config.OWN)
        (output / sd_config.OWN).mkdir()
    for _ in range(20):
        args = sd_config.parse_args([f"--output_dir={output}", "--lr_warmup_steps=0", OVERWRITE])
        with monkeypatch.context() as patch:
            patch.setattr(sd_config, "discard", lambda folder, own: folder.rename(own / f"old-{folder.name}") and 1 / 0)
            try:
                sd_config.clear_output(args, None)
                break
            except ZeroDivisionError:
                assert litter(output)
    train(*FLAGS, OVERWRITE, "--max_train_steps=1")
    assert [path.name for path in sd_config.checkpoints(output)] == ["checkpoint-1"]


def test_what_older_versions_wrote_is_known(train, output):
    """They kept no manifest of the export, and gave pictures a chunk of text for each setting, and a grid none."""
    shutil.rmtree(output / sd_config.OWN)
    for path in output.glob("samples/*/*.png"):
        text = PngInfo()
        for name in ("prompt", "seed", "num_inference_steps") if path.name != "grid.png" else ():
            text.add_itxt(name, "1")
        Image.open(path).copy().save(path, pnginfo=text)
    train(*FLAGS, OVERWRITE, "--max_train_steps=3")
    assert [path.name for path in sd_config.checkpoints(output)] == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_with_a_file_of_no_run_is_not_pruned(train, output, capsys):
    mine = make(output, "checkpoint-2/notes.txt")
    train(*FLAGS, f"{RESUME}=latest", "--max_train_steps=6", "--checkpoints_total_limit=1")
    assert [path.name for path in sd_config.checkpoints(output)] == ["checkpoint-2", "checkpoint-6"]
    assert f"warning: {mine.parent} is kept: no run wrote notes.txt in it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [".lock", ".export", ".checkpoint-2", "encoded-0", sd_config.OWN, "checkpoint-x", "vae"]
)
def test_logs_have_a_folder_of_their_own(refused, name):
    assert f"--logging_dir {name}: must be a folder of its own" in refused(f"--logging_dir={name}")


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../x"])
def test_the_trackers_project_is_no_path_to_another_folder(refused, name):
    assert f"--tracker_project_name {name}: must be a name" in refused(f"--tracker_project_name={name}")


def test_output_is_no_link_to_nothing(refused, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nothing")
    assert f"--output_dir {tmp_path / 'run'}: must be a folder" in refused()


@pytest.mark.parametrize("place", ["run/samples", "run/samples/step-4", ".", "run/encoded-0123456789abcdef"])
def test_training_data_and_results_do_not_mix(refused, assets, tmp_path, place):
    data = shutil.copytree(assets[1], tmp_path / place, dirs_exist_ok=True)
    before = snapshot(tmp_path)
    for flags in ((), (OVERWRITE,)):
        assert "would mix with --train_data_dir" in refused(*flags, data=data)
    assert snapshot(tmp_path) == before


def test_encodings_are_deleted_with_their_run_but_never_in_a_shared_folder(train, tmp_path):
    once = (*FLAGS, "--center_crop", "--cache_latents=on")
    (train(*once).output / "model_index.json").exists()
    train(*once, OVERWRITE, "--resolution=32")
    assert len([*(tmp_path / "run").glob("encoded-*")]) == 1
    for size in (64, 32):
        train(*once, OVERWRITE, f"--cache_dir={tmp_path / 'cache'}", f"--resolution={size}")
    assert len([*(tmp_path / "cache").glob("encoded-*")]) == 2


def test_a_run_encodes_as_it_began(train, monkeypatch, capsys):
    """Even if the disk has become too tight for encodings, or has room for them now: otherwise it is not exact."""
    usage, auto = shutil.disk_usage, (*FLAGS, "--center_crop", "--cache_latents=auto", "--max_train_steps=8")

    def disk_with(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))

    monkeypatch.setattr(sd_config, "compare_disk", lambda *args: ([], []))
    for begin, (then, says) in ((10**12, (10**6, "once, kept in")), (10**6, (10**12, "as in the run so far"))):
        disk_with(begin)
        train(*auto, output=str(begin))
        capsys.readouterr()
        disk_with(then)
        train(*auto, f"{RESUME}=latest", "--max_train_steps=9", output=str(begin))
        assert says in capsys.readouterr().out


def test_encodings_of_earlier_runs_are_no_room_for_those_of_this_one(tmp_path):
    make(tmp_path, "encoded-0123456789abcdef/pictures.arrow").write_bytes(bytes(10**6))
    args = sd_config.parse_args([f"--output_dir={tmp_path}", "--center_crop", "--lr_warmup_steps=0"])
    plan = sd_config.Plan(args, rows=100, processes=1, parameters=10**6, texts=10)
    assert plan.encoded_missing == plan.encoded_bytes > 10**6
    known = sd_config.Plan(args, rows=100, processes=1, parameters=10**6, texts=10, encoding="encoded-0123456789abcdef")
    assert known.encoded_missing == 0


def test_a_run_that_went_on_elsewhere_says_where_its_last_checkpoint_is(train, output, monkeypatch, capsys):
    def fail(*_args):
        raise RuntimeError("unexpected")

    monkeypatch.setattr(trainer, "create_loader", fail)
    monkeypatch.setattr(trainer.Checkpoints, "save", lambda *_args: None)
    with pytest.raises(SystemExit):
        train(*FLAGS, f"{RESUME}={output / 'checkpoint-2'}", output="other")
    assert (
        f"Last checkpoint: {output / 'checkpoint-2'}: add {RESUME} {output / 'checkpoint-2'} to"
        in capsys.readouterr().err
    )


def test_pictures_made_up_for_elsewhere_name_no_checkpoint(train, output, tmp_path):
    """A validation that the run before had not finished is drawn by the run that goes on, in its own folder."""
    train(*FLAGS, *PICTURES, f"{RESUME}={output / 'checkpoint-4'}", output="other")
    (picture,) = (tmp_path / "other/samples/step-4").glob("0-*.png")
    assert "checkpoint-4" not in str(Image.open(picture).text)


def test_the_demo_draws_over_nothing(tmp_path):
    script = [sys.executable, str(ROOT / "tests/demo/portraits.py"), str(tmp_path / "ninja"), "--rows=2"]
    assert subprocess.run(script, check=False).returncode == 0
    before = snapshot(tmp_path)
    assert subprocess.run(script, check=False).returncode == 0  # the same pictures again
    for name in ("metadata.jsonl", "00000.png"):
        (tmp_path / "ninja" / name).write_bytes(b"mine")
        done = subprocess.run(script, check=False, capture_output=True, text=True)
        assert (done.returncode, Path(tmp_path / "ninja" / name).read_bytes()) == (2, b"mine")
        assert f"{name} is not" in done.stderr
        (tmp_path / "ninja" / name).write_bytes(before[Path("ninja") / name])
