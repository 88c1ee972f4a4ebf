"""The recipes on a CUDA device that computes nothing: do they run, in how much memory, and where do they wait for it?

The device reads as zeros. So that a run does not end for that reason, fp16's scale is taken to be 2^16.
"""

import collections
import concurrent.futures
import contextlib
import gc
import io
import multiprocessing
import os
import re
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import cuda_stand_in
import faults
import infer
import sd_config
from conftest import command_line, steps, trainer, weights

REASON = cuda_stand_in.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FAITHFUL = "--use_ema --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4"
AT_ONCE = f"{FAITHFUL} --train_batch_size=4 --gradient_accumulation_steps=1 --mixed_precision=bf16 --allow_tf32"
CHECKPOINTING = "--gradient_checkpointing"
# Flags; how often a step waits for the device (an average on the host does, in its thread); peak memory of a step, of
# the tiny model, in units of 10^6 bytes.
RECIPES = {
    "faithful": (f"{FAITHFUL} {CHECKPOINTING}", 0, 82.7),
    "faithful, one by one": (f"{FAITHFUL} {CHECKPOINTING} --micro_batch_size=1", 0, 60.9),
    "faithful, EMA on the host": (f"{FAITHFUL} {CHECKPOINTING} --offload_ema", 1, 76.0),
    "fast": (AT_ONCE, 0, 122.9),
    "shapes": (f"{AT_ONCE} --aspect_buckets", 0, 122.9),
    "fast, checkpointing": (f"{AT_ONCE} {CHECKPOINTING}", 0, 71.2),
    "fp16": (f"{AT_ONCE} --mixed_precision=fp16", 1, 122.9),
    "small": (f"{FAITHFUL} {CHECKPOINTING} --use_8bit_adam --mixed_precision=bf16", 1, 62.3),
    "smallest": (f"{FAITHFUL} --low_memory", 2, 52.0),
    "graphs": (f"{FAITHFUL} {CHECKPOINTING} --cuda_graphs --dream_training", 0, 106.5),
    "graphs, shapes": (f"{AT_ONCE} --aspect_buckets --cuda_graphs", 0, 111.5),
    "graphs, fp16": (f"{AT_ONCE} {CHECKPOINTING} --mixed_precision=fp16 --cuda_graphs", 1, 99.3),
    "graphs, smallest": (f"{FAITHFUL} --low_memory --cuda_graphs", 2, 77.0),
}
Seen = collections.namedtuple("Seen", "code printed counts peaks waits streams early")


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A function that calls a function of this file in a process whose PyTorch sees the device."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda_stand_in.build(tmp_path_factory.mktemp("device")).items():
            patch.setenv(name, value)
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
    pool.shutdown()


def train(assets, output, *flags, gibibytes=8.0):
    """Train on a device of this size. Return the exit code, what was printed and counted, and what each step took.

    The peaks (in 10^6 bytes) and waits of a step are those since the end of the one before; `early` are the tensors of
    a checkpoint that were still on their way to the host when they were handed to be written.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()  # of the run before
    torch.cuda.empty_cache()
    cuda_stand_in.reset(int(gibibytes * 2**30))
    code, printed, take = 0, io.StringIO(), trainer.snapshot
    peaks, waits, streams, early = [], [], [], []

    def after_step(run):
        run.average.settled_weights()  # so that its thread's wait belongs to this step
        peaks.append(round(torch.cuda.max_memory_allocated() / 1e6, 1))
        waits.append(sum("synchronizing CUDA" in str(warning.message) for warning in caught))
        streams.append(cuda_stand_in.counts().get("waits of a stream", 0) - sum(streams))
        caught.clear()
        torch.cuda.reset_peak_memory_stats()

    def snapshot(run, copied):
        tensors = take(run, copied)
        early.extend(name for name, tensor in tensors["unet"].items() if tensor.isnan().any())
        return tensors

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: scaler._scale.item() + 2**16)
        patch.setattr(trainer, "snapshot", snapshot)
        faults.plant(patch.setattr, after_step=after_step)
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.main(sd_config.parse_args(command_line(assets, output, *flags)))
        except SystemExit as end:
            code = end.code
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Seen(code, printed.getvalue(), cuda_stand_in.counts(), peaks, waits, streams, early)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_saves_draws_exports_and_goes_on(device, assets, tmp_path, recipe):
    """Its steps take the memory that they took when this was written, and wait for the device only where they must."""
    flags, waits, peak = RECIPES[recipe]
    flags = [*flags.split(), "--checkpointing_steps=4", "--validation_samples=2", "--validation_prompts=a cat"]
    flags += ["--resolution=256"]  # so that activations count
    seen = device(train, assets, tmp_path / "run", *flags, "--max_train_steps=4")
    assert seen.code == 0, seen.printed
    assert seen.waits[1:3] == [waits, waits]  # the first follows the encoding, and the last a read of the metrics
    assert ("captured graphs" in seen.counts) == ("--cuda_graphs" in flags)
    assert not {"wait in a graph", "launches beside a graph"} & seen.counts.keys()
    on_host = "--offload_ema" in flags or "--low_memory" in flags
    assert seen.streams[1:3] == [2 * on_host] * 2  # the copy waits for the step before, and the next step for the copy
    # The second step captures a graph; while one is repeated, PyTorch does not count the memory in which it works.
    assert seen.peaks[1 if "--cuda_graphs" in flags else 2] == pytest.approx(peak, rel=0.04)
    assert re.search(r"Peak GPU memory: [\d.]+ GiB allocated, [\d.]+ GiB reserved", seen.printed)
    more = device(train, assets, tmp_path / "run", *flags, "--max_train_steps=6", "--resume_from_checkpoint=latest")
    assert more.code == 0, more.printed
    assert (steps(tmp_path / "run"), len(more.peaks)) == ([4, 6], 2)
    assert (tmp_path / "run/samples/step-6/grid.png").exists()
    # What the host reads or changes before it has waited for a copy would be NaN, or counted.
    assert (seen.early, more.early) == ([], [])
    assert "changed too early" not in seen.counts | more.counts
    for folder in ("checkpoint-4/unet", "checkpoint-4/unet_ema", "unet"):
        assert not any(tensor.isnan().any() for tensor in weights(tmp_path / "run" / folder).values())


def draw(*flags):
    """Draw a picture on the device; return what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        infer.main(infer.parse_args(flags))
    return printed.getvalue()


def test_pictures_are_drawn_in_fp16(device, assets, tmp_path):
    flags = f"--model_path={assets[0]} --output={tmp_path}/cat.png --num_inference_steps=2 --prompt=cat"
    assert "(fp16 on cuda" in device(draw, *flags.split())
    assert (tmp_path / "cat.png").exists()


def test_memory_that_runs_out_halves_the_micro_batches(device, assets, tmp_path):
    """By itself, and a run that goes on keeps their size; where a size was asked for, it is an error."""
    flags = f"{FAITHFUL} --resolution=256 --max_train_steps=2 --checkpointing_steps=1".split()
    peaks = {size: device(train, assets, tmp_path / f"{size}", *flags, f"--micro_batch_size={size}") for size in (1, 4)}
    between = (peaks[1].peaks[1] + peaks[4].peaks[1]) / 2 * 1e6 / 2**30
    seen = device(train, assets, tmp_path / "run", *flags, gibibytes=between)
    assert seen.code == 0, seen.printed
    assert "micro-batches    4, halved whenever memory runs out" in seen.printed
    assert "note: out of memory; micro-batches of 2 instead of 4 from here on" in seen.printed
    found = sd_config.read_state(tmp_path / "run/checkpoint-2").micro_batch_size
    assert found < 4
    more = device(train, assets, tmp_path / "run", *flags, "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert sd_config.read_state(tmp_path / "run/checkpoint-3").micro_batch_size == found
    assert "out of memory" not in more.printed
    seen = device(train, assets, tmp_path / "no", *flags, "--micro_batch_size=4", gibibytes=between)
    assert seen.code == 1
    assert "OutOfMemoryError" in seen.printed
