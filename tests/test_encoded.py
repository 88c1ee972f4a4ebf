"""Encoding pictures and captions only once trains the same, and nothing is spoilt if it is killed meanwhile."""

import json
import multiprocessing
import os
import re
import shutil

import pytest

from conftest import assert_same_state, difference, learned, trainer, weights

# Ten steps of four samples, which need all that is encoded: a picture and its mirror image, and the empty caption.
FLAGS = (
    *("--center_crop", "--random_flip", "--caption_dropout=0.3", "--use_ema", "--learning_rate=3e-4"),
    *("--train_batch_size=4", "--max_train_steps=10", "--checkpointing_steps=5"),
)
SHORT = (*FLAGS, "--max_train_steps=2", "--cache_latents=on")


@pytest.fixture
def encodings(monkeypatch):
    """A list of the sizes of the batches of pictures that have been encoded."""
    sizes, original = [], trainer.Frozen.encode_pictures

    def encode_pictures(vae, pixel_values):
        sizes.append(len(pixel_values))
        return original(vae, pixel_values)

    monkeypatch.setattr(trainer.Frozen, "encode_pictures", encode_pictures)
    return sizes


def encoded_files(folder):
    """The files of encoded rows below a folder, each with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("encoded-*/*")) if path.name != ".lock"}


def test_encoding_once_trains_what_encoding_each_time_trains(train, assets, encodings):
    each = train(*FLAGS, "--cache_latents=off", output="each")
    assert sum(encodings) == 10 * 4
    assert not encoded_files(each.output)
    encodings.clear()
    once = train(*FLAGS, output="once")
    assert sum(encodings) == 14 * 2
    start = weights(assets[0] / "unet")
    for part in ("unet", "unet_ema"):
        trained, expected = (weights(run.output / "checkpoint-10" / part) for run in (once, each))
        assert difference(trained, expected, start) <= 1e-4
    resumed = [f"--resume_from_checkpoint={once.output / 'checkpoint-5'}", "--dataloader_num_workers=2"]
    again = train(*FLAGS, *resumed, output="again")
    assert_same_state(again.output / "checkpoint-10", once.output / "checkpoint-10")
    assert learned(again) == {step: values for step, values in learned(once).items() if step > 5}


def test_the_next_run_finds_what_was_encoded_and_says_so_unless_it_is_damaged(
    train, assets, tmp_path, encodings, capsys
):
    before = sorted(path.name for path in assets[1].iterdir())
    first = train(*SHORT, f"--cache_dir={tmp_path / 'kept'}", output="first")
    assert not encoded_files(first.output)
    assert "found" not in capsys.readouterr().out
    encodings.clear()
    files = encoded_files(tmp_path / "kept")
    second = train(*SHORT, f"--cache_dir={tmp_path / 'kept'}", output="second")
    assert encodings == []
    assert encoded_files(tmp_path / "kept") == files
    (folder,) = (tmp_path / "kept").glob("encoded-*")
    printed = capsys.readouterr().out
    assert f"Encoded pictures and captions: found in {folder}" in printed
    assert_same_state(first.output / "checkpoint-2", second.output / "checkpoint-2")
    for path in files:
        path.write_bytes(path.read_bytes()[:-5000])
    third = train(*SHORT, f"--cache_dir={tmp_path / 'kept'}", output="third")
    assert sum(encodings) == 14 * 2
    assert learned(first) == learned(third)
    for path in folder.glob("*.arrow"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # among the values, where nothing else would notice it
        path.write_bytes(content)
    fourth = train(*SHORT, f"--cache_dir={tmp_path / 'kept'}", output="fourth")
    assert sum(encodings) == 2 * 14 * 2
    assert learned(first) == learned(fourth)
    assert sorted(path.name for path in assets[1].iterdir()) == before


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder for what the runs of several tests encode."""
    return tmp_path_factory.mktemp("kept")


def test_killed_while_encoding_it_starts_again(train, train_once, kept, tmp_path, encodings, monkeypatch):
    """A process is killed in the second batch of pictures. What it leaves is not used, and is deleted."""
    whole = train_once(*SHORT, f"--cache_dir={kept}")
    child = multiprocessing.get_context("fork").Process(target=killed_while_encoding, args=(train, monkeypatch))
    child.start()
    child.join(120)
    assert child.exitcode == 9
    assert [path.suffix for path in encoded_files(tmp_path / "killed")] == [""]  # a temporary file

    encodings.clear()
    again = train(*SHORT, output="killed")
    assert sum(encodings) == 14 * 2
    assert [path.name for path in encoded_files(tmp_path / "killed")] == [
        "captions.arrow",
        "manifest.json",
        "pictures.arrow",
    ]
    (manifest,) = (tmp_path / "killed").glob("encoded-*/manifest.json")
    assert [*json.loads(manifest.read_text(encoding="utf-8"))] == ["captions.arrow", "pictures.arrow"]
    assert_same_state(whole.output / "checkpoint-2", again.output / "checkpoint-2")


def killed_while_encoding(train, monkeypatch):
    """Train, and have this process end in the second batch of pictures as if it were killed."""
    original, batches = trainer.Frozen.encode_pictures, []

    def encode_pictures(frozen, pixel_values):
        if batches:
            os._exit(9)
        batches.append(pixel_values)
        return original(frozen, pixel_values)

    monkeypatch.setattr(trainer.Frozen, "encode_pictures", encode_pictures)
    train(*SHORT, output="killed")


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ("--resolution=128", 28),
        ("--image_interpolation_mode=nearest", 28),
        ("--max_train_samples=13", 26),
        ("--mixed_precision=bf16", 28),
        ("no --random_flip", 14),
        ("a caption", 28),
        ("a bit of the VAE", 28),
    ],
)
def test_what_depends_on_something_else_is_encoded_anew(
    train, train_once, assets, tmp_path, encodings, kept, change, count
):
    """What other runs have encoded stays as it is."""
    flags = [*SHORT, f"--cache_dir={kept}"]
    train_once(*flags)
    encodings.clear()
    files = encoded_files(kept)
    assert files
    model, photos = (shutil.copytree(folder, tmp_path / folder.name) for folder in assets)
    if change == "no --random_flip":
        flags.remove("--random_flip")
    elif change == "a caption":
        file = photos / "metadata.jsonl"
        file.write_text(file.read_text().replace("a ginger cat", "a grumpy cat"))
    elif change == "a bit of the VAE":
        file = model / "vae/diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
    else:
        flags.append(change)
    train(*flags, model=model, data=photos)
    assert sum(encodings) == count
    assert files.items() < encoded_files(kept).items()


def test_an_encoding_for_which_the_disk_has_no_room_is_a_message(train, capsys, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.Frozen, "encode_pictures", fail)
    with pytest.raises(SystemExit) as end:
        train(*SHORT)
    printed = capsys.readouterr().err
    assert end.value.code == 1
    assert re.search(
        "error: the encodings in .* cannot be written .* needed, .* free.*No space left on device", printed
    )
    assert "Traceback" not in printed
