"""The trainer against a plain loop that shares nothing with it but the samples: weights and EMA after ten steps."""

import math
import shutil

import pytest
from diffusers import DDPMScheduler
from transformers import CLIPTokenizer

import oracle
import sd_config
from conftest import difference, trainer, weights

# At a rate of 1e-4 the rounding of the float32 weights themselves is as long as 8e-5 of the way; at this one, 4e-5.
RATE, STEPS, BATCH = 3e-4, 10, 4
WARMUP = 3


def constant(step):
    return RATE


def cosine(step):
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return RATE * (step / WARMUP if step < WARMUP else (1 + math.cos(math.pi * progress)) / 2)


def linear(step):
    return RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


VARIANTS = {
    "epsilon": ([], {}),
    "v-prediction": (["--prediction_type=v_prediction"], {"v": True}),
    "min-SNR": (["--snr_gamma=5"], {"gamma": 5.0}),
    "min-SNR with v-prediction": (["--snr_gamma=5", "--prediction_type=v_prediction"], {"gamma": 5.0, "v": True}),
    "offset and perturbation": (
        ["--noise_offset=0.1", "--input_perturbation=0.2"],
        {"offset": 0.1, "perturbation": 0.2},
    ),
    "DREAM": (["--dream_training", "--dream_detail_preservation=2"], {"dream": 2.0}),
    "cosine": (["--lr_scheduler=cosine", f"--lr_warmup_steps={WARMUP}"], {"rate": cosine}),
    "linear, hard clipping": (
        ["--lr_scheduler=linear", f"--lr_warmup_steps={WARMUP}", "--max_grad_norm=0.01"],
        {"rate": linear, "clip": 0.01},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_agree_with_the_textbook(train, assets, variant):
    """Batches of 4 over 14 rows: the steps cross two epoch boundaries, where short groups used to be."""
    flags, options = VARIANTS[variant]
    flags = [f"--learning_rate={RATE}", f"--max_train_steps={STEPS}", "--random_flip", "--use_ema", *flags]
    run = train(*flags, "--train_batch_size=2", "--gradient_accumulation_steps=2")

    model, photos = assets
    args = sd_config.parse_args(
        [*flags, f"--train_data_dir={photos}", "--resolution=64", f"--output_dir={run.output}/new"]
    )
    table = trainer.read_dataset(args)
    rows = trainer.Rows(
        table,
        fingerprint="",
        bad={},
        held_out=[],
        kept=list(range(len(table))),
        captions=[[text] for text in table["text"]],
    )
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    stream = trainer.SampleStream(rows, tokenizer, args, 7, (4, 8, 8), 1000)
    trained, average = oracle.train(model, stream, batch=BATCH, steps=STEPS, **{"rate": constant} | options)

    start = weights(model / "unet")
    assert (
        difference(weights(run.output / "unet", "diffusion_pytorch_model.non_ema.safetensors"), trained, start) <= 1e-4
    )
    assert difference(weights(run.output / "unet"), average, start) <= 1e-4
    shutil.rmtree(run.output)


def test_the_oracle_fits_a_page():
    with open(oracle.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 80


def test_the_schedule_is_the_base_models_own(assets):
    """The oracle computes SD1.5's betas by hand; the trainer reads them from the model."""
    scheduler = DDPMScheduler.from_pretrained(assets[0], subfolder="scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, rel=1e-5)
