"""A compiled UNet trains what the plain one trains, with the same weights that are saved, validated and exported.

(In test_processes.py, two processes trace a UNet with all of SD1.5's blocks, without compiling it to machine code.)
"""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from conftest import difference, learned, weights

# Ten steps, at a rate at which rounding the weights to float32 makes little difference.
FLAGS = (
    *("--train_batch_size=1", "--gradient_accumulation_steps=2", "--max_train_steps=10", "--checkpointing_steps=6"),
    *("--use_ema", "--learning_rate=3e-4", "--center_crop", "--max_train_samples=4", "--validation_epochs=3"),
)


@pytest.fixture
def shallow(assets, tmp_path):
    """The tiny model with a UNet of every kind of layer, but with few of them, as each takes seconds to compile."""
    model = shutil.copytree(assets[0], tmp_path / "shallow")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=32,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    unet.save_pretrained(model / "unet")
    return model


def test_compiled_and_plain_runs_are_the_same_and_go_on_from_each_other(train, shallow):
    begin = weights(shallow / "unet")
    plain = train(*FLAGS, output="plain", model=shallow)
    compiled = train(*FLAGS, "--torch_compile", "--validation_prompts=a cat", output="compiled", model=shallow)
    assert compiled.run.network is not compiled.run.unet
    assert len(list(compiled.output.glob("samples/*/0-a-cat.png"))) == 3
    for step, values in learned(plain, "train/loss", "train/grad_norm").items():
        assert learned(compiled)[step]["train/loss"] == pytest.approx(values["train/loss"], rel=1e-4)
        assert learned(compiled)[step]["train/grad_norm"] == pytest.approx(values["train/grad_norm"], rel=1e-3)
    halfway = {run.output.name: f"--resume_from_checkpoint={run.output / 'checkpoint-6'}" for run in (plain, compiled)}
    onwards = train(*FLAGS, halfway["compiled"], output="onwards", model=shallow)
    faster = train(*FLAGS, "--torch_compile", halfway["plain"], output="faster", model=shallow)
    for output in (compiled.output, onwards.output, faster.output):
        for part in ("unet", "unet_ema"):
            one, other = (weights(folder / "checkpoint-10" / part) for folder in (output, plain.output))
            assert one.keys() == other.keys()
            assert difference(one, other, begin) <= 1e-4
