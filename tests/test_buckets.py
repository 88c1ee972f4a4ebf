"""--aspect_buckets: pictures of several shapes in a step train as exactly as squares do."""

import collections
import re

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import faults
import oracle
import sd_config
from conftest import assert_same, assert_same_state, command_line, difference, learned, start, trainer, weights

B = 8
FLAGS = (
    *("--aspect_buckets", "--resolution=256", "--center_crop", f"--train_batch_size={B}", "--learning_rate=3e-4"),
    *("--use_ema", "--cache_latents=off", "--micro_batch_size=1"),
)
TEN = (*FLAGS, "--max_train_steps=10")
SIZES = [(96, 96), (128, 80), (80, 128), (140, 70), (70, 140), (300, 290), (64, 100), (100, 64), (60, 130), (90, 90)]


def write(folder, sizes):
    """Write noise of some sizes (width, height) with captions beside, and return the folder."""
    folder.mkdir()
    for number, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of pictures of which every step of eight has at least three shapes."""
    return write(tmp_path_factory.mktemp("data") / "mixed", SIZES)


@pytest.fixture
def groups(monkeypatch):
    """The shapes of each group of samples of each step."""
    seen, original = [], trainer.train_step

    def train_step(run, batch):
        seen.append([tuple(group["noise"].shape) for group in batch])
        assert sum(len(group["timesteps"]) for group in batch) == run.plan.batch_per_process
        return original(run, batch)

    monkeypatch.setattr(trainer, "train_step", train_step)
    return seen


def test_steps_with_mixed_shapes_agree_with_the_textbook(train_once, assets, mixed, groups):
    run = train_once(*TEN, data=mixed)
    assert len(groups) == 10
    assert all(len(shapes) >= 3 for shapes in groups)
    trained, average = oracle.train(assets[0], run.run.stream, batch=B, steps=10, rate=lambda step: 3e-4)
    start, raw = weights(assets[0] / "unet"), "diffusion_pytorch_model.non_ema.safetensors"
    assert difference(weights(run.output / "unet", raw), trained, start) <= 1e-4
    assert difference(weights(run.output / "unet"), average, start) <= 1e-4


WAYS = {
    "micro-batches of 2, workers": ["--micro_batch_size=2", "--dataloader_num_workers=2"],
    "micro-batches as large as fit, encoded once": ["--micro_batch_size=auto", "--cache_latents=on"],
    "one sample a batch, accumulated": ["--train_batch_size=1", f"--gradient_accumulation_steps={B}"],
}


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_a_step_of_mixed_shapes_may_be_divided_in_any_way(train, train_once, assets, mixed, flags):
    one, other = train_once(*TEN, data=mixed), train(*TEN, *flags, data=mixed)
    initial = weights(assets[0] / "unet")
    assert difference(weights(other.output / "unet"), weights(one.output / "unet"), initial) <= 1e-4
    for step, values in learned(one).items():
        assert learned(other)[step] == pytest.approx(values, rel=1e-3)


def test_two_processes_train_alike(train_once, assets, mixed, tmp_path):
    whole = train_once(*TEN, data=mixed)
    flags = (*TEN, f"--train_batch_size={B // 2}", "--report_to=none")
    command = command_line((assets[0], mixed), tmp_path / "run", *flags)
    start(trainer.__file__, *command, folder=tmp_path, processes=2)
    initial = weights(assets[0] / "unet")
    assert difference(weights(tmp_path / "run/unet"), weights(whole.output / "unet"), initial) <= 1e-4


def test_memory_that_runs_out_halves_one_size_for_all_shapes(train, train_once, assets, mixed, monkeypatch):
    sizes = []

    def full(run, micro_batch):
        sizes.append(len(micro_batch["timesteps"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    faults.plant(monkeypatch.setattr, before_micro_batch=full)
    run = train(*TEN, "--micro_batch_size=auto", "--checkpointing_steps=10", data=mixed)
    assert run.run.micro_batch_size == sd_config.read_state(run.output / "checkpoint-10").micro_batch_size == 1
    one, other = weights(train_once(*TEN, data=mixed).output / "unet"), weights(run.output / "unet")
    assert difference(other, one, weights(assets[0] / "unet")) <= 1e-4


def test_resumed_at_every_step_of_twelve(train, mixed):
    """Each step is done again from the checkpoint before it; random crops and flips are of the picture's own shape."""
    flags = (*FLAGS, "--train_batch_size=4", "--random_flip", "--checkpointing_steps=1", "--caption_dropout=0.3")
    flags = [flag for flag in flags if flag != "--center_crop"]
    whole = train(*flags, "--max_train_steps=12", "--checkpoints_total_limit=12", data=mixed, output="whole")
    for step in range(1, 12):
        checkpoint = f"--resume_from_checkpoint={whole.output / f'checkpoint-{step}'}"
        resumed = train(*flags, checkpoint, f"--max_train_steps={step + 1}", data=mixed, output=f"from-{step}")
        assert_same_state(*(run.output / f"checkpoint-{step + 1}" for run in (whole, resumed)))


def test_squares_train_bit_identically_with_the_flag_and_without(train, tmp_path):
    data = write(tmp_path / "squares", [(96, 96)] * 3 + [(70, 70)] * 3)
    flags = [*FLAGS[1:], "--train_batch_size=4", "--max_train_steps=3", "--random_flip", "--input_perturbation=0.1"]
    runs = []
    for more in ([], ["--aspect_buckets"], ["--cache_latents=on"], ["--aspect_buckets", "--cache_latents=on"]):
        runs.append(train(*flags, *more, data=data, output=f"run-{len(runs)}"))
    for one, other in (runs[:2], runs[2:]):
        assert learned(one) == learned(other)
        assert_same(weights(one.output / "unet"), weights(other.output / "unet"))


def test_other_shapes_change_only_the_noise_of_samples(train, mixed):
    """Rows, captions, crops, timesteps and all draws of squares are those of a run without the flag."""
    flags = [*FLAGS, "--max_train_steps=1", "--caption_dropout=0.5", "--input_perturbation=0.1"]
    with_flag = train(*flags, data=mixed).run.stream
    without = train(*flags[1:], data=mixed, output="other").run.stream
    shapes = collections.Counter()
    for position in range(30):
        one, other = with_flag[position], without[position]
        same = [name for name in one if one[name].shape == other[name].shape and torch.equal(one[name], other[name])]
        assert {"input_ids", "timesteps", "noise_offset"} <= {*same}
        assert with_flag.index(position) == without.index(position)
        _, height, width = one["noise"].shape
        assert one["pixel_values"].shape == (3, 8 * height, 8 * width)
        assert len(same) == len(one) or height != width
        shapes[height, width] += 1
        if height != width:
            generator = trainer.keyed_generator(7, "sample", position, height, width)
            for name in ("posterior_noise", "noise", "input_perturbation"):
                assert torch.equal(one[name], torch.randn(4, height, width, generator=generator))
    assert len(shapes) == 5


def test_the_plan_lists_shapes_cropping_and_enlargement(train, tmp_path, capsys):
    """A picture that lies on its side by its EXIF data counts as it is seen; data that is not valid does not count."""
    data = write(tmp_path / "photos", [(512, 512), (640, 448), (300, 200), (1920, 1080), (2000, 1000)])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (448, 640)).save(data / "05.jpg", exif=exif)
    exif[ExifTags.Base.Orientation] = 9
    Image.new("RGB", (640, 448)).save(data / "06.jpg", exif=exif)
    for name in ("05.txt", "06.txt"):
        (data / name).write_text("a picture with EXIF data")
    train("--aspect_buckets", "--resolution=512", "--dry_run", data=data)
    shapes = re.search(r"  shapes +(.*)", capsys.readouterr().out)[1]
    # 300x200 is enlarged 2.24 times, to 672x448, of which 640 remain: 4.8 % are cropped. 1920x1080 becomes 704x396
    # (3.0 %), and 2000x1000 becomes 768x384 (8.3 %).
    average = (32 / 672 + 12 / 396 + 64 / 768) / 7
    cropped = f"on average {average:.1%} of a picture is cropped"
    assert shapes == f"640x448: 4, 704x384: 2, 512x512: 1; {cropped}; enlarged by more than half: 1"


def test_a_picture_that_cannot_be_trained_on_is_named_before_the_training(train, tmp_path, capsys):
    """Its header tells, which is read anyway."""
    data = write(tmp_path / "photos", [(80, 80), (1010, 10)])
    with pytest.raises(SystemExit) as end:
        train("--aspect_buckets", "--resolution=128", "--dry_run", data=data)
    assert end.value.code == 2
    assert "1010x10 is too narrow" in capsys.readouterr().err


@pytest.mark.parametrize("size, shape", [((200, 100), (192, 384)), ((100, 200), (384, 192)), ((101, 103), (256, 256))])
def test_pictures_cover_their_shape(size, shape):
    """Of a picture whose columns (or rows) are numbered, the centre remains, and a corner if asked for."""
    columns = np.tile(np.arange(size[0]) % 256, (size[1], 1)).astype(np.uint8)
    pixels = trainer.to_pixels(Image.fromarray(columns), shape, "bilinear")
    assert pixels.shape == (3, *shape)
    scale = max(shape[0] / size[1], shape[1] / size[0])
    middle = (pixels[0, :, shape[1] // 2 - 1 : shape[1] // 2 + 1].mean() + 1) * 127.5
    assert middle.item() == pytest.approx((size[0] - 1) / 2, abs=1)
    corner = trainer.to_pixels(Image.fromarray(columns), shape, "bilinear", crop=(0.0, 0.0))
    assert ((corner[0, 0, 0] + 1) * 127.5).item() == pytest.approx(0, abs=1)
    last = ((corner[0, 0, -1] + 1) * 127.5).item()
    assert last == pytest.approx(shape[1] / scale - 1, abs=1)


def test_held_out_rows_are_measured_in_their_own_shapes(train, mixed):
    run = train(*FLAGS, "--max_train_steps=1", "--validation_samples=5", data=mixed)
    shapes = [tuple(8 * side for side in sample["noise"].shape[2:]) for sample in run.run.held_out]
    assert shapes == [run.run.stream.rows.shapes[number] for number in run.run.stream.rows.held_out]
    assert len({*shapes}) >= 3
    assert all(sample["moments"].shape == (1, 2, *sample["noise"].shape[1:]) for sample in run.run.held_out)


def test_what_is_encoded_for_squares_is_not_used_for_other_shapes(train, mixed):
    flags = [*FLAGS, "--cache_latents=on", "--max_train_steps=1"]
    names = [train(*given, data=mixed, output=f"{len(given)}").run.stream.encoded.name for given in (flags, flags[1:])]
    assert names[0] != names[1]
