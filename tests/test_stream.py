"""The data: which sample is at which position, how pictures become tensors, and what a run says of captions."""

import argparse

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

import sd_config
from conftest import trainer


@pytest.fixture(scope="module")
def photos(assets):
    return datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train")


@pytest.fixture(scope="module")
def stream_of(assets, photos):
    """A function that makes a sample stream of the photographs, or of other rows, with some flags changed."""
    tokenizer = CLIPTokenizer.from_pretrained(assets[0] / "tokenizer")

    def make(rows=photos, seed=3, **changed):
        args = argparse.Namespace(**vars(sd_config.parse_args(["--resolution=64"])) | changed)
        captions = [trainer.list_captions(caption) for caption in rows["text"]]
        kept, shapes = list(range(len(rows))), [(64, 64)] * len(rows)
        rows = trainer.Rows(rows, fingerprint="", bad={}, held_out=[], kept=kept, captions=captions, shapes=shapes)
        return trainer.SampleStream(rows, tokenizer, args, seed, (4, 8, 8), 1000)

    return make


def test_each_choice_has_a_draw_of_its_own(stream_of, monkeypatch):
    """Caption, dropout, crop and flip take the five first numbers of a position's generator, in this order."""
    stream = stream_of(random_flip=True, caption_dropout=0.4)
    stream.rows.captions = [["one", "two", "three"]] * len(stream.rows.captions)
    monkeypatch.setattr(stream, "load_pixels", lambda _, crop: torch.tensor([[crop]]))
    for position in range(20):
        seed = trainer.keyed_seed(3, "sample", position)
        caption, dropout, top, left, flip = torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()
        text, crop = "" if dropout < 0.4 else ["one", "two", "three"][int(3 * caption)], [top, left]
        sample = stream[position]
        assert torch.equal(sample["input_ids"], trainer.tokenize(stream.tokenizer, [text])[0])
        assert sample["pixel_values"].flatten().tolist() == pytest.approx(crop[::-1] if flip < 0.5 else crop)


def same(one, other, names):
    return all(torch.equal(one[name], other[name]) for name in names)


DRAWN = ("posterior_noise", "timesteps", "noise", "noise_offset")


def test_an_item_is_a_function_of_seed_and_position(stream_of):
    one, other = stream_of(), stream_of()
    backwards = {position: other[position] for position in reversed(range(30))}
    for position in range(30):
        assert same(one[position], backwards[position], one[position])
    assert not same(stream_of(seed=4)[0], one[0], ["noise"])
    assert len({one[position]["noise"].sum().item() for position in range(60)}) == 60


def test_every_epoch_shows_each_row_once_in_an_order_of_its_own(photos, stream_of):
    captions, stream = list(photos["text"]), stream_of()
    tokens = {tuple(trainer.tokenize(stream.tokenizer, [caption])[0].tolist()): caption for caption in captions}
    shown = [tokens[tuple(stream[position]["input_ids"].tolist())] for position in range(28)]
    assert sorted(shown[:14]) == sorted(shown[14:]) == sorted(captions)
    assert shown[:14] != shown[14:]


@pytest.mark.parametrize(
    "changed",
    [
        {"random_flip": True},
        {"center_crop": True},
        {"caption_dropout": 0.5},
        {"input_perturbation": 0.1},
        {"image_interpolation_mode": "box"},
    ],
)
def test_switching_one_thing_on_shifts_no_other_draw(stream_of, changed):
    plain, switched = stream_of(), stream_of(**changed)
    for position in range(8):
        assert same(plain[position], switched[position], DRAWN)


def test_draws_are_made_in_the_documented_order(stream_of):
    sample, draws = stream_of(input_perturbation=0.1)[5], trainer.keyed_generator(3, "sample", 5)
    torch.rand(5, generator=draws)
    shape = (4, 8, 8)
    assert torch.equal(sample["posterior_noise"], torch.randn(shape, generator=draws))
    assert torch.equal(sample["timesteps"], torch.randint(1000, (), generator=draws))
    assert torch.equal(sample["noise"], torch.randn(shape, generator=draws))
    assert torch.equal(sample["noise_offset"], torch.randn((4, 1, 1), generator=draws))
    assert torch.equal(sample["input_perturbation"], torch.randn(shape, generator=draws))


def test_what_is_drawn_follows_its_distribution(stream_of):
    """Flips and dropped captions are as frequent as the flags say, and every caption, crop and timestep occurs."""
    grey = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (64, 1)) * 2)
    rows = datasets.Dataset.from_dict({"image": [grey], "text": [["one", "two", "three"]]})
    rows = rows.cast_column("image", datasets.Image())
    samples = [stream_of(rows, random_flip=True, caption_dropout=0.25)[position] for position in range(600)]
    texts = [tuple(sample["input_ids"].tolist()) for sample in samples]
    counts = {text: texts.count(text) for text in set(texts)}
    assert len(counts) == 4
    empty = tuple(trainer.tokenize(stream_of().tokenizer, [""])[0].tolist())
    assert 110 < counts.pop(empty) < 190
    assert all(110 < count < 190 for count in counts.values())
    flipped = [sample["pixel_values"][0, 0, 0] > sample["pixel_values"][0, 0, -1] for sample in samples]
    assert 250 < sum(flipped) < 350
    lefts = {min(sample["pixel_values"][0, 0, [0, -1]].tolist()) for sample in samples}
    assert len(lefts) == 96 - 64 + 1
    timesteps = torch.stack([sample["timesteps"] for sample in samples])
    assert 450 < timesteps.float().mean() < 550
    assert timesteps.max() > 980 and timesteps.min() < 20


# -- pictures --------------------------------------------------------------------------------------------------


def test_pixels_are_square_in_range_and_cropped_where_asked():
    image = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (50, 1)))
    centre = trainer.to_pixels(image, (40, 40), "nearest")
    assert centre.shape == (3, 40, 40) and centre.dtype == torch.float32
    white, black = (trainer.to_pixels(Image.new("L", (9, 9), v), (8, 8), "box") for v in (255, 0))
    assert white.unique().tolist() == [1] and black.unique().tolist() == [-1]
    left = trainer.to_pixels(image, (50, 50), "nearest", crop=(0, 0))
    right = trainer.to_pixels(image, (50, 50), "nearest", crop=(0.999, 0.999))
    grey = ((left + 1) * 127.5).round()[0, 0], ((right + 1) * 127.5).round()[0, 0]
    assert grey[0].tolist() == list(range(50)) and grey[1].tolist() == list(range(50, 100))


GREY = 100  # of 255, in every mode


def pictures():
    """The same grey square in every mode that PIL has."""
    plain = Image.new("L", (8, 8), GREY)
    for mode in ("L", "RGB", "CMYK", "YCbCr", "HSV"):
        yield mode, plain.convert("RGB").convert(mode)
    yield "P", plain.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = np.full((8, 8), GREY * 257)
    yield "I;16", Image.fromarray(deep.astype(np.uint16))
    yield "I;16B", Image.frombytes("I;16B", (8, 8), deep.astype(">u2").tobytes())
    yield "I", Image.fromarray(deep.astype(np.int32))


@pytest.mark.parametrize(("mode", "image"), list(pictures()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_mode_becomes_the_same_grey(mode, image):
    rgb = trainer.to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb, int)[1:] - GREY).max() <= 1


def test_a_picture_may_have_one_bit_and_be_a_hundred_times_as_long_as_wide():
    image = trainer.to_rgb(Image.new("1", (1, 100), 1))
    assert (image.size, image.getpixel((0, 0))) == ((1, 100), (255, 255, 255))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("F", (2, 2), 0.5), "convert"),
        (Image.new("LAB", (2, 2)), "convert"),
        (Image.new("I", (2, 2), 65536), "convert"),
        (Image.new("I", (2, 2), -1), "convert"),
        (Image.new("RGB", (1, 101)), "is too narrow"),
        (Image.new("RGB", (101, 1)), "is too narrow"),
    ],
    ids=["float", "LAB", "32 bits", "negative", "narrow", "flat"],
)
def test_a_picture_without_an_agreed_meaning_in_rgb_or_far_too_long_is_refused(image, says):
    """As its shorter side is resized to the resolution, a long picture would fill the memory."""
    with pytest.raises(ValueError, match=says):
        trainer.to_rgb(image)


def transparent():
    """Red and black pictures in every mode that has transparency: opaque at (0, 0), and transparent at (3, 3)."""
    colour = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    colour.putpixel((0, 0), (255, 0, 0, 255))
    colour.putpixel((1, 0), (255, 0, 0, 128))
    yield "RGBA", colour
    yield "RGBa", colour.convert("RGBa")
    yield "LA", Image.merge("LA", (Image.new("L", (4, 4), 0), colour.getchannel("A")))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 1
    yield "P", palette
    key = Image.new("RGB", (4, 4), (9, 9, 9))
    key.putpixel((0, 0), (255, 0, 0))
    key.info["transparency"] = (9, 9, 9)
    yield "RGB", key


@pytest.mark.parametrize(
    ("mode", "image"), list(transparent()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_transparency_is_laid_over_white(mode, image):
    rgb = trainer.to_rgb(image)
    assert rgb.getpixel((3, 3)) == (255, 255, 255)
    assert rgb.getpixel((0, 0)) == ((0, 0, 0) if mode == "LA" else (255, 0, 0))
    if mode == "RGBA":
        assert rgb.getpixel((1, 0)) == (255, 127, 127)


def test_exif_orientation_is_respected(tmp_path, stream_of):
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1)))
    exif = image.getexif()
    exif[0x0112] = 6  # the top is at the right: turn it clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    with Image.open(tmp_path / "turned.png") as turned:
        assert np.array_equal(np.asarray(trainer.to_rgb(turned))[..., 0], expected)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "turned.png", "text": "a"}\n')
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    pixels = stream_of(rows)[0]["pixel_values"][0]
    assert np.array_equal(((pixels + 1) * 127.5).round().numpy(), expected)


# -- captions, and what a run says of the data --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "captions"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        *((none, []) for none in (None, "", " \n", 1, [], ["a", ""], ["a", None])),
    ],
)
def test_captions_of_a_row_are_one_text_or_several_of_which_none_is_empty(given, captions):
    assert trainer.list_captions(given) == captions


def test_a_run_says_what_texts_it_cuts_and_what_rows_and_steps_it_lacks(train, tmp_path, capsys):
    pictures, captions = [Image.new("RGB", (64, 64))] * 3, ["short", "a " * 75, "a " * 76]
    rows = datasets.Dataset.from_dict({"image": pictures, "text": captions})
    rows = rows.cast_column("image", datasets.Image())
    rows.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "rows")  # is decoded nevertheless
    flags = (f"--dataset_name={tmp_path / 'rows'}", "--max_train_samples=99", "--max_train_steps=1")
    flags += ("--lr_scheduler=linear", "--lr_warmup_steps=5", "--validation_prompts", "a " * 76, "a")
    run = train(*flags, "--train_batch_size=2", data=None)
    assert list(run.logs) == [1]
    assert run.run.plan.rows == 3
    printed = capsys.readouterr().out
    assert "note: 1 of 3 captions have more than 77 tokens and will be cut" in printed
    assert "note: 1 of 2 --validation_prompts have more than 77 tokens and will be cut" in printed
    assert "note: --lr_warmup_steps 5: the run ends before its warm-up does" in printed
    assert "note: --max_train_samples 99: only 3 are available, and all are used" in printed


def test_a_data_set_of_the_hub_is_asked_for_with_every_flag(photos, monkeypatch):
    """No test may use the network, so this one looks at the call that would."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or photos)
    hub = ("--dataset_name=a/b", "--dataset_config_name=c", "--train_data_dir=d", "--cache_dir=/tmp")
    for flags in ((), hub):
        assert trainer.read_dataset(sd_config.parse_args([*flags]), None) is photos
    assert asked == [
        (("lambdalabs/naruto-blip-captions", None), {"data_dir": None, "split": "train", "cache_dir": None}),
        (("a/b", "c"), {"data_dir": "d", "split": "train", "cache_dir": "/tmp"}),
    ]
