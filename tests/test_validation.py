"""What a validation measures on rows kept out of training, and what is in the text of its pictures."""

import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

import infer
import sd_config
from conftest import assert_same, learned, trainer, weights

SHORT = ("--train_batch_size=5", "--max_train_steps=4", "--learning_rate=1e-3", "--center_crop")
HELD_OUT = (*SHORT, "--validation_samples=4", "--validation_epochs=1")  # of 14 rows; two steps an epoch


def loss_by_hand(run, base, unet, prediction_type):
    """The loss on the rows kept out of training. Of the trainer, this uses only its pictures, token ids and noise."""
    vae = AutoencoderKL.from_pretrained(base / "vae")
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    rows, losses = run.stream.rows, []
    for index, number in enumerate(rows.held_out):
        noise, posterior_noise = (run.held_out[index][name] for name in ("noise", "posterior_noise"))
        timestep = torch.tensor([[125, 375, 625, 875][index]])
        picture = trainer.to_pixels(rows.table[number]["image"], (64, 64), "bilinear")
        ids = trainer.tokenize(run.stream.tokenizer, [rows.captions[number][0]])
        with torch.no_grad():
            posterior = vae.encode(picture[None]).latent_dist
            latents = (posterior.mean + posterior.std * posterior_noise) * vae.config.scaling_factor
            target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timestep)
            guess = unet(scheduler.add_noise(latents, noise, timestep), timestep, text_encoder(ids)[0]).sample
        losses.append(torch.nn.functional.mse_loss(guess, target).item())
    return np.mean(losses)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_on_rows_kept_out_is_the_plain_one(train, assets, prediction_type):
    """It has none of the options that the run trains with.

    It is measured of the base model at the start, and of raw and averaged weights at each validation.
    """
    flags = ["--use_ema", "--noise_offset=0.1", "--input_perturbation=0.1", "--snr_gamma=5", "--random_flip"]
    flags += ["--micro_batch_size=5", "--caption_dropout=1", f"--prediction_type={prediction_type}"]
    if prediction_type == "epsilon":
        flags += ["--dream_training"]
    run = train(*HELD_OUT, *flags)
    measured = {step: {k: v for k, v in run.logs[step].items() if k.startswith("val/")} for step in run.logs}
    assert {step: set(names) for step, names in measured.items() if names} == {
        step: {"val/loss", "val/loss_ema"} for step in (0, 2, 4)
    }
    for folder, variant, value in (
        (assets[0], None, measured[0]["val/loss"]),
        (run.output, "non_ema", measured[4]["val/loss"]),
        (run.output, None, measured[4]["val/loss_ema"]),
    ):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", variant=variant)
        assert value == pytest.approx(loss_by_hand(run.run, assets[0], unet, prediction_type), rel=1e-5)
    assert measured[0]["val/loss_ema"] == measured[0]["val/loss"]
    assert len({measured[0]["val/loss"], *measured[4].values()}) == 3


def test_rows_kept_out_are_never_trained_on_and_the_same_for_every_seed(train):
    one = train(*HELD_OUT, output="one")
    other = train(*HELD_OUT, "--max_train_samples=6", output="other", seed=8)
    rows = [result.run.stream.rows for result in (one, other)]
    assert rows[0].held_out == rows[1].held_out
    assert [len(each.kept) for each in rows] == [10, 6]
    for result in (one, other):
        stream = result.run.stream
        shown = {stream.rows.kept[stream.index(position)] for position in range(40)}
        assert not shown & set(stream.rows.held_out)
    for sample, same in zip(one.run.held_out, other.run.held_out, strict=True):
        assert_same(sample, same)
    assert one.logs[0] == other.logs[0]


def test_measuring_leaves_training_alone_and_a_resumed_run_measures_the_same(train):
    flags = (*HELD_OUT, "--use_ema", "--random_flip", "--checkpointing_steps=2")
    often, seldom = train(*flags, output="often"), train(*flags, "--validation_epochs=100", output="seldom")
    assert_same(weights(often.output / "unet"), weights(seldom.output / "unet"))
    assert learned(often) == learned(seldom)
    shutil.rmtree(often.output / "checkpoint-4")
    again = train(*flags, "--resume_from_checkpoint=latest", output="often")
    names = ("val/loss", "val/loss_ema")
    # What the checkpoint knows is not measured again, and what it goes on with is the same.
    assert list(learned(again, *names)) == [4]
    assert again.logs[4]["val/loss_ema"] == often.logs[4]["val/loss_ema"]
    assert (
        again.run.losses
        == often.run.losses
        == {str(step): often.logs[step] for step in (0,)} | {str(step): learned(often, *names)[step] for step in (2, 4)}
    )


def test_without_an_average_only_the_weights_are_measured(train, assets, capfd):
    run = train(*HELD_OUT, "--mixed_precision=bf16", "--cache_latents=off", "--train_batch_size=10")
    measured = {name for values in run.logs.values() for name in values if name.startswith("val/")}
    assert measured == {"val/loss"}
    last = run.logs[4]["val/loss"]
    unet = UNet2DConditionModel.from_pretrained(run.output / "unet")
    assert last == pytest.approx(loss_by_hand(run.run, assets[0], unet, "epsilon"), rel=0.02)
    printed = capfd.readouterr().out
    assert f"Step 0: val/loss {run.logs[0]['val/loss']:.4f}" in printed
    assert f"Step 4: val/loss {last:.4f}" in printed


# -- pictures ------------------------------------------------------------------------------------------------------


def test_each_picture_names_the_command_that_draws_it_again(train, tmp_path):
    """The pixels are the same, on a CPU in float32. Where no checkpoint has the weights, there is no command."""
    flags = ("--use_ema", "--resolution=128", "--train_batch_size=7", "--max_train_steps=5", "--checkpointing_steps=4")
    prompts = ('a cat\'s "hat", $5', "a rocket")
    drawn = ("--validation_epochs=1", "--validation_guidance_scale=3", "--validation_negative_prompt=a dog's tail")
    drawn += ("--validation_prompts", *prompts)
    output = train(*SHORT, *flags, *drawn).output
    pictures = {step: sorted(output.glob(f"samples/step-{step}/[01]-*.png")) for step in (2, 4, 5)}
    assert [len(files) for files in pictures.values()] == [2, 2, 2]
    assert not any("command" in infer.settings_of(Image.open(file)) for file in pictures.pop(2))
    for step, files in pictures.items():
        for file in files:
            picture = Image.open(file)
            settings = infer.settings_of(picture)
            program, script, *flags = shlex.split(settings["command"])
            assert (program, script) == ("python", "infer.py")
            assert flags[0] == f"--checkpoint={output}/checkpoint-{step}"
            size = [flag for flag in flags if flag.startswith(("--height", "--width"))]
            flags = [flag for flag in flags if flag not in size]  # by default it is the one trained on
            assert size == ["--height=128", "--width=128"]
            infer.main(infer.parse_args([*flags, "--output", str(tmp_path / "again.png")]))
            again = Image.open(tmp_path / "again.png")
            assert picture.size == (128, 128)
            assert np.array_equal(np.asarray(picture), np.asarray(again)), (step, file)
            for name in ("guidance_scale", "prompt", "negative_prompt"):
                assert settings[name] == infer.settings_of(again)[name]
            assert settings["negative_prompt"] == "a dog's tail"
            assert settings["step"] == step


@pytest.mark.parametrize("side", [64, 300])
def test_a_grid_shows_every_picture_whole_with_its_caption_below(side):
    """No caption is cut off or overlaps another."""
    colours = [["red", "green", "blue"], ["cyan", "magenta", "yellow"]]
    rows = [[Image.new("RGB", (side, side), colour) for colour in row] for row in colours]
    grid = infer.captioned_grid(rows, ["i", "a long caption " * 12, "W" * 30])
    width = 256 if side == 64 else 300
    pixels = np.asarray(grid)
    for row in rows:
        for picture in row:
            assert (pixels == picture.getpixel((0, 0))).all(axis=2).sum() == width * width
    below = (pixels[2 * width + 24 :] < 128).any(axis=(0, 2))
    columns = [below[8 + index * (width + 8) : 8 + index * (width + 8) + width] for index in range(3)]
    assert all(column.any() for column in columns)
    assert below.sum() == sum(column.sum() for column in columns)
    assert not (pixels[-4:] < 128).any()


def test_a_grid_enlarges_small_pictures_without_blur():
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    grid = np.asarray(infer.captioned_grid([[Image.fromarray(pixels)]], ["noise"]))
    assert np.array_equal(grid[8 : 8 + 256, 8 : 8 + 256], pixels.repeat(4, axis=0).repeat(4, axis=1))


def test_a_picture_that_is_not_finite_costs_the_run_no_more_than_pictures(train, monkeypatch, capsys):
    """Of that step: the run goes on, draws at the next one, and is exported."""
    decode, pictures = AutoencoderKL.decode, []

    def overflow_once(vae, latents, **kwargs):
        pictures.append(decode(vae, latents, **kwargs)[0])
        return [pictures[-1] * (torch.nan if len(pictures) == 2 else 1)]

    monkeypatch.setattr(AutoencoderKL, "decode", overflow_once)
    monkeypatch.setattr(sd_config, "DENOISING_STEPS", 2)
    output = train(*SHORT, "--validation_epochs=1", "--validation_prompts", "a cat", "a dog").output
    assert [path.name for path in (output / "samples").iterdir()] == ["step-4"]
    assert (output / "model_index.json").exists()
    warning = next(line for line in capsys.readouterr().out.splitlines() if "warning: no " in line)
    assert all(part in warning for part in ("step 3", "'a dog'", "bf16", "fp32"))


def test_the_negative_prompt_changes_the_pictures(train):
    flags = (*SHORT, "--max_train_steps=1", "--validation_prompts", "a cat")
    plain, other = train(*flags, output="plain"), train(*flags, "--validation_negative_prompt=a dog", output="other")
    one, two = (result.output / "samples/step-1/0-a-cat.png" for result in (plain, other))
    assert not np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))


def test_a_command_is_quoted_for_a_shell():
    settings = {"prompt": "-it's $5; `ls`", "negative_prompt": None, "seed": 3}
    assert shlex.split(infer.command(settings)) == ["python", "infer.py", "--prompt=-it's $5; `ls`", "--seed=3"]
