"""The scripts as a user starts them: in processes of their own."""

import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import sd_config
import tiny_sd15
from conftest import ROOT, TUTORIAL, assert_same, difference, weights


def start(command, folder, **environment):
    """Run a command in `folder`, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def here(assets, tmp_path):
    """A folder as the tutorial's reader has it: the scripts, and model and data unpacked beside them."""
    for name in ("train_sd1-5_naruto.py", "sd_config.py", "infer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / tiny_sd15.MODEL).symlink_to(assets[0])
    (tmp_path / "naruto-blip-captions").symlink_to(assets[1])
    return tmp_path


def test_the_tutorial_end_to_end(here):
    """Its command with only the paths, the resolution and the number of steps changed; then its inference."""
    command = ["train_sd1-5_naruto.py", *shlex.split(TUTORIAL)]
    command = [word.replace("512", "64").replace("15000", "6") for word in command]
    paths = [f"--pretrained_model_name_or_path=./{tiny_sd15.MODEL}", "--dataset_name=./naruto-blip-captions"]
    printed = start([*command, *paths], here)
    assert "The trained pipeline is in sd-naruto-model" in printed
    ours = "Loading |Reading |Plan |  |Encoding |Generating train split|Steps|The trained |swanlab: |to sync this run|$"
    assert [line for line in re.split("[\r\n]+", printed) if not re.match(ours, line)] == []
    assert list((here / "sd-naruto-model/logs").glob("run-*/*.swanlab"))
    assert len(list((here / "sd-naruto-model/samples").glob("step-*/*.png"))) == 10

    printed = start(["infer.py", "--seed=1", "--num_inference_steps=3"], here)
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
    tokenizer = StableDiffusionPipeline.from_pretrained(assets[0]).tokenizer
    assert tokenizer("Lebron James with a hat").input_ids == [49406, 11971, 2392, 593, 320, 3801, 49407]
    assert len(tokenizer) == 49408
    pictures = [Image.open(path) for path in (tmp_path / tiny_sd15.PHOTOS).iterdir() if path.suffix in (".jpg", ".png")]
    assert {"RGB", "RGBA", "L", "LA", "P", "CMYK", "I;16"} == {picture.mode for picture in pictures}
    assert len({picture.size for picture in pictures}) > 10


FLAGS = (
    f"--pretrained_model_name_or_path={tiny_sd15.MODEL}",
    "--dataset_name=naruto-blip-captions",
    "--resolution=64",
    "--report_to=none",
    "--validation_prompts",
    "--max_train_samples=11",
    "--center_crop",
    "--random_flip",
    "--use_ema",
    "--snr_gamma=5",
    "--lr_scheduler=linear",
    "--lr_warmup_steps=2",
    "--learning_rate=1e-4",
    "--num_train_epochs=6",
    "--validation_samples=2",
    "--validation_epochs=3",
)


def test_two_processes_train_what_one_trains(train, here, assets, monkeypatch, capfd):
    """With epochs instead of steps, where the rate used to fall too slowly; and with pictures encoded once for both.

    No seed is given. One drawn by each for itself would give each another permutation, and another subset.
    """
    monkeypatch.chdir(here)
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train_sd1-5_naruto.py", *FLAGS]
    two += ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--output_dir=two"]
    printed = [start(two, here, ACCELERATE_USE_CPU="true")]
    assert len(re.findall("Encoding pictures: +0%", printed[0])) == 1
    (seed,) = re.findall(r"No --seed given: drew (\d+)", printed[0])
    one = ("--train_batch_size=4", "--gradient_accumulation_steps=2", "--cache_latents=off")
    train(*FLAGS, *one, data=None, output="one", seed=seed)
    printed.append("".join(capfd.readouterr()))
    plans = [re.search(r"effective batch +(\d+) \((\d+) x (\d+)", text).groups() for text in printed]
    assert plans == [("8", "4", "2"), ("8", "8", "1")]
    measured = [re.findall(r"Step (\d+): (\S+) ([\d.]+)", text) for text in printed]
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
