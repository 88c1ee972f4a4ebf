"""--low_memory: weights in bf16 and moments in 8 bits, of which no update is lost."""

import time

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel

from conftest import assert_same, assert_same_state, learned, trainer, weights

FLAGS = (
    *("--low_memory", "--use_ema", "--center_crop", "--random_flip", "--lr_scheduler=linear"),
    *("--train_batch_size=2", "--gradient_accumulation_steps=2", "--max_train_steps=4", "--checkpointing_steps=2"),
)
pytestmark = pytest.mark.usefixtures("uncompiled")


def test_the_precision_of_weights_moments_and_average(train):
    from torchao.optim.subclass_8bit import OptimState8bit  # noqa: PLC0415 (slow)

    run = train(*FLAGS, "--validation_prompts=a cat")
    parameters = list(run.run.unet.parameters())
    large = [p.numel() >= 4096 and p.numel() % 256 == 0 for p in parameters]
    assert [p.dtype for p in parameters] == [torch.bfloat16 if is_large else torch.float32 for is_large in large]
    in_bf16 = sum(p.numel() for p in parameters if p.dtype == torch.bfloat16)
    assert in_bf16 > 0.9 * sum(p.numel() for p in parameters)
    for parameter, is_large in zip(parameters, large, strict=True):
        moments = run.run.optimizer.adamw.state[parameter]
        assert [isinstance(moments[name], OptimState8bit) for name in ("exp_avg", "exp_avg_sq")] == 2 * [is_large]
    assert {average.dtype for average in run.run.average.weights} == {torch.float32}
    assert run.run.unet.is_gradient_checkpointing
    assert run.run.args.mixed_precision == "bf16"
    assert {tensor.dtype for tensor in weights(run.output / "unet").values()} == {torch.float32}
    raw = weights(run.output / "unet", "diffusion_pytorch_model.non_ema.safetensors")
    assert all(torch.equal(raw[name], value) for name, value in run.run.unet.state_dict().items())
    StableDiffusionPipeline.from_pretrained(run.output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_updated_as_torchao_updates_each_tensor(dtype):
    """Bit by bit, for tensors of any memory format; and its moments, which older checkpoints have, are taken over."""
    from torchao.optim import AdamW8bit  # noqa: PLC0415 (slow)

    torch.manual_seed(0)
    shapes = ((64, 64), (32, 16, 3, 3), (100, 256), (7,), (8, 8), (64, 64, 1, 1))
    start = [torch.randn(shape).to(dtype if len(shape) > 1 and shape != (8, 8) else torch.float32) for shape in shapes]
    start[1] = start[1].to(memory_format=torch.channels_last)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    mine, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    chunked, plain = trainer.EightBitAdamW(mine, settings, False), AdamW8bit(theirs, **settings)
    assert sorted(len(tensors) for tensors, _ in chunked.chunks) == [1, 3]
    for step in range(4):
        if step == 2:
            chunked.load_state_dict(plain.state_dict())
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        chunked.step()
        plain.step()
        for one, other in zip(mine, theirs, strict=True):
            exact = trainer.has_8bit_moments(one)  # others have torch's AdamW, which rounds differently
            torch.testing.assert_close(one, other, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                moments = [state[name] for state in (chunked.state[one], plain.state[other])]
                moments = [moment.dequantize() if hasattr(moment, "codes") else moment for moment in moments]
                torch.testing.assert_close(*moments, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_the_average_on_the_host_is_the_same(train):
    flags = ("--use_ema", "--max_train_steps=3", "--train_batch_size=2")
    runs = [train(*flags, *more, output=name) for name, more in (("device", ()), ("host", ("--offload_ema",)))]
    assert runs[1].run.average.on_host
    assert_same_state(*(run.output / "checkpoint-3" for run in runs))


def test_resuming_is_bit_identical(train):
    """Weights are rounded at random, but the draws depend on seed and step alone."""
    whole = train(*FLAGS, output="whole")
    torch.manual_seed(2)
    resumed = train(*FLAGS, f"--resume_from_checkpoint={whole.output / 'checkpoint-2'}", output="resumed")
    assert_same_state(whole.output / "checkpoint-4", resumed.output / "checkpoint-4")
    assert learned(resumed) == {step: values for step, values in learned(whole).items() if step > 2}


def test_updates_too_small_for_bf16_add_up(train, assets):
    """The run moves a weight by about 1e-4. Near 0.1, bf16 numbers are 5e-4 apart: rounded to the nearest, none moves.

    Rounding at random is noise without a direction, so along the way of a float32 run the weights come as far as there.
    """
    flags = (*FLAGS, "--lr_scheduler=constant", "--learning_rate=1e-5", "--max_train_steps=10")
    flags += ("--checkpointing_steps=10",)
    low = train(*flags, output="low")
    full = train(*flags[1:], output="full")
    start = weights(assets[0] / "unet")
    one, other = (weights(run.output / "checkpoint-10/unet") for run in (low, full))
    ways = [torch.cat([(w[name].double() - start[name]).flatten() for name in start]) for w in (one, other)]
    rounding = torch.cat([(start[name].bfloat16().double() - start[name]).flatten() for name in start])
    progress = (ways[0] - rounding) @ ways[1] / ways[1].square().sum()
    assert 0.8 < progress < 1.2


@pytest.mark.parametrize(("on_host", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_the_average_moves_in_float32(on_host, dtype):
    """It becomes what diffusers makes of weights in float32, on the device and on the host."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 20)
    average, other = trainer.Average(layer, torch.device("cpu"), on_host), EMAModel(layer.parameters())
    for _ in range(50):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
        seen = [parameter.detach().clone().to(dtype).requires_grad_() for parameter in layer.parameters()]
        average.update(seen)
        other.step([parameter.float() for parameter in seen])
        for mine, theirs in zip(average.settled_weights(), other.shadow_params, strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_whatever_reads_the_average_waits_for_it(train, monkeypatch):
    flags = (*FLAGS, "--max_train_steps=5", "--checkpointing_steps=3", "--validation_prompts=a cat")
    quick, move = train(*flags, output="quick"), trainer.Average.update_on_host

    def update_on_host(*args):
        time.sleep(0.3)
        move(*args)

    monkeypatch.setattr(trainer.Average, "update_on_host", update_on_host)
    slow = train(*flags, output="slow")
    for name in ("checkpoint-3", "checkpoint-5"):
        assert_same_state(quick.output / name, slow.output / name)
    assert_same(weights(quick.output / "unet"), weights(slow.output / "unet"))
    pictures = [(run.output / "samples/step-4/0-a-cat.png").read_bytes() for run in (quick, slow)]
    assert pictures[0] == pictures[1]


def test_the_norm_of_the_gradients_is_exact(train, monkeypatch):
    """It is a float32 sum, although the gradients are bf16, in which a sum of many squares would be wrong."""
    clip, seen = trainer.clip_gradients, []

    def clip_gradients(run):
        exact = sum(p.grad.double().square().sum() for p in run.unet.parameters()).sqrt().item()
        norm = clip(run)
        clipped = sum(p.grad.double().square().sum() for p in run.unet.parameters()).sqrt().item()
        seen.append((norm.item(), exact, clipped))
        return norm

    monkeypatch.setattr(trainer, "clip_gradients", clip_gradients)
    train(*FLAGS, "--max_train_steps=2", "--max_grad_norm=0.01")
    for norm, exact, clipped in seen:
        assert norm == pytest.approx(exact, rel=1e-5)
        assert clipped == pytest.approx(0.01, rel=1e-2)
    assert len(seen) == 2
