"""The formulas at their edges (test_oracle.py has the rest), their precision, and that no step waits for a device."""

import types

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from conftest import trainer

ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def test_min_snr_weights():
    """min(SNR, γ) / SNR and min(SNR, γ) / (SNR + 1), finite at SNR = 0."""
    snr = torch.tensor([0.0, 1.0, 5.0, 20.0])
    expected = {"epsilon": [1.0, 1.0, 1.0, 0.25], "v_prediction": [0.0, 0.5, 5 / 6, 5 / 21]}
    for prediction_type, weights in expected.items():
        found = trainer.min_snr_weight(snr / (1 + snr), 5.0, prediction_type)
        torch.testing.assert_close(found, torch.tensor(weights))


@pytest.mark.parametrize("flags", [(), ("--prediction_type=v_prediction",), ("--dream_training",)])
def test_under_bf16_inputs_targets_and_loss_stay_float32(train, monkeypatch, flags):
    seen = {}

    def spy(owner, name):
        original = getattr(owner, name)

        def call(*tensors, **options):
            seen.setdefault(name, {tensor.dtype for tensor in tensors})
            return original(*tensors, **options)

        monkeypatch.setattr(owner, name, call)

    spy(trainer.F, "mse_loss")
    spy(trainer, "add_noise")
    run = train("--mixed_precision=bf16", "--train_batch_size=2", "--max_train_steps=1", *flags)
    assert seen == {"add_noise": {torch.float32}, "mse_loss": {torch.float32}}
    assert {parameter.dtype for parameter in run.run.unet.parameters()} == {torch.float32}
    assert run.run.frozen.vae.dtype == run.run.frozen.text_encoder.dtype == torch.bfloat16


HOST_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")


@pytest.fixture
def around_steps(monkeypatch):
    """A function that has `enter` and `leave` called before and after each step, and the noting of its metrics."""

    def watch(enter, leave):
        for owner, name in ((trainer, "train_step"), (trainer.Progress, "add")):
            original = getattr(owner, name)

            def watched(*args, original=original):
                enter()
                try:
                    return original(*args)
                finally:
                    leave()

            monkeypatch.setattr(owner, name, watched)

    return watch


STEPS = (
    *("--train_batch_size=2", "--gradient_accumulation_steps=2", "--max_train_steps=11"),
    *("--use_ema", "--snr_gamma=5", "--mixed_precision=bf16"),
)
CACHED = ("--center_crop", "--cache_latents=on", "--micro_batch_size=auto")


@pytest.mark.parametrize("flags", [(), CACHED])
def test_no_step_makes_the_host_wait(train, monkeypatch, around_steps, flags):
    """On a GPU each call of `HOST_READS` would make the host wait until the device has caught up."""
    reads, inside = [], []
    around_steps(lambda: inside.append(True), inside.pop)

    def watch(name, method):
        def call(*args, **kwargs):
            if inside:
                reads.append(name)
            return method(*args, **kwargs)

        return call

    for name in HOST_READS:
        monkeypatch.setattr(torch.Tensor, name, watch(name, getattr(torch.Tensor, name)))
    run = train(*STEPS, *flags)
    assert reads == []
    assert len(run.logs) == 11


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [(), CACHED, (*CACHED, "--torch_compile")])
def test_no_step_synchronises_the_device(train, around_steps, flags):
    """CUDA itself raises an error in a step that does."""
    mode = torch.cuda.set_sync_debug_mode
    around_steps(lambda: mode("error"), lambda: mode("default"))
    assert len(train(*STEPS, *flags).logs) == 11


def test_metrics_are_read_every_ten_steps_and_before_a_save(train, monkeypatch):
    """Each time, the progress bar shows the loss of the last step that was read."""
    read, original = [], trainer.Progress.flush

    def flush(progress):
        original(progress)
        read.append((progress.run.step, progress.loss, progress.bar.postfix))

    monkeypatch.setattr(trainer.Progress, "flush", flush)
    run = train("--train_batch_size=1", "--max_train_steps=25", "--checkpointing_steps=24")
    losses = {step: values["train/loss"] for step, values in run.logs.items()}
    assert list(losses) == list(range(1, 26))
    assert [(step, loss) for step, loss, _ in read] == [(step, losses[step]) for step in (10, 20, 24, 25)]
    assert all(shown.startswith(f"loss {loss:.4f}, ") for _, loss, shown in read)


def test_the_loss_needs_nothing_from_the_host(assets):
    """It runs on the meta device, whose tensors have no values to read, and cannot index a table on the host."""
    network = UNet2DConditionModel.from_pretrained(assets[0] / "unet").to("meta")
    pipeline = types.SimpleNamespace(
        vae=AutoencoderKL.from_pretrained(assets[0] / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(assets[0] / "text_encoder"),
        tokenizer=None,
    )
    accelerator = types.SimpleNamespace(mixed_precision="no", device=torch.device("meta"))
    options = {"noise_offset": 0.1, "input_perturbation": 0.1, "snr_gamma": 5.0, "dream_detail_preservation": 1.0}
    options |= {"prediction_type": "epsilon", "alphas_cumprod": ALPHA_BAR.to("meta")}
    latents = ("posterior_noise", "noise", "input_perturbation")
    micro_batch = {name: torch.empty(2, 4, 8, 8, device="meta") for name in latents}
    micro_batch["pixel_values"] = torch.empty(2, 3, 64, 64, device="meta")
    micro_batch["noise_offset"] = torch.empty(2, 4, 1, 1, device="meta")
    micro_batch["input_ids"] = torch.zeros(2, 77, dtype=torch.int64, device="meta")
    micro_batch["timesteps"] = torch.zeros(2, dtype=torch.int64, device="meta")
    encoded = trainer.Frozen(pipeline, accelerator).encode(micro_batch)
    loss = trainer.diffusion_loss(network, *encoded, micro_batch, **options)
    assert loss.shape == ()
    assert loss.device.type == "meta"
