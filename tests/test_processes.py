"""The scripts as a user starts them, in processes of their own."""

import re
import runpy
import shlex
import sys

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import sd_config
import tiny_sd15
from conftest import ROOT, TUTORIAL, assert_same, command_line, difference, start, trainer, weights


@pytest.fixture
def here(assets, tmp_path):
    """A folder like that of the tutorial's reader, with the scripts, the model and the data."""
    for name in ("train_sd1-5_naruto.py", "sd_config.py", "infer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / tiny_sd15.MODEL).symlink_to(assets[0])
    (tmp_path / "naruto-blip-captions").symlink_to(assets[1])
    return tmp_path


def test_the_tutorial_end_to_end(here):
    """Its command trains, with other paths, resolution and number of steps, and then its inference draws."""
    command = ["train_sd1-5_naruto.py", *shlex.split(TUTORIAL)]
    command = [word.replace("512", "64").replace("15000", "6") for word in command]
    paths = [f"--pretrained_model_name_or_path=./{tiny_sd15.MODEL}", "--dataset_name=./naruto-blip-captions"]
    printed = start(*command, *paths, folder=here)
    assert "The trained pipeline is in sd-naruto-model" in printed
    ours = "Loading |Reading |Plan |  |Encoding |Generating train split|Steps|The trained |swanlab: |to sync this run|$"
    ours += "|warning: .* draws fewer"  # in so short a run
    assert [line for line in re.split("[\r\n]+", printed) if not re.match(ours, line)] == []
    assert list((here / "sd-naruto-model/logs").glob("run-*/*.swanlab"))
    assert len(list((here / "sd-naruto-model/samples").glob("step-*/*.png"))) == 10

    printed = start("infer.py", "--seed=1", "--num_inference_steps=3", folder=here)
    lines = [line for line in re.split("[\r\n]+", printed) if line and not line.startswith("Denoising: ")]
    assert lines == [
        "Loading PyTorch and diffusers takes a few seconds.",
        "Loading ./sd-naruto-model (fp32 on cpu)",
        "result.png: 64x64, seed 1, 'Lebron James with a hat'",
    ]
    assert Image.open(here / "result.png").size == (64, 64)
    pipeline = StableDiffusionPipeline.from_pretrained(here / "sd-naruto-model")
    image = pipeline("Lebron James with a hat", num_inference_steps=2).images[0]
    image.save(here / "tutorial.png")


def test_the_tiny_model_has_the_real_vocabulary_and_stays_small(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny_sd15.py", str(tmp_path)])
    runpy.run_path(tiny_sd15.__file__, run_name="__main__")
    assert_same(weights(tmp_path / tiny_sd15.MODEL / "unet"), weights(assets[0] / "unet"))
    sizes = [path.stat().st_size for path in (tmp_path / tiny_sd15.MODEL).rglob("*") if path.is_file()]
    assert sum(sizes) <= 20e6
    tokenizer = StableDiffusionPipeline.from_pretrained(tmp_path / tiny_sd15.MODEL).tokenizer
    assert tokenizer("Lebron James with a hat").input_ids == [49406, 11971, 2392, 593, 320, 3801, 49407]
    assert len(tokenizer) == 49408
    pictures = [Image.open(path) for path in (tmp_path / tiny_sd15.PHOTOS).iterdir() if path.suffix in (".jpg", ".png")]
    assert {"RGB", "RGBA", "L", "LA", "P", "CMYK", "I;16"} == {picture.mode for picture in pictures}
    assert len({picture.size for picture in pictures}) > 10


FLAGS = (
    *("--dataset_name=naruto-blip-captions", "--max_train_samples=11", "--center_crop", "--random_flip", "--use_ema"),
    *("--snr_gamma=5", "--lr_scheduler=linear", "--lr_warmup_steps=2", "--learning_rate=1e-4", "--num_train_epochs=6"),
    *("--validation_samples=2", "--validation_epochs=3"),
)


COMPILED = """
import functools, runpy, torch
torch.compile = functools.partial(torch.compile, backend="eager")  # which generates no code, as that is slow
runpy.run_path("train_sd1-5_naruto.py", run_name="__main__")
"""


def test_two_processes_train_what_one_trains(train, here, assets, monkeypatch, capfd):
    """The length is given in epochs, on which the learning rate depends. The two encode the pictures once for both.

    No seed is given. If each process drew one for itself, they would differ in the order and choice of the rows. The
    two compile the UNet, too, as far as that has to do with there being two. (Plain ones are in test_faults.py.)
    """
    monkeypatch.chdir(here)
    (here / "compiled.py").write_text(COMPILED)
    shares = ("--train_batch_size=2", "--gradient_accumulation_steps=2")
    two = command_line((assets[0], None), "two", *FLAGS, *shares, "--torch_compile", seed=None)
    printed = [start("compiled.py", *two, folder=here, processes=2)]
    assert "Compiling: " in printed[0]
    assert len(re.findall("Encoding pictures: +0%", printed[0])) == 1
    (seed,) = re.findall(r"No --seed given: drew (\d+)", printed[0])
    one = ("--train_batch_size=4", "--gradient_accumulation_steps=2", "--cache_latents=off")
    train(*FLAGS, *one, data=None, output="one", seed=seed)
    printed.append("".join(capfd.readouterr()))
    plans = [re.search(r"effective batch +(\d+) \((\d+) x (\d+)", text).groups() for text in printed]
    assert plans == [("8", "4", "2"), ("8", "8", "1")]
    measured = [re.findall(r"(Step \d+:|,) (val/\S+) ([\d.]+)", text) for text in printed]
    assert len(measured[0]) >= 5
    for two_line, one_line in zip(*measured, strict=True):
        assert one_line[:2] == two_line[:2]
        assert float(two_line[2]) == pytest.approx(float(one_line[2]), abs=2e-4)
    begin = weights(assets[0] / "unet")
    for part in ("unet", "unet_ema"):
        single, shared = (weights(here / name / "checkpoint-12" / part) for name in ("one", "two"))
        assert difference(shared, single, begin) <= 1e-4
    losses = [sd_config.read_state(here / name / "checkpoint-12").loss for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_machines_that_do_not_share_their_output_folder_cannot_resume(train, monkeypatch, capsys):
    """One would go on, and the other start over."""
    monkeypatch.setattr(trainer.utils, "gather_object", lambda steps: [*steps, 4])
    with pytest.raises(SystemExit) as end:
        train("--max_train_steps=1")
    assert end.value.code == 2
    assert "must be shared by all machines; they are at steps [0, 4]" in capsys.readouterr().err
