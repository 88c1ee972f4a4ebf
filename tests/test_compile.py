"""A compiled UNet trains what the plain one trains, on the same weights that are saved, validated and exported."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from conftest import ROOT, difference, learned, trainer, weights
from test_processes import start

# Ten steps, at a rate at which the rounding of float32 weights is little of the way that they go.
FLAGS = (
    "--train_batch_size=1",  # as in each of two processes, which find in the compiler's cache what is compiled here
    "--gradient_accumulation_steps=2",
    "--max_train_steps=10",
    "--checkpointing_steps=6",
    "--use_ema",
    "--learning_rate=3e-4",
    "--center_crop",
    "--max_train_samples=4",
    "--validation_epochs=3",
)


@pytest.fixture
def shallow(assets, tmp_path):
    """The tiny model with a UNet of two levels instead of four: every kind of layer, and half as long to compile."""
    model = shutil.copytree(assets[0], tmp_path / "shallow")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=32,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    unet.save_pretrained(model / "unet")
    return model


def test_compiled_and_plain_runs_are_the_same_and_go_on_from_each_other(train, shallow, assets, tmp_path, monkeypatch):
    begin = weights(shallow / "unet")
    plain = train(*FLAGS, output="plain", model=shallow)
    monkeypatch.setattr(trainer, "DENOISING_STEPS", 2)
    compiled = train(*FLAGS, "--torch_compile", "--validation_prompts=a cat", output="compiled", model=shallow)
    assert compiled.run.network is not compiled.run.unet
    assert len(list(compiled.output.glob("samples/*/0-a-cat.png"))) == 3
    for step, values in learned(plain, "train/loss", "train/grad_norm").items():
        assert learned(compiled)[step]["train/loss"] == pytest.approx(values["train/loss"], rel=1e-4)
        assert learned(compiled)[step]["train/grad_norm"] == pytest.approx(values["train/grad_norm"], rel=1e-3)
    halfway = {run.output.name: f"--resume_from_checkpoint={run.output / 'checkpoint-6'}" for run in (plain, compiled)}
    onwards = train(*FLAGS, halfway["compiled"], output="onwards", model=shallow)
    faster = train(*FLAGS, "--torch_compile", halfway["plain"], output="faster", model=shallow)
    shared = [f"--pretrained_model_name_or_path={shallow}", f"--train_data_dir={assets[1]}", "--output_dir=two"]
    shared += ["--resolution=64", "--report_to=none", "--lr_warmup_steps=0", "--validation_prompts", "--seed=7", *FLAGS]
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(ROOT / "train_sd1-5_naruto.py")]
    flags = [*shared, "--gradient_accumulation_steps=1", "--torch_compile"]
    start([*two, *flags], tmp_path, ACCELERATE_USE_CPU="true")
    for output in (compiled.output, onwards.output, faster.output, tmp_path / "two"):
        for part in ("unet", "unet_ema"):
            one, other = (weights(folder / "checkpoint-10" / part) for folder in (output, plain.output))
            assert one.keys() == other.keys()
            assert difference(one, other, begin) <= 1e-4
