"""Fine-tune every weight of Stable Diffusion 1.5's UNet on pictures with captions.

Read it from the top: first `main`, the outline, then the training itself: the loss, the sample stream, the loop. The
rest supports these: progress and tracker, signals and errors, models, data, encoding, validation and saving.

Two ideas underlie the code. First, a run consumes an endless stream of training samples, and *everything* random
about sample p (which row, which caption, crop, flip, noise, timestep) is a pure function of the seed and p, for given
rows and flags. With effective batch size B, step t consumes positions tB to tB + B - 1. The only state of the stream
is therefore t: a resumed run goes on with the very next sample, and neither the number of loader workers nor the way B
is split into micro-batches and processes changes what is trained. Second, only the networks' forward and backward
passes use half precision: noise, targets, losses, master weights, optimizer state and EMA are float32, unless
--low_memory or --use_8bit_adam says otherwise.

`step` always means an optimizer step; its gradients are accumulated over micro-batches. Pictures are float32
in [-1, 1], shape (batch, 3, resolution, resolution); latents are (batch, 4, resolution / 8, resolution / 8).
"""

import signal

import sd_config
from sd_config import Plan, exit_on, stop_if

if __name__ == "__main__":
    sd_config.outlive_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside the training there is nothing to save
    ARGS = sd_config.parse_args()  # answers --help and typos before the slow imports below
    sd_config.announce_imports()

import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import datasets
import numpy as np
import PIL
import psutil
import pyarrow.compute
import torch
import torch.nn.functional as F
from accelerate import utils
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import save
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

import infer

# SIGHUP comes when a terminal closes; Windows has none.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
EXPERIMENT_NAME = "SD1-5_火影忍者"
OPTIMIZER = "optimizer.pt"  # the checkpoint file that holds AdamW's moments
LOG_EVERY = 10  # steps between reads of the metrics, which make the host wait for the device
# The out-of-memory messages of PyTorch's allocator, the CUDA driver, Triton, cuBLAS, cuDNN and CPU allocation.
OUT_OF_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED|unable to find an engine|can't allocate memory")
# The others wait while rank 0 downloads, validates and saves: the default of ten minutes may be too short.
TIMEOUT = datetime.timedelta(hours=6)
LEAST_LOSS_SCALE = 2**-14  # fp16 only; the scale starts at 2^16, and each overflow halves it


def main(args):
    """Train as `args` (from `sd_config.parse_args`) specify, and export the result to `args.output_dir`."""
    infer.quiet_libraries()
    accelerator = create_accelerator(args)
    saved = sd_config.read_state(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    seed = choose_seed(args, saved, accelerator)

    # All that can be checked without the weights is checked before loading them.
    noise_scheduler = load_noise_scheduler(args)
    tokenizer = load_base(CLIPTokenizer.from_pretrained, args, subfolder="tokenizer")
    infer.check_tokenizer(tokenizer, f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}")
    rows = load_rows(args, tokenizer, seed, accelerator)
    plan = make_plan(args, saved, rows, accelerator)
    settled = {"seed": seed, "prediction_type": noise_scheduler.config.prediction_type}
    check_plan(plan, saved, rows, settled, accelerator)
    if args.dry_run:
        accelerator.print("Dry run: every check has passed, and nothing was trained.")
        return

    main_process = accelerator.is_main_process
    with sd_config.claimed_output(args, saved.step if saved else 0) if main_process else contextlib.nullcontext():
        run = Run(plan, seed, rows, tokenizer, accelerator, noise_scheduler)
        if saved:
            restore(run, saved)
        run.tracker.start(run)
        if main_process:
            sd_config.clear_output(args, run.stream.encoded and run.stream.encoded.name)
        accelerator.wait_for_everyone()
        with rescued(run):
            train(run)
            export(run)


def choose_seed(args, saved, accelerator):
    """Return the run's seed: the one given, the checkpoint's, or one that rank 0 draws for all ranks."""
    known = saved.seed if args.seed is None and saved else args.seed
    seed = utils.broadcast_object_list([secrets.randbits(32) if known is None else known])[0]
    if known is None:
        accelerator.print(f"No --seed given: drew {seed}. Give it to repeat this run.")
    return seed


def make_plan(args, saved, rows, accelerator):
    """Return the `Plan`; exit with code 2 if the UNet is of another kind, as its configuration alone tells."""
    load = UNet2DConditionModel.load_config
    unet = load_base(lambda *name, **kwargs: hollow_unet(load(*name, **kwargs)), args, subfolder="unet")
    sizes = unet.num_parameters(), len(rows.texts), unet.config.cross_attention_dim
    width = load_base(CLIPTextConfig.from_pretrained, args, subfolder="text_encoder").hidden_size
    like_ours = {"in_channels": 4, "cross_attention_dim": width, "attention_type": "default", "dropout": 0.0}
    like_ours |= dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"))
    if other := [name for name, value in like_ours.items() if unet.config.get(name, value) != value]:
        what = f"its UNet is not like Stable Diffusion 1.5's: it has another {', '.join(other)}"
        stop_if([f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: {what}"])
    device = accelerator.device.type
    options = {"encoding": saved and saved.encoding, "device": device, "precision": accelerator.mixed_precision}
    options["area"] = sum(math.prod(rows.shapes[number]) for number in rows.kept)
    plan = Plan(args, len(rows.kept), accelerator.num_processes, *sizes, **options)
    plan.encoded = utils.broadcast_object_list([plan.encoded])[0]  # each machine may have another disk
    return plan


def check_plan(plan, saved, rows, settled, accelerator):
    """Print the plan with its warnings; exit with code 2 if the disk is too small, or the resumed run differs.

    `settled` holds the flags that may be left open, as they were settled on.
    """
    step, output = saved.step if saved else 0, plan.args.output_dir
    problems, warnings = sd_config.compare_disk(plan, step)
    if len({*(steps := utils.gather_object([step]))}) > 1:
        problems.append(f"--output_dir {output}: must be shared by all machines; they are at steps {steps}")
    if saved:
        now = plain_args(plan.args, accelerator) | settled
        differences, changes = sd_config.compare_runs(saved, plan, now, rows.fingerprint)
        problems, warnings = differences + problems, changes + warnings
    stop_if(problems)
    accelerator.print(f"Plan (device {accelerator.device}, mixed precision {accelerator.mixed_precision}):\n{plan}")
    if rows.buckets:
        accelerator.print(f"  shapes           {rows.buckets}")
    if accelerator.device.type == "cuda":
        free, needed = sd_config.gigabytes(torch.cuda.mem_get_info()[0]), sd_config.gigabytes(plan.needed)
        accelerator.print(f"  GPU memory       {free} free, and an estimated {needed} needed")
    if plan.drawing > 0.1:
        remedy = "a larger --validation_steps (or --validation_epochs) draws fewer"
        warnings.append(f"{plan.drawing:.1%} of the UNet's passes draw validation pictures; {remedy}")
    for warning in warnings:
        accelerator.print(f"warning: {warning}")
    if plan.args.lr_scheduler != "constant" and plan.args.lr_warmup_steps >= plan.max_steps:
        accelerator.print(f"note: --lr_warmup_steps {plan.args.lr_warmup_steps}: the run ends before its warm-up does")


# -- The loss, one function per formula ----------------------------------------------------------------------

# ε: noise, x_0: latents, ᾱ: alpha_bar, all float32, of shape (batch, 4, h, w) or broadcasting to it.


def diffusion_loss(
    network,
    latents,
    encoder_hidden_states,
    draws,
    *,
    alphas_cumprod,
    prediction_type,
    noise_offset=0.0,
    input_perturbation=0.0,
    dream_detail_preservation=None,
    snr_gamma=None,
):
    """Return a micro-batch's mean loss: a differentiable float32 scalar. The defaults give the plain MSE loss.

    Args:
        network (callable): the UNet, or its training wrapper `Run.network`.
        latents (torch.Tensor): x_0, float32, of about unit variance, shape (batch, 4, h, w).
        encoder_hidden_states (torch.Tensor): the encoded captions, float32, shape (batch, 77, width).
        draws (dict[str, torch.Tensor]): `timesteps`, shape (batch,), and the noises of `SampleStream.draw`.
        alphas_cumprod (torch.Tensor): ᾱ of every timestep, float32, shape (timesteps,).
        prediction_type (str): what the network predicts, "epsilon" or "v_prediction".
        noise_offset, input_perturbation (float): scales of additional noise; 0 is off.
        dream_detail_preservation (float or None): p of `dream` (epsilon only); None turns it off.
        snr_gamma (float or None): γ of `min_snr_weight`; with None every sample counts the same.
    """
    timesteps = draws["timesteps"]
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = draws["noise"] + noise_offset * draws["noise_offset"]
    input_noise = noise
    if input_perturbation:
        input_noise = noise + input_perturbation * draws["input_perturbation"]
    noisy_latents = add_noise(latents, input_noise, alpha_bar)
    target = noise if prediction_type == "epsilon" else velocity(latents, noise, alpha_bar)

    conditions = timesteps, encoder_hidden_states
    if dream_detail_preservation is not None:
        with torch.no_grad():
            estimate = predict(network, noisy_latents, *conditions)
        noisy_latents, target = dream(noisy_latents, noise, estimate, alpha_bar, dream_detail_preservation)
    prediction = predict(network, noisy_latents, *conditions)
    losses = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weight(alpha_bar.flatten(), snr_gamma, prediction_type)
    return losses.mean()


def predict(network, noisy_latents, timesteps, encoder_hidden_states):
    """Return the UNet's prediction in float32, whatever its compute precision; shape as `noisy_latents`."""
    return network(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0].float()


def sample_latents(moments, posterior_noise):
    """Return a draw from the VAE's posterior. Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 2.4.

    The caller scales it to about unit variance, as in Rombach et al. 2022, "High-Resolution Image Synthesis with
    Latent Diffusion Models", appendix D.1.
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


def dream(noisy_latents, noise, estimate, alpha_bar, detail_preservation):
    """Return input and target, shifted to what the network meets when it samples from its own estimates.

    With λ = √(1 - ᾱ)^p and Δ = λ (ε - ε_θ): x_t + √(1 - ᾱ) Δ and ε + Δ. Zhou et al. 2023, "DREAM: Diffusion
    Rectification and Estimation-Adaptive Models", section 3 and equation 8.
    """
    sigma = (1 - alpha_bar).sqrt()
    delta = sigma**detail_preservation * (noise - estimate)
    return noisy_latents + sigma * delta, noise + delta


# -- The sample stream: position -> everything that a training sample needs ----------------------------------


class SampleStream(torch.utils.data.Dataset):
    """The endless stream of training samples, indexed by position: item p is a pure function of (seed, p).

    One generator per position draws, always in this order: caption choice, caption dropout, crop, flip (five numbers
    at once), VAE posterior noise, timestep, diffusion noise, noise offset, input perturbation. All are drawn even if
    unused, except input perturbation, which comes last: so switching one option on changes no other draw. Nor does
    --aspect_buckets: noise of another shape than the square's comes from a second generator.
    """

    def __init__(self, rows, tokenizer, args, seed, latent_shape, num_train_timesteps):
        self.rows, self.tokenizer, self.args, self.seed = rows, tokenizer, args, seed
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps
        self.encoded = None  # an `Encoded`, if pictures and captions are encoded only once

    def __getitem__(self, position):
        """Return the sample at `position` (from 0) as a dictionary of tensors without a batch dimension."""
        args, index = self.args, self.index(position)
        number = self.rows.kept[index]
        drawn = self.draw(position, number)
        choice, dropout, top, left, flip = drawn.pop("choices").tolist()
        flipped, captions = args.random_flip and flip < 0.5, self.rows.captions[number]
        caption = "" if dropout < args.caption_dropout else captions[int(choice * len(captions))]
        if self.encoded:
            return self.encoded.look_up(index, flipped, caption, drawn["noise"].shape) | drawn
        pixel_values = self.load_pixels(number, crop=None if args.center_crop else (top, left))
        if flipped:
            pixel_values = pixel_values.flip(-1)
        return {"pixel_values": pixel_values, "input_ids": tokenize(self.tokenizer, [caption])[0], **drawn}

    def draw(self, position, number, seed=None):
        """Return everything random about the sample at `position`, which shows row `number`, as a dictionary."""
        key = self.seed if seed is None else seed, "sample", position
        generator = keyed_generator(*key)
        drawn = {
            "choices": torch.rand(5, generator=generator),
            "posterior_noise": torch.randn(self.latent_shape, generator=generator),
            "timesteps": torch.randint(self.num_train_timesteps, (), generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "noise_offset": torch.randn((self.latent_shape[0], 1, 1), generator=generator),
        }
        if self.args.input_perturbation:
            drawn["input_perturbation"] = torch.randn(self.latent_shape, generator=generator)
        channels, *square = self.latent_shape
        shape = [side * square[0] // self.args.resolution for side in self.rows.shapes[number]]
        if shape != square:
            generator = keyed_generator(*key, *shape)
            for name in ("posterior_noise", "noise", "input_perturbation"):
                if name in drawn:
                    drawn[name] = torch.randn(channels, *shape, generator=generator)
        return drawn

    def index(self, position):
        """Return the index in `rows.kept` of the row that the sample at `position` shows."""
        epoch, index = divmod(position, len(self.rows.kept))
        return permutation(self.seed, epoch, len(self.rows.kept))[index]

    def load_pixels(self, number, crop=None):
        """Return the picture of a row, given by its number in the data set, as `to_pixels` makes it."""
        args = self.args
        try:
            image = self.rows.table[number][args.image_column]
            return to_pixels(image, self.rows.shapes[number], args.image_interpolation_mode, crop)
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything on a broken file
            fault = f"{name_row(self.rows.table, number, args)}: {type(error).__name__}: {error}"
            remedy = "--skip_bad_rows trains without it; a repaired file makes it a new data set"
            raise BadRow(f"{fault} ({remedy})") from None


def collate(samples):
    """Return a step's samples as batches, one for each shape of picture, in the order in which these come."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample["noise"].shape, []).append(sample)
    return [torch.utils.data.default_collate(group) for group in groups.values()]


def keyed_generator(*key):
    """Return a CPU generator that depends on nothing but `key`."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_seed(*key):
    """Return a seed that depends on nothing but `key`. (torch uses only 32 bits of a CPU seed.)"""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


@functools.lru_cache(maxsize=2)  # samples come in order of their epochs
def permutation(seed, epoch, length):
    """Return the row order of an epoch, as a list of indices; `epoch` may be any key."""
    return torch.randperm(length, generator=keyed_generator(seed, "permutation", epoch)).tolist()


# -- The loop ------------------------------------------------------------------------------------------------

# `run` is a `Run`: `run.unet` holds the weights being trained, and `run.network` is that UNet as the loss calls it,
# wrapped as flags and accelerate require: compiled, under autocast, with gradients averaged over the processes.


def train(run):
    """Train from `run.step` to the last step, saving and validating when the plan says so."""
    if run.args.torch_compile or run.args.use_8bit_adam:
        run.accelerator.print("Compiling: the first step takes minutes, the others do not.")
    with Signals(run.accelerator) as signals:
        if run.step == 0:
            measure(run)
        if run.plan.validates_after(run.step):
            validate(run, signals, missing_only=True)  # a signal may have cut this validation short
        leave_if_asked(run, signals)
        run.progress.start()
        for batch in create_loader(run):
            run.progress.add(train_step(run, batch))
            run.checkpoints.finish(wait=False)
            saves, validates = run.plan.saves_after(run.step), run.plan.validates_after(run.step)
            if saves or validates or run.step % LOG_EVERY == 0:
                run.progress.flush()
            if saves:
                measure(run)  # first, so that the checkpoint knows its own loss
                run.checkpoints.save(run)
            if validates:
                validate(run, signals)
            if saves or validates:
                run.progress.clock = time.perf_counter()  # what these took is not training
            leave_if_asked(run, signals)
        run.checkpoints.finish()
        leave_if_asked(run, signals)
    run.progress.close()


def leave_if_asked(run, signals):
    """If any process of the run has received a signal, save, and exit with 128 + its number, as shells do."""
    if number := signals.received_by_any():
        run.progress.flush()
        run.checkpoints.save(run)
        run.checkpoints.finish()
        sys.exit(128 + number)


def create_loader(run):
    """Return a loader that yields this process's share of the samples of each remaining step."""
    positions = functools.partial(run.plan.positions, rank=run.accelerator.process_index)
    return torch.utils.data.DataLoader(
        run.stream,
        batch_sampler=map(positions, range(run.step, run.plan.max_steps)),
        num_workers=run.args.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def train_step(run, batch):
    """Do one optimizer step. The host waits for the device only under fp16, if the optimizer is not fused, or to
    capture a CUDA graph; with --offload_ema it is at most a step ahead.

    `batch` is `collate`'s, of this process's samples of the step. Of the metrics returned, loss and gradient norm are
    tensors on the device, shape ().
    """
    while (loss := add_gradients(run, batch)) is None:  # out of memory: retry with smaller micro-batches
        release_gradients(run)
    gradient_norm = clip_gradients(run)
    run.consistent = False
    torch.manual_seed(keyed_seed(run.stream.seed, "rounding", run.step))  # for --low_memory's stochastic rounding
    if run.average:
        run.average.release_weights()
    metrics = {"loss": loss, "grad_norm": gradient_norm} | run.optimizer.step(run.step, loss, gradient_norm)
    if run.average and not metrics.get("skipped"):
        run.average.update(run.weights)
    run.step += 1
    run.consistent = True
    if (scale := run.optimizer.loss_scale) and scale < LEAST_LOSS_SCALE:
        last = describe_step(run, run.step, loss.item(), gradient_norm.item())
        raise NotFinite(f"fp16 overflows even at a loss scale of {scale:.0e} (try bf16); {last}")
    return metrics


def add_gradients(run, batch):
    """Run forward and backward over a step's samples, a micro-batch at a time, so that their gradients add up.

    Returns the mean loss, shape (); or None if memory ran out: the gradients are then incomplete, and later
    micro-batches smaller.
    """
    accelerator, losses, size = run.accelerator, [], run.micro_batch_size
    accelerator.gradient_accumulation_steps = run.plan.batch_per_process // size  # accelerate divides each loss by it
    micro_batches = [
        {name: samples[first : first + size] for name, samples in group.items()}
        for group in batch
        for first in range(0, len(group["timesteps"]), size)
    ]
    try:
        for micro_batch in micro_batches:
            # Processes average their gradients in the last micro-batch only.
            with contextlib.nullcontext() if micro_batch is micro_batches[-1] else accelerator.no_sync(run.network):
                losses.append(run.add_micro_batch(micro_batch))
        return torch.stack(losses).sum() / accelerator.gradient_accumulation_steps
    except RuntimeError as error:
        # In a capture, the error about its end may hide the one that ended it.
        if not run.plan.halves or size == 1 or not OUT_OF_MEMORY.search(f"{error} {error.__context__}"):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold the activations
    run.micro_batch_size = next(n for n in range(size // 2, 0, -1) if run.plan.batch_per_process % n == 0)
    accelerator.print(f"\nnote: out of memory; micro-batches of {run.micro_batch_size} instead of {size} from here on")
    return None


def add_micro_batch(run, micro_batch):
    """Add the gradients of a micro-batch, a dictionary of samples on the device. Return its loss: shape ()."""
    latents, encoder_hidden_states = run.frozen.encode(micro_batch)
    loss = diffusion_loss(run.network, latents, encoder_hidden_states, micro_batch, **run.loss_options)
    loss = loss * (len(latents) / run.micro_batch_size)  # of a shape there may be fewer samples: each counts the same
    run.accelerator.backward(loss)
    return loss.detach()


def release_gradients(run):
    """Give up the memory of the gradients, of the graphs that add to them, and what PyTorch keeps for later use."""
    run.optimizer.adamw.zero_grad()
    run.add_micro_batch.clear()
    utils.memory.clear_device_cache(garbage_collection=True)


def clip_gradients(run):
    """Scale the gradients down to --max_grad_norm, if their global norm is above it. Return that norm: shape ()."""
    run.accelerator.unscale_gradients()  # fp16 only
    gradients = [weight.grad for weight in run.weights]
    # Sum in float32: gradients may be bf16, whose rounding would lose most of a long sum.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
    torch._foreach_mul_(gradients, (run.args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
    return norm


class Optimizer:
    """AdamW, with a learning rate that is a function of the step, and a guard that keeps NaN out of the weights.

    After a loss or gradient that is not finite, no step changes the weights (fp16's scaler skips only that step).
    The device checks this, without the host waiting; `Progress` ends the run when it reads the metrics.
    """

    def __init__(self, args, plan, unet, accelerator):
        adamw = create_adamw(args, plan, unet)
        # Only for its function: step -> factor of the rate.
        schedule = get_scheduler(args.lr_scheduler, adamw, None, args.lr_warmup_steps, plan.max_steps)
        self.accelerator, self.peak_rate, self.rate_factor = accelerator, plan.learning_rate, schedule.lr_lambdas[0]
        self.fused = adamw.defaults.get("fused")
        self.nonfinite = torch.zeros((), device=accelerator.device)  # 1 once something was not finite
        if self.fused and not accelerator.scaler:  # fp16's scaler brings a flag of its own
            adamw.found_inf = self.nonfinite
        self.adamw = accelerator.prepare(adamw) if accelerator.scaler else adamw  # only the scaler needs what it adds
        self.keeps_gradients = args.cuda_graphs  # for graphs to add to
        self.loss_scale = None  # fp16 only

    def step(self, step, loss, gradient_norm):
        """Update the weights with the rate of `step` (from 0), if all was finite so far; return metrics to log."""
        scaler, rate = self.accelerator.scaler, self.peak_rate * self.rate_factor(step)
        self.adamw.param_groups[0]["lr"] = rate
        if scaler and self.loss_scale is None:
            self.loss_scale = scaler.get_scale()
        self.nonfinite.clamp_(min=(~torch.isfinite(loss + gradient_norm)).float())
        if self.fused or scaler or not self.nonfinite.item():  # an optimizer that is not fused ignores the flag
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=not self.keeps_gradients)
        if scaler is None:
            return {"lr": rate}
        # A lower scale means that the step was skipped, which the fused optimizer does not tell accelerate.
        before, self.loss_scale = self.loss_scale, scaler.get_scale()
        return {"lr": rate, "skipped": float(self.loss_scale < before)}


# -- What a run reports: progress and tracker ----------------------------------------------------------------


class Progress:
    """Collects the metrics of each step on the device, and reads, logs and shows them a few steps at a time."""

    def __init__(self, run):
        self.run, self.pending, self.bar = run, [], None
        self.loss = math.nan  # of the last step that was read

    def start(self):
        shown = self.run.accelerator.is_local_main_process
        self.bar = tqdm(total=self.run.plan.max_steps, initial=self.run.step, desc="Steps", disable=not shown)
        self.clock = time.perf_counter()

    def add(self, metrics):
        """Note the metrics of the step just done."""
        self.pending.append((self.run.step, metrics))
        self.bar.update()

    def flush(self):
        """Log the metrics not yet logged, each at its own step. This is where the host waits for the device."""
        run, (pending, self.pending) = self.run, (self.pending, [])
        if not pending:
            return
        tensors = [torch.stack([metrics["loss"], metrics["grad_norm"]]).float() for _, metrics in pending]
        values = run.accelerator.reduce(torch.stack(tensors), "mean").tolist()
        images_per_sec = len(pending) * run.plan.effective_batch / (time.perf_counter() - self.clock)
        self.clock = time.perf_counter()
        for (step, metrics), (loss, grad_norm) in zip(pending, values, strict=True):
            read = metrics | {"loss": loss, "grad_norm": grad_norm, "images_per_sec": images_per_sec}
            read["epoch"] = step / run.plan.steps_per_epoch
            run.tracker.attempt(run.accelerator.log, {f"train/{name}": value for name, value in read.items()}, step)
            if not math.isfinite(loss + grad_norm) and not metrics.get("skipped"):
                run.consistent = False  # the EMA was updated, but not the weights
                raise NotFinite(describe_step(run, step, loss, grad_norm))
        self.loss = loss
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {metrics['lr']:.2e}, {images_per_sec:.1f} images/s")

    def close(self):
        """Close the bar, and print the peak memory of the GPU."""
        self.bar.close()
        if self.run.accelerator.device.type == "cuda":
            peaks = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
            self.run.accelerator.print("Peak GPU memory: {:.2f} GiB allocated, {:.2f} GiB reserved".format(*peaks))


def describe_step(run, step, loss, grad_norm):
    """Describe a step that was not finite and so changed no weights: its loss, norm and samples."""
    size, stream = run.plan.effective_batch, run.stream
    positions = range((step - 1) * size, (step - 1) * size + min(size, 64))
    numbers = [stream.rows.kept[stream.index(p)] for p in positions]
    seen = [f"{n} ({int(stream.draw(p, n)['timesteps'])})" for p, n in zip(positions, numbers, strict=True)]
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}. It changed no weights.\n"
        f"Its rows (and timesteps): {', '.join(seen)}{', ...' if size > 64 else ''}.\n"
        "A resumed run meets the same samples again: change a setting, for example to a smaller --learning_rate."
    )


def can_ask():
    """Say whether a question would be seen and answered: on a terminal, and not from the background."""
    interactive = sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()
    return interactive and (os.name == "nt" or os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp())


class Tracker:
    """The tracker that --report_to names. Failures never stop the training; only the first gives a warning."""

    def __init__(self, accelerator, args):
        self.accelerator, self.name, self.failed = accelerator, args.report_to, False

    def start(self, run):
        """Start the tracker, with all flags as its configuration, unless no step is left."""
        folder = self.accelerator.logging_dir
        if self.name == "none" or run.step == run.plan.max_steps:
            return
        options = {"name": EXPERIMENT_NAME, "dir": folder} if self.name == "wandb" else {}
        if self.name == "swanlab":
            import swanlab  # noqa: PLC0415 (of the trackers only the one in use is imported)

            place = os.environ.get("SWANLAB_LOG_DIR") or os.environ.get("SWANLAB_LOGDIR") or folder
            settings = swanlab.Settings()
            options = {"name": settings.experiment.name or EXPERIMENT_NAME, "log_dir": place}
        plain = (bool, int, float, str)  # all that TensorBoard takes
        config = plain_args(run.args, self.accelerator) | {"seed": run.stream.seed}
        config = {name: value if isinstance(value, plain) else str(value) for name, value in config.items()}
        start = functools.partial(self.accelerator.init_trackers, run.args.tracker_project_name, config)
        try:
            os.makedirs(folder, exist_ok=True)
            if self.name == "swanlab" and settings.mode == "online" and not (settings.api_key or can_ask()):
                raise RuntimeError("it has no key, and cannot ask for one here")
            start({self.name: options})
        except Exception as error:  # for example no key and no terminal, a refused key, no network
            print(f"warning: {self.name} cannot start: {error}")
            self.accelerator.trackers.clear()  # accelerate has listed it already
            if self.name == "swanlab":
                print(f"Offline run in {place}: upload it with swanlab sync.")
                self.attempt(start, {"swanlab": options | {"mode": "offline", "reinit": True}})

    def attempt(self, send, *args, **kwargs):
        """Call `send` of the tracker or of accelerate; warn of the first failure only."""
        try:
            send(*args, **kwargs)
        except Exception as error:
            if not self.failed:
                print(f"warning: {self.name} failed; training goes on, and what it missed is lost: {error!r}")
            self.failed = True

    def log_images(self, images, captions, step):
        """Send validation pictures with their captions; each tracker has a way of its own."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.stack(images)}, step=step, dataformats="NHWC")
            else:
                library = __import__(tracker.name)  # swanlab and wandb agree on the class and its arguments
                pictures = [library.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
                tracker.log({"validation": pictures}, step=step)

    def summarise(self, values):
        """Send what is known at the end: to wandb's summary; SwanLab has none, so to its configuration."""
        for tracker in self.accelerator.trackers:
            if place := {"wandb": "summary", "swanlab": "config"}.get(tracker.name):
                getattr(tracker.run, place).update(values)

    def finish(self, code, step):
        """Close the tracker's run; SwanLab also learns from the exit code how it ended."""
        for tracker in self.accelerator.trackers:
            if code and tracker.name == "swanlab" and self.accelerator.is_main_process:
                state, reason = "aborted" if code > 128 else "crashed", f"stopped at step {step}, exit code {code}"
                self.attempt(tracker.tracker.finish, state=state, error=reason)
            else:
                self.attempt(tracker.finish)


# -- What may stop a run: signals and errors -----------------------------------------------------------------


class Signals:
    """While entered, notes the first of `STOP_SIGNALS`. A later second one ends the process at once.

    Signals less than a second apart count as one: a launcher passes on what its processes may have got as well.
    """

    def __init__(self, accelerator):
        self.number = 0
        # The processes agree over gloo, on the CPU: over the device, every step would have to wait for it.
        self.group = torch.distributed.new_group(None, TIMEOUT, "gloo") if accelerator.num_processes > 1 else None

    def __enter__(self):
        ignored = {signal.SIGHUP} if os.name != "nt" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.handlers = {number: signal.signal(number, self.note) for number in {*STOP_SIGNALS} - ignored}  # by nohup
        return self

    def __exit__(self, error, *_details):
        # After an error or a signal the handlers stay: the last save must survive a new or forwarded one.
        if not (error or self.number):
            for number, handler in self.handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def note(self, number, _frame):
        """Remember the first signal; at a second one, exit with 128 + its number, as shells do."""
        if not self.number:
            self.number, self.noted = number, time.monotonic()
            # Not print: the signal may have come while something was being printed.
            text = "Stopping: this step will be finished and saved. A second signal stops at once, without saving."
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{text}\n".encode())
        elif time.monotonic() > self.noted + 1:
            os._exit(128 + number)

    def received_by_any(self):
        """Return the number of the signal that this process, or another of the run, has received; 0 if none has."""
        if self.group is None:
            return self.number
        number = torch.tensor(self.number)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number)


def ignore_signals(_worker):
    """Make a loader worker ignore signals: the training process still needs it to finish the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class BadRow(sd_config.ReportedError):
    """A row's picture cannot be decoded."""

    code = 2


class NotFinite(sd_config.ReportedError):
    """A loss or a gradient was not finite. All processes of the run raise this at the same step."""


@contextlib.contextmanager
def rescued(run):
    """However the run ends: rescue what can be saved, close the tracker, and exit with a message and a code."""
    code, accelerator, failed_alone = 0, run.accelerator, False
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:  # after a signal: all processes come here at the same step
        code = getattr(end, "code", 130)
    except Exception as error:
        code = error.code if isinstance(error, sd_config.ReportedError) else 1
        failed_alone = accelerator.num_processes > 1 and not isinstance(error, NotFinite)
        traceback.clear_frames(error.__traceback__)  # after out of memory, the frames hold what fills it
        rescue(run, error)
        explain(error, accelerator)
    if code and (failed_alone or accelerator.is_main_process):
        known = [path for path in sd_config.checkpoints(run.args.output_dir) if sd_config.step_of(path) <= run.step]
        last, flag = (known[-1], "latest") if known else [run.args.resume_from_checkpoint] * 2
        how = f"{last}: add --resume_from_checkpoint {flag} to go on from there" if last else "none"
        print(f"Stopped at step {run.step}. Last checkpoint: {how}", file=sys.stderr)
    if failed_alone:  # the others wait for ever, in a collective call; once this process exits, the launcher ends them
        sys.stdout.flush()
        os._exit(code)
    run.tracker.finish(code, run.step)
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()
    if code:
        sys.exit(code)


def rescue(run, error):
    """After an error, finish the save under way. A run of one process also logs and saves what was trained."""
    try:
        run.checkpoints.finish()
        if run.accelerator.num_processes > 1:
            return
        run.progress.flush()
        # After a failed write, another would fail as well: the disk is no emptier.
        if run.consistent and run.step and not isinstance(error, sd_config.WriteError):
            run.checkpoints.save(run)
            run.checkpoints.finish()
    except Exception as another:  # a device that has failed, a disk that is full
        explain(another, run.accelerator)


def explain(error, accelerator):
    """Print an error: with its traceback, unless its message says everything."""
    if not isinstance(error, sd_config.ReportedError):
        traceback.print_exception(error)
    elif accelerator.is_main_process or not isinstance(error, NotFinite):
        message = str(error).rpartition("BadRow: ")[2]  # a loader's worker puts its traceback before the message
        print(f"\nerror: {message.strip()}", file=sys.stderr)


# -- The run: models, optimizer, and where it stands ---------------------------------------------------------


def create_accelerator(args):
    """Return accelerate's Accelerator: device, processes, precision, trackers."""
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=utils.ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
            kwargs_handlers=[
                utils.InitProcessGroupKwargs(timeout=TIMEOUT),
                # Checkpointing casts the weights again in the backward pass: copies kept for it would only take memory.
                utils.AutocastKwargs(cache_enabled=not args.gradient_checkpointing),
            ],
        )
        torch.empty(0, device=accelerator.device)
    except (ValueError, ImportError, RuntimeError, AssertionError) as error:  # no such device, or not in this precision
        sd_config.stop(f"the device, --mixed_precision {args.mixed_precision} or accelerate's configuration: {error}")
    problems = []
    if args.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        used = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        problems.append(f"--cuda_graphs: needs a CUDA device and one process, and this run has {used}")
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        problems.append(f"accelerate's configuration asks for {accelerator.mixed_precision}: only no, fp16 and bf16")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 without a word.
        problems.append("--mixed_precision fp16: needs a GPU; bf16 and no also work on a CPU")
    launched, seen = os.environ.get("WORLD_SIZE", "1"), accelerator.num_processes
    if launched != str(seen):
        remedy = "launch with accelerate launch --multi_gpu or torchrun (on CPUs with ACCELERATE_USE_CPU=true)"
        problems.append(f"WORLD_SIZE {launched}: accelerate sees {seen} process(es); {remedy}")
    kind = accelerator.distributed_type
    if kind not in (utils.DistributedType.NO, utils.DistributedType.MULTI_CPU, utils.DistributedType.MULTI_GPU):
        problems.append(f"accelerate's configuration asks for {kind}: only plain data parallelism is supported")
    if accelerator.state.dynamo_plugin.backend != utils.DynamoBackend.NO:
        problems.append("accelerate's configuration asks for dynamo: use --torch_compile instead")
    stop_if(problems)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


class Run:
    """The parts of a run, and the step that it has reached."""

    def __init__(self, plan, seed, rows, tokenizer, accelerator, noise_scheduler):
        """Load the models, encode what is to be encoded only once, and build the optimizer."""
        args = plan.args
        accelerator.print(f"Loading {args.resume_from_checkpoint or args.pretrained_model_name_or_path}")
        pipeline, ema_unet = load_models(args)
        if accelerator.mixed_precision != "no":
            for unet in (pipeline.unet, ema_unet):  # tensor cores prefer channels-last convolutions
                unet.to(memory_format=torch.channels_last)
        self.plan, self.args, self.accelerator = plan, args, accelerator
        self.step = 0  # steps done
        self.losses = {}  # measured on held-out rows, as `TrainerState` has them
        self.consistent = True  # weights, moments, average and step number agree, so they may be saved
        self.frozen = Frozen(pipeline, accelerator)
        side, timesteps = args.resolution // pipeline.vae_scale_factor, len(noise_scheduler.alphas_cumprod)
        latent_shape = pipeline.vae.config.latent_channels, side, side
        pipeline.unet.register_to_config(sample_size=side)  # so that pictures are drawn in the size trained on
        self.stream = SampleStream(rows, tokenizer, args, seed, latent_shape, timesteps)
        measures = rows.held_out and accelerator.is_main_process
        self.held_out = encode_held_out(self.stream, self.frozen) if measures else None
        if plan.encoded:
            self.stream.encoded = Encoded(self.stream, plan, self.frozen, accelerator)
            self.frozen.move("cpu")
        self.loss_options = {  # of `diffusion_loss`
            "alphas_cumprod": noise_scheduler.alphas_cumprod.to(accelerator.device, torch.float32),
            "prediction_type": noise_scheduler.config.prediction_type,
            "noise_offset": args.noise_offset,
            "input_perturbation": args.input_perturbation,
            "dream_detail_preservation": args.dream_detail_preservation if args.dream_training else None,
            "snr_gamma": args.snr_gamma,
        }
        self.average = Average(ema_unet, accelerator.device, on_host=args.offload_ema) if args.use_ema else None
        self.unet = prepare_unet(pipeline.unet, args, accelerator)
        self.weights = list(self.unet.parameters())  # to walk over the modules takes a millisecond
        network = torch.compile(self.unet, fullgraph=True, dynamic=False) if args.torch_compile else self.unet
        self.network = accelerator.prepare(network)
        self.optimizer = Optimizer(args, plan, self.unet, accelerator)
        self.micro_batch_size = plan.micro_batch_size
        self.add_micro_batch = Launcher(self)
        self.checkpoints = Checkpoints(plan, accelerator)
        self.tracker = Tracker(accelerator, args)
        self.progress = Progress(self)


class Launcher:
    """Has the device do `add_micro_batch` with samples that are on the host, which waits only to capture a graph.

    With --cuda_graphs, a call is one launch for the host: that of a CUDA graph, which repeats the kernels of a call
    that was captured, for samples of the same shapes. They work on the same memory and with the same numbers as then.
    So samples are copied there, and until `clear` gradients, weights and encoders stay where they are, and the size of
    micro-batches stays as it is. The first call for some shapes is not captured: in it libraries choose and load their
    kernels, which a capture does not allow. Nor is a call in the first step, at whose end AdamW takes its memory.
    """

    def __init__(self, run):
        self.run = run
        self.clear()

    def clear(self):
        """Give up all graphs and their memory; the gradients must be given up as well."""
        self.called, self.graphs, self.pool = set(), {}, None

    def __call__(self, micro_batch):
        """Return the loss of a micro-batch, after its gradients have been added."""
        run, shapes = self.run, tuple(samples.shape for samples in micro_batch.values())
        if shapes not in self.graphs:
            device = run.accelerator.device
            copies = {name: samples.to(device, non_blocking=True) for name, samples in micro_batch.items()}
            if run.args.cuda_graphs and not self.called:
                for weight in run.weights:  # a graph can add only to what is there
                    weight.grad = torch.zeros_like(weight)
            if not run.args.cuda_graphs or run.step == 0 or shapes not in self.called:
                self.called.add(shapes)
                return add_micro_batch(run, copies)
            self.graphs[shapes] = self.capture(copies)
        graph, places, loss = self.graphs[shapes]
        for name, samples in micro_batch.items():
            places[name].copy_(samples, non_blocking=True)
        graph.replay()
        return loss.clone()

    def capture(self, places):
        """Return a graph of a call with the samples in `places`, these, and the tensor in which it leaves the loss."""
        graph = torch.cuda.CUDAGraph()
        # What a capture forbids is forbidden to this thread only: others go on to pin samples and wait for copies.
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            loss = add_micro_batch(self.run, dict(places))
        self.pool = graph.pool()  # the graphs run one after another, so they can share their memory
        return graph, places, loss


class Frozen:
    """The base model's pipeline (its UNet is the one trained), to be exported, and copies of its encoders."""

    def __init__(self, pipeline, accelerator):
        self.pipeline = pipeline
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        self.vae, self.text_encoder = (
            copy.deepcopy(part).requires_grad_(False).eval().to(accelerator.device, dtype)
            for part in (pipeline.vae, pipeline.text_encoder)
        )

    def move(self, device):
        self.vae.to(device)
        self.text_encoder.to(device)

    def encode(self, micro_batch):
        """Return latents and hidden states, as `diffusion_loss` takes them, from encoded or raw samples.

        Takes raw pictures out of the dictionary: they are not needed any longer, and would only fill memory.
        """
        if "moments" in micro_batch:  # encoded in advance
            moments, encoder_hidden_states = micro_batch["moments"], micro_batch["encoder_hidden_states"]
        else:
            moments = self.encode_pictures(micro_batch.pop("pixel_values"))
            encoder_hidden_states = self.encode_captions(micro_batch["input_ids"])
        latents = sample_latents(moments, micro_batch["posterior_noise"]) * self.vae.config.scaling_factor
        return latents, encoder_hidden_states

    @torch.no_grad()
    def encode_pictures(self, pixel_values):
        """Return mean and log-variance of the VAE's posterior: float32, shape (batch, 2, 4, h, w)."""
        posterior = self.vae.encode(pixel_values.to(self.vae.device, self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1).float()

    @torch.no_grad()
    def encode_captions(self, input_ids):
        """Return the text encoder's hidden states, one per token: float32, shape (batch, 77, width)."""
        return self.text_encoder(input_ids.to(self.text_encoder.device))[0].float()


def load_base(loader, args, **kwargs):
    """Load the base model, or a part of it, with the revision and cache that `args` name."""
    kwargs = {"revision": args.revision, "cache_dir": args.cache_dir} | kwargs
    return infer.load(loader, "--pretrained_model_name_or_path", args.pretrained_model_name_or_path, **kwargs)


def load_noise_scheduler(args):
    """Return the DDPM noise schedule of the base model, with the prediction type that is to be trained."""
    chosen = {} if args.prediction_type is None else {"prediction_type": args.prediction_type}
    scheduler = load_base(DDPMScheduler.from_pretrained, args, subfolder="scheduler", **chosen)
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        stop_if([f"--prediction_type: the base model predicts {prediction_type!r}; choose epsilon or v_prediction"])
    if args.dream_training and prediction_type != "epsilon":
        stop_if([f"--dream_training: defined for epsilon only, and the base model's scheduler says {prediction_type}"])
    return scheduler


def load_models(args):
    """Return the base pipeline with the UNet to train, in float32, and the UNet that the EMA starts from."""
    checkpoint, parts, load = args.resume_from_checkpoint, {}, UNet2DConditionModel.from_pretrained
    if checkpoint:
        parts["unet"] = infer.load(load, "--resume_from_checkpoint", checkpoint, subfolder="unet")
    elif args.non_ema_revision != args.revision:
        chosen = {"variant": args.variant, "revision": args.non_ema_revision}
        parts["unet"] = load_base(load, args, subfolder="unet", **chosen)
    pipeline = load_base(StableDiffusionPipeline.from_pretrained, args, variant=args.variant, **parts)
    infer.restore_precision(pipeline, "--pretrained_model_name_or_path", args.variant)
    if checkpoint and args.use_ema:
        return pipeline, infer.load(load, "--resume_from_checkpoint", checkpoint, subfolder="unet_ema")
    return pipeline, pipeline.unet  # any UNet would do: the first update overwrites the average


def hollow_unet(config):
    """Return a UNet on the meta device, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def unet_with(tensors, config):
    """Return a UNet with `tensors`, a dictionary, as its weights, not copied."""
    unet = hollow_unet(config)
    unet.load_state_dict(tensors, assign=True)
    return unet


def prepare_unet(unet, args, accelerator):
    """Make the UNet ready to be trained: precision, memory, device."""
    unet.requires_grad_(True).train()
    if args.gradient_checkpointing:
        # SD1.5 has no dropout (`make_plan`), and the generators' states cannot be read in a CUDA graph's capture.
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        unet.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, **settings))
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, NotImplementedError) as error:  # no CUDA device, or one that xformers was not built for
            stop_if([f"--enable_xformers_memory_efficient_attention: {error}"])
    if args.low_memory:
        for parameter in filter(has_8bit_moments, unet.parameters()):  # others' moments take their dtype
            parameter.data = parameter.data.bfloat16()
    return unet.to(accelerator.device)


def create_adamw(args, plan, unet):
    """Return AdamW over all of the UNet's weights: torch's in one fused kernel, or torchao's with 8-bit moments."""
    settings = {"lr": plan.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    settings["weight_decay"] = args.adam_weight_decay
    if args.use_8bit_adam:
        return EightBitAdamW(list(unet.parameters()), settings, stochastic_rounding=args.low_memory)
    # Fused only where that is known to heed `found_inf`, which the NaN guard needs: on mps, for one, it is not.
    return torch.optim.AdamW(unet.parameters(), fused=unet.device.type in ("cpu", "cuda"), **settings)


def has_8bit_moments(weight):
    """Say whether a tensor is one of those that torchao keeps 8-bit moments of."""
    return weight.numel() >= 4096 and weight.numel() % 256 == 0


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW with 8-bit moments: torchao's, called for chunks of one size instead of for every tensor.

    Given tensors, torchao would compile its update once per shape, which takes minutes, and call it 686 times a step.
    So they are copied into chunks, updated there, and copied back. Their moments are views of a chunk's, and are saved
    as torchao saves them. Small tensors have float32 moments, as with torchao, and torch's fused AdamW.
    """

    def __init__(self, weights, settings, stochastic_rounding):
        from torchao.optim import AdamW8bit  # noqa: PLC0415 (optional package: checked with the flags)
        from torchao.optim.subclass_8bit import OptimState8bit  # noqa: PLC0415

        super().__init__(weights, settings | {"foreach": True})  # so that all gradients are zeroed at once
        large, small = ([weight for weight in weights if has_8bit_moments(weight) == kind] for kind in (True, False))
        self.small, device, dtype = torch.optim.AdamW(small, fused=True, **settings), weights[0].device, large[0].dtype
        for weight in small:
            zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.state[weight] = self.small.state[weight] = {"step": torch.zeros((), device=device), **zeros}
        self.size, self.chunks = max(weight.numel() for weight in large), []
        for tensors in pack(large, self.size):
            zeros = functools.partial(OptimState8bit.zeros, (self.size,), block_size=256, device=device, dtype=dtype)
            moments = {"exp_avg": zeros(signed=True), "exp_avg_sq": zeros(signed=False)}
            chunk, end = {"step": torch.zeros(()), **moments}, 0
            for weight in tensors:
                start, end = end, end + weight.numel()
                views = {name: moment[start:end].view(weight.shape) for name, moment in moments.items()}
                self.state[weight] = chunk | views
            self.chunks.append((tensors, chunk))
        self.values = torch.nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
        self.large = AdamW8bit([self.values], **settings, bf16_stochastic_round=stochastic_rounding)

    @torch.no_grad()
    def step(self, closure=None):
        rate = self.param_groups[0]["lr"]
        self.small.param_groups[0]["lr"] = rate
        self.small.step()
        self.large.param_groups[0]["lr"].fill_(rate)
        self.values.data = self.values.new_zeros(self.size)
        self.values.grad = torch.zeros_like(self.values)
        for tensors, chunk in self.chunks:
            sizes = [weight.numel() for weight in tensors]
            torch.cat([weight.flatten() for weight in tensors], out=self.values[: sum(sizes)])
            torch.cat([weight.grad.flatten() for weight in tensors], out=self.values.grad[: sum(sizes)])
            self.large.state[self.values] = chunk
            self.large.step()
            pieces = zip(self.values[: sum(sizes)].split(sizes), tensors, strict=True)
            torch._foreach_copy_(tensors, [piece.view(weight.shape) for piece, weight in pieces])
        self.values.data, self.values.grad = self.values.new_zeros(0), None

    def load_state_dict(self, state_dict):
        """Copy the moments of a state; rates and the like stay as they are."""
        for index, moments in state_dict["state"].items():
            for name, moment in moments.items():
                self.state[self.param_groups[0]["params"][index]][name].copy_(moment)


def pack(tensors, size):
    """Return tensors in lists with at most `size` values each: the largest first, each into the first with room."""
    lists = []
    for tensor in sorted(tensors, key=torch.Tensor.numel, reverse=True):
        with_room = (some for some in lists if sum(map(torch.Tensor.numel, [*some, tensor])) <= size)
        if (place := next(with_room, None)) is None:
            lists.append(place := [])
        place.append(tensor)
    return lists


class Average:
    """The exponential moving average (EMA) of the weights, float32: on the device, or on the host, in a thread.

    The decay of update n is min(0.9999, n / (9 + n)), as in diffusers' `EMAModel`, which passes over memory twice and
    needs extra memory of the average's own size. The first update has decay 0: the average becomes the weights.
    """

    def __init__(self, unet, device, on_host):
        self.on_host, self.updates = on_host, 0
        self.weights = [weight.detach().to("cpu" if on_host else device, copy=True) for weight in unet.parameters()]
        self.executor, self.pending = ThreadPoolExecutor(max_workers=1), None
        self.stream = torch.cuda.Stream() if on_host and device.type == "cuda" else None  # of copies to the host

    @torch.no_grad()
    def update(self, weights):
        """Move the average towards the weights, a list of tensors on the run's device."""
        self.updates += 1
        decay = min(0.9999, self.updates / (9 + self.updates)) if self.updates > 1 else 0.0
        if not self.on_host:
            torch._foreach_lerp_(self.weights, weights, 1 - decay)
            return
        averages = self.settled_weights()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            copies = [copied_to_host(weight) for weight in weights]
        self.pending = self.executor.submit(self.update_on_host, averages, copies, 1 - decay)

    def release_weights(self):
        """Make the device's further work wait until the weights have been copied to the host."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    @torch.no_grad()  # that of `update` does not hold in another thread
    def update_on_host(self, averages, weights, move):
        """Move the averages towards copies of the weights by the fraction `move`, once these have arrived."""
        if self.stream:
            self.stream.synchronize()
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight.float(), move)

    def settled_weights(self):
        """Return the averaged weights as a list, once the thread is done with them."""
        if self.pending:
            self.pending.result()
        return self.weights

    def by_name(self, unet):
        """Return the averaged weights by the names that `unet` gives them."""
        return dict(zip(dict(unet.named_parameters()), self.settled_weights(), strict=True))


def restore(run, saved):
    """Restore the state of a checkpoint, except its UNets: these were loaded with the other models."""
    folder, adamw, scaler = run.args.resume_from_checkpoint, run.optimizer.adamw, run.accelerator.scaler
    # Only the moments: flags such as --adam_weight_decay are this run's own.
    kwargs = {"map_location": "cpu", "weights_only": True}
    moments = infer.load(torch.load, "--resume_from_checkpoint", folder / OPTIMIZER, **kwargs)
    for index, state in moments.items():
        weight = run.weights[index]
        for name, moment in state.items():  # saved with another memory format, if the precision was another
            if type(moment) is torch.Tensor and moment.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=moment.dtype, device="cpu").copy_(moment)
    adamw.load_state_dict(adamw.state_dict() | {"state": moments})
    if run.average:
        run.average.updates = saved.ema_step
    if scaler and saved.scaler and saved.scaler["scale"] >= LEAST_LOSS_SCALE:
        scaler.load_state_dict(saved.scaler)
    if run.plan.halves and run.plan.batch_per_process % saved.micro_batch_size == 0:
        run.micro_batch_size = saved.micro_batch_size
    run.step, run.checkpoints.last_step, run.progress.loss = saved.step, saved.step, saved.loss
    run.losses = saved.losses
    where = f"step {run.step} of {run.plan.max_steps}, in micro-batches of {run.micro_batch_size}"
    run.accelerator.print(f"Resuming from {folder}: {where}")
    if run.stream.encoded and saved.encoding not in (None, "", run.stream.encoded.name):
        run.accelerator.print("warning: encoders, rows or the flags for pictures are not those of the run so far")


# -- The data set: rows, captions, pictures ------------------------------------------------------------------


@dataclasses.dataclass
class Rows:
    """The data set, and which of its rows are trained on."""

    table: datasets.Dataset  # all rows: the image and the caption column
    fingerprint: str  # of every caption and picture file, in their order
    bad: dict  # number of a row left out by --skip_bad_rows -> what is wrong with it
    kept: list  # numbers of the rows trained on
    held_out: list  # numbers of the held-out rows, on which validation measures the loss
    captions: list  # of all rows: the captions of each, as a list
    shapes: list  # of all rows: the (height, width) in which each picture is trained
    buckets: str = ""  # with --aspect_buckets: how many pictures have which shape, and what that does to them

    @functools.cached_property
    def texts(self):
        """The distinct captions of the rows trained on, and the empty one, sorted."""
        return sorted({"", *(text for number in self.kept for text in self.captions[number])})


def load_rows(args, tokenizer, seed, accelerator):
    """Return the `Rows` to train on; exit with code 2 if anything is missing or unusable.

    Pictures are decoded here only with --skip_bad_rows.
    """
    accelerator.print(f"Reading {args.dataset_name or args.train_data_dir}")
    with accelerator.local_main_process_first():
        table = read_dataset(args, accelerator)
    check_columns(table, args)
    table = table.select_columns([args.image_column, args.caption_column])
    table = table.cast_column(args.image_column, datasets.Image())  # which decodes, whatever the data set says
    captions = [list_captions(caption) for caption in table[args.caption_column]]
    check_captions(captions, args, tokenizer, accelerator)
    on_main = [read_pictures(table, args) if accelerator.is_main_process else None]
    fingerprint, bad, sizes = utils.broadcast_object_list(on_main)[0]
    if bad and not args.skip_bad_rows:
        faults = [f"{name_row(table, number, args)}: {fault}" for number, fault in bad.items()]
        stop_if([*faults[:10], f"{len(bad)} row(s) without a readable picture; --skip_bad_rows trains on the others"])
    for number in bad:
        accelerator.print(f"note: left out {name_row(table, number, args)}: {bad[number]}")
    limit = args.max_train_samples
    numbers = range(len(table)) if limit is None or limit >= len(table) else permutation(seed, "subset", len(table))
    # Held-out rows depend on the data set only, not on the seed.
    good = [number for number in permutation("held out", 0, len(table)) if number not in bad]
    held_out, trained = good[: args.validation_samples], {*good[args.validation_samples :]}
    kept = [number for number in numbers if number in trained][:limit]
    if not kept:
        flag = f"--validation_samples {args.validation_samples}" if held_out else "--skip_bad_rows"
        stop_if([f"{flag}: of {len(table)} rows, {len(bad)} of them bad, none is left to train on"])
    if limit is not None and limit > len(kept):
        accelerator.print(f"note: --max_train_samples {limit}: only {len(kept)} are available, and all are used")
    square, buckets = (args.resolution, args.resolution), generate_aspect_ratio_buckets(args.resolution, 64)
    shapes = [buckets[find_nearest_bucket(height, width, buckets)] for width, height in sizes or ()]
    said = describe_shapes([(*sizes[number], *shapes[number]) for number in kept]) if sizes else ""
    return Rows(table, fingerprint, bad, kept, held_out, captions, shapes or [square] * len(table), said)


def describe_shapes(pictures):
    """Say what --aspect_buckets does to pictures: tuples of a width and a height, and of a shape's height and width."""
    counts = collections.Counter(f"{columns}x{rows}" for _, _, rows, columns in pictures)
    shapes = ", ".join(f"{shape}: {count}" for shape, count in counts.most_common())
    width, height, rows, columns = np.array(pictures).T
    scale = np.maximum(rows / height, columns / width)
    cropped = f"on average {1 - (rows * columns / (height * width * scale**2)).mean():.1%} of a picture is cropped"
    return f"{shapes}; {cropped}; enlarged by more than half: {(scale > 1.5).sum()}"


def read_dataset(args, accelerator):
    """Return the train split of the data set that `args` name, from the Hub or from a local folder."""
    name, options = args.dataset_name, {"split": "train", "cache_dir": args.cache_dir}
    flag = f"--dataset_name {name}" if name else f"--train_data_dir {args.train_data_dir}"
    local = PictureFolder.of(args)
    texts = local and local.has_texts and not local.tables
    try:
        if texts and not local.metadata:
            table = local.read_texts(args)
        elif local and local.pictures and (name is None or texts or not (local.metadata or local.tables)):
            files = os.path.join(glob.escape(str(local.folder)), "**")
            table = datasets.load_dataset("imagefolder", data_files=files, **options)
        elif name is None:
            table = datasets.load_dataset(args.train_data_dir, **options)
        elif sd_config.is_saved_dataset(name):
            splits = os.path.isfile(os.path.join(name, "dataset_dict.json"))
            table = datasets.Dataset.load_from_disk(os.path.join(name, "train") if splits else name)
        else:
            table = datasets.load_dataset(name, args.dataset_config_name, data_dir=args.train_data_dir, **options)
    except Exception as error:  # the library raises many types of error
        cause = f"{error} {error.__cause__ or ''}"
        remedy = "check the folder" if local else "check name and network, or give a local folder"
        stop_if([f"{flag}: cannot be loaded ({remedy}): {cause}"])
    stop_if([f"{flag}: its train split is empty"] if len(table) == 0 else [])
    for note in local.notes(table, args) if local else ():
        accelerator.print(f"note: {note}")
    return table


class PictureFolder:
    """A local folder of pictures, whose captions are in .txt files beside them, or in metadata that `datasets` reads.

    Paths are sorted, so that the rows have the same order on every file system.
    """

    def __init__(self, folder):
        self.folder = folder
        Image.init()
        readable = {*Image.OPEN} - {"MPEG", "HDF5", "GRIB", "BUFR", "EPS", "WMF"}  # these are only recognised
        readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in readable}
        paths = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)  # without hidden files
        files = [Path(path) for path in paths if not os.path.isdir(path)]
        homes = {}  # real folder -> its shortest name: links may lead to it again, even in circles
        for home in sorted({file.parent for file in files}, key=lambda home: (len(home.parts), home.as_posix())):
            homes.setdefault(os.path.realpath(home), home)
        homes = {home for home in homes.values() if "__MACOSX" not in home.relative_to(folder).parts}
        files = sorted((file for file in files if file.parent in homes), key=Path.as_posix)
        self.pictures = [file for file in files if file.suffix.lower() in readable]
        self.metadata = [file for file in files if re.fullmatch(r"metadata\.(jsonl|csv|parquet)", file.name)]
        texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
        self.texts = [texts.get(picture.with_suffix("")) for picture in self.pictures]  # None where there is none
        self.has_texts = any(self.texts)
        self.others = sorted({*files} - {*self.pictures, *self.metadata, *self.texts})
        self.tables = [file for file in self.others if re.search(r"\.(parquet|arrow|tar|gz)$", file.name)]

    @classmethod
    def of(cls, args):
        """Return the folder that `args` name, or None if the data set is on the Hub or was saved by `datasets`."""
        name, folder = args.dataset_name, Path(args.dataset_name or "", args.train_data_dir or "")
        if name and (sd_config.is_saved_dataset(name) or not sd_config.is_local(name)):
            return None
        return cls(folder / "train" if name and (folder / "train").is_dir() else folder)  # as `datasets` does

    def read_texts(self, args):
        """Return the pictures and the captions beside them as a data set; exit with code 2 if any has no caption."""
        captions = []
        for file in self.texts:
            try:
                lines = file.read_text(encoding="utf-8-sig").split("\n") if file else ()
            except (OSError, UnicodeDecodeError) as error:
                stop_if([f"{file}: cannot be read as UTF-8 text: {error}"])
            captions.append([line.strip() for line in lines if line.strip()])
        if bare := [picture for picture, texts in zip(self.pictures, captions, strict=True) if not texts]:
            what = f"{len(bare)} of {len(self.pictures)} pictures have no caption in a .txt file beside them"
            stop_if([f"{self.folder}: {what}: {self.some_of(bare)}"])
        columns = {args.image_column: [*map(str, self.pictures)], args.caption_column: captions}
        return datasets.Dataset.from_dict(columns).cast_column(args.image_column, datasets.Image())

    def notes(self, table, args):
        """Yield what in the folder is not used as its owner may expect."""
        named = [picture.parent.name for picture in self.pictures if re.match(r"\d+_", picture.parent.name)]
        if named:
            yield f"{named[0]}: every picture counts once; the number of repeats in a folder's name is not applied"
        if self.pictures and self.others and not self.tables:
            what = f"{len(self.others)} file(s) are neither pictures that PIL here reads nor the caption of one"
            yield f"{what}: {self.some_of(self.others)}"
        if self.has_texts and self.metadata:
            yield f"the captions are those of {self.metadata[0].name}; the .txt files beside pictures are not read"
        elif self.has_texts and (several := sum(len(captions) > 1 for captions in table[args.caption_column])):
            yield f"{several} picture(s) have several captions, one a line, of which each sample takes one"
        if self.metadata and isinstance(table.features.get(args.image_column), datasets.Image):
            listed = {os.path.realpath(path) for path in paths_of(table, args) if path}
            if unlisted := [picture for picture in self.pictures if os.path.realpath(picture) not in listed]:
                what = f"{len(unlisted)} of {len(self.pictures)} pictures are not listed in {self.metadata[0].name}"
                yield f"{what}, and not trained on: {self.some_of(unlisted)}"

    def hint(self):
        """Return how the captions of a folder of pictures without any may be given, and what lies there instead."""
        if not self.pictures or self.metadata:
            return ""
        name, folder = self.pictures[0].name, self.folder
        lines = [
            ". Captions of a folder of pictures are given in one of three ways:",
            f"beside {name}: {Path(name).stem}.txt with its caption (or several, one a line)",
            f'{folder / "metadata.jsonl"} with lines like {{"file_name": "{name}", "text": "a caption"}}',
            f"{folder / 'metadata.csv'} with the first line file_name,text",
        ]
        if found := [*self.others, *sorted(folder.absolute().parent.glob("metadata.*"))]:
            lines.append(f"found, but not read under this name or in this place: {', '.join(map(str, found[:10]))}")
        return "\n  ".join(lines)

    def some_of(self, paths):
        """Return the first ten of some paths as text, relative to the folder."""
        return ", ".join(str(path.relative_to(self.folder)) for path in paths[:10]) + ", ..." * (len(paths) > 10)


def check_columns(table, args):
    """Exit with code 2 unless both columns are there and one holds images."""
    columns, feature = ", ".join(table.column_names), table.features.get(args.image_column)
    flags = {"--image_column": args.image_column, "--caption_column": args.caption_column}
    missing = [f"{flag} {name}" for flag, name in flags.items() if name not in table.column_names]
    local = PictureFolder.of(args) if missing else None
    stop_if([f"{flag}: the columns are {columns}{local.hint() if local else ''}" for flag in missing])
    if not isinstance(feature, datasets.Image):
        stop_if([f"--image_column {args.image_column}: holds {feature}, not images"])
    captions = table.features[args.caption_column]
    dtype = getattr(getattr(captions, "feature", captions), "dtype", None)  # of a column of lists, what they hold
    if isinstance(captions, datasets.ClassLabel) or dtype not in ("string", "large_string", "null"):
        stop_if([f"--caption_column {args.caption_column}: holds {captions}, not text"])


def check_captions(captions, args, tokenizer, accelerator):
    """Exit with code 2 if a caption is missing or empty; say what is longer than the text encoder reads."""
    bad = [str(index) for index, texts in enumerate(captions) if not texts]
    if bad:
        rows = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
        what = f"{len(bad)} row(s) without a caption, or with an empty one: {rows}"
        stop_if([f"--caption_column {args.caption_column}: {what}"])
    texts, limit = sorted({text for texts in captions for text in texts}), tokenizer.model_max_length
    for what, some in (("captions", texts), ("--validation_prompts", args.validation_prompts)):
        if cut := infer.cut_texts(tokenizer, some):
            accelerator.print(f"note: {len(cut)} of {len(some)} {what} have more than {limit} tokens and will be cut")


def list_captions(caption):
    """Return the captions of a row, given as a string or a list of strings, or [] if any is missing or empty."""
    texts = [caption] if isinstance(caption, str) else caption if isinstance(caption, list) else []
    return texts if all(isinstance(text, str) and text.strip() for text in texts) else []


def tokenize(tokenizer, texts):
    """Return the token ids of texts, cut or padded to the tokenizer's length: int64, shape (texts, 77)."""
    return tokenizer(
        texts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


def read_pictures(table, args):
    """Read every picture's file, unless an earlier run did; with --skip_bad_rows decode each too.

    Returns a fingerprint of the data set, which changes with any caption and any byte of a picture; a dictionary:
    number of a row -> what is wrong with its picture; and, with --aspect_buckets, the pictures' sizes.
    """
    fingerprint, bad = hash_pictures(table, args)
    if not (args.skip_bad_rows or args.aspect_buckets):
        return fingerprint, bad, None
    kind = "Decoding" if args.skip_bad_rows else "Measuring"
    name = f"{kind.lower()}-{fingerprint}-{PIL.__version__}.arrow"
    file = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, name)
    with exit_on(OSError):
        measure = functools.partial(measure_pictures, table, args)
        found = map_once(measure, len(table), 16, file, f"{kind} every picture")
    bad = {number: fault for number, fault in enumerate(found["fault"]) if fault} | bad
    return fingerprint, dict(sorted(bad.items())), found["size"][:] if args.aspect_buckets else None


def hash_pictures(table, args):
    """Return a hash of all captions and pictures, and what is wrong with which file; see `read_pictures`.

    The hash is remembered by all captions and the size and modification time of every file, unless a picture was
    changed in the last two seconds: another change might leave both as they are.
    """
    started, files = time.time(), table.cast_column(args.image_column, datasets.Image(decode=False))
    pictures, key = [stat_of(path) for path in paths_of(table, args)], hashlib.sha256()
    for fact in (*pictures, *(stat_of(file["filename"]) for file in table.cache_files), *table[args.caption_column]):
        key.update(repr(fact).encode())
    memory = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, f"read-{key.hexdigest()[:16]}.json")
    if known := sd_config.read_json(memory).get("fingerprint"):
        if args.dry_run:
            print(f"note: pictures not read again, as sizes and times of modification are those in {memory}")
        return known, {}
    read, bad = hashlib.sha256(), {}
    for number, row in enumerate(tqdm(files, desc="Reading every picture", delay=2)):
        picture = row[args.image_column] or {}
        path, content = picture.get("path"), picture.get("bytes")
        try:
            if path and content is None:  # for a picture on the web, its URL is hashed
                content = path.encode() if "://" in path else Path(path).read_bytes()
            if not content:
                bad[number] = "the picture is empty"
        except OSError as error:
            bad[number] = f"the picture cannot be read: {error}"
        content = content or b""
        read.update(repr((row[args.caption_column], len(content))).encode() + content)
    fingerprint = read.hexdigest()[:16]
    if not bad and max(changed for *_, changed in pictures) < started - 2:
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(json.dumps({"fingerprint": fingerprint}))
    return fingerprint, bad


def paths_of(table, args):
    """Return the path of every row's picture, or None where the table itself holds the picture."""
    pictures = table.data.column(args.image_column)
    paths, held = (pyarrow.compute.struct_field(pictures, name) for name in ("path", "bytes"))
    return pyarrow.compute.if_else(held.is_null(), paths, None).to_pylist()


def stat_of(path):
    """Return path, size and modification time of a file: what tells that it was changed."""
    try:
        found = os.stat(path)
    except (OSError, TypeError):  # there is none, or the table holds the picture
        return path, 0, 0.0
    return os.path.abspath(path), found.st_size, found.st_mtime


def measure_pictures(table, args, numbers):
    """Return the `size` (width, height), upright, of the pictures of some rows, and each one's `fault`, or "".

    With --skip_bad_rows they are decoded; otherwise only their headers are read, as far as their format has one.
    """
    files, found = table.cast_column(args.image_column, datasets.Image(decode=False)), {"size": [], "fault": []}
    for number in numbers:
        try:
            held, fault = files[number][args.image_column], ""
            if args.skip_bad_rows or "://" in (held["path"] or ""):
                size = to_rgb(table[number][args.image_column]).size
            else:
                with Image.open(io.BytesIO(held["bytes"]) if held["bytes"] else held["path"]) as image:
                    check_picture(image)
                    on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                    size = image.size[::-1] if on_its_side else image.size
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything on a broken file
            size, fault = (0, 0), f"{type(error).__name__}: {error}"
        found["size"].append(size)
        found["fault"].append(fault)
    return found


def map_once(function, count, batch_size, file, description):
    """Return a data set that holds the results of `function` for 0 to `count` - 1.

    It is computed once and kept in `file`, which is written under another name, and renamed when whole. `function` maps
    a list of `batch_size` numbers to a dictionary of columns, each as long.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        try:
            return datasets.Dataset.from_file(str(file))
        except Exception:  # damaged, as by a power cut
            file.unlink()
    return datasets.Dataset.from_dict({"number": range(count)}).map(
        lambda batch: function(batch["number"]),
        batched=True,
        batch_size=batch_size,
        remove_columns="number",
        cache_file_name=str(file),
        new_fingerprint=file.stem,  # otherwise the function and its models would be hashed
        desc=description,
    )


def name_row(table, number, args):
    """Return a row's name for messages: its number and, if any, its file."""
    files = table.cast_column(args.image_column, datasets.Image(decode=False))
    path = (files[number][args.image_column] or {}).get("path")
    return f"row {number}" + (f" ({path})" if path else "")


def to_pixels(image, shape, interpolation, crop=None):
    """Return a picture as a float32 tensor in [-1, 1], shape (3, height, width); `shape` is (height, width).

    It is resized with PIL's filter `interpolation`, until it just covers this shape, and cropped along one side. `crop`
    places the crop: fractions in [0, 1) of the free space above it and to its left; None centres it.
    """
    image, (height, width) = to_rgb(image), shape
    covering = height, int(height * image.width / image.height)
    if image.width * height < image.height * width:
        covering = int(width * image.height / image.width), width
    image = TF.resize(image, covering, InterpolationMode(interpolation))
    if crop is None:
        image = TF.center_crop(image, shape)
    else:
        rooms = (image.height - height + 1, image.width - width + 1)
        top, left = (int(fraction * room) for fraction, room in zip(crop, rooms, strict=True))
        image = TF.crop(image, top, left, height, width)
    return TF.to_tensor(image) * 2 - 1


def check_picture(image):
    """Raise a `ValueError` if a picture's header tells that `to_rgb` cannot take it."""
    if max(image.size) > 100 * min(image.size):  # once resized to the resolution, it would fill the memory
        raise ValueError(f"{image.width}x{image.height} is too narrow")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"pictures of mode {image.mode} cannot be trained on; convert them to RGB")


def to_rgb(image):
    """Return a PIL picture upright and in RGB: transparency over white, 16 bits scaled to 8. Others: a `ValueError`."""
    check_picture(image)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] == "I":  # PIL itself would clip everything above 255 to white
        grey = np.asarray(image, np.float64) / 257
        if grey.min() < 0 or grey.max() > 255:
            raise ValueError("grey values of more than 16 bits cannot be trained on; convert the picture to RGB")
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# -- Pictures and captions that are encoded only once --------------------------------------------------------


class Encoded:
    """The frozen models' encodings of every picture and caption, in memory-mapped files.

    Those of an earlier run are reused: the name of their folder is a hash of all that they depend on.
    """

    def __init__(self, stream, plan, frozen, accelerator):
        rows, args, ids = stream.rows, stream.args, tokenize(stream.tokenizer, stream.rows.texts)
        self.views = plan.views
        transform = args.resolution, args.image_interpolation_mode, plan.views
        if args.aspect_buckets:
            transform += ([rows.shapes[number] for number in rows.kept],)
        models = [hashlib.sha256(save(part.state_dict())).digest() for part in (frozen.vae, frozen.text_encoder)]
        key = (rows.fingerprint, rows.kept, transform, ids.tolist(), models)
        folder = plan.encoded / f"encoded-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
        self.name, self.numbers = folder.name, {text: number for number, text in enumerate(rows.texts)}

        def encode_views(indices):  # mirrors pictures, not latents: encoding does not commute with mirroring
            pictures = [stream.load_pixels(rows.kept[index]) for index in indices]
            views = [view for picture in pictures for view in (picture, picture.flip(-1))[: plan.views]]
            runs = [torch.stack([*run]) for _, run in itertools.groupby(views, lambda view: view.shape)]  # of one shape
            moments = [row for run in runs for row in frozen.encode_pictures(run).flatten(1).cpu().numpy()]
            return {"values": moments}

        def encode_texts(numbers):
            return {"values": frozen.encode_captions(ids[numbers]).flatten(1).cpu().numpy()}

        batch = max(1, min(4, 4 * 512**2 // args.resolution**2))  # large pictures take no more memory than those
        locked = functools.partial(sd_config.lock, folder, folder, wait=True)  # another run may be making the same
        told = sd_config.reported(f"the encodings in {folder}", plan.encoded_bytes, folder, OSError)
        with accelerator.local_main_process_first(), exit_on(sd_config.ReportedError), locked(), told:
            if damage := sd_config.find_damage(folder, holds="captions.arrow"):  # there is nothing, or half of it
                for path in (*folder.glob("*.arrow"), *folder.glob("tmp*")):
                    path.unlink()
            else:
                accelerator.print(f"Encoded pictures and captions: found in {folder}")
            pictures = map_once(encode_views, len(rows.kept), batch, folder / "pictures.arrow", "Encoding pictures")
            captions = map_once(encode_texts, len(rows.texts), 32, folder / "captions.arrow", "Encoding captions")
            if damage:
                sd_config.write_manifest(folder)
        self.pictures = pictures.with_format("torch")  # per row: its picture and, with --random_flip, the mirror image
        self.captions = captions.with_format("torch")  # in the order of Rows.texts

    def look_up(self, index, flipped, caption, shape):
        """Return the encodings that a sample of row `index` needs, its latents of this `shape`, for `Frozen.encode`."""
        moments = self.pictures[self.views * index + int(flipped)]["values"]
        hidden_states = self.captions[self.numbers[caption]]["values"]
        return {"moments": moments.view(2, *shape), "encoder_hidden_states": hidden_states.view(77, -1)}


# -- Validation: the loss on rows kept out of training, and pictures of the prompts --------------------------


def encode_held_out(stream, frozen):
    """Return the samples of --validation_samples, on the host: moments, hidden states, noise, timestep; each a batch.

    They depend on the data set and their number only. Row i of n has timestep (i + 1/2) T / n, rounded down: random
    timesteps would dominate the measurement, as the loss depends so much on them.
    """
    rows, samples = stream.rows, []
    for index, number in enumerate(tqdm(rows.held_out, desc="Encoding the rows kept out of training")):
        with exit_on(BadRow):
            pixel_values = stream.load_pixels(number)
        input_ids = tokenize(stream.tokenizer, rows.captions[number][:1])
        sample = {name: value[None] for name, value in stream.draw(index, number, "held out").items()}
        sample["timesteps"][0] = (2 * index + 1) * stream.num_train_timesteps // (2 * len(rows.held_out))
        sample["moments"] = frozen.encode_pictures(pixel_values[None]).cpu()
        sample["encoder_hidden_states"] = frozen.encode_captions(input_ids).cpu()
        samples.append(sample)
    return samples


def measure(run):
    """Measure and log the losses of weights and average on the rows kept out of training, if any, once a step."""
    if run.held_out is None or str(run.step) in run.losses:
        return
    release_gradients(run)  # what follows needs memory too
    losses = {"val/loss": held_out_loss(run)}
    if run.average:
        with averaged_weights(run):
            losses["val/loss_ema"] = held_out_loss(run)
    run.losses[str(run.step)] = losses
    if not math.isfinite(sum(losses.values())):
        tqdm.write(f"warning: the weights of step {run.step} have diverged: an earlier checkpoint may be sound")
    run.tracker.attempt(run.accelerator.log, losses, run.step)
    tqdm.write(f"Step {run.step}: {', '.join(f'{name} {value:.4f}' for name, value in losses.items())}")


@torch.no_grad()
def held_out_loss(run):
    """Return the plain loss (no offset, DREAM or min-SNR) on the rows kept out of training."""
    plain = {option: run.loss_options[option] for option in ("alphas_cumprod", "prediction_type")}
    device, losses = run.accelerator.device, []
    for sample in run.held_out:  # one at a time always fits, and always rounds alike
        sample = {name: value.to(device) for name, value in sample.items()}
        with run.accelerator.autocast():
            losses.append(diffusion_loss(run.unet, *run.frozen.encode(sample), sample, **plain))
    return torch.stack(losses).mean().item()


def validate(run, signals, *, missing_only=False):
    """Measure the loss on the rows kept out of training, if any, and draw the prompts, if any.

    Every prompt has a generator of its own, seeded with the run's seed: neither the training stream nor the other
    pictures depend on it. Pictures that a signal cuts short are drawn when the run is resumed.
    """
    run.accelerator.wait_for_everyone()
    folder = Path(run.args.output_dir, sd_config.SAMPLES, f"step-{run.step}")
    if run.accelerator.is_main_process:
        measure(run)
        if run.args.validation_prompts and not (missing_only and folder.exists()):
            try:
                with averaged_weights(run) if run.average else contextlib.nullcontext():
                    draw_prompts(run, folder, signals)
            except (sd_config.ReportedError, OSError) as error:  # a picture is not finite, or the disk is full
                tqdm.write(f"warning: no validation pictures of step {run.step}: {error}")
            if run.plan.encoded:
                run.frozen.move("cpu")  # where `draw_prompts` has found it
    run.accelerator.wait_for_everyone()


@contextlib.contextmanager
def averaged_weights(run):
    """Swap the averaged weights into the UNet. Its own wait on the host."""
    weights = [weight.detach() for weight in run.weights]
    own = [weight.to("cpu", copy=True) for weight in weights]
    run.consistent = False
    torch._foreach_copy_(weights, run.average.settled_weights())
    try:
        yield
    finally:
        torch._foreach_copy_(weights, own)
        run.consistent = True


def draw_prompts(run, folder, signals):
    """Draw each validation prompt, log the pictures, and save them in `folder`; none of these, if a signal comes."""
    prompts, hidden = run.args.validation_prompts, Path(run.args.output_dir, sd_config.OWN, folder.name)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    release_gradients(run)
    run.frozen.move(run.accelerator.device)
    parts = run.frozen.pipeline.components | {"unet": run.unet, "vae": run.frozen.vae, "safety_checker": None}
    parts |= {"text_encoder": run.frozen.text_encoder, "tokenizer": run.stream.tokenizer}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    infer.set_scheduler(pipeline, prediction_type=run.loss_options["prediction_type"])
    settings = {"negative_prompt": run.args.validation_negative_prompt, "seed": run.stream.seed}
    settings |= {"num_inference_steps": sd_config.DENOISING_STEPS, "guidance_scale": run.args.validation_guidance_scale}
    settings["height"] = settings["width"] = run.args.resolution
    checkpoint = Path(run.args.output_dir, f"checkpoint-{run.step}")
    saved = checkpoint.exists() or (run.checkpoints.writing and run.plan.saves_after(run.step))
    images = []
    with run.accelerator.autocast():
        for index, prompt in enumerate(prompts):
            if signals.number:
                return
            flags = {"prompt": prompt, **settings}
            text = {"step": run.step, "command": infer.command({"checkpoint": checkpoint} | flags) if saved else None}
            words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60]
            images.append(infer.draw(pipeline, hidden / f"{index}-{words}.png", flags, text))
    infer.captioned_grid([images], prompts).save(hidden / "grid.png")
    run.tracker.attempt(run.tracker.log_images, images, prompts, run.step)
    sd_config.flush(hidden)
    sd_config.put_in_place(hidden, folder)


# -- What a run leaves behind: checkpoints, and the exported pipeline ----------------------------------------


class Checkpoints:
    """Saves the run: a thread writes a copy of its state while the training goes on, if memory has room for a copy."""

    def __init__(self, plan, accelerator):
        self.plan, self.accelerator = plan, accelerator
        self.last_step = 0  # of the checkpoint saved last, or resumed from
        self.thread, self.writing = ThreadPoolExecutor(max_workers=1), None  # the Future of the one being written

    def save(self, run):
        """Save a checkpoint of this step, unless there is one already."""
        self.finish()
        if self.last_step == run.step:
            return
        check_finite(run)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            room = free_memory()
            copied = self.plan.checkpoint_bytes < 0.7 * room  # pinning rounds up to powers of 2; writing needs room
            parts = snapshot(run, copied), trainer_state(run), run.unet.config
            self.writing = self.thread.submit(self.write, *parts, self.last_step)
            if not copied:
                print(f"note: {sd_config.gigabytes(room)} of memory is free, too little to train while saving")
                self.finish()
        self.last_step = run.step

    def finish(self, wait=True):
        """Raise any error of writing the last checkpoint; `wait` for the writing, or return if it still goes on."""
        if self.writing and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            writing.result()

    def write(self, tensors, state, config, last_step):
        """Write a checkpoint whole or not at all; only then delete the oldest ones above the limit, except the best."""
        final = Path(self.plan.args.output_dir, f"checkpoint-{state.step}")
        hidden = final.parent / sd_config.OWN / final.name
        with sd_config.written_whole(hidden, final, self.plan.checkpoint_bytes) as folder:
            for part in tensors.keys() - {OPTIMIZER}:
                unet_with(tensors[part], config).save_pretrained(folder / part)
            torch.save(tensors[OPTIMIZER], folder / OPTIMIZER)
            state.write(folder)
            sd_config.write_manifest(folder)
            sd_config.put_in_place(folder, final)
        if limit := self.plan.args.checkpoints_total_limit:
            sd_config.prune_checkpoints(final.parent, limit, state.step, last_step)


def check_finite(run):
    """Raise `NotFinite` if a weight, average or moment is not finite: the optimizer's own arithmetic may overflow."""
    moments = [moment for state in run.optimizer.adamw.state.values() for moment in state.values()]
    tensors = [*run.weights, *(run.average.settled_weights() if run.average else ()), *moments]
    for tensor in tensors:
        if getattr(tensor, "scale", tensor).isfinite().logical_not().any():  # torchao's moments are codes times scales
            what = "the weights, their average or AdamW's moments are not finite, and so not saved"
            raise NotFinite(f"step {run.step}: {what}. A smaller --learning_rate or a larger --adam_epsilon may help.")


def free_memory(group=Path("/sys/fs/cgroup")):
    """Return how many bytes of the host's memory this process may still take."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where there is one
        cached = re.search(r"^file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used + int(cached[1]))
    pinned = torch.cuda.host_memory_stats()  # PyTorch keeps the pinned memory of earlier copies for the next ones
    return free + pinned.get("allocated_bytes.current", 0) - pinned.get("active_bytes.current", 0)


def snapshot(run, copied):
    """Return a checkpoint's tensors by file or folder; if `copied`, to the host, where training cannot change them."""
    tensors = {"unet": run.unet.state_dict(), OPTIMIZER: run.optimizer.adamw.state_dict()["state"]}
    if run.average:
        tensors["unet_ema"] = run.average.by_name(run.unet)
    if copied:
        tensors = copied_to_host(tensors)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
    return tensors


def copied_to_host(value):
    """Return a host copy of a tensor, or of a dictionary of them; synchronize before reading it."""
    if isinstance(value, dict):
        return {key: copied_to_host(entry) for key, entry in value.items()}
    if hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit moments: codes, scales, and a table
        names, context = value.__tensor_flatten__()
        parts = {name: copied_to_host(getattr(value, name)) for name in names}
        return value.__tensor_unflatten__(parts, context, value.size(), value.stride())
    return value.detach().to("cpu", copy=True, non_blocking=value.is_cuda)  # only CUDA's can be waited for


def trainer_state(run):
    base, scaler = run.args.pretrained_model_name_or_path, run.accelerator.scaler
    return sd_config.TrainerState(
        step=run.step,
        seed=run.stream.seed,
        effective_batch=run.plan.effective_batch,
        data=run.stream.rows.fingerprint,
        max_steps=run.plan.max_steps,
        ema_step=run.average.updates if run.average else None,
        scaler=scaler.state_dict() if scaler else None,
        loss=run.progress.loss,
        prediction_type=run.loss_options["prediction_type"],
        micro_batch_size=run.micro_batch_size,
        encoding=run.stream.encoded.name if run.stream.encoded else "",
        base_model=os.path.abspath(base) if os.path.isdir(base) else base,
        args=plain_args(run.args, run.accelerator),
        losses=dict(run.losses),  # a copy: it is written while the training goes on
    )


def plain_args(args, accelerator):
    """Return the arguments as values that JSON can hold, with the precision that accelerate settled on."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return plain | {"mixed_precision": accelerator.mixed_precision}


def export(run):
    """Write the output folder's pipeline: the base model's parts and the UNet as trained.

    With EMA, `unet` holds the average and, as the variant `non_ema`, the raw weights.
    """
    accelerator, output, pipeline = run.accelerator, Path(run.args.output_dir), run.frozen.pipeline
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        hidden, best = output / sd_config.OWN / "export", describe_best(run)
        with sd_config.written_whole(hidden, f"the pipeline in {output}", run.plan.export_bytes) as staging:
            infer.set_scheduler(pipeline, prediction_type=run.loss_options["prediction_type"])
            average = run.average and unet_with(run.average.by_name(run.unet), run.unet.config)
            pipeline.unet = average or run.unet
            pipeline.save_pretrained(staging)
            pipeline.tokenizer.backend_tokenizer.model.save(str(staging / "tokenizer"))  # as transformers 4 reads it
            for file in staging.glob("*/config.json"):  # by which transformers chooses, while diffusers loads float32
                file.write_text(re.sub(r'"dtype": "\w+"', '"dtype": "float32"', file.read_text()))
            if run.average:
                run.unet.save_pretrained(staging / "unet", variant="non_ema")
            (staging / "README.md").write_text(model_card(run, best), encoding="utf-8")
            sd_config.write_manifest(staging, sd_config.read_json(output / sd_config.OWN / sd_config.MANIFEST))
        sd_config.put_export_in_place(staging, output)
        print(f"The trained pipeline is in {output}. Draw with it: python infer.py --model_path {output}")
        if best:
            print(best)
            run.tracker.attempt(run.tracker.summarise, {"best": best})
    accelerator.wait_for_everyone()


def describe_best(run):
    """Return a text about the checkpoint with the lowest held-out loss; an empty one without rows kept out."""
    folder, name, loss = sd_config.best_checkpoint(sd_config.checkpoints(run.args.output_dir))
    if run.held_out is None or folder is None:
        return ""
    step, last = sd_config.step_of(folder), run.losses[str(run.step)]["val/loss_ema" if run.average else "val/loss"]
    if last <= loss:  # also if a signal saved it, so that its checkpoint does not say so
        return f"The last checkpoint is the best: {name} {last:.4f}."
    best = f"{name} {loss:.4f} at step {step}, {1 - loss / last:.1%} below the last step's {last:.4f}"
    settings = {"checkpoint": folder}
    if prompts := run.args.validation_prompts:
        settings |= {"prompt": prompts[0], "guidance_scale": run.args.validation_guidance_scale}
    return f"The best checkpoint: {best}. Draw with it: {infer.command(settings)}"


def card_head(args):
    """Return the model card's metadata, with base model, data set and licence where they are known, and its title."""
    base, data, known = args.pretrained_model_name_or_path, args.dataset_name, ""
    if not sd_config.is_local(base):
        known = f"base_model: {base}\n" + "license: creativeml-openrail-m\n" * (base == sd_config.MODEL)
    with contextlib.suppress(OSError):  # the base model is not a folder, or has no card
        card = Path(base, "README.md").read_text(encoding="utf-8", errors="replace")
        if found := re.match(r"---\n(?:(?!---).*\n)*?(license: *[\"']?[\w.-]+[\"']?)", card):
            known = f"{found[1]}\n"
    if data and not sd_config.is_local(data):
        known += f"datasets: [{data}]\n"
    known += "tags: [stable-diffusion, text-to-image, full-fine-tune]\n"
    title = f"# {escaped(base)}, fine-tuned on {escaped(data or args.train_data_dir)}"
    return f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n{known}---\n\n{title}"


def escaped(value):
    """Return a value as Markdown that shows it as it is, in a table too."""
    return "<br>".join(re.sub(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", str(value)).splitlines())


def model_card(run, best):
    args, plan, grid = run.args, run.plan, f"{sd_config.SAMPLES}/step-{run.step}/grid.png"
    bad = [f"- row {number}: {fault}" for number, fault in run.stream.rows.bad.items()]
    arguments = [f"| {name} | {escaped(value)} |" for name, value in plain_args(args, run.accelerator).items()]
    not_model = [shlex.quote(f"{name}*") for name in ("checkpoint-", "encoded-", ".", f"{args.logging_dir}/")]
    upload = "upload OWNER/NAME . --exclude"
    paragraphs = [
        card_head(args),
        f"All weights of the UNet were trained for {run.step} steps of {plan.effective_batch} samples "
        f"({plan.rows} rows, {run.step / plan.steps_per_epoch:.1f} epochs, seed {run.stream.seed}), "
        f"in micro-batches of {run.micro_batch_size}. The loss of the last step was {run.progress.loss:.4f}.",
        f"![samples]({grid})" if Path(args.output_dir, grid).exists() else "",
        '`unet` holds the moving average; the raw weights load with `variant="non_ema"`.' if run.average else "",
        "\n".join([f"{len(bad)} rows were left out, because their pictures cannot be read:\n", *bad]) if bad else "",
        escaped(best),
        "To publish the model from this folder, on Hugging Face or on ModelScope, without checkpoints and logs:",
        f"    hf {upload} {' --exclude '.join(not_model)}\n    modelscope {upload} {' '.join(not_model)}",
        "\n".join(["| argument | value |", "|---|---|", *arguments]),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


if __name__ == "__main__":
    main(ARGS)
