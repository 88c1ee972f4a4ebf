"""The formulas at their edges, and what precision they are computed in. (The oracle holds them in the middle.)"""

import math
import re
import types

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

import faults
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


def test_fp16_needs_a_gpu(train, capsys):
    """accelerate would train in float32 without a word."""
    with pytest.raises(SystemExit) as error:
        train("--mixed_precision=fp16", "--max_train_steps=1")
    assert error.value.code == 2
    assert "--mixed_precision fp16: needs a GPU" in capsys.readouterr().err


def test_a_step_that_overflows_is_spent_but_changes_nothing(train, monkeypatch):
    """fp16's scaler, on the CPU: weights and EMA stay, the step counts, and the metrics say that it was skipped."""
    build, states = trainer.Run, []

    def before_micro_batch(run, micro_batch):
        if run.step == 0:
            micro_batch["noise"].fill_(math.inf)

    def note(run):
        parameters = (*run.unet.parameters(), *run.average.weights)
        states.append([parameter.detach().clone() for parameter in parameters])

    def with_scaler(*args):
        run = build(*args)
        run.accelerator.scaler = run.optimizer.adamw.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run.optimizer.adamw.__setstate__({})  # as accelerate does for an optimizer with a scaler
        monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *args: torch.tensor(1.0))
        note(run)
        return run

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch, after_step=note)
    monkeypatch.setattr(trainer, "Run", with_scaler)
    run = train("--use_ema", "--train_batch_size=2", "--max_train_steps=2", "--checkpointing_steps=1")
    assert [run.logs[step]["train/skipped"] for step in (1, 2)] == [1, 0]
    before, skipped, stepped = states
    assert all(map(torch.equal, before, skipped))
    assert not any(map(torch.equal, skipped[:50], stepped[:50]))
    assert run.run.average.updates == 1
    assert run.run.step == 2


def test_a_loss_that_is_infinite_stops_the_run(train, monkeypatch, capsys):
    """As one that is no number does, in test_faults.py."""

    def before_micro_batch(run, micro_batch):
        if run.step == 3:
            micro_batch["noise"].fill_(math.inf)

    faults.plant(monkeypatch.setattr, before_micro_batch=before_micro_batch)
    with pytest.raises(SystemExit) as end:
        train("--train_batch_size=1", "--max_train_steps=9", "--checkpointing_steps=2")
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert re.search(r"error: step 4: loss (nan|inf), gradient norm nan\.", printed)
    assert re.search(r"Last checkpoint: \S*checkpoint-2: add", printed)


HOST_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")


@pytest.fixture
def between_readings(monkeypatch):
    """A function that has `enter` and `leave` called around all that a step does: the step itself, and its metrics."""

    def watch(enter, leave):
        def wrap(owner, name):
            original = getattr(owner, name)

            def watched(*args, **kwargs):
                enter()
                try:
                    return original(*args, **kwargs)
                finally:
                    leave()

            monkeypatch.setattr(owner, name, watched)

        wrap(trainer, "train_step")
        wrap(trainer.Progress, "add")

    return watch


STEPS = (
    "--use_ema",
    "--snr_gamma=5",
    "--train_batch_size=2",
    "--gradient_accumulation_steps=2",
    "--max_train_steps=11",
    "--mixed_precision=bf16",
)
CACHED = ("--center_crop", "--cache_latents=on", "--micro_batch_size=auto")


@pytest.mark.parametrize("flags", [(), CACHED])
def test_no_step_makes_the_host_wait(train, monkeypatch, between_readings, flags):
    """On a GPU each of these would stop the host until the device has caught up."""
    reads, inside = [], []
    between_readings(lambda: inside.append(True), inside.pop)

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
def test_no_step_synchronises_the_device(train, between_readings, flags):
    """As CUDA itself sees it."""
    mode = torch.cuda.set_sync_debug_mode
    between_readings(lambda: mode("error"), lambda: mode("default"))
    assert len(train(*STEPS, *flags).logs) == 11


def test_metrics_are_read_every_ten_steps_and_before_a_save(train, monkeypatch):
    """And shown at once: after step 10, the bar has the loss of step 10."""
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
    """On the meta device, which has no values to read and where tables left on the host cannot be indexed."""
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
