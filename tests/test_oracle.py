"""Weights and average after ten steps are those of a plain loop that shares only the samples with the trainer."""

import math
import shutil

import pytest
from diffusers import DDPMScheduler

import oracle
from conftest import difference, weights

# At this rate, rounding the weights to float32 makes a difference of 4e-5 (see `difference`); at 1e-4, one of 8e-5.
RATE, STEPS, BATCH = 3e-4, 10, 4
WARMUP = 3


def cosine(step):
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return RATE * (step / WARMUP if step < WARMUP else (1 + math.cos(math.pi * progress)) / 2)


def linear(step):
    return RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


WARM_UP, VELOCITY = f"--lr_warmup_steps={WARMUP}", "--prediction_type=v_prediction"
LINEAR = f"--lr_scheduler=linear {WARM_UP} --max_grad_norm=0.01"
# The trainer's flags, and the same in the oracle's words. Schedules and clipping go together with some of the losses.
VARIANTS = {
    "epsilon": ("", {}),
    "v-prediction, cosine": (f"{VELOCITY} --lr_scheduler=cosine {WARM_UP}", {"v": True, "rate": cosine}),
    "min-SNR": ("--snr_gamma=5", {"gamma": 5.0}),
    "min-SNR with v-prediction": (f"--snr_gamma=5 {VELOCITY}", {"gamma": 5.0, "v": True}),
    "DREAM": ("--dream_training --dream_detail_preservation=2", {"dream": 2.0}),
    "offset and perturbation, linear, hard clipping": (
        f"--noise_offset=0.1 --input_perturbation=0.2 {LINEAR}",
        {"offset": 0.1, "perturbation": 0.2, "rate": linear, "clip": 0.01},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_agree_with_the_textbook(train, assets, variant):
    """Ten steps of 4 samples of 14 rows cross the ends of two epochs, at which a step must be as large as others."""
    flags, options = VARIANTS[variant]
    flags = [f"--learning_rate={RATE}", f"--max_train_steps={STEPS}", "--random_flip", "--use_ema", *flags.split()]
    run = train(*flags, "--train_batch_size=2", "--gradient_accumulation_steps=2")

    options = {"rate": lambda step: RATE} | options
    trained, average = oracle.train(assets[0], run.run.stream, batch=BATCH, steps=STEPS, **options)
    start, raw = weights(assets[0] / "unet"), "diffusion_pytorch_model.non_ema.safetensors"
    assert difference(weights(run.output / "unet", raw), trained, start) <= 1e-4
    assert difference(weights(run.output / "unet"), average, start) <= 1e-4
    shutil.rmtree(run.output)


def test_the_oracle_fits_a_page():
    with open(oracle.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 80


def test_the_schedule_is_the_base_models_own(assets):
    """The oracle computes SD1.5's betas itself, and the trainer reads the schedule of the base model."""
    scheduler = DDPMScheduler.from_pretrained(assets[0], subfolder="scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, rel=1e-5)
