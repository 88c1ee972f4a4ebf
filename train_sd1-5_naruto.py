"""Fine-tune every weight of Stable Diffusion 1.5's UNet on pictures with captions.

Read it from the top: `main` is the story, and everything it calls follows in the order of the calls.

Two ideas carry the rest. First, a run is an endless stream of training samples, and *everything* random about
sample p (which row, which caption, crop, flip, noise, timestep) is a pure function of (seed, p). Step t of
effective batch B consumes positions tB to tB + B - 1. So a run resumed at step t needs to know nothing but t,
and neither the number of loader workers nor the way B is split into micro-batches and processes changes what
is trained. Second, half precision is for the network's forward and backward only: noise, targets, losses, master
weights, optimizer state and EMA are float32.

`step` always means an optimizer step; the pieces it is accumulated from are micro-batches. Pictures are float32
in [-1, 1], shape (batch, 3, resolution, resolution); latents are (batch, 4, resolution / 8, resolution / 8).
"""

import signal

import sd_config
from sd_config import Plan, stop

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before and after the training there is nothing to save
    ARGS = sd_config.parse_args()  # answers --help and typos before the slow imports below
    sd_config.announce_imports()

import contextlib
import copy
import dataclasses
import datetime
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import threading
import time
import traceback
import types
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import accelerate
import datasets
import numpy as np
import psutil
import safetensors
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageCms, ImageOps
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

import infer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXPERIMENT_NAME = "SD1-5_火影忍者"
LOG_EVERY = 10  # steps between two readings of the metrics, when the host waits for the device
VALIDATION_STEPS = 20  # denoising steps of a validation picture
# What PyTorch's allocator, CUDA's driver, Triton, cuBLAS, cuDNN and a CPU say, each in its own words.
OUT_OF_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED|unable to find an engine|can't allocate memory")
MAX_SKIPPED_STEPS = 30  # in a row under fp16; by then the loss scale has fallen from 2^16 to 2^-14


def main(args):
    """Train as `args` (of `sd_config.parse_args`) say, and export the result to `args.output_dir`."""
    infer.quiet_libraries()
    accelerator = create_accelerator(args)
    saved = sd_config.read_state(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    seed = choose_seed(args, saved, accelerator)

    # What can be known without the weights is checked before they are loaded.
    noise_scheduler = load_noise_scheduler(args)
    tokenizer = load_tokenizer(args)
    rows = load_rows(args, tokenizer, seed, accelerator)
    plan = make_plan(args, rows, accelerator)
    check_plan(plan, saved, seed, rows, accelerator)
    if args.dry_run:
        accelerator.print("Dry run: every check has passed, and nothing was trained.")
        return

    with claimed_output(args, saved, accelerator):
        run = load_run(args, plan, seed, rows, accelerator, noise_scheduler)
        if saved:
            restore(run, saved)
        start_tracker(run)
        clear_output(run)
        with rescued(run):
            train(run)
            export(run)


def create_accelerator(args):
    """Return accelerate's Accelerator: device, processes, precision, accumulation, trackers."""
    try:
        accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
            # The others wait while the first downloads, validates and saves: the usual ten minutes may be too few.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))],
        )
    except (ValueError, ImportError) as error:  # a precision that the device lacks, a launch that is incomplete
        stop([f"--mixed_precision {args.mixed_precision}, or accelerate's configuration: {error}"])
    problems = []
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 without a word.
        problems.append("--mixed_precision fp16: needs a GPU; bf16 and no also work on a CPU")
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(accelerator.num_processes):
        problems.append(
            f"WORLD_SIZE {launched}: accelerate sees {accelerator.num_processes} process(es); launch with "
            "accelerate launch --multi_gpu or torchrun (on CPUs with ACCELERATE_USE_CPU=true)"
        )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        problems.append(
            f"accelerate's configuration asks for {accelerator.distributed_type}: only plain data parallelism"
        )
    stop(problems)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def choose_seed(args, saved, accelerator):
    """Return the run's seed: the one given, the checkpoint's, or one that rank 0 draws for all."""
    if args.seed is not None:
        return args.seed
    if saved:
        return saved["seed"]
    seed = broadcast_object_list([secrets.randbits(32)])[0]
    accelerator.print(f"No --seed given: drew {seed}. Give it to repeat this run.")
    return seed


def load_base(loader, args, **kwargs):
    """Load something of the base model, or all of it, with the revision and cache that `args` name."""
    kwargs = {"revision": args.revision, "cache_dir": args.cache_dir} | kwargs
    return infer.load(loader, "--pretrained_model_name_or_path", args.pretrained_model_name_or_path, **kwargs)


def load_tokenizer(args):
    """Return the base model's tokenizer; one that lacks files would load all the same, and know no words."""
    tokenizer = load_base(CLIPTokenizer.from_pretrained, args, subfolder="tokenizer")
    if len(tokenizer) < 256 or tokenizer.model_max_length > 10**6:
        name = args.pretrained_model_name_or_path
        stop([f"--pretrained_model_name_or_path {name}: its tokenizer lacks its vocabulary or its settings"])
    return tokenizer


def load_noise_scheduler(args):
    """Return the DDPM noise schedule of the base model, with the prediction type that is to be trained."""
    chosen = {} if args.prediction_type is None else {"prediction_type": args.prediction_type}
    scheduler = load_base(DDPMScheduler.from_pretrained, args, subfolder="scheduler", **chosen)
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        stop([f"--prediction_type: the base model predicts {prediction_type!r}; choose epsilon or v_prediction"])
    if args.dream_training and prediction_type != "epsilon":
        stop([f"--dream_training: defined for epsilon only, and the base model's scheduler says {prediction_type}"])
    return scheduler


def make_plan(args, rows, accelerator):
    """Return the `Plan`, for which the base model's UNet is measured by its configuration alone."""
    unet = load_base(
        lambda *name, **kw: hollow_unet(UNet2DConditionModel.load_config(*name, **kw)), args, subfolder="unet"
    )
    sizes = unet.num_parameters(), len(rows.texts), unet.config.cross_attention_dim
    return Plan(args, len(rows.kept), accelerator.num_processes, *sizes)


def hollow_unet(config):
    """Return a UNet without the memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def check_plan(plan, saved, seed, rows, accelerator):
    """Print the plan and what there is to say against it; exit with code 2 if that forbids the run."""
    problems, warnings = sd_config.compare_disk(plan, saved["step"] if saved else 0)
    if saved:
        now = final_args(plan.args, accelerator) | {"seed": seed}
        unlike, changed = sd_config.compare_runs(saved, plan, now, rows.fingerprint)
        problems, warnings = unlike + problems, changed + warnings
    stop(problems)
    accelerator.print(f"Plan (device {accelerator.device}, mixed precision {accelerator.mixed_precision}):\n{plan}")
    for warning in warnings:
        accelerator.print(f"warning: {warning}")


# ------------------------------------------------------------------------------------------------------------
# Rows: the data set, checked
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rows:
    """The data set, and which of its rows are trained on."""

    table: datasets.Dataset  # all rows: the image and the caption column
    fingerprint: str  # of every caption and picture file, in their order
    bad: dict  # number of a row left out by --skip_bad_rows -> what is wrong with it
    kept: list  # numbers of the rows trained on
    held_out: list  # numbers of those kept out of training, to measure the loss on
    captions: list  # of all rows: the captions of each, as a list

    @functools.cached_property
    def texts(self):
        """The distinct captions of the rows trained on, and the empty one, sorted."""
        return sorted({"", *(text for number in self.kept for text in self.captions[number])})


def load_rows(args, tokenizer, seed, accelerator):
    """Return the `Rows` to train on.

    Exits with code 2 if the data set, its train split, a column, a caption or a picture's file is not there or not
    usable. Whether a picture can be decoded is found out here only with --skip_bad_rows.
    """
    accelerator.print(f"Reading {args.dataset_name or args.train_data_dir}")
    with accelerator.local_main_process_first():
        table = read_dataset(args)
    check_columns(table, args)
    table = table.select_columns([args.image_column, args.caption_column])
    captions = [list_captions(caption) for caption in table[args.caption_column]]
    check_captions(captions, args.caption_column, tokenizer, accelerator)
    found = [read_pictures(table, args) if accelerator.is_main_process else None]
    fingerprint, bad = broadcast_object_list(found)[0]
    if bad and not args.skip_bad_rows:
        names = [f"{describe(table, number, args)}: {wrong}" for number, wrong in bad.items()]
        stop([*names[:10], f"{len(bad)} row(s) without a readable picture; --skip_bad_rows trains on the others"])
    for number in bad:
        accelerator.print(f"note: left out {describe(table, number, args)}: {bad[number]}")
    limit = args.max_train_samples
    numbers = range(len(table)) if limit is None or limit >= len(table) else permutation(seed, "subset", len(table))
    held_out = choose_held_out(len(table), bad, args.validation_samples)
    left_out = {*bad, *held_out}
    kept = [number for number in numbers if number not in left_out][:limit]
    if not kept:
        flag = f"--validation_samples {args.validation_samples}" if held_out else "--skip_bad_rows"
        stop([f"{flag}: of {len(table)} rows, {len(bad)} of them bad, none is left to train on"])
    if limit is not None and limit > len(kept):
        accelerator.print(f"note: --max_train_samples {limit}: there are {len(kept)} to train on, all used")
    return Rows(table, fingerprint, bad, kept, held_out, captions)


def choose_held_out(length, bad, count):
    """Return the numbers of `count` rows, without bad ones: the same in every run on a data set, whatever its seed."""
    return [number for number in permutation("held out", 0, length) if number not in bad][:count] if count else []


def read_dataset(args):
    """Return the train split of the data set that `args` name, from the Hub or from a local folder."""
    name = args.dataset_name
    flag = f"--dataset_name {name}" if name else f"--train_data_dir {args.train_data_dir}"
    try:
        if name is None:
            files = {"train": os.path.join(glob.escape(args.train_data_dir), "**")}
            splits = datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)
        elif sd_config.is_saved_dataset(name):
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(
                name, args.dataset_config_name, data_dir=args.train_data_dir, cache_dir=args.cache_dir
            )
    except Exception as error:  # the library raises many kinds for what is wrong with a file
        stop([f"{flag}: cannot be loaded (check name and network, or give a local folder): {error}"])
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    if "train" not in splits:
        stop([f"{flag}: has no split named train, only {', '.join(splits)}"])
    if len(splits["train"]) == 0:
        stop([f"{flag}: its train split is empty"])
    return splits["train"]


def check_columns(rows, args):
    """Exit with code 2 unless both columns are there and one holds images."""
    columns = ", ".join(rows.column_names)
    flags = {"--image_column": args.image_column, "--caption_column": args.caption_column}
    problems = [f"{k} {v}: the columns are {columns}" for k, v in flags.items() if v not in rows.column_names]
    if not problems and not isinstance(rows.features[args.image_column], datasets.Image):
        feature = rows.features[args.image_column]
        problems.append(f"--image_column {args.image_column}: holds {feature}, not images")
    stop(problems)


def check_captions(captions, column, tokenizer, accelerator):
    """Exit with code 2 if a caption is missing or empty; say how many are longer than the text encoder reads."""
    bad = [index for index, texts in enumerate(captions) if not texts]
    if bad:
        rows = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        stop([f"--caption_column {column}: {len(bad)} row(s) without a caption, or with an empty one: {rows}"])
    texts = sorted({text for texts in captions for text in texts})
    lengths = map(len, tokenizer(texts, truncation=False, verbose=False).input_ids)
    cut = sum(length > tokenizer.model_max_length for length in lengths)
    if cut:
        limit = tokenizer.model_max_length
        accelerator.print(f"note: {cut} of {len(texts)} captions are longer than {limit} tokens and will be cut")


def list_captions(caption):
    """Return the captions of a row, given as a string or a list of strings, or [] if any is missing or empty."""
    texts = [caption] if isinstance(caption, str) else caption if isinstance(caption, list) else []
    return texts if all(isinstance(text, str) and text.strip() for text in texts) else []


def read_pictures(table, args):
    """Read every picture's file once; with --skip_bad_rows decode it too, unless an earlier run did.

    Returns:
        tuple[str, dict[int, str]]: a fingerprint of the data set, which is another one if a caption or a byte of a
        picture is, and what is wrong with each row whose picture is not usable.
    """
    digest, bad = hashlib.sha256(), {}
    files = table.cast_column(args.image_column, datasets.Image(decode=False))
    for number, row in enumerate(files):
        picture = row[args.image_column] or {}
        path, content = picture.get("path"), picture.get("bytes")
        try:
            if path and content is None:  # the address of one that is not on this machine stands for it
                content = path.encode() if "://" in path else Path(path).read_bytes()
            if not content:
                bad[number] = "the picture is empty"
        except OSError as error:
            bad[number] = f"the picture cannot be read: {error}"
        content = content or b""
        digest.update(repr((row[args.caption_column], len(content))).encode() + content)
    fingerprint = digest.hexdigest()[:16]
    if args.skip_bad_rows:
        bad |= decode_pictures(table, [number for number in range(len(table)) if number not in bad], fingerprint, args)
    return fingerprint, dict(sorted(bad.items()))


def decode_pictures(table, numbers, fingerprint, args):
    """Return what is wrong with each of the rows whose picture cannot be decoded; it is kept for the next run."""
    memory = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, f"bad-rows-{fingerprint}.json")
    if memory.exists():
        return {int(number): wrong for number, wrong in json.loads(memory.read_text("utf-8")).items()}
    faults = ((number, picture_fault(table, number, args)) for number in tqdm(numbers, desc="Decoding every picture"))
    bad = {number: wrong for number, wrong in faults if wrong}
    draft = memory.with_suffix(".new")  # a killed run leaves nothing half written
    with contextlib.suppress(OSError):  # where nothing can be kept, the next run decodes again
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(bad), "utf-8")
        draft.replace(memory)
    return bad


def picture_fault(table, number, args):
    """Return what keeps a row's picture from being decoded, or None if nothing does."""
    try:
        to_rgb(table[number][args.image_column])
    except Exception as error:  # whatever a broken file makes a decoder raise
        return f"{type(error).__name__}: {error}"


def describe(table, number, args):
    """Name a row for people: its number and, where it has one, its file."""
    files = table.cast_column(args.image_column, datasets.Image(decode=False))
    path = (files[number][args.image_column] or {}).get("path")
    return f"row {number}" + (f" ({path})" if path else "")


# ------------------------------------------------------------------------------------------------------------
# The sample stream: position -> everything that a training sample needs
# ------------------------------------------------------------------------------------------------------------


class SampleStream(torch.utils.data.Dataset):
    """The endless stream of training samples, indexed by position: item p is a pure function of (seed, p).

    One generator per position draws, always in this order: caption choice, caption dropout, crop, flip (five numbers
    at once), VAE posterior noise, timestep, diffusion noise, noise offset, input perturbation. What a run does not
    use is drawn all the same, or comes last, so that switching one thing on changes nothing else.
    """

    def __init__(self, rows, tokenizer, args, seed, latent_shape, num_train_timesteps):
        self.rows, self.tokenizer, self.args, self.seed = rows, tokenizer, args, seed
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps
        self.encoded = None  # Encoded, where pictures and captions are encoded only once

    def __getitem__(self, position):
        """Return the sample at `position` (from 0) as a dictionary of tensors without a batch dimension."""
        args, drawn = self.args, self.draw(position)
        choice, dropout, top, left, flip = drawn.pop("choices").tolist()
        index, flipped = self.index(position), args.random_flip and flip < 0.5
        captions = self.rows.captions[self.rows.kept[index]]
        caption = "" if dropout < args.caption_dropout else captions[int(choice * len(captions))]
        if self.encoded:
            return self.encoded.look_up(index, flipped, caption) | drawn
        pixel_values = self.load_pixels(index, flipped, crop=None if args.center_crop else (top, left))
        return {"pixel_values": pixel_values, "input_ids": tokenize(self.tokenizer, [caption])[0], **drawn}

    def draw(self, position):
        """Return everything random about the sample at `position`, as a dictionary of tensors."""
        draws = keyed_generator(self.seed, "sample", position)
        drawn = {
            "choices": torch.rand(5, generator=draws),
            "posterior_noise": torch.randn(self.latent_shape, generator=draws),
            "timesteps": torch.randint(self.num_train_timesteps, (), generator=draws),
            "noise": torch.randn(self.latent_shape, generator=draws),
            "noise_offset": torch.randn((self.latent_shape[0], 1, 1), generator=draws),
        }
        if self.args.input_perturbation:
            drawn["input_perturbation"] = torch.randn(self.latent_shape, generator=draws)
        return drawn

    def index(self, position):
        """Return which of the rows trained on, counted from 0, the sample at `position` shows."""
        epoch, index = divmod(position, len(self.rows.kept))
        return permutation(self.seed, epoch, len(self.rows.kept))[index]

    def row(self, position):
        """Return the number of that row in the data set."""
        return self.rows.kept[self.index(position)]

    def load_pixels(self, index, flipped, crop=None):
        """Return the picture of a row trained on, as `to_pixels` makes it."""
        args, number = self.args, self.rows.kept[index]
        try:
            image = self.rows.table[number][args.image_column]
            return to_pixels(image, args.resolution, args.image_interpolation_mode, crop=crop, flip=flipped)
        except MemoryError:
            raise
        except Exception as error:  # whatever a broken file makes a decoder raise
            wrong = f"{describe(self.rows.table, number, args)}: {type(error).__name__}: {error}"
            raise BadRow(f"{wrong} (--skip_bad_rows goes on without it; repaired, it makes another data set)") from None


def keyed_generator(*key):
    """Return a CPU generator that depends on nothing but `key`."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_seed(*key):
    """Return a seed that depends on nothing but `key`. (torch uses only 32 bits of a CPU seed.)"""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


@functools.lru_cache(maxsize=2)  # samples come in order of their epochs
def permutation(seed, epoch, length):
    """Return the order in which an epoch shows the rows, as a list; `epoch` may be any key."""
    return torch.randperm(length, generator=keyed_generator(seed, "permutation", epoch)).tolist()


def to_pixels(image, resolution, interpolation, *, crop, flip):
    """Return a picture as a square float32 tensor in [-1, 1], shape (3, resolution, resolution).

    Args:
        image (PIL.Image.Image): of any mode and size.
        resolution (int): the shorter side is resized to it.
        interpolation (str): name of the filter, as PIL calls it.
        crop (tuple[float, float] or None): where to crop, as fractions in [0, 1) of the room there is from the top and
            from the left; None crops the centre.
        flip (bool): mirror left to right.
    """
    image = TF.resize(to_rgb(image), resolution, InterpolationMode(interpolation))
    if crop is None:
        image = TF.center_crop(image, resolution)
    else:
        rooms = (image.height - resolution + 1, image.width - resolution + 1)
        top, left = (int(fraction * room) for fraction, room in zip(crop, rooms, strict=True))
        image = TF.crop(image, top, left, resolution, resolution)
    if flip:
        image = TF.hflip(image)
    return TF.to_tensor(image) * 2 - 1


def to_rgb(image):
    """Return any PIL picture upright and in RGB: transparency over white, deep pictures scaled to 8 bits."""
    if max(image.size) > 100 * min(image.size):  # its shorter side at the resolution, the longer would fill the memory
        raise ValueError(f"{image.width}x{image.height} is too narrow")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # PIL itself would clip everything above 255 to white
        return Image.fromarray(to_8_bits(np.asarray(image, np.float64), image.mode)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(pixels, mode):
    """Scale grey values so that the white of their format becomes 255.

    A format does not always say what its white is: it is taken to be the smallest usual one (1, 255 or 65535 for
    floating point, 65535 or 2^31 - 1 for integers) that no pixel exceeds.
    """
    whites = (1, 255, 65535) if mode == "F" else (65535, 2**31 - 1)
    brightest = np.nanmax(pixels, initial=0)
    white = next((white for white in whites if brightest <= white), brightest)
    return np.rint(np.nan_to_num(pixels).clip(0, white) * (255 / white)).astype(np.uint8)


def tokenize(tokenizer, texts):
    """Return the token ids of texts, cut or padded to the tokenizer's length: int64, shape (texts, 77)."""
    return tokenizer(
        texts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


# ------------------------------------------------------------------------------------------------------------
# Pictures and captions that are encoded only once
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Encoded:
    """What the frozen models make of every picture and caption, in files that are mapped into memory."""

    pictures: datasets.Dataset  # one for each view of each row: the row, then with --random_flip its mirror image
    captions: datasets.Dataset  # in the order of Rows.texts
    texts: dict  # caption -> its number
    views: int
    latent_shape: tuple

    def look_up(self, index, flipped, caption):
        """Return what a sample that shows row `index` needs of it, in the shapes that `diffusion_loss` takes."""
        moments = self.pictures[self.views * index + bool(flipped)]["values"]
        hidden_states = self.captions[self.texts[caption]]["values"]
        return {
            "moments": moments.view(2, *self.latent_shape),
            "encoder_hidden_states": hidden_states.view(77, -1),
        }


def encode_rows(stream, plan, vae, text_encoder, accelerator):
    """Return the `Encoded` rows, found where an earlier run left them, or made now.

    The folder's name is a hash of all that they depend on. They are written in shards, each under a temporary name, so
    that a run which is killed meanwhile loses at most one.
    """
    rows, args = stream.rows, stream.args
    ids = tokenize(stream.tokenizer, rows.texts)
    transform = args.resolution, args.image_interpolation_mode, plan.views
    key = (rows.fingerprint, rows.kept, transform, ids.tolist(), vae.dtype, digest(vae), digest(text_encoder))
    folder = plan.encoded / f"encoded-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"

    def encode_views(indices):  # mirrored before they are encoded: the latents of a mirrored picture are not mirrored
        pictures = [stream.load_pixels(index, flipped=False) for index in indices]
        views = [view for picture in pictures for view in (picture, picture.flip(-1))[: plan.views]]
        return encode_pictures(vae, torch.stack(views).to(vae.device))

    def encode_texts(numbers):
        return encode_captions(text_encoder, ids[numbers].to(text_encoder.device))

    with accelerator.local_main_process_first(), ending_on(BadRow, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with sd_config.lock(folder, wait=True):  # another run may be making the same
            for path in folder.glob("tmp*"):  # of a run that was killed
                path.unlink()
            pictures = encode_once(folder, "pictures", encode_views, len(rows.kept), 4, accelerator)
            captions = encode_once(folder, "captions", encode_texts, len(rows.texts), 32, accelerator)
    texts = {text: number for number, text in enumerate(rows.texts)}
    return Encoded(pictures, captions, texts, plan.views, stream.latent_shape)


@contextlib.contextmanager
def ending_on(*errors):
    """Exit with code 2 and the error's message, but for a traceback, if one of `errors` is raised."""
    try:
        yield
    except errors as error:
        stop([str(error)], alone=True)


def digest(model):
    """Return a hash of a model's weights."""
    value = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        value.update(name.encode())
        value.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return value.hexdigest()


def encode_once(folder, name, encode, count, batch_size, accelerator):
    """Return `encode` of the numbers below `count`, as a data set of flat float32 tensors in its column `values`."""
    numbers, shards = list(range(count)), []
    files = [folder / f"{name}-{first:06}.arrow" for first in range(0, count, sd_config.SHARD_ROWS)]
    found = sum(map(is_whole, files))
    if found:
        accelerator.print(f"Encoded {name}: found {found} of {len(files)} shards in {folder}")
    for file, first in zip(files, range(0, count, sd_config.SHARD_ROWS), strict=True):
        shard = datasets.Dataset.from_dict({"number": numbers[first : first + sd_config.SHARD_ROWS]})
        shard = shard.map(
            lambda batch: {"values": encode(batch["number"]).flatten(1).cpu().numpy()},
            batched=True,
            batch_size=batch_size,
            remove_columns="number",
            cache_file_name=str(file),
            new_fingerprint=f"{folder.name}-{file.stem}",  # or the function and its models would be hashed for one
            desc=f"Encoding {name} from {first} of {count}",
        )
        shards.append(shard)
    return datasets.concatenate_datasets(shards).with_format("torch")


def is_whole(file):
    """Say whether a file of encoded rows is there, and remove one that cannot be read."""
    try:
        datasets.Dataset.from_file(str(file))
        return True
    except FileNotFoundError:
        return False
    except Exception:  # cut short by a power cut
        file.unlink()
        return False


# ------------------------------------------------------------------------------------------------------------
# The run: models, optimizer, where it stands
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a run consists of, and how far it has come."""

    args: object  # argparse.Namespace: the flags
    plan: Plan
    seed: int
    accelerator: accelerate.Accelerator
    pipeline: StableDiffusionPipeline  # the base model's parts as they were loaded, to be exported untouched
    vae: torch.nn.Module  # frozen working copies, on the device and in the precision of the run
    text_encoder: torch.nn.Module
    unet: torch.nn.Module  # the weights that are trained
    network: object  # what they are trained through: the UNet as accelerate prepares it, and compiled
    ema: EMAModel | None
    optimizer: torch.optim.Optimizer
    lr_lambda: object  # step, from 0 -> factor of the learning rate
    prediction_type: str
    alphas_cumprod: torch.Tensor  # ᾱ_t, float32 on the device, shape (timesteps,)
    stream: SampleStream
    held_out_batch: dict | None  # the samples of --validation_samples, encoded, on the host of the main process
    nonfinite: torch.Tensor  # on the device: 1 once a loss or gradient was not finite, from when on no step updates
    optimizer_asks: bool  # whether the optimizer itself looks at that, so that the host need not
    micro_batch_size: int
    micro_batch_fixed: bool  # if not, it is halved when memory runs out
    threads: ThreadPoolExecutor  # one to write a checkpoint, one to move an average in the host's memory
    averaging: Future | None = None  # the average's last update, there
    saving: tuple | None = None  # the checkpoint being written and, on the process that writes it, its Future
    step: int = 0  # steps done
    loss: float = math.nan  # of the last step whose metrics were read
    loss_scale: float | None = None  # fp16 only: the scaler's factor after the last step
    skipped: int = 0  # fp16 only: steps skipped in a row
    sound: bool = True  # weights, moments, average and step number belong together
    checkpoint: Path | None = None  # the last one saved, or the one resumed from
    saved_step: int = 0  # its step
    tracker_failed: bool = False
    progress: object = None  # Progress, while it is trained


def load_run(args, plan, seed, rows, accelerator, noise_scheduler):
    """Load the models, encode what is to be encoded only once, and build the optimizer and its schedule."""
    accelerator.print(f"Loading {args.resume_from_checkpoint or args.pretrained_model_name_or_path}")
    pipeline, ema_unet = load_models(args)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = half.get(accelerator.mixed_precision, torch.float32)
    vae, text_encoder = (
        copy.deepcopy(part).requires_grad_(False).eval().to(accelerator.device, dtype)
        for part in (pipeline.vae, pipeline.text_encoder)
    )
    # A copy of the tokenizer: it remembers how it was used, and is exported untouched.
    latent_shape = vae.config.latent_channels, *2 * [args.resolution // pipeline.vae_scale_factor]
    timesteps = len(noise_scheduler.alphas_cumprod)
    stream = SampleStream(rows, copy.deepcopy(pipeline.tokenizer), args, seed, latent_shape, timesteps)
    held_out_batch = None
    if rows.held_out and accelerator.is_main_process:
        held_out_batch = encode_held_out(stream, vae, text_encoder)
    if plan.encoded:
        stream.encoded = encode_rows(stream, plan, vae, text_encoder, accelerator)
        vae, text_encoder = vae.to("cpu"), text_encoder.to("cpu")

    if accelerator.mixed_precision != "no":
        for unet in (pipeline.unet, ema_unet):  # tensor cores take the channels of a convolution last
            unet.to(memory_format=torch.channels_last)
    ema = EMAModel(ema_unet.parameters(), foreach=not args.low_memory) if args.use_ema else None
    if ema and not args.low_memory:
        ema.to(accelerator.device)
    unet = prepare_unet(pipeline.unet, args, accelerator)
    optimizer = create_optimizer(args, plan, unet)
    # The rate of a step is a function of its number: the schedule is never advanced, saved or handed to accelerate.
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=plan.max_steps
    )
    nonfinite, fused = torch.zeros((), device=accelerator.device), optimizer.defaults.get("fused")
    if fused and not accelerator.scaler:  # fp16's scaler brings a flag of its own
        optimizer.found_inf = nonfinite
    network = torch.compile(unet, fullgraph=True, dynamic=False) if args.torch_compile else unet
    network, optimizer = accelerator.prepare(network, optimizer)
    auto = args.micro_batch_size == "auto"
    return Run(
        args=args,
        plan=plan,
        seed=seed,
        accelerator=accelerator,
        pipeline=pipeline,
        vae=vae,
        text_encoder=text_encoder,
        unet=unet,
        network=network,
        ema=ema,
        optimizer=optimizer,
        lr_lambda=schedule.lr_lambdas[0],
        prediction_type=noise_scheduler.config.prediction_type,
        alphas_cumprod=noise_scheduler.alphas_cumprod.to(accelerator.device, torch.float32),
        stream=stream,
        held_out_batch=held_out_batch,
        nonfinite=nonfinite,
        optimizer_asks=bool(fused or accelerator.scaler),
        micro_batch_size=plan.batch_per_process if auto else args.micro_batch_size,
        micro_batch_fixed=not auto,
        threads=ThreadPoolExecutor(max_workers=2),
    )


def encode_held_out(stream, vae, text_encoder):
    """Return the samples of --validation_samples as a batch on the host: moments, hidden states, noise, timesteps.

    They depend on the data set and on their number only. Row i of n has timestep (i + 1/2) T / n, rounded down: the
    loss depends so much on the timestep that random ones would be most of what is measured.
    """
    rows, samples, held = stream.rows, [], copy.copy(stream)
    held.rows, held.seed = dataclasses.replace(rows, kept=rows.held_out), "held out"
    for index, number in enumerate(tqdm(rows.held_out, desc="Encoding the rows kept out of training")):
        with ending_on(BadRow):
            pixel_values = held.load_pixels(index, flipped=False)
        input_ids = tokenize(stream.tokenizer, rows.captions[number][:1])
        timestep = (2 * index + 1) * stream.num_train_timesteps // (2 * len(rows.held_out))
        encoded = {
            "moments": encode_pictures(vae, pixel_values[None].to(vae.device))[0].cpu(),
            "encoder_hidden_states": encode_captions(text_encoder, input_ids.to(text_encoder.device))[0].cpu(),
        }
        samples.append(held.draw(index) | {"timesteps": torch.tensor(timestep)} | encoded)
    return torch.utils.data.default_collate(samples)


def prepare_unet(unet, args, accelerator):
    """Make the UNet ready to be trained: precision, memory, device."""
    unet.requires_grad_(True).train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, NotImplementedError) as error:  # no CUDA device, or one that xformers was not built for
            stop([f"--enable_xformers_memory_efficient_attention: {error}"])
    if args.low_memory:
        for parameter in unet.parameters():
            # torchao keeps 8-bit moments of such tensors only; those of others have the precision of the weights.
            if parameter.numel() >= 4096 and parameter.numel() % 256 == 0:
                parameter.data = parameter.data.bfloat16()
    return unet.to(accelerator.device)


def load_models(args):
    """Return the base pipeline with the UNet to train, in float32, and the UNet that starts the EMA."""
    checkpoint, weights = args.resume_from_checkpoint, {"variant": args.variant}
    if checkpoint is None:
        pipeline = load_base(StableDiffusionPipeline.from_pretrained, args, **weights)
        ema_unet = pipeline.unet
        if args.non_ema_revision != args.revision:
            pipeline.unet = load_base(
                UNet2DConditionModel.from_pretrained, args, subfolder="unet", revision=args.non_ema_revision, **weights
            )
    else:
        unets = [
            infer.load(
                UNet2DConditionModel.from_pretrained, "--resume_from_checkpoint", checkpoint, subfolder=subfolder
            )
            for subfolder in ("unet", "unet_ema")[: 2 if args.use_ema else 1]
        ]
        ema_unet = unets[-1]
        pipeline = load_base(StableDiffusionPipeline.from_pretrained, args, unet=unets[0], **weights)
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        part = getattr(pipeline, name)
        dtypes = stored_dtypes(part, args.variant) if part is not None else []
        held = sum(tensor.is_floating_point() for tensor in part.state_dict().values()) if dtypes else 0
        if len(dtypes) < held:  # transformers would have made up the others
            base = args.pretrained_model_name_or_path
            stop([f"--pretrained_model_name_or_path {base}: {name} has {len(dtypes)} of its {held} tensors"])
        # Half-precision files may have been loaded as float32: what is exported untouched goes back to what it was.
        if dtypes and name != "unet":
            part.to(dtypes[0])
    return pipeline, ema_unet


def stored_dtypes(model, variant):
    """Return the dtypes of a model's floating-point tensors in the file that they were loaded from, if it is found."""
    folder, stems = Path(model.config._name_or_path), ("diffusion_pytorch_model", "model", "pytorch_model")
    for suffix, infix, stem in itertools.product((".safetensors", ".bin"), (f".{variant}", ""), stems):
        file = folder / f"{stem}{infix}{suffix}"
        if not file.is_file():
            continue
        if suffix == ".bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).values()
            return [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        with safetensors.safe_open(file, "pt") as tensors:
            found = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118 (no dictionary)
        return [names[dtype] for dtype in found if dtype in names]
    return []


def create_optimizer(args, plan, unet):
    """Return AdamW over all of the UNet's weights: torch's in one fused kernel, or torchao's with 8-bit moments."""
    settings = {
        "lr": plan.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        from torchao.optim import AdamW8bit  # noqa: PLC0415 (optional package: checked with the flags)

        return AdamW8bit(unet.parameters(), **settings, bf16_stochastic_round=args.low_memory)
    # Fused only where it is known to heed `found_inf`, on which the guard against NaN rests: mps, for one, does not.
    return torch.optim.AdamW(unet.parameters(), fused=unet.device.type in ("cpu", "cuda"), **settings)


def restore(run, saved):
    """Bring the run to where a checkpoint was saved; its UNets were loaded with the models."""
    folder = run.args.resume_from_checkpoint
    # Only the moments: flags such as --adam_weight_decay are this run's own.
    kwargs = {"map_location": "cpu", "weights_only": True}
    moments = infer.load(torch.load, "--resume_from_checkpoint", folder / "optimizer.pt", **kwargs)
    for weight, state in zip(run.unet.parameters(), moments.values(), strict=True):
        for name, moment in state.items():  # in another precision they may have lain in memory in another order
            if type(moment) is torch.Tensor and moment.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=moment.dtype, device="cpu").copy_(moment)
    run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": moments})
    if run.ema:
        run.ema.optimization_step = saved["ema_step"]
    if run.accelerator.scaler and saved["scaler"]:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    if not run.micro_batch_fixed and run.plan.batch_per_process % saved["micro_batch_size"] == 0:
        run.micro_batch_size = saved["micro_batch_size"]
    run.step, run.saved_step, run.loss, run.checkpoint = saved["step"], saved["step"], saved["loss"], folder
    run.accelerator.print(f"Resuming from {folder}: step {run.step} of {run.plan.max_steps}")


@contextlib.contextmanager
def claimed_output(args, saved, accelerator):
    """Make the output folder, and keep every other trainer out of it for as long as this is entered."""
    if accelerator.is_main_process:
        output, step = Path(args.output_dir), saved["step"] if saved else 0
        output.mkdir(parents=True, exist_ok=True)
        with sd_config.lock(output):
            newer = [path for path in sd_config.checkpoints(output) if sd_config.number(path) > step]
            whole = [path for path in newer if not args.overwrite_output_dir and not sd_config.damage(path)]
            if whole:  # while this one was starting
                stop([f"--output_dir {output}: {whole[-1].name} was saved by another process just now; start again"])
            yield
    else:
        yield


def clear_output(run):
    """Delete the litter of a run that was killed, and the run that --overwrite_output_dir gives up (not its logs)."""
    if run.accelerator.is_main_process:
        for path in sd_config.leftovers(run.args):
            shutil.rmtree(path, ignore_errors=path.name[0] == ".") if path.is_dir() else path.unlink()
    run.accelerator.wait_for_everyone()


def start_tracker(run):
    """Start the tracker that --report_to names, with all arguments as its configuration, if there is a step to log."""
    args = run.args
    if args.report_to == "none" or run.step == run.plan.max_steps:
        return
    folder, options = os.path.join(args.output_dir, args.logging_dir), {}
    if run.accelerator.is_main_process:
        os.makedirs(folder, exist_ok=True)
        options["wandb"] = {"dir": folder, "name": EXPERIMENT_NAME}
        if args.report_to == "swanlab":
            options["swanlab"] = swanlab_options(folder)
    plain = (bool, int, float, str)  # all that TensorBoard takes
    config = {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
    start = functools.partial(run.accelerator.init_trackers, args.tracker_project_name, config | {"seed": run.seed})
    try:
        start(options)
    except Exception as error:  # a key that is refused, a server out of reach
        print(f"warning: {args.report_to} cannot start: {error}")
        run.accelerator.trackers.clear()  # it is among them all the same
        if args.report_to == "swanlab":
            print(f"Offline run in {folder}: upload it with swanlab sync.")
            report(run, start, {"swanlab": options["swanlab"] | {"mode": "offline", "reinit": True}})


def report(run, send, *args, **kwargs):
    """Call something of the tracker's. Its first failure is a warning, and none stops the training."""
    try:
        send(*args, **kwargs)
    except Exception as error:
        if not run.tracker_failed:
            print(f"warning: {run.args.report_to} failed; training goes on without what it misses: {error!r}")
        run.tracker_failed = True


def swanlab_options(folder):
    """Return the options of `swanlab.init` that the environment leaves to us.

    SwanLab online wants an API key. Where there is none, and no terminal to ask on, the run is kept in `folder`, to be
    uploaded later.
    """
    import swanlab  # noqa: PLC0415 (of the trackers only the one in use is imported)

    settings, options = swanlab.Settings(), {}
    if not settings.experiment.name:
        options["name"] = EXPERIMENT_NAME
    if not {"SWANLAB_LOG_DIR", "SWANLAB_LOGDIR"} & os.environ.keys():
        options["log_dir"] = folder
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if settings.mode == "online" and not settings.api_key and not terminal:
        place = options.get("log_dir", settings.log_dir)
        print(f"SwanLab: no API key and no terminal to ask on. Offline run in {place}: upload it with swanlab sync.")
        options["mode"] = "offline"
    return options


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------


def train(run):
    """Train from the step that the run has reached to its last, saving and validating when the plan says so.

    After the first SIGTERM or SIGINT, finish the step, save, and exit with the code that shells give that signal.
    """
    if run.args.torch_compile or run.args.use_8bit_adam:
        run.accelerator.print("Compiling: the first step takes minutes, the others do not.")
    progress = run.progress = Progress(run)
    if run.step == 0:
        measure(run, "val/loss_base")
        run.accelerator.wait_for_everyone()
    with Signals(run.accelerator) as signals:
        if run.plan.validates_after(run.step):
            validate(run, signals, missing_only=True)  # it may have been cut short when the run was stopped
        leave_if_asked(run, signals)
        for batch in create_loader(run):
            progress.add(train_step(run, batch))
            finish_saving(run, wait=False)
            saves, validates = run.plan.saves_after(run.step), run.plan.validates_after(run.step)
            if saves or validates or run.step % LOG_EVERY == 0:
                progress.flush(everything=saves or validates)
            if saves:
                save_checkpoint(run)
            if validates:
                validate(run, signals)
            if saves or validates:
                progress.restart_clock()
            leave_if_asked(run, signals)
        finish_saving(run)
    progress.close()


def leave_if_asked(run, signals):
    """Save and exit if a process of this run has received a signal."""
    if number := signals.received_by_any():
        run.progress.flush()
        save_checkpoint(run)
        finish_saving(run)
        sys.exit(128 + number)


def create_loader(run):
    """Return a loader that yields, for each step still to be done, this process's share of its samples."""
    steps, rank = range(run.step, run.plan.max_steps), run.accelerator.process_index
    return torch.utils.data.DataLoader(
        run.stream,
        batch_sampler=map(functools.partial(run.plan.positions, rank=rank), steps),
        num_workers=run.args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def ignore_signals(_worker):
    """Leave to the training process what a signal means: it needs its workers to the end of the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """Takes note of the first SIGTERM or SIGINT while it is entered. A second one ends the process at once."""

    def __init__(self, accelerator):
        self.number = 0
        # The processes agree through their hosts' memory: the device is not asked, so nobody waits for it.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception):
        if not self.number:  # after one, another ends the process at once whatever it does
            for number, handler in self.handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def note(self, number, _frame):
        """Remember the first signal. From then on both do what the system does by default."""
        if self.number:
            if time.monotonic() > self.noted + 1:
                os._exit(128 + number)
            return
        self.number, self.noted = number, time.monotonic()
        if "LOCAL_RANK" not in os.environ:  # a launcher passes on signals that this process may have got as well
            for each in STOP_SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        # Not print: the signal may have come while something was being printed.
        os.write(
            2, b"\nStopping: this step will be finished and saved. A second signal stops at once, without saving.\n"
        )

    def received_by_any(self):
        """Return the number of the signal that this process, or another of the run, has received; 0 if none has."""
        if self.group is None:
            return self.number
        number = torch.tensor(self.number)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number)


class Explained(Exception):
    """An error whose message says all there is to say: it is shown without a traceback."""

    code = 1
    everywhere = False  # all processes of the run raise it at the same step


class BadRow(Explained):
    """A row's picture cannot be decoded."""

    code = 2


class NotFinite(Explained):
    """A loss or a gradient was not finite."""

    everywhere = True


@contextlib.contextmanager
def rescued(run):
    """Whatever ends the run: save what was trained, finish the tracker, and leave with a message and a code."""
    code, together = 0, True
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:  # after a signal: all processes come to it at the same step
        code = getattr(end, "code", 130)
    except Exception as error:
        known = isinstance(error, Explained)
        code, together = (error.code, error.everywhere) if known else (1, False)
        explain(error, run)
        traceback.clear_frames(error.__traceback__)  # they hold what fills the memory, if that is the error
        together |= run.accelerator.num_processes == 1
        rescue(run)
    if together:
        finish_tracker(run, code)
    else:  # it may wait for a network, and other processes for this one
        finish = threading.Thread(target=finish_tracker, args=(run, code), daemon=True)
        finish.start()
        finish.join(60)
    if code and (run.accelerator.is_main_process or not together):
        how = ": add --resume_from_checkpoint latest to go on from there" if run.checkpoint else ""
        print(f"Stopped at step {run.step}. Last checkpoint: {run.checkpoint or 'none'}{how}", file=sys.stderr)
    if not together:  # the others may be waiting for this process, and would for ever: their launcher ends them
        sys.stdout.flush()
        os._exit(code)
    run.accelerator.wait_for_everyone()
    run.accelerator.state.destroy_process_group()
    if code:
        sys.exit(code)


def finish_tracker(run, code):
    """Close the tracker's run; SwanLab is told how it ended."""
    for tracker in run.accelerator.trackers:
        if code and tracker.name == "swanlab" and run.accelerator.is_main_process:
            state = "aborted" if code > 128 else "crashed"
            report(run, tracker.tracker.finish, state=state, error=f"stopped at step {run.step}, exit code {code}")
        else:
            report(run, tracker.finish)


def explain(error, run):
    """Print an error: with its traceback, unless its message is enough."""
    if not isinstance(error, Explained):
        traceback.print_exception(error)
    elif run.accelerator.is_main_process or not error.everywhere:
        message = str(error).rpartition("BadRow: ")[2]  # a loader's worker puts its traceback before it
        print(f"\nerror: {message.strip()}", file=sys.stderr)


def rescue(run):
    """After an error, finish what is being saved; in a run of one process, log and save what was trained, if sound."""
    try:
        finish_saving(run)
        if run.accelerator.num_processes > 1:
            return
        if run.progress:
            run.progress.flush()
        if run.sound and run.step:
            save_checkpoint(run)
            finish_saving(run)
    except Exception as error:  # a device that has failed, a disk that is full
        explain(error, run)


def train_step(run, batch):
    """Do one optimizer step, without making the host wait (but for one number under fp16 and with 8-bit moments).

    Args:
        batch (dict[str, torch.Tensor]): this process's samples of the step, on the host.

    Returns:
        dict: the step's metrics; loss and gradient norm are tensors on the device, shape ().
    """
    args, accelerator = run.args, run.accelerator
    if not run.micro_batch_fixed and accelerator.num_processes > 1:
        agree_on_micro_batch(run, batch)
    learning_rate = run.plan.learning_rate * run.lr_lambda(run.step)
    set_learning_rate(run.optimizer, learning_rate)
    if accelerator.scaler and run.loss_scale is None:
        run.loss_scale = accelerator.scaler.get_scale()
    while (loss := add_gradients(run, batch)) is None:
        release_memory(run)  # and once more, with smaller micro-batches
    gradient_norm = clip_gradients(run)
    run.nonfinite.clamp_(min=(~torch.isfinite(loss + gradient_norm)).float())
    run.sound = False  # until weights, average and step number belong together again
    if args.low_memory:
        torch.manual_seed(keyed_seed(run.seed, "rounding", run.step))  # the optimizer rounds at random
    if run.optimizer_asks or not run.nonfinite.item():
        run.optimizer.step()
    run.optimizer.zero_grad()
    metrics = {"loss": loss, "grad_norm": gradient_norm, "lr": learning_rate}
    if accelerator.scaler:
        # A step that overflowed lowers the scale. The fused optimizer skips it without telling accelerate.
        scale, run.loss_scale = run.loss_scale, accelerator.scaler.get_scale()
        metrics["skipped"] = float(run.loss_scale < scale)
        run.skipped = run.skipped + 1 if metrics["skipped"] else 0
    if run.ema and not metrics.get("skipped"):
        update_average(run)
    run.step, run.sound = run.step + 1, True
    if run.skipped == MAX_SKIPPED_STEPS:
        where = describe_step(run, run.step, loss.item(), gradient_norm.item())
        raise NotFinite(f"fp16 overflowed in {run.skipped} steps in a row, which bf16 would not; the last: {where}")
    return metrics


def add_gradients(run, batch, *, alone=False):
    """Run forward and backward over a step's samples, a micro-batch at a time, so that their gradients add up.

    Args:
        batch (dict[str, torch.Tensor]): this process's samples of the step, on the host.
        alone (bool): leave out what several processes do together.

    Returns:
        torch.Tensor or None: the mean loss, shape (). If memory ran out: None, with part of the gradients, and the
        micro-batches are smaller from now on.
    """
    accelerator, losses, size = run.accelerator, [], run.micro_batch_size
    starts = range(0, run.plan.batch_per_process, size)
    accelerator.gradient_accumulation_steps = len(starts)  # by which it divides each loss
    try:
        for first in starts:
            together = first == starts[-1] and not alone
            with contextlib.nullcontext() if together else accelerator.no_sync(run.network):
                micro_batch = {
                    name: samples[first : first + size].to(accelerator.device, non_blocking=True)
                    for name, samples in batch.items()
                }
                loss = diffusion_loss(run, micro_batch)
                accelerator.backward(loss)
                losses.append(loss.detach())
        return torch.stack(losses).mean()
    except RuntimeError as error:
        if run.micro_batch_fixed or size == 1 or not OUT_OF_MEMORY.search(str(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations
    run.micro_batch_size = next(n for n in range(size // 2, 0, -1) if run.plan.batch_per_process % n == 0)
    accelerator.print(f"\nnote: out of memory; micro-batches of {run.micro_batch_size} instead of {size} from here on")
    return None


def release_memory(run):
    """Give back the gradients, and what the device's allocator keeps of memory that is no longer used."""
    run.optimizer.zero_grad()
    clear_device_cache(garbage_collection=True)


def agree_on_micro_batch(run, batch):
    """Find, before the first step, the size of a micro-batch that fits on every process; from then on it is fixed."""
    allocate_moments(run)
    tried = None
    while tried != run.micro_batch_size:
        tried = run.micro_batch_size
        add_gradients(run, batch, alone=True)
        release_memory(run)
        size = torch.tensor(run.micro_batch_size, device=run.accelerator.device)
        run.micro_batch_size = int(run.accelerator.gather(size).min())
    run.micro_batch_fixed = True


def allocate_moments(run):
    """Have the optimizer allocate its moments, by a step that changes nothing else: what then fits will still fit."""
    optimizer = run.optimizer.optimizer
    if optimizer.state:  # it was restored
        return
    (group,) = optimizer.param_groups
    epsilon, group["eps"] = group["eps"], group["eps"] or 1.0  # with none, 0 / 0
    set_learning_rate(optimizer, 0.0)
    for parameter in run.unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    group["eps"] = epsilon
    release_memory(run)


def clip_gradients(run):
    """Scale the gradients down to --max_grad_norm, if their global norm is above it. Return that norm: shape ()."""
    parameters, limit = list(run.unet.parameters()), run.args.max_grad_norm
    if not run.args.low_memory:
        return run.accelerator.clip_grad_norm_(parameters, limit)
    norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) for parameter in parameters]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@torch.no_grad()
def update_average(run):
    """Move the moving average towards the weights; in a thread of its own, where it is in the host's memory.

    In place of `EMAModel.step`, which takes two passes over memory, and as much of it again as the average itself.
    """
    ema, weights = run.ema, list(run.unet.parameters())
    ema.optimization_step += 1
    decay = ema.get_decay(ema.optimization_step)
    if not run.args.low_memory:
        get_ema_multi_avg_fn(decay)(ema.shadow_params, weights, None)
        return
    averages, arrived = settled_average(run), None
    copies = copied_to_host(dict(enumerate(weights))).values()
    if run.accelerator.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record()
    run.averaging = run.threads.submit(average_on_host, averages, copies, 1 - decay, arrived)


@torch.no_grad()
def average_on_host(averages, weights, weight, arrived):
    """Move averages towards weights, once their copies have `arrived` from the device."""
    if arrived:
        arrived.synchronize()
    for average, copied in zip(averages, weights, strict=True):
        average.lerp_(copied.float(), weight)


def settled_average(run):
    """Return the averaged weights as a list, once the thread that may still be at work on them is done."""
    if run.averaging:
        run.averaging.result()
    return run.ema.shadow_params


def set_learning_rate(optimizer, value):
    """Set the learning rate of all parameters; torchao keeps it in a tensor, which its compiled step reads."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


class Progress:
    """Collects the metrics of each step on the device, and reads, logs and shows them a few steps at a time."""

    def __init__(self, run):
        self.run, self.pending, self.asked = run, [], []
        self.bar = tqdm(
            total=run.plan.max_steps, initial=run.step, desc="Steps", disable=not run.accelerator.is_local_main_process
        )
        self.restart_clock()

    def restart_clock(self):
        """Leave out of images/s whatever happened since the last reading."""
        self.clock = time.perf_counter()

    def add(self, metrics):
        """Note the metrics of the step just done."""
        self.pending.append((self.run.step, metrics))
        self.bar.update()

    def flush(self, everything=True):
        """Log the metrics not yet logged, each at its own step.

        Unless `everything` is wanted, those since the last call are only asked for, and logged by the next: so the
        device has other steps to do while the host reads.
        """
        if self.pending:
            self.ask()
        while len(self.asked) > (0 if everything else 1):
            self.log(*self.asked.pop(0))

    def ask(self):
        """Have the device send what it has computed, without waiting for it."""
        run, (pending, self.pending) = self.run, (self.pending, [])
        tensors = [torch.stack([m["loss"], m["grad_norm"]]).float() for _, m in pending]
        values = run.accelerator.reduce(torch.stack(tensors), "mean")
        arrived = None
        if values.is_cuda:
            values, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        images_per_sec = len(pending) * run.plan.effective_batch / (time.perf_counter() - self.clock)
        self.asked.append((pending, values, arrived, images_per_sec))
        self.restart_clock()

    def log(self, pending, values, arrived, images_per_sec):
        """Log metrics that were asked for. This is where the host waits for the device."""
        run = self.run
        if arrived:
            arrived.synchronize()
        for (step, metrics), (loss, grad_norm) in zip(pending, values.tolist(), strict=True):
            read = metrics | {"loss": loss, "grad_norm": grad_norm, "images_per_sec": images_per_sec}
            read["epoch"] = step / run.plan.steps_per_epoch
            report(run, run.accelerator.log, {f"train/{name}": value for name, value in read.items()}, step=step)
            if not math.isfinite(loss + grad_norm) and not metrics.get("skipped"):
                run.sound = False  # the average has gone on without the weights
                raise NotFinite(describe_step(run, step, loss, grad_norm))
        run.loss = loss
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {metrics['lr']:.2e}, {images_per_sec:.1f} images/s")

    def close(self):
        """Take the bar off, and say how much memory a GPU had to have."""
        self.bar.close()
        if self.run.accelerator.device.type == "cuda":
            self.run.accelerator.print(f"Peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def describe_step(run, step, loss, grad_norm):
    """Say what was not finite in a step that no weights have taken, and which samples it saw."""
    first, size = run.plan.positions(step - 1)[0], run.plan.effective_batch
    seen = [
        f"{run.stream.row(p)} ({int(run.stream.draw(p)['timesteps'])})" for p in range(first, first + min(size, 64))
    ]
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}. The weights did not take it; nothing was saved since.\n"
        f"Its rows (and timesteps): {', '.join(seen)}{', ...' if size > 64 else ''}.\n"
        "A run that goes on meets the same samples again: give it another setting, such as a smaller --learning_rate."
    )


# ------------------------------------------------------------------------------------------------------------
# The loss, one function a formula. ε: noise, x_0: latents, ᾱ: alpha_bar, all float32, shape (batch, 4, h, w)
# or broadcasting to it.
# ------------------------------------------------------------------------------------------------------------


def diffusion_loss(run, micro_batch):
    """Return the training loss of a micro-batch: shape (), float32, with its graph."""
    args, timesteps = run.args, micro_batch["timesteps"]
    alpha_bar = run.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if "moments" in micro_batch:  # encoded once for all
        moments, encoder_hidden_states = micro_batch["moments"], micro_batch["encoder_hidden_states"]
    else:
        moments = encode_pictures(run.vae, micro_batch["pixel_values"])
        encoder_hidden_states = encode_captions(run.text_encoder, micro_batch["input_ids"])
    latents = sample_latents(moments, micro_batch["posterior_noise"]) * run.vae.config.scaling_factor

    noise = micro_batch["noise"] + args.noise_offset * micro_batch["noise_offset"]
    input_noise = noise
    if args.input_perturbation:
        input_noise = noise + args.input_perturbation * micro_batch["input_perturbation"]
    noisy_latents = add_noise(latents, input_noise, alpha_bar)
    target = noise if run.prediction_type == "epsilon" else velocity(latents, noise, alpha_bar)

    conditions = timesteps, encoder_hidden_states
    if args.dream_training:
        with torch.no_grad():
            estimate = predict(run.network, noisy_latents, *conditions)
        noisy_latents, target = dream(noisy_latents, target, noise, estimate, alpha_bar, args.dream_detail_preservation)
    prediction = predict(run.network, noisy_latents, *conditions)
    losses = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if args.snr_gamma is not None:
        losses = losses * min_snr_weight(alpha_bar.flatten(), args.snr_gamma, run.prediction_type)
    return losses.mean()


def predict(network, noisy_latents, timesteps, encoder_hidden_states):
    """Return the UNet's prediction in float32, whatever precision it computes in: shape of `noisy_latents`."""
    return network(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0].float()


@torch.no_grad()
def encode_pictures(vae, pixel_values):
    """Return mean and log-variance of the VAE's posterior: float32, shape (batch, 2, 4, h, w)."""
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.logvar], dim=1).float()


@torch.no_grad()
def encode_captions(text_encoder, input_ids):
    """Return what the UNet attends to, one vector for each token: float32, shape (batch, 77, width)."""
    return text_encoder(input_ids)[0].float()


def sample_latents(moments, posterior_noise):
    """Return a draw from the VAE's posterior. Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 2.4.

    It is then scaled to about unit variance, as in Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
    Diffusion Models", appendix D.1.
    """
    mean, log_variance = moments.unbind(1)
    return mean + (log_variance / 2).exp() * posterior_noise


def add_noise(latents, noise, alpha_bar):
    """Return x_t = √ᾱ x_0 + √(1 - ᾱ) ε. Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4."""
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def velocity(latents, noise, alpha_bar):
    """Return v = √ᾱ ε - √(1 - ᾱ) x_0. Salimans & Ho 2022, "Progressive Distillation", section 4 and appendix D."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def min_snr_weight(alpha_bar, gamma, prediction_type):
    """Return the min-SNR-γ weight of each sample's loss, in the shape of `alpha_bar`.

    With SNR = ᾱ / (1 - ᾱ): min(SNR, γ) / SNR for epsilon, written so that SNR = 0 gives its limit 1 and not 0/0, and
    min(SNR, γ) / (SNR + 1) for v-prediction. Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
    Strategy", sections 3.4 and 4.2.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)


def dream(noisy_latents, target, noise, estimate, alpha_bar, detail_preservation):
    """Return input and target moved towards what the network will see when it samples from its own estimates.

    With λ = √(1 - ᾱ)^p and Δ = λ (ε - ε_θ): x_t + √(1 - ᾱ) Δ and ε + Δ. Zhou et al. 2023, "DREAM: Diffusion
    Rectification and Estimation-Adaptive Models", section 3 and equation 8.
    """
    sigma = (1 - alpha_bar).sqrt()
    delta = sigma**detail_preservation * (noise - estimate)
    return noisy_latents + sigma * delta, target + delta


# ------------------------------------------------------------------------------------------------------------
# What a run leaves behind: samples, checkpoints, the exported pipeline
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawing(run):
    """Give the UNet its averaged weights, and the device the VAE and the text encoder, for as long as this is entered.

    The weights meanwhile wait in the host's memory.
    """
    parts, home = (run.vae, run.text_encoder), run.vae.device
    for part in parts:
        part.to(run.accelerator.device)
    run.sound = False
    if run.ema:
        settled_average(run)
        run.ema.store(run.unet.parameters())
        run.ema.copy_to(run.unet.parameters())
    try:
        yield
    finally:
        if run.ema:
            run.ema.restore(run.unet.parameters())
        run.sound = True
        for part in parts:
            part.to(home)


def validate(run, signals, *, missing_only=False):
    """Measure the loss on the rows kept out of training, and draw the prompts: what is there of the two.

    Every prompt is drawn with the run's seed by a generator of its own: neither the training stream nor another
    prompt's picture depends on it. A validation that a signal cuts short is left to the run that is resumed.
    """
    run.accelerator.wait_for_everyone()
    final = Path(run.args.output_dir, "samples", f"step-{run.step}")
    if run.accelerator.is_main_process and not (missing_only and final.exists()):
        prompts, folder = run.args.validation_prompts, final.with_name(f".{final.name}")
        shutil.rmtree(folder, ignore_errors=True)
        measure(run, "val/loss")
        with drawing(run):
            if run.ema:
                measure(run, "val/loss_ema")
            images = list(draw_samples(run, folder, signals)) if prompts else []
        if prompts and not signals.number:
            infer.captioned_grid([images], prompts).save(folder / "grid.png")
            report(run, log_images, run, images, prompts)
            discard(final)  # of a run that came this way before
            folder.rename(final)
    run.accelerator.wait_for_everyone()


@torch.no_grad()
def measure(run, name):
    """Log the mean squared error on the rows kept out of training, if there are any, as `name`.

    Whatever loss the run itself trains with, it is the plain one.
    """
    if run.held_out_batch is None:
        return
    plain = types.SimpleNamespace(noise_offset=0, input_perturbation=0, dream_training=False, snr_gamma=None)
    measured, device, losses = dataclasses.replace(run, args=plain, network=run.unet), run.accelerator.device, []
    for index in range(len(run.stream.rows.held_out)):  # one at a time fits always, and rounds always the same
        sample = {key: values[index : index + 1].to(device) for key, values in run.held_out_batch.items()}
        with run.accelerator.autocast():
            losses.append(diffusion_loss(measured, sample))
    value = torch.stack(losses).mean().item()
    report(run, run.accelerator.log, {name: value}, step=run.step)
    run.progress.bar.write(f"Step {run.step}: {name} {value:.4f}")


def draw_samples(run, folder, signals):
    """Yield a picture of each validation prompt, and save it in `folder`, until a signal comes."""
    parts = {"unet": run.unet, "vae": run.vae, "text_encoder": run.text_encoder}
    parts["tokenizer"] = run.stream.tokenizer
    pipeline = StableDiffusionPipeline(
        **{**run.pipeline.components, **parts, "safety_checker": None}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    infer.set_prediction_type(pipeline, run.prediction_type)
    settings = {
        "num_inference_steps": VALIDATION_STEPS,
        "guidance_scale": run.args.validation_guidance_scale,
        "height": run.args.resolution,
        "width": run.args.resolution,
    }
    saved = run.plan.saves_after(run.step) or run.saved_step == run.step
    checkpoint = {"checkpoint": Path(run.args.output_dir, f"checkpoint-{run.step}")}
    folder.mkdir(parents=True)
    with run.accelerator.autocast():
        for index, prompt in enumerate(run.args.validation_prompts):
            if signals.number:
                return
            image = infer.sample(pipeline, prompt, seed=run.seed, **settings)
            words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60]
            flags = {"prompt": prompt, "seed": run.seed, **settings}
            text = flags | {"step": run.step, "command": infer.command(checkpoint | flags) if saved else None}
            infer.save_png(image, folder / f"{index}-{words}.png", text)
            yield image


def log_images(run, images, captions):
    """Send validation pictures with their captions to the tracker; each has a way of its own."""
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.stack(images)}, step=run.step, dataformats="NHWC")
        else:
            library = __import__(tracker.name)  # swanlab and wandb agree on the class and its arguments
            pictures = [library.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            tracker.log({"validation": pictures}, step=run.step)


def save_checkpoint(run):
    """Save all that is needed to go on from this step, then let go of the oldest checkpoints above the limit.

    The state is copied to the host's memory, and written by a thread while the training goes on, if that memory has
    room for it. `finish_saving` waits for the thread.
    """
    finish_saving(run)
    if run.saved_step == run.step:
        return
    final, writing = Path(run.args.output_dir, f"checkpoint-{run.step}"), None
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        room = free_memory()
        behind = run.plan.checkpoint_bytes < 0.7 * room  # pinned memory comes in powers of 2, and writing takes some
        writing = run.threads.submit(write_checkpoint, run, final, snapshot(run, copied=behind))
        if not behind:
            print(f"note: {sd_config.gigabytes(room)} of memory are free, too few to save while training goes on")
    run.saving = final, writing
    if writing and not behind:
        finish_saving(run)


def finish_saving(run, wait=True):
    """Take note of the checkpoint being written, once it is (for which this can `wait`), or of why it cannot be."""
    if run.saving is None:
        return
    final, writing = run.saving
    if writing and not wait and not writing.done():
        return
    run.saving = None
    if writing and writing.exception():
        run.sound = False  # or its rescue would be tried, on the same disk
        raise writing.exception()
    run.checkpoint, run.saved_step = final, sd_config.number(final)


def free_memory(group=Path("/sys/fs/cgroup")):
    """Return how many bytes of the host's memory this process may still take."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where there is one
        cached = re.search(r"^file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used + int(cached[1]))
    pinned = torch.cuda.host_memory_stats()  # PyTorch keeps what the last copies have left
    return free + pinned.get("allocated_bytes.current", 0) - pinned.get("active_bytes.current", 0)


def snapshot(run, copied):
    """Return the tensors of a checkpoint by the name of their file or folder, and the trainer's state.

    `copied` ones lie in the host's memory, where the training that goes on does not change them.
    """
    tensors = {"unet": run.unet.state_dict(), "optimizer.pt": run.optimizer.state_dict()["state"]}
    if run.ema:
        tensors["unet_ema"] = average_of(run)
    if copied:
        tensors = copied_to_host(tensors)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
    return tensors, trainer_state(run)


def average_of(run):
    """Return the averaged weights by their names."""
    return dict(zip(dict(run.unet.named_parameters()), settled_average(run), strict=True))


def copied_to_host(value):
    """Return a copy of a tensor, or of all tensors in a dictionary, in the host's memory; the device may lag behind."""
    if isinstance(value, dict):
        return {key: copied_to_host(entry) for key, entry in value.items()}
    if hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit moments: codes, scales, and a table
        names, context = value.__tensor_flatten__()
        parts = {name: copied_to_host(getattr(value, name)) for name in names}
        return value.__tensor_unflatten__(parts, context, value.size(), value.stride())
    tensor = value.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu", non_blocking=True)


def prune_checkpoints(run, step):
    """Delete the oldest checkpoints above the limit; one that cannot be deleted stops nothing."""
    limit, output = run.args.checkpoints_total_limit, Path(run.args.output_dir)
    past = [path for path in sd_config.checkpoints(output) if sd_config.number(path) <= step]
    # What lies between this one and the one before was passed over when the run was resumed: it is damaged.
    passed = [path for path in past if run.saved_step < sd_config.number(path) < step]
    whole = [path for path in past if path not in passed]
    try:
        for old in (*passed, *whole[:-limit]) if limit is not None else ():
            discard(old)
    except OSError as error:
        print(f"warning: an old checkpoint cannot be deleted: {error}")


@contextlib.contextmanager
def written_whole(what, folder, size):
    """Leave nothing behind in `folder` of what cannot be written whole, and say how much room it needs."""
    try:
        yield
    except Exception as error:  # each library has its own for a full disk
        shutil.rmtree(folder, ignore_errors=True)
        room = f"{sd_config.gigabytes(size)} needed, {sd_config.gigabytes(shutil.disk_usage(folder.parent).free)} free"
        raise Explained(f"{what} cannot be written ({room}): {type(error).__name__}: {error}") from error


def write_checkpoint(run, final, taken):
    """Write what a `snapshot` has taken as the checkpoint `final`, and let go of the oldest ones.

    A checkpoint either exists or it does not: it is written under a hidden name, checked by a manifest, flushed to
    disk, and renamed. Only then do older ones go, which are hidden before they are deleted.
    """
    (tensors, state), folder = taken, final.with_name(f".{final.name}")
    with written_whole(final, folder, run.plan.checkpoint_bytes):
        shutil.rmtree(folder, ignore_errors=True)
        for part in tensors.keys() - {"optimizer.pt"}:
            unet_holding(run, tensors[part]).save_pretrained(folder / part)
        torch.save(tensors["optimizer.pt"], folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        sd_config.seal(folder)
        discard(final)  # a damaged one: this run has come from before it
        folder.rename(final)
        sd_config.flush(final.parent, within=False)
    prune_checkpoints(run, state["step"])


def unet_holding(run, tensors):
    """Return another UNet of the same kind, with `tensors` themselves for its weights."""
    unet = hollow_unet(run.unet.config)
    unet.load_state_dict(tensors, assign=True)
    return unet


def discard(folder):
    """Delete a folder, if it is there, in such a way that no half of it is ever to be seen."""
    hidden = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def trainer_state(run):
    """Return what a checkpoint keeps besides weights and moments, as plain values."""
    base = run.args.pretrained_model_name_or_path
    return {
        "step": run.step,
        "seed": run.seed,
        "effective_batch": run.plan.effective_batch,
        "data": run.stream.rows.fingerprint,
        "max_steps": run.plan.max_steps,
        "ema_step": run.ema.optimization_step if run.ema else None,
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "loss": run.loss,
        "prediction_type": run.prediction_type,
        "micro_batch_size": run.micro_batch_size,
        "base_model": os.path.abspath(base) if os.path.isdir(base) else base,
        "args": final_args(run.args, run.accelerator),
    }


def final_args(args, accelerator):
    """Return the arguments as values that JSON can hold, with the precision that accelerate settled on."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return plain | {"mixed_precision": accelerator.mixed_precision}


def export(run):
    """Write the output folder's pipeline: the base model's parts untouched, and the UNet as trained.

    With EMA its average is the pipeline's UNet, and the raw weights lie beside it as the variant `non_ema`.
    """
    accelerator, output = run.accelerator, Path(run.args.output_dir)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        staging = output / ".export"
        with written_whole(f"the pipeline in {output}", staging, run.plan.export_bytes):
            shutil.rmtree(staging, ignore_errors=True)
            infer.set_prediction_type(run.pipeline, run.prediction_type)
            if run.ema:
                run.pipeline.unet = unet_holding(run, average_of(run))
            run.pipeline.save_pretrained(staging)
            if run.ema:
                run.unet.save_pretrained(staging / "unet", variant="non_ema")
            (staging / "README.md").write_text(model_card(run), encoding="utf-8")
            sd_config.flush(staging)
        # The index goes first and comes last: a folder that has one holds a whole pipeline.
        (output / "model_index.json").unlink(missing_ok=True)
        for part in sorted(staging.iterdir(), key=lambda path: path.name == "model_index.json"):
            target = output / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
        staging.rmdir()
        print(f"The trained pipeline is in {output}. Draw with it: python infer.py --model_path {output}")
    accelerator.wait_for_everyone()


def model_card(run):
    """Return the text of the output folder's README.md."""
    args, output = run.args, Path(run.args.output_dir)
    base, data = args.pretrained_model_name_or_path, args.dataset_name or args.train_data_dir
    grid = output / f"samples/step-{run.step}/grid.png"
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags: [stable-diffusion, text-to-image, full-fine-tune]",
        "---",
        "",
        f"# {base}, fine-tuned on {data}",
        "",
        f"All weights of the UNet were trained for {run.step} steps of {run.plan.effective_batch} samples "
        f"({run.plan.rows} rows, {run.step / run.plan.steps_per_epoch:.1f} epochs, seed {run.seed}). "
        f"The loss of the last step was {run.loss:.4f}.",
        "",
    ]
    if grid.exists():
        lines += [f"![samples]({grid.relative_to(output).as_posix()})", ""]
    if run.ema:
        lines += ['`unet` holds the moving average of the weights; the raw ones load with `variant="non_ema"`.', ""]
    if bad := run.stream.rows.bad:
        lines += [f"Rows left out, {len(bad)}, because their pictures cannot be read:", ""]
        lines += [*(f"- row {number}: {wrong}" for number, wrong in bad.items()), ""]
    lines += ["| argument | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in final_args(args, run.accelerator).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(ARGS)
