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

from sd_config import Plan, checkpoints, is_ours, is_saved_dataset, parse_args, read_state, resume_problems, stop

if __name__ == "__main__":
    ARGS = parse_args()  # answers --help and typos before the slow imports below

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
import time
from pathlib import Path

import accelerate
import datasets
import diffusers
import numpy as np
import safetensors
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image, ImageCms, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

import infer

EXPERIMENT_NAME = "SD1-5_火影忍者"
LOG_EVERY = 10  # steps between two readings of the metrics, when the host waits for the device
VALIDATION_STEPS = 20  # denoising steps of a validation picture
GUIDANCE_SCALE = 7.5


def main(args):
    """Train as `args` (of `sd_config.parse_args`) say, and export the result to `args.output_dir`."""
    quiet_libraries()
    accelerator = create_accelerator(args)
    saved = read_state(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    seed = choose_seed(args, saved, accelerator)

    # What can be known without the weights is checked before they are loaded.
    tokenizer = load_base(CLIPTokenizer.from_pretrained, args, subfolder="tokenizer")
    noise_scheduler = load_noise_scheduler(args)
    rows = load_rows(args, tokenizer, seed, accelerator)
    plan = Plan.of(args, len(rows), accelerator.num_processes, count_parameters(args))
    if saved:
        stop(resume_problems(saved, args, plan, seed))
    accelerator.print(f"Plan (device {accelerator.device}, mixed precision {accelerator.mixed_precision}):\n{plan}")
    if args.dry_run:
        return

    run = load_run(args, plan, seed, accelerator, noise_scheduler)
    if saved:
        restore(run, saved)
    start_tracker(run)
    prepare_output(run)
    train(run, rows, tokenizer)
    export(run)
    accelerator.end_training()


def quiet_libraries():
    """Silence what the user can do nothing about: bars for every part loaded, notes of the libraries to themselves."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # The captions are tokenised here once before loader workers fork, which tokenizers would warn about.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def create_accelerator(args):
    """Return accelerate's Accelerator: device, processes, precision, accumulation, trackers."""
    accelerator = accelerate.Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        # The others wait while the first downloads, validates and saves: ten minutes, the usual limit, may be too few.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))],
    )
    problems = []
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 without a word.
        problems.append("--mixed_precision fp16: needs a GPU; bf16 and no also work on a CPU")
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


def count_parameters(args):
    """Return how many weights the base model's UNet has, from its configuration alone."""
    config = load_base(UNet2DConditionModel.load_config, args, subfolder="unet")
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet2DConditionModel.from_config(config).parameters())


# ------------------------------------------------------------------------------------------------------------
# Rows: the data set, checked
# ------------------------------------------------------------------------------------------------------------


def load_rows(args, tokenizer, seed, accelerator):
    """Return the rows to train on, as a data set with the image and the caption column.

    Exits with code 2 if the data set, its train split, a column or a caption is not there or not usable.
    """
    with accelerator.local_main_process_first():
        rows = read_dataset(args)
    check_columns(rows, args)
    rows = rows.select_columns([args.image_column, args.caption_column])
    check_captions(list(rows[args.caption_column]), args.caption_column, tokenizer, accelerator)
    if args.max_train_samples is not None and args.max_train_samples < len(rows):
        return rows.select(permutation(seed, "subset", len(rows))[: args.max_train_samples])
    if args.max_train_samples is not None and args.max_train_samples > len(rows):
        accelerator.print(f"note: --max_train_samples {args.max_train_samples}: the data set has {len(rows)}, all used")
    return rows


def read_dataset(args):
    """Return the train split of the data set that `args` name, from the Hub or from a local folder."""
    name = args.dataset_name
    flag = f"--dataset_name {name}" if name else f"--train_data_dir {args.train_data_dir}"
    try:
        if name is None:
            files = {"train": os.path.join(glob.escape(args.train_data_dir), "**")}
            splits = datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)
        elif is_saved_dataset(name):
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(
                name, args.dataset_config_name, data_dir=args.train_data_dir, cache_dir=args.cache_dir
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
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
    variants = [list_captions(caption) for caption in captions]
    bad = [index for index, texts in enumerate(variants) if not texts]
    if bad:
        rows = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        stop([f"--caption_column {column}: {len(bad)} row(s) without a caption, or with an empty one: {rows}"])
    texts = sorted({text for texts in variants for text in texts})
    lengths = map(len, tokenizer(texts, truncation=False, verbose=False).input_ids)
    cut = sum(length > tokenizer.model_max_length for length in lengths)
    if cut:
        limit = tokenizer.model_max_length
        accelerator.print(f"note: {cut} of {len(texts)} captions are longer than {limit} tokens and will be cut")


def list_captions(caption):
    """Return the captions of a row, given as a string or a list of strings, or [] if any is missing or empty."""
    texts = [caption] if isinstance(caption, str) else caption if isinstance(caption, list) else []
    return texts if all(isinstance(text, str) and text.strip() for text in texts) else []


# ------------------------------------------------------------------------------------------------------------
# The sample stream: position -> everything that a training sample needs
# ------------------------------------------------------------------------------------------------------------


class SampleStream(torch.utils.data.Dataset):
    """The endless stream of training samples, indexed by position: item p is a pure function of (seed, p).

    One generator per position draws, always in this order: caption choice, caption dropout, crop, flip (five numbers
    at once), VAE posterior noise, timestep, diffusion noise, noise offset, input perturbation. What a run does not
    use is drawn all the same, or comes last, so that switching one thing on changes nothing else.
    """

    def __init__(self, rows, tokenizer, args, seed, latent_channels, latent_size, num_train_timesteps):
        self.rows, self.tokenizer, self.args, self.seed = rows, tokenizer, args, seed
        self.latent_shape = (latent_channels, latent_size, latent_size)
        self.num_train_timesteps = num_train_timesteps

    def __getitem__(self, position):
        """Return the sample at `position` (from 0) as a dictionary of tensors without a batch dimension."""
        args, draws = self.args, keyed_generator(self.seed, "sample", position)
        epoch, index = divmod(position, len(self.rows))
        row = self.rows[permutation(self.seed, epoch, len(self.rows))[index]]

        choice, dropout, top, left, flip = torch.rand(5, generator=draws).tolist()
        captions = list_captions(row[args.caption_column])
        caption = "" if dropout < args.caption_dropout else captions[int(choice * len(captions))]
        crop = None if args.center_crop else (top, left)
        flip = args.random_flip and flip < 0.5
        sample = {
            "pixel_values": to_pixels(
                row[args.image_column], args.resolution, args.image_interpolation_mode, crop=crop, flip=flip
            ),
            "input_ids": tokenize(self.tokenizer, caption),
            "posterior_noise": torch.randn(self.latent_shape, generator=draws),
            "timesteps": torch.randint(self.num_train_timesteps, (), generator=draws),
            "noise": torch.randn(self.latent_shape, generator=draws),
            "noise_offset": torch.randn((self.latent_shape[0], 1, 1), generator=draws),
        }
        if args.input_perturbation:
            sample["input_perturbation"] = torch.randn(self.latent_shape, generator=draws)
        return sample


def keyed_generator(*key):
    """Return a CPU generator that depends on nothing but `key`. (torch uses only 32 bits of a CPU seed.)"""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


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


def tokenize(tokenizer, caption):
    """Return a caption's token ids, cut or padded to the tokenizer's length: int64, shape (77,)."""
    return tokenizer(
        caption, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids[0]


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
    unet: torch.nn.Module  # float32 master weights, prepared by accelerate
    ema: EMAModel | None
    optimizer: torch.optim.Optimizer
    lr_lambda: object  # step, from 0 -> factor of the learning rate
    prediction_type: str
    alphas_cumprod: torch.Tensor  # ᾱ_t, float32 on the device, shape (timesteps,)
    step: int = 0  # steps done
    loss: float = math.nan  # of the last step whose metrics were read
    loss_scale: float | None = None  # fp16 only: the scaler's factor after the last step


def load_run(args, plan, seed, accelerator, noise_scheduler):
    """Load the models, and build the optimizer and its schedule."""
    pipeline, ema_unet = load_models(args)
    unet = pipeline.unet.requires_grad_(True).train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, NotImplementedError) as error:  # no CUDA device, or one that xformers was not built for
            stop([f"--enable_xformers_memory_efficient_attention: {error}"])
    unet.to(accelerator.device)
    ema = EMAModel(ema_unet.parameters(), foreach=True) if args.use_ema else None
    if ema:
        ema.to(accelerator.device)

    optimizer = create_optimizer(args, plan, unet)
    # The rate of a step is a function of its number: the schedule is never advanced, saved or handed to accelerate.
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=plan.max_steps
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)

    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = half.get(accelerator.mixed_precision, torch.float32)
    vae, text_encoder = (
        copy.deepcopy(part).requires_grad_(False).eval().to(accelerator.device, dtype)
        for part in (pipeline.vae, pipeline.text_encoder)
    )
    return Run(
        args=args,
        plan=plan,
        seed=seed,
        accelerator=accelerator,
        pipeline=pipeline,
        vae=vae,
        text_encoder=text_encoder,
        unet=unet,
        ema=ema,
        optimizer=optimizer,
        lr_lambda=schedule.lr_lambdas[0],
        prediction_type=noise_scheduler.config.prediction_type,
        alphas_cumprod=noise_scheduler.alphas_cumprod.to(accelerator.device, torch.float32),
    )


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
    # The libraries may load half-precision files as float32; that is undone for what will be exported untouched.
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        if part is not None:
            part.to(stored_dtype(part, args.variant))
    return pipeline, ema_unet


def stored_dtype(model, variant):
    """Return the dtype of a model's weights in the file that they were loaded from."""
    folder, stems = Path(model.config._name_or_path), ("diffusion_pytorch_model", "model", "pytorch_model")
    for suffix, infix, stem in itertools.product((".safetensors", ".bin"), (f".{variant}", ""), stems):
        file = folder / f"{stem}{infix}{suffix}"
        if file.is_file():  # SD1.5's text encoder has a buffer of integers too
            return next(tensor.dtype for tensor in stored_tensors(file) if tensor.is_floating_point())
    return model.dtype


def stored_tensors(file):
    """Yield the tensors of a weight file, as they are stored."""
    if file.suffix == ".bin":
        yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).values()
    else:
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                yield tensors.get_tensor(name)


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

        return AdamW8bit(unet.parameters(), **settings)
    return torch.optim.AdamW(unet.parameters(), fused=unet.device.type in ("cpu", "cuda", "mps", "xpu"), **settings)


def restore(run, saved):
    """Bring the run to where a checkpoint was saved; its UNets were loaded with the models."""
    folder = run.args.resume_from_checkpoint
    # Only the moments: flags such as --adam_weight_decay are this run's own.
    moments = torch.load(folder / "optimizer.pt", map_location=run.accelerator.device, weights_only=True)
    run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": moments})
    if run.ema:
        run.ema.optimization_step = saved["ema_step"]
    if run.accelerator.scaler and saved["scaler"]:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.step, run.loss = saved["step"], saved["loss"]
    run.accelerator.print(f"Resuming from {folder}: step {run.step} of {run.plan.max_steps}")


def prepare_output(run):
    """Make the output folder, without the run that --overwrite_output_dir gives up (its logs stay)."""
    output = Path(run.args.output_dir)
    if run.accelerator.is_main_process:
        if run.args.overwrite_output_dir:
            for path in output.iterdir() if output.is_dir() else ():
                if is_ours(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        output.mkdir(parents=True, exist_ok=True)
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
    run.accelerator.init_trackers(args.tracker_project_name, config | {"seed": run.seed}, options)


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


def train(run, rows, tokenizer):
    """Train from the step that the run has reached to its last, saving and validating when the plan says so."""
    progress = Progress(run)
    for batch in create_loader(run, rows, tokenizer):
        metrics = train_step(run, batch)
        run.step += 1
        progress.add(metrics)
        saves, validates = run.plan.saves_after(run.step), run.plan.validates_after(run.step)
        if saves or validates or run.step % LOG_EVERY == 0 or run.step == run.plan.max_steps:
            progress.flush()
        if saves:
            save_checkpoint(run)
        if validates:
            validate(run)
        if saves or validates:
            progress.restart_clock()
    progress.close()


def create_loader(run, rows, tokenizer):
    """Return a loader that yields, for each step still to be done, this process's share of its samples."""
    stream = SampleStream(
        rows,
        tokenizer,
        run.args,
        run.seed,
        latent_channels=run.vae.config.latent_channels,
        latent_size=run.args.resolution // run.pipeline.vae_scale_factor,
        num_train_timesteps=len(run.alphas_cumprod),
    )
    steps, rank = range(run.step, run.plan.max_steps), run.accelerator.process_index
    return torch.utils.data.DataLoader(
        stream,
        batch_sampler=[run.plan.positions(step, rank) for step in steps],
        num_workers=run.args.dataloader_num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def train_step(run, batch):
    """Do one optimizer step, without making the host wait for the device (but for one number under fp16).

    Args:
        batch (dict[str, torch.Tensor]): this process's samples of the step, on the host.

    Returns:
        dict: the step's metrics; loss and gradient norm are tensors on the device, shape ().
    """
    args, accelerator = run.args, run.accelerator
    learning_rate = run.plan.learning_rate * run.lr_lambda(run.step)
    set_learning_rate(run.optimizer, learning_rate)
    if accelerator.scaler and run.loss_scale is None:
        run.loss_scale = accelerator.scaler.get_scale()
    losses = []
    for first in range(0, run.plan.batch_per_process, args.train_batch_size):
        with accelerator.accumulate(run.unet):
            micro_batch = {
                name: samples[first : first + args.train_batch_size].to(accelerator.device, non_blocking=True)
                for name, samples in batch.items()
            }
            loss = diffusion_loss(run, micro_batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(run.unet.parameters(), args.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        losses.append(loss.detach())
    metrics = {"loss": torch.stack(losses).mean(), "grad_norm": gradient_norm, "lr": learning_rate}
    if accelerator.scaler:
        # A step that overflowed lowers the scale. The fused optimizer skips it without telling accelerate.
        scale, run.loss_scale = run.loss_scale, accelerator.scaler.get_scale()
        metrics["skipped"] = float(run.loss_scale < scale)
    if run.ema and not metrics.get("skipped"):
        run.ema.step(run.unet.parameters())
    return metrics


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
        self.run, self.pending = run, []
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

    def flush(self):
        """Read the metrics not yet read (the one time that the host waits), and log each at its own step."""
        run = self.run
        tensors = [torch.stack([m["loss"], m["grad_norm"]]).float() for _, m in self.pending]
        values = run.accelerator.reduce(torch.stack(tensors), "mean").tolist()
        images_per_sec = len(self.pending) * run.plan.effective_batch / (time.perf_counter() - self.clock)
        for (step, metrics), (loss, grad_norm) in zip(self.pending, values, strict=True):
            read = metrics | {"loss": loss, "grad_norm": grad_norm, "images_per_sec": images_per_sec}
            read["epoch"] = step / run.plan.steps_per_epoch
            run.accelerator.log({f"train/{name}": value for name, value in read.items()}, step=step)
            if not math.isfinite(loss) and not metrics.get("skipped"):
                kept = checkpoints(run.args.output_dir)
                sys.exit(
                    f"error: the loss of step {step} is {loss}; the last checkpoint: {kept[-1] if kept else 'none'}"
                )
        run.loss = loss
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {metrics['lr']:.2e}, {images_per_sec:.1f} images/s")
        self.pending = []
        self.restart_clock()

    def close(self):
        """Take the bar off, and say how much memory a GPU had to have."""
        self.bar.close()
        if self.run.accelerator.device.type == "cuda":
            self.run.accelerator.print(f"Peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


# ------------------------------------------------------------------------------------------------------------
# The loss, one function a formula. ε: noise, x_0: latents, ᾱ: alpha_bar, all float32, shape (batch, 4, h, w)
# or broadcasting to it.
# ------------------------------------------------------------------------------------------------------------


def diffusion_loss(run, micro_batch):
    """Return the training loss of a micro-batch: shape (), float32, with its graph."""
    args, timesteps = run.args, micro_batch["timesteps"]
    alpha_bar = run.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    latents = encode_pictures(run.vae, micro_batch["pixel_values"], micro_batch["posterior_noise"])
    with torch.no_grad():
        encoder_hidden_states = run.text_encoder(micro_batch["input_ids"])[0]

    noise = micro_batch["noise"] + args.noise_offset * micro_batch["noise_offset"]
    input_noise = noise
    if args.input_perturbation:
        input_noise = noise + args.input_perturbation * micro_batch["input_perturbation"]
    noisy_latents = add_noise(latents, input_noise, alpha_bar)
    target = noise if run.prediction_type == "epsilon" else velocity(latents, noise, alpha_bar)

    conditions = timesteps, encoder_hidden_states
    if args.dream_training:
        with torch.no_grad():
            estimate = predict(run.unet, noisy_latents, *conditions)
        noisy_latents, target = dream(noisy_latents, target, noise, estimate, alpha_bar, args.dream_detail_preservation)
    prediction = predict(run.unet, noisy_latents, *conditions)
    losses = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if args.snr_gamma is not None:
        losses = losses * min_snr_weight(alpha_bar.flatten(), args.snr_gamma, run.prediction_type)
    return losses.mean()


def predict(unet, noisy_latents, timesteps, encoder_hidden_states):
    """Return the UNet's prediction in float32, whatever precision it computes in: shape of `noisy_latents`."""
    return unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0].float()


@torch.no_grad()
def encode_pictures(vae, pixel_values, posterior_noise):
    """Return latents drawn from the VAE's posterior, scaled to about unit variance: float32.

    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 2.4; the scale is that of Rombach et al. 2022,
    "High-Resolution Image Synthesis with Latent Diffusion Models", appendix D.1.
    """
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    deviation = (posterior.logvar.float() / 2).exp()
    return (posterior.mean.float() + deviation * posterior_noise) * vae.config.scaling_factor


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
def ema_weights(run):
    """Exchange the UNet's weights with their moving average (where there is one), and back at the end.

    One tensor at a time and in place, so that it costs no memory to speak of.
    """
    swap_weights(run)
    try:
        yield
    finally:
        swap_weights(run)


@torch.no_grad()
def swap_weights(run):
    """Exchange the values of the UNet's weights with those of their moving average."""
    for parameter, average in zip(run.unet.parameters(), run.ema.shadow_params if run.ema else (), strict=False):
        held = parameter.clone()
        parameter.copy_(average)
        average.copy_(held)


def validate(run):
    """Draw the validation prompts with the averaged weights, save the pictures, and send them to the tracker.

    Every prompt is drawn with the run's seed by a generator of its own: neither the training stream nor another
    prompt's picture depends on it.
    """
    accelerator, prompts = run.accelerator, run.args.validation_prompts
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder = Path(run.args.output_dir, "samples", f"step-{run.step}")
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"unet": accelerator.unwrap_model(run.unet), "vae": run.vae, "text_encoder": run.text_encoder}
        pipeline = StableDiffusionPipeline(
            **{**run.pipeline.components, **parts, "safety_checker": None}, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        infer.set_prediction_type(pipeline, run.prediction_type)
        settings = {
            "num_inference_steps": VALIDATION_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "height": run.args.resolution,
            "width": run.args.resolution,
        }
        images = []
        with ema_weights(run), accelerator.autocast():
            for index, prompt in enumerate(prompts):
                image = infer.sample(pipeline, prompt, seed=run.seed, **settings)
                words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60]
                text = {"prompt": prompt, "seed": run.seed, "step": run.step, **settings}
                infer.save_png(image, folder / f"{index}-{words}.png", text)
                images.append(image)
        make_image_grid(images, rows=1, cols=len(images)).save(folder / "grid.png")
        log_images(run, images, prompts)
    accelerator.wait_for_everyone()


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

    The folder is written under a hidden name and renamed when it is whole, so that it either exists or does not.
    """
    accelerator, output = run.accelerator, Path(run.args.output_dir)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        final, folder = output / f"checkpoint-{run.step}", output / f".checkpoint-{run.step}"
        for stale in (folder, final):  # left by a save that was killed: complete ones are never written over
            shutil.rmtree(stale, ignore_errors=True)
        unet = accelerator.unwrap_model(run.unet)
        unet.save_pretrained(folder / "unet")
        if run.ema:
            with ema_weights(run):
                unet.save_pretrained(folder / "unet_ema")
        torch.save(run.optimizer.state_dict()["state"], folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text(json.dumps(trainer_state(run), indent=2), encoding="utf-8")
        folder.rename(final)
        if run.args.checkpoints_total_limit is not None:
            for old in checkpoints(output)[: -run.args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def trainer_state(run):
    """Return what a checkpoint keeps besides weights and moments, as plain values."""
    base = run.args.pretrained_model_name_or_path
    return {
        "step": run.step,
        "seed": run.seed,
        "effective_batch": run.plan.effective_batch,
        "rows": run.plan.rows,
        "use_ema": run.args.use_ema,
        "ema_step": run.ema.optimization_step if run.ema else None,
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "loss": run.loss,
        "prediction_type": run.prediction_type,
        "base_model": os.path.abspath(base) if os.path.isdir(base) else base,
        "args": plain_args(run.args),
    }


def plain_args(args):
    """Return the arguments as values that JSON can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def export(run):
    """Write the output folder's pipeline: the base model's parts untouched, and the UNet as trained.

    With EMA its average is the pipeline's UNet, and the raw weights lie beside it as the variant `non_ema`.
    """
    accelerator, output = run.accelerator, Path(run.args.output_dir)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        staging = output / ".export"
        shutil.rmtree(staging, ignore_errors=True)
        unet, pipeline = accelerator.unwrap_model(run.unet), run.pipeline
        infer.set_prediction_type(pipeline, run.prediction_type)
        with ema_weights(run):
            pipeline.save_pretrained(staging)
        if run.ema:
            unet.save_pretrained(staging / "unet", variant="non_ema")
        (staging / "README.md").write_text(model_card(run), encoding="utf-8")
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
        prompts = "; ".join(args.validation_prompts)
        lines += [f"![samples]({grid.relative_to(output).as_posix()})", "", f"Left to right: {prompts}.", ""]
    if run.ema:
        lines += ['`unet` holds the moving average of the weights; the raw ones load with `variant="non_ema"`.', ""]
    lines += ["| argument | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in plain_args(args).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(ARGS)
