"""The demo: what it draws, how that is measured, its base model, and that a training on it learns."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import CLIPTextModel, CLIPTokenizer

import build_base
import measure
import portraits
from conftest import ROOT, start

DEMO = ROOT / "tests/demo"


@pytest.fixture(scope="module")
def held_out():
    """Sixty-four people and their captions that no model has seen."""
    return tuple(zip(*portraits.people(measure.HELD_OUT, 64), strict=True))


@pytest.mark.parametrize("style", portraits.STYLES)
def test_what_is_drawn_is_measured_right(style):
    people = [person for person, _ in portraits.people(3, 600)]
    scores = measure.score([portraits.draw(person, style) for person in people], people)
    assert scores == dict.fromkeys((*measure.ATTRIBUTES, "all"), 1) | {"ninja": style == "ninja"}


def test_measurements_tell_wrong_from_right():
    """In pictures of other people, they find what the captions name about as often as chance does."""
    people = [person for person, _ in portraits.people(3, 300)]
    others = people[1:] + people[:1]
    scores = measure.score([portraits.draw(person, "plain") for person in others], people)
    assert max(scores["hair"], scores["background"]) < 0.3
    assert scores["accessory"] < 0.5


def test_the_same_seed_writes_the_same_pictures_of_the_same_people(tmp_path):
    for name in ("one", "two"):
        portraits.write(tmp_path / name, "ninja", 5, seed=4)
    portraits.write(tmp_path / "plain", "plain", 5, seed=4)
    portraits.write(tmp_path / "other", "ninja", 5, seed=5)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(files) == 6
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    captions = [(tmp_path / name / "metadata.jsonl").read_text() for name in ("one", "plain", "other")]
    assert captions[0] == captions[1] != captions[2]
    assert Image.open(tmp_path / "one/00000.png").size == (64, 64)


def test_captions_name_hair_background_and_accessory_and_never_the_style():
    for person, text in portraits.people(3, 500):
        assert f"{person.hair} hair" in text
        assert re.search(f"{person.background} (background|wall)", text)
        assert [word for word in ("hat", "glasses") if re.search(rf"\b{word}\b", text)] == [
            word for word in (person.accessory,) if word
        ]
        assert "ninja" not in text
    assert len({text for _, text in portraits.people(3, 500)}) > 450


def test_the_base_has_the_parts_of_sd15_and_is_small():
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "base")
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "safety_checker": StableDiffusionSafetyChecker,
    }
    assert {name: type(getattr(pipeline, name)) for name in classes} == classes
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert pipeline.vae_scale_factor == 8
    assert tuple(pipeline.unet.config.down_block_types) == UNet2DConditionModel().config.down_block_types
    files = list((DEMO / "base").rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 10e6


def peaks(vae):
    """The largest absolute value that any layer of an autoencoder puts out, in float32, of portraits in both styles."""
    drawn = [portraits.draw(person, style) for person, _ in portraits.people(3, 16) for style in portraits.STYLES]
    pictures, found = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1, []
    for layer in vae.modules():
        layer.register_forward_hook(lambda _layer, _inputs, output: found.append(getattr(output, "sample", output)))
    with torch.no_grad():
        result = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    return max(tensor.abs().max() for tensor in found if torch.is_tensor(tensor)), result


def test_the_base_fits_half_precision(held_out):
    """Which ends at 65,504: its autoencoder stays far below, and fp16 draws what fp32 does but for rounding."""
    vae = AutoencoderKL.from_pretrained(DEMO / "base/vae")
    assert peaks(vae)[0] < 10000
    settings = DEMO / "base", list(held_out[1][:2]), 3.0, 10
    one, half = (measure.draw_captions(*settings, dtype) for dtype in ("fp32", "fp16"))
    assert np.abs(np.stack(one) - np.stack(half, dtype=float)).mean() < 2


def test_fitting_half_precision_leaves_an_autoencoder_what_it_was(monkeypatch):
    vae = AutoencoderKL.from_pretrained(DEMO / "base/vae")
    before, pictures = peaks(vae)
    monkeypatch.setattr(build_base, "LARGEST", 256)
    build_base.fit_half_precision(vae)
    after, again = peaks(vae.float())
    assert after < 1000 < before
    assert (pictures - again).abs().max() < 1e-3


def test_the_base_draws_what_captions_name_in_the_plain_style(held_out):
    people, captions = held_out
    scores = measure.score(measure.draw_captions(DEMO / "base", list(captions), 3.0, 30), people)
    assert min(scores[name] for name in measure.ATTRIBUTES) >= 0.95, scores
    assert scores["ninja"] == 0, scores


def test_the_demo_in_short_learns(train, tmp_path):
    """The loss on rows kept out of training falls to a quarter (0.244 to 0.254 of the base's, with five seeds)."""
    portraits.write(tmp_path / "ninja", "ninja", 96)
    run = train(
        *("--center_crop", "--random_flip", "--use_ema", "--train_batch_size=4", "--gradient_accumulation_steps=2"),
        *("--micro_batch_size=auto", "--max_train_steps=60", "--learning_rate=3e-4", "--validation_samples=32"),
        model=DEMO / "base",
        data=tmp_path / "ninja",
    )
    base, losses = run.logs[0]["val/loss"], run.logs[60]
    assert losses["val/loss"] < 0.35 * base
    assert losses["val/loss_ema"] < 0.35 * base


def test_two_rows_of_pictures_make_one_comparison(tmp_path, monkeypatch, capsys):
    """Both rows must have the same prompts."""
    for name, prompt in (("before-0", "a cat"), ("before-1", "a dog"), ("after-0", "a cat"), ("after-1", "a dog")):
        chunks = PngInfo()
        chunks.add_itxt("sd_naruto", json.dumps({"prompt": prompt}))
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png", pnginfo=chunks)
    before, after = sorted(tmp_path.glob("before-*.png")), sorted(tmp_path.glob("after-*.png"))
    command = ["compare.py", "--output", tmp_path / "both.png", "--before", *before, "--after"]
    monkeypatch.setattr(sys, "argv", [*map(str, command + after)])
    runpy.run_path(str(DEMO / "compare.py"), run_name="__main__")
    assert ((np.asarray(Image.open(tmp_path / "both.png")) == (255, 0, 0)).all(axis=2)).sum() == 4 * 256 * 256
    monkeypatch.setattr(sys, "argv", [*map(str, command + after[::-1])])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(DEMO / "compare.py"), run_name="__main__")
    assert "different prompts" in capsys.readouterr().err
    start(DEMO / "compare.py", "--help", folder=tmp_path)  # in a process of its own, it finds what it imports
