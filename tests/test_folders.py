"""Folders of pictures as users have them: what is read, and what a run says about the rest."""

import io
import json
import multiprocessing
import os
import shutil
import tarfile
from glob import glob
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import sd_config
from conftest import assert_same, only, trainer

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".avif": "AVIF", ".bmp": "BMP"}
CATS = {"one.png": None, "two.jpg": None, "one.txt": "a cat", "two.txt": "a dog"}
LISTED = '{"file_name": "one.png", "text": "a bird"}\n{"file_name": "two.jpg", "text": "a fish"}\n'
BARE = {"one.png": None, "two.jpg": None}
ASKS = "--caption_column text: the columns are image. Captions of a folder of pictures are given in one of three ways:"
NEAR = "  found, but not read under this name or in this place: {folder}/"


def picture(name, size=(80, 72)):
    """The bytes of a picture that depends on its name, in the format of its suffix."""
    noise = np.random.default_rng(list(name.encode())).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, FORMATS[os.path.splitext(name)[1].lower()])
    return content.getvalue()


def fill(folder, files):
    """Write files by their names; None stands for a picture."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = picture(path.name) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


ABOVE = NEAR.replace("folder", "above")
# What a folder holds -> the captions of its rows in their order, and what is said besides; or the error.
FOLDERS = {
    "captions in .txt": (CATS, ["a cat", "a dog"], []),
    "several captions": (
        CATS | {"one.txt": "a cat\n\n a black cat \r\n"},
        [["a cat", "a black cat"], "a dog"],
        ["1 picture(s) have several captions, one a line, of which each sample takes one"],
    ),
    "a phone's": (
        CATS | {"IMG_1.HEIC": "?", "IMG_1.txt": "?", "x/v.mov": "?"},
        ["a cat", "a dog"],
        ["3 file(s) are neither pictures that PIL here reads nor the caption of one: IMG_1.HEIC, IMG_1.txt, x/v.mov"],
    ),
    "byte order mark": (CATS | {"one.txt": "\ufeffun café"}, ["un café", "a dog"], []),
    "suffixes of any case, and new formats": (
        {"B.JPG": None, "a.AVIF": None, "c.webp": None, "B.TXT": "b", "a.txt": "a", "c.txt": "c"},
        ["b", "a", "c"],
        [],
    ),
    "a video, and a name like a Mac's": (
        {f"__MACOSX_2/{name}": CATS[name] for name in CATS} | {"clip.mpg": "?"},
        ["a cat", "a dog"],
        ["1 file(s) are neither pictures that PIL here reads nor the caption of one: clip.mpg"],
    ),
    "another line separator": (CATS | {"one.txt": "a cat\u2028on a mat"}, ["a cat\u2028on a mat", "a dog"], []),
    "names of splits": (
        {"a-test.png": None, "test/b.png": None, "a-test.txt": "?", "metadata.jsonl": LISTED.replace("one", "a-test")}
        | {"two.jpg": None},
        ["a bird", "a fish"],
        [
            "the captions are those of metadata.jsonl; the .txt files beside pictures are not read",
            "1 of 3 pictures are not listed in metadata.jsonl, and not trained on: test/b.png",
        ],
    ),
    "dots in names": ({"a.b.png": None, "a.png": None, "a.txt": "a", "a.b.txt": "ab"}, ["ab", "a"], []),
    "subfolders": ({f"x/{name}": CATS[name] for name in CATS} | CATS, ["a cat", "a dog"] * 2, []),
    "hidden files and a Mac's": (
        CATS | {".cache/x.png": None, "._one.png": "?", "__MACOSX/._two.jpg": "?", ".DS_Store": "?"},
        ["a cat", "a dog"],
        [],
    ),
    "kohya's": (
        {f"10_naruto/{name}": CATS[name] for name in CATS},
        ["a cat", "a dog"],
        ["10_naruto: every picture counts once; the number of repeats in a folder's name is not applied"],
    ),
    ".txt without a picture": (
        CATS | {"prompts.txt": "?"},
        ["a cat", "a dog"],
        ["1 file(s) are neither pictures that PIL here reads nor the caption of one: prompts.txt"],
    ),
    "metadata and .txt": (
        CATS | {"metadata.jsonl": LISTED},
        ["a bird", "a fish"],
        ["the captions are those of metadata.jsonl; the .txt files beside pictures are not read"],
    ),
    "pictures that metadata does not list": (
        BARE | {"metadata.jsonl": LISTED, "three.png": None, "x/four.png": None},
        ["a bird", "a fish"],
        ["2 of 4 pictures are not listed in metadata.jsonl, and not trained on: three.png, x/four.png"],
    ),
    "metadata.csv": (BARE | {"metadata.csv": 'file_name,text\none.png,"a, b"\ntwo.jpg,c\n'}, ["a, b", "c"], []),
    "a picture without a caption": (
        {f"{n:02}.png": None for n in range(13)} | {"00.txt": "a", "12.txt": " \n"},
        SystemExit,
        ["{folder}: 12 of 13 pictures have no caption in a .txt file beside them: 01.png, 02.png, 03.png, 04.png"],
    ),
    "captions that are not UTF-8": (
        CATS | {"two.txt": "café".encode("latin-1")},
        SystemExit,
        ["{folder}/two.txt: cannot be read as UTF-8 text: "],
    ),
    "no captions": (BARE, SystemExit, [ASKS]),
    "a misspelled metadata file": (BARE | {"metadata.json1": LISTED}, SystemExit, [ASKS, NEAR + "metadata.json1"]),
    "one file with all captions": (BARE | {"captions.txt": "?"}, SystemExit, [ASKS, NEAR + "captions.txt"]),
    "kohya's metadata": (BARE | {"meta_cap.json": "{}"}, SystemExit, [ASKS, NEAR + "meta_cap.json"]),
    "metadata one level up": (BARE | {"../metadata.jsonl": LISTED}, SystemExit, [ASKS, ABOVE + "metadata.jsonl"]),
    "kohya's .caption files": (BARE | {"one.caption": "a"}, SystemExit, [ASKS, NEAR + "one.caption"]),
    "captions in another column": (
        BARE | {"metadata.jsonl": LISTED.replace("text", "prompt")},
        SystemExit,
        ["--caption_column text: the columns are image, prompt"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_a_link_to_a_folder_lists_all_its_pictures(train, tmp_path, capfd, flag):
    fill(tmp_path / "photos", BARE | {"metadata.jsonl": LISTED})
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    train(f"{flag}={tmp_path / 'link'}", "--dry_run", data=None)
    assert "not listed" not in capfd.readouterr().out


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize("files, captions, says", FOLDERS.values(), ids=FOLDERS)
def test_folders_as_users_have_them(train, tmp_path, capfd, monkeypatch, flag, files, captions, says):
    folder = fill(tmp_path / "above/photos", files)
    read, original = [], trainer.load_rows
    monkeypatch.setattr(trainer, "load_rows", lambda *args: read.append(original(*args)) or read[-1])
    flags = (f"{flag}={folder}", "--dry_run")
    if captions is SystemExit:
        with pytest.raises(SystemExit) as exit_info:
            train(*flags, data=None)
        assert exit_info.value.code == 2
        lines = capfd.readouterr().err.splitlines()
        first, *rest = (text.format(folder=folder, above=folder.parent) for text in says)
        assert only([line for line in lines if line.startswith("error: ")]).startswith(f"error: {first}")
        assert all(line in lines for line in rest), lines
        return
    train(*flags, data=None)
    assert only(read).captions == [[text] if isinstance(text, str) else text for text in captions]
    notes = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {text}" for text in says]


def test_links_in_circles_do_not_multiply_pictures(train, tmp_path, monkeypatch):
    """A linked folder is read, and none twice."""
    folder = fill(tmp_path / "photos", CATS)
    (folder / "self").symlink_to(folder)
    (folder / "x").symlink_to(fill(tmp_path / "elsewhere", {"b.png": None, "b.txt": "b"}))
    read, original = [], trainer.load_rows
    monkeypatch.setattr(trainer, "load_rows", lambda *args: read.append(original(*args)) or read[-1])
    train(f"--train_data_dir={folder}", "--dry_run", data=None)
    assert only(read).captions == [["a cat"], ["a dog"], ["b"]]


@pytest.mark.parametrize("text", ["sample.txt", "notes.txt"])
def test_an_example_beside_a_table_is_not_the_data(train, assets, tmp_path, text):
    photos = datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train")
    folder = fill(tmp_path / "table", {"sample.png": None, text: "an example"})
    photos.to_parquet(folder / "train-00000.parquet")
    run = train(f"--dataset_name={folder}", "--max_train_steps=1", "--train_batch_size=2", data=None)
    assert len(run.run.stream.rows.kept) == len(photos)


def test_captions_in_txt_give_the_samples_of_the_same_captions_in_metadata(train, tmp_path):
    names = [f"{name}.{suffix}" for name, suffix in zip("acbd", ("png", "jpg", "webp", "bmp"), strict=True)]
    captions = {name: f"a picture called {name}" for name in names}
    beside = fill(tmp_path / "beside", dict.fromkeys(names) | {f"{n[0]}.txt": captions[n] for n in names})
    lines = [json.dumps({"file_name": name, "text": captions[name]}) for name in sorted(names)]
    listed = fill(tmp_path / "listed", dict.fromkeys(names) | {"metadata.jsonl": "\n".join(lines)})
    for cache in ("off", "on"):
        flags = (
            "--random_flip",
            "--center_crop",
            f"--cache_latents={cache}",
            "--max_train_steps=3",
            "--train_batch_size=2",
        )
        runs = [train(*flags, data=data, output=f"{data.name}-{cache}") for data in (beside, listed)]
        streams = [result.run.stream for result in runs]
        assert bool(streams[0].encoded) == (cache == "on")
        for position in range(12):
            assert_same(streams[0][position], streams[1][position])
        assert runs[0].logs[3]["train/loss"] == runs[1].logs[3]["train/loss"]


def test_rows_have_one_order_on_every_file_system(tmp_path, monkeypatch):
    folder = fill(tmp_path / "photos", CATS | {"x/a.png": None, "x/a.txt": "x", "B.png": None, "B.txt": "b"})
    found = []
    for listed in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(
            trainer.glob, "glob", lambda pattern, listed=listed, **_: listed(glob(pattern, recursive=True))
        )
        found.append([path.relative_to(folder).as_posix() for path in trainer.PictureFolder(folder).pictures])
    assert found == [["B.png", "one.png", "two.jpg", "x/a.png"]] * 2


def test_tars_of_webdataset_are_read(train, tmp_path):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        for name, content in (("a.jpg", picture("a.jpg")), ("a.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    flags = ("--image_column=jpg", "--caption_column=txt", "--max_train_steps=1", "--train_batch_size=2")
    for flag in ("dataset_name", "train_data_dir"):
        result = train(f"--{flag}={tmp_path / 'shards'}", *flags, data=None, output=flag)
        assert result.run.stream.rows.captions == [["a cat"]]


def test_workers_that_are_spawned_read_such_a_folder(train, tmp_path):
    """As on Windows and macOS, where they get the rows as a pickle."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        flags = (f"--train_data_dir={fill(tmp_path / 'photos', CATS)}", "--max_train_steps=2", "--train_batch_size=2")
        one, other = (train(*flags, f"--dataloader_num_workers={n}", data=None, output=str(n)) for n in (0, 1))
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert one.logs[2]["train/loss"] == other.logs[2]["train/loss"]


@pytest.fixture
def fingerprint(train, monkeypatch, capfd):
    """A function that has a dry run look at a folder, and returns its fingerprint and how many pictures it read."""
    rows, read, load, read_bytes = [], [], trainer.load_rows, Path.read_bytes
    monkeypatch.setattr(trainer, "load_rows", lambda *args: rows.append(load(*args)) or rows[-1])
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))

    def look(folder):
        read.clear()
        train(f"--train_data_dir={folder}", "--dry_run", data=None)
        pictures = [path for path in read if path.suffix in FORMATS]
        trusted = "note: pictures not read again, as sizes and times of modification are those in "
        assert (trusted in capfd.readouterr().out) == (not pictures)
        return rows[-1].fingerprint, len(pictures)

    return look


def test_pictures_are_read_again_only_if_they_may_have_changed(fingerprint, tmp_path):
    folder = fill(tmp_path / "photos", CATS)
    assert fingerprint(folder)[1] == 2
    first, count = fingerprint(folder)
    assert count == 2, "what was changed two seconds ago may change again without a trace"
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    assert [fingerprint(folder) for _ in range(2)] == [(first, 2), (first, 0)]

    shutil.copy(folder / "one.png", tmp_path / "kept.png")
    content = bytearray((folder / "one.png").read_bytes())
    content[-20] ^= 1  # in its checksum: a picture of the same size
    (folder / "one.png").write_bytes(content)
    os.utime(folder / "one.png", (1e9, 1e9 + 1))
    exchanged, count = fingerprint(folder)
    assert (exchanged != first, count) == (True, 2)

    shutil.copy2(tmp_path / "kept.png", folder / "one.png")
    os.utime(folder / "one.png", (1e9, 1e9))
    assert fingerprint(folder) == (first, 0)
    (folder / "one.txt").write_text("another caption")
    assert fingerprint(folder)[0] not in (first, exchanged)


def test_the_same_names_in_another_place_are_other_pictures(tmp_path, monkeypatch):
    """Here they even have the same sizes and times."""
    found = []
    for name in ("one", "other"):
        pixels = Image.new("RGB", (9, 9), "red" if name == "one" else "blue")
        (tmp_path / name / "photos").mkdir(parents=True)
        pixels.save(tmp_path / name / "photos/a.bmp")
        os.utime(tmp_path / name / "photos/a.bmp", (1e9, 1e9))
        (tmp_path / name / "photos/a.txt").write_text("a square")
        monkeypatch.chdir(tmp_path / name)
        args = sd_config.parse_args(["--train_data_dir=photos"])
        found.append(trainer.hash_pictures(trainer.read_dataset(args, None), args)[0])
    assert found[0] != found[1]


def test_a_picture_that_cannot_be_read_is_looked_for_again(tmp_path):
    lines = LISTED + '{"file_name": "gone.png", "text": "gone"}\n'
    folder = fill(tmp_path / "photos", BARE | {"gone.png": None, "metadata.jsonl": lines})
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    args = sd_config.parse_args([f"--train_data_dir={folder}"])
    (folder / "gone.png").rename(folder / "moved")
    assert list(trainer.hash_pictures(rows, args)[1]) == list(trainer.hash_pictures(rows, args)[1]) == [2]
    (folder / "moved").rename(folder / "gone.png")
    assert trainer.hash_pictures(rows, args)[1] == {}


def test_pictures_inside_of_a_table_are_read_again_only_if_its_file_changes(assets, tmp_path, monkeypatch):
    photos = datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train").select(range(3))
    photos.save_to_disk(tmp_path / "one")
    swapped = {"image": photos.select([1, 0, 2])["image"], "text": photos["text"]}
    datasets.Dataset.from_dict(swapped, features=photos.features).save_to_disk(tmp_path / "other")
    read = []
    monkeypatch.setattr(trainer, "tqdm", lambda rows, **_: read.append(rows) or rows)

    def look(name):
        table = datasets.Dataset.load_from_disk(tmp_path / name)
        assert trainer.paths_of(table, sd_config.parse_args([])) == [None] * 3
        return trainer.hash_pictures(table, sd_config.parse_args([]))[0], len(read)

    first, _ = look("one")
    assert look("one") == (first, 1)
    shutil.copytree(tmp_path / "other", tmp_path / "one", dirs_exist_ok=True)
    assert look("one") != (first, 1)
    assert len(read) == 2
