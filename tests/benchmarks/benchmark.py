"""Measure how fast, in how much memory and how exactly the trainer trains, beside other scripts for the same work.

    python tests/benchmarks/benchmark.py                                          # ours: speed and memory
    python tests/benchmarks/benchmark.py --script_a tutorial/train_sd1-5_naruto.py --script_b train_text_to_image.py
    python tests/benchmarks/benchmark.py --modes M C E --no_speed --match 50      # is it the same training?
    python tests/benchmarks/benchmark.py --modes C --no_speed --profile 10        # where does the time of a step go?
    python tests/benchmarks/benchmark.py --modes C --no_speed --stall 400         # what does a checkpoint cost?

Every mode of `MODES` runs in a process of its own, under one instrument (`instrument.py`): a hook on the optimizer's
step, so that no script needs a change. (The tutorial's does, for another reason: its `SwanLabTracker(...)` now wants
`project=` before the name.) After a warm-up come windows of wall clock, with one wait for the device at each end; their
median counts. Model and pictures are built here: random weights in Stable Diffusion 1.5's configuration, and
photograph-like JPEGs; on a CPU small ones of both, of which only ratios mean anything. To build the model takes the
package open_clip_torch (CLIP's vocabulary), --match takes tensorboard, and mode E torchao.

`python tests/cuda_stand_in.py tests/benchmarks/benchmark.py` runs it all on a device that computes nothing: it tells
the memory, and how many pictures per second the host could feed to a GPU that takes no time.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
TESTS, OURS = HERE.parent, HERE.parent.parent / "train_sd1-5_naruto.py"
TFLOP = 2.407  # of model work in a 512 x 512 picture trained on: the UNet forward and backward, nothing recomputed
PEAKS = (790, 989)  # TFLOP/s in bf16 that an H200 was measured to reach, and that its data sheet gives

# What all modes share: the tutorial's flags but those for batch and memory, and neither a save nor an end before the
# measuring is over. Of a flag given twice the last one counts.
COMMON = """
    --use_ema --center_crop --random_flip --learning_rate 1e-5 --max_grad_norm 1 --seed 42 --lr_scheduler constant
    --lr_warmup_steps 0 --max_train_steps 15000 --checkpointing_steps 1000000
"""
ONE_BY_ONE, AT_ONCE = "--train_batch_size 1 --gradient_accumulation_steps {}", "--train_batch_size {}"
TUTORIAL = f"{ONE_BY_ONE} --gradient_checkpointing"
FAST = f"{AT_ONCE} --cache_latents on --micro_batch_size auto --allow_tf32"
EXAMPLE = f"{AT_ONCE} --allow_tf32 --foreach_ema --image_interpolation_mode bilinear --dataloader_num_workers"
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "inductor"}


class Mode(NamedTuple):
    """A row of the table. `gpu` and `cpu` are its flags besides `COMMON`, {} in them the pictures of a step."""

    name: str
    description: str
    script: str  # "a", "b" or "ours"
    batch: int  # pictures per step
    gpu: str
    cpu: str | None = None  # where they differ: bf16 is slow on a CPU, and compiling takes minutes for little
    env: dict = {}  # noqa: RUF012 (never changed)


MODES = [
    Mode("A", "the tutorial's own script and flags", "a", 4, TUTORIAL),
    *(
        Mode(f"B{batch}{mark}", f"diffusers' example at its best flags{note}", "b", batch, *flags, env)
        for batch in (4, 32, 64)
        for mark, note, env in (("", "", {}), ("i", ", compiled by accelerate", COMPILED))
        for flags in [(f"{EXAMPLE} 8 --mixed_precision bf16", f"{EXAMPLE} 1")]
    ),
    Mode("T", "ours, the tutorial's flags", "ours", 4, TUTORIAL),
    Mode("M", "ours, the same one by one", "ours", 4, f"{TUTORIAL} --micro_batch_size 1"),
    Mode("O", "ours, the tutorial's, EMA on the host", "ours", 4, f"{TUTORIAL} --offload_ema"),
    Mode("O1", "ours, the same one by one", "ours", 4, f"{TUTORIAL} --offload_ema --micro_batch_size 1"),
    Mode("K", "ours, bf16 with checkpointing", "ours", 4, f"{TUTORIAL} --mixed_precision bf16"),
    Mode("K1", "ours, the same one by one", "ours", 4, f"{TUTORIAL} --mixed_precision bf16 --micro_batch_size 1"),
    Mode("S", "ours, 8-bit moments", "ours", 4, f"{TUTORIAL} --use_8bit_adam --mixed_precision bf16"),
    Mode(
        "S1", "ours, one by one", "ours", 4, f"{TUTORIAL} --use_8bit_adam --mixed_precision bf16 --micro_batch_size 1"
    ),
    *(
        Mode(name, "ours, fast but not compiled", "ours", batch, f"{FAST} --mixed_precision bf16", FAST)
        for name, batch in (("F", 4), ("F16", 16))
    ),
    *(
        Mode(name, "ours, the fast recipe", "ours", batch, f"{FAST} --mixed_precision bf16 --torch_compile", FAST)
        for name, batch in (("C", 4), ("D32", 32), ("D64", 64))
    ),
    Mode("E", "ours, low memory", "ours", 4, f"{ONE_BY_ONE} --low_memory"),
    Mode("E1", "ours, low memory, one by one", "ours", 4, f"{ONE_BY_ONE} --low_memory --micro_batch_size 1"),
    Mode("P", "ours, plain bf16", "ours", 4, f"{AT_ONCE} --mixed_precision bf16 --cache_latents off"),
]

# For a CPU: SD1.5's layers, all of them, but a tenth as wide, and three eighths in the VAE.
CPU_UNET = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 12}
CPU_VAE = {"block_out_channels": (48, 96, 192, 192), "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 96}


def main():
    """Run what the command line asks for, print tables, write the JSON; exit with 1 if something failed."""
    options = parse_args()
    chosen = {name: value for name, value in vars(options).items() if isinstance(value, int | float)}
    results = {"machine": describe_machine(), "options": chosen, "failed": []}
    with contextlib.ExitStack() as stack:
        work = options.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
        bench = Bench(options, Path(work).resolve())
        ours = [mode for mode in options.modes if mode.script == "ours"]
        plan = {
            "speed": [] if options.no_speed else options.modes,
            "match": ours if options.match else [],
            "profile": options.modes if options.profile else [],
            "stall": options.modes if options.stall else [],
        }
        for kind, modes in plan.items():
            for mode in modes:
                attempt(results, kind, mode, getattr(bench, kind))
                if options.out:  # each time: a later one may not come to its end
                    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for folder in bench.plain.values():
            shutil.rmtree(folder)
    print_results(results)
    results["failed"] += [f"match {row['mode']}: too far" for row in results.get("match", []) if not row["matches"]]
    if results["failed"]:
        sys.exit(f"failed: {', '.join(each.splitlines()[0] for each in results['failed'])}")


def parse_args():
    """Return the options; what depends on the device has its default."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join(mode.name for mode in MODES)
    add("--modes", nargs="*", help=f"of {names}; B and D: all of these. Default: all that have a script, but P")
    add("--script_a", type=Path, help="the tutorial's train_sd1-5_naruto.py, with its sd_config.py beside it")
    add("--script_b", type=Path, help="diffusers' examples/text_to_image/train_text_to_image.py")
    add("--model", type=Path, help="the base model. Default: one is built, with random weights")
    add("--full", action=argparse.BooleanOptionalAction, default=gpu, help="build it in SD1.5's true configuration")
    add("--resolution", type=int, default=512 if gpu else 96, help="side of the pictures trained on")
    add("--pictures", type=int, default=1221 if gpu else 128, help="how many JPEGs to draw")
    add("--side", type=int, default=1080 if gpu else 200, help="their side in pixels")
    add("--ratios", type=float, nargs="*", default=[1], help="of width to height of the pictures, in turn")
    add("--seconds_warmup", type=float, default=60, help="from the end of the first step on")
    add("--window", type=float, default=20, help="seconds that a window has at least")
    add("--windows", type=int, default=3, help="how many")
    add("--limit", type=float, default=900, help="seconds after which a run has failed")
    add("--no_speed", action="store_true", help="measure only what the next three options ask for")
    add("--match", type=int, default=0, help="so many steps of our modes and of the plain float32 path: the same?")
    add("--profile", type=int, default=0, help="so many steps are profiled: where does their time go?")
    add("--stall", type=int, default=0, help="save every so many steps: how much training time does it take?")
    add("--checkpoints", type=int, default=3, help="how many saves --stall measures")
    add("--extra", default="", help="more flags for all our modes, to try something: --extra='--torch_compile'")
    add("--work", type=Path, help="folder for the model, the pictures and the runs; keeps the first two")
    add("--out", type=Path, help="JSON file for everything measured")
    options = parser.parse_args()
    options.scripts = {"a": options.script_a, "b": options.script_b, "ours": OURS}
    if options.modes is None:
        options.modes = [mode.name for mode in MODES if mode.name != "P" and options.scripts[mode.script]]
    options.modes = [mode for name in options.modes for mode in pick(name) or parser.error(f"no mode {name}")]
    for mode in options.modes:
        if not options.scripts[mode.script]:
            parser.error(f"mode {mode.name} needs --script_{mode.script}")
    return options


def pick(name):
    """Return the modes that a name stands for."""
    return [mode for mode in MODES if mode.name == name or (name in ("B", "D") and mode.name[0] == name)]


def attempt(results, kind, mode, measure):
    """Add what `measure` finds out about a mode to the results; if it fails, say so and go on."""
    print(f"{kind}: {mode.name}, {mode.description} ...", flush=True)
    try:
        results.setdefault(kind, []).append({"mode": mode.name, "description": mode.description} | measure(mode))
    except (Failed, OSError) as error:
        print(f"failed: {error}", flush=True)
        results["failed"].append(f"{kind} {mode.name}: {error}")


class Failed(Exception):
    """A run did not give what was asked of it; the message has its exit code and its last lines."""


class Bench:
    """Runs modes, all with the same model and the same pictures."""

    def __init__(self, options, work):
        self.options, self.work, self.gpu, self.plain = options, work, torch.cuda.is_available(), {}
        kind = "full" if options.full else "small"
        name = "-".join(map(str, ("pictures", options.pictures, options.side, *options.ratios)))
        self.model = options.model or once(work / f"model-{kind}", build_model, options.full)
        self.pictures = once(work / name, draw_pictures, options.pictures, options.side, options.ratios)
        # The tutorial's script validates after its first epoch, whatever it is told: it gets an epoch that outlasts the
        # windows, of the same pictures.
        self.repeated = once(work / f"{name}-repeated", repeat_pictures, self.pictures, 5000)

    def speed(self, mode):
        """Return the figures of a mode: see `summarise`."""
        options = self.options
        settings = {"warmup": options.seconds_warmup, "window": options.window, "windows": options.windows}
        result = self.measure(mode, {"kind": "speed"} | settings)
        countable = self.gpu and options.full and options.resolution == 512
        return summarise(result["report"], mode.batch, countable) | result

    def profile(self, mode):
        """Return where the time of a step goes: milliseconds by part of the step, and by kind of work."""
        settings = {"warmup": self.options.seconds_warmup, "steps": self.options.profile}
        return self.measure(mode, {"kind": "profile"} | settings)

    def stall(self, mode):
        """Return how many seconds each checkpoint takes from the training, and how many of them the loop stands still.

        The spans between edges have as many steps each, and every second one begins with a save.
        """
        every = max(4, self.options.stall // 2 * 2)
        settings = {"kind": "stall", "every": every, "checkpoints": self.options.checkpoints}
        result = self.measure(mode, settings, f"--checkpointing_steps {every} --checkpoints_total_limit 1")
        edges, hosts = (result["report"][key][1:] for key in ("edges", "host_milliseconds"))
        spans = [end[1] - start[1] for start, end in itertools.pairwise(edges)]
        usual, issuing = spans[0], hosts[0]  # later ones may have a save before them that is still being written
        lost, stopped = [span - usual for span in spans[1::2]], [(host - issuing) / 1000 for host in hosts[1::2]]
        return {"lost_seconds": lost, "stopped_seconds": stopped, "usual_seconds": usual} | result

    def match(self, mode):
        """Return how far a mode's training is from the plain path's: float32, eager, nothing cached, the same draws.

        That is, for the weights and for their average, the L2 distance after the last step, over the way that the plain
        path has come from the base model; and the largest difference between the losses of a step. See `tolerances`.
        """
        if mode.batch not in self.plain:
            size = min(mode.batch, 4)
            flags = f"--train_batch_size {size} --gradient_accumulation_steps {mode.batch // size} --cache_latents off"
            plain = Mode(f"plain-{mode.batch}", "", "ours", mode.batch, flags, env={"NVIDIA_TF32_OVERRIDE": "0"})
            self.plain[mode.batch] = self.train(plain)
        trained, plain = self.train(mode), self.plain[mode.batch]
        losses = read_losses(trained), read_losses(plain)
        result = {"loss": max(abs(one - other) for one, other in zip(*losses, strict=True)), "losses": losses}
        for part in ("unet", "unet_ema"):
            result[part] = distance(trained / part, plain / part, self.model / "unet")
        shutil.rmtree(trained)
        far, off = tolerances(self.flags(mode), self.gpu)
        result["tolerances"] = [far, off]
        result["matches"] = max(result["unet"], result["unet_ema"]) <= far and result["loss"] <= off
        return result

    def train(self, mode):
        """Train a mode without measuring it, and return a folder with its last checkpoint and its losses."""
        steps = self.options.match
        more = f"--max_train_steps {steps} --checkpointing_steps {steps} --report_to tensorboard"
        folder, kept = self.run(mode, [], more), self.work / f"trained-{mode.name}"
        shutil.rmtree(kept, ignore_errors=True)
        (folder / f"output/checkpoint-{steps}").rename(kept)
        (folder / "output/logs").rename(kept / "logs")
        (kept / "optimizer.pt").unlink()  # half of it, and of no use here
        shutil.rmtree(folder)
        return kept

    def measure(self, mode, settings, more=""):
        """Run a mode under the instrument, and return its report and, for people, its command line."""
        report = self.work / "report.json"
        report.unlink(missing_ok=True)
        settings |= {"report": str(report), "started": time.time()}
        folder = self.run(mode, [str(HERE / "instrument.py"), json.dumps(settings)], more)
        shutil.rmtree(folder)
        shown = [*(f"{name}={value}" for name, value in mode.env.items()), "python", *self.command(mode, more)]
        command = shlex.join(Path(part).name if part.startswith("/") else part for part in shown)
        return {"batch": mode.batch, "command": command, "report": json.loads(report.read_text(encoding="utf-8"))}

    def run(self, mode, instrument, more):
        """Run a mode to its end, and return the folder that it ran in; raises `Failed` unless it exits with 0."""
        folder = self.work / f"run-{mode.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # Nothing is found in a cache that another run has left.
        env = {"HF_HOME": str(folder / "hf"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        env = os.environ | env | {"HF_HUB_OFFLINE": "1", "SWANLAB_MODE": "offline"} | mode.env
        command = [sys.executable, *instrument, *self.command(mode, more)]
        with open(folder / "log.txt", "w+", encoding="utf-8", errors="replace") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **streams)
            try:
                code = process.wait(self.options.limit)
            except subprocess.TimeoutExpired:
                code = f"none after {self.options.limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):  # a measured script leaves its loader's workers behind
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            if code != 0:
                raise Failed(f"exit code {code}; it ended with\n" + "\n".join(log.read().splitlines()[-15:]))
        return folder

    def command(self, mode, more):
        """Return the script of a mode and its flags."""
        options, flags = self.options, self.flags(mode)
        if mode.script == "ours":
            flags = f"--cache_dir {self.work / 'cache'} --validation_prompts --report_to none {flags} {options.extra}"
        if mode.script == "b":  # whole batches only: the rest would be compiled for itself
            flags = f"--max_train_samples {options.pictures // 64 * 64 or options.pictures} {flags}"
        return [
            str(options.scripts[mode.script].resolve()),
            *("--pretrained_model_name_or_path", str(self.model.resolve())),
            *("--dataset_name", str(self.repeated if mode.script == "a" else self.pictures)),
            *("--output_dir", str(self.work / f"run-{mode.name}/output")),
            *f"--resolution {options.resolution} {COMMON} {flags} {more}".split(),
        ]

    def flags(self, mode):
        """Return the flags of a mode on this device, besides those that all share."""
        return (mode.gpu if self.gpu else mode.cpu or mode.gpu).format(mode.batch)


# ------------------------------------------------------------------------------------------------------------
# The model and the pictures
# ------------------------------------------------------------------------------------------------------------


def once(folder, build, *args):
    """Have a folder built, unless it is there, and return it; one that was not finished is not there."""
    if not folder.exists():
        print(f"building {folder.name} ...", flush=True)
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        build(draft, *args)
        draft.rename(folder)
    return folder


def build_model(folder, full):
    """Write a model with random weights (zeros would run faster): SD1.5's configuration, or a small one."""
    sys.path.append(str(TESTS))
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: PLC0415 (slow)

    import tiny_sd15  # noqa: PLC0415 (found only now)

    tiny_sd15.build_model(folder, full=full)
    if not full:
        torch.manual_seed(0)
        for kind, name, changes in ((UNet2DConditionModel, "unet", CPU_UNET), (AutoencoderKL, "vae", CPU_VAE)):
            kind.from_config(kind.load_config(folder / name) | changes).save_pretrained(folder / name)


def draw_pictures(folder, count, side, ratios):
    """Draw captioned JPEGs."""
    names = [f"{number:05}.jpg" for number in range(count)]
    sizes = [(round(side * ratio**0.5), round(side / ratio**0.5)) for ratio in ratios]
    with multiprocessing.Pool() as pool:
        pool.starmap(draw_picture, [(folder / name, i, sizes[i % len(sizes)]) for i, name in enumerate(names)])
    write_captions(folder, names)


def draw_picture(path, number, size):
    """Draw smooth colours, shapes of all sizes and a little grain, as photographs have them."""
    draws, picture = np.random.default_rng(number), 0
    for cells, strength in ((3, 0.5), (12, 0.3), (60, 0.15), (min(size), 0.05)):
        noise = Image.fromarray(draws.integers(256, size=(cells, cells, 3), dtype=np.uint8))
        picture += strength * np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32)
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=95)


def repeat_pictures(folder, pictures, rows):
    """Make a data set of so many rows from the files of another one."""
    files = sorted(pictures.glob("*.jpg"))
    for file in files:
        os.link(file, folder / file.name)
    write_captions(folder, [file.name for file in itertools.islice(itertools.cycle(files), rows)])


def write_captions(folder, names):
    """Write a sentence for each row, no two alike."""
    who = ["ninja", "fox", "monk", "child", "king"]
    where = ["forest", "storm", "street", "desert", "sky", "sea", "dark"]
    sentences = [f"a {who[i % 5]} with {i} stars in the {where[i % 7]}" for i in range(len(names))]
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, sentences, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def summarise(report, batch, countable):
    """Return a mode's figures: pictures per second, seconds, milliseconds, GiB.

    Args:
        report (dict): of the instrument's `Speed`.
        batch (int): pictures per step.
        countable (bool): whether this is the work that `TFLOP` was counted for, on a GPU.
    """
    edges = report["edges"][2:]
    rates = [batch * (end[0] - start[0]) / (end[1] - start[1]) for start, end in itertools.pairwise(edges)]
    rate, steps = statistics.median(rates), edges[-1][0] - edges[0][0]
    return {
        "images_per_second": rate,
        "windows": rates,
        "steps_per_second": rate / batch,
        "mfu": [rate * TFLOP / peak for peak in PEAKS] if countable else [],
        # Of the whole run, and since the warm-up.
        "gpu_allocated_gib": [size / 2**30 for size in report["gpu_allocated_bytes"]],
        "gpu_reserved_gib": [size / 2**30 for size in report["gpu_reserved_bytes"]],
        "rss_gib": report["rss_bytes"] / 2**30,
        "host_milliseconds": statistics.median(report["host_milliseconds"][2:]),
        "launches_per_step": report["launches"] / steps,  # counted on the stand-in for CUDA only
        "processor_milliseconds": 1000 * (edges[-1][2] - edges[0][2]) / steps,
        "seconds_to_first_step": report["seconds_to_first_step"],
        "compile_seconds": max(0, report["seconds_of_first_steps"] - report["first_steps"] * batch / rate),
        "steps": report["steps"],
    }


def tolerances(flags, gpu):
    """Return how far weights and averages may be from the plain path's after 50 steps, and the losses of a step."""
    if "--low_memory" in flags:
        return 3.0, 5e-3  # rounding at random moves weights further than training does, though up as much as down
    if "bf16" in flags:
        return 0.1, 5e-3
    return (2e-2, 1e-3) if gpu else (1e-4, 1e-5)  # on a GPU the convolutions use TF32


def read_losses(folder):
    """Return the loss of every step from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 (only here)

    for file in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            return [event.value for event in events.Scalars("train/loss")]
    raise Failed("no losses were logged")


def distance(trained, plain, base):
    """Return the L2 distance of two folders' weights, over that of the second from the base model."""
    gap = way = 0
    with contextlib.ExitStack() as stack:
        files = (next(folder.glob("*.safetensors")) for folder in (trained, plain, base))
        one, other, start = (stack.enter_context(safe_open(file, "pt")) for file in files)
        for name in start.keys():  # noqa: SIM118 (no dictionary)
            target = other.get_tensor(name).double()
            gap += (one.get_tensor(name).double() - target).square().sum().item()
            way += (target - start.get_tensor(name).double()).square().sum().item()
    return (gap / way) ** 0.5


def print_results(results):
    """Print a table for each thing measured."""
    if rows := results.get("speed"):
        print_speed(rows)
    if rows := results.get("match"):
        print("\nDistance from the plain float32 path, over the way that it has come; largest difference of a loss:")
        keys = ("unet", "unet_ema", "loss")
        table = [[row["mode"], *(f"{row[key]:.1e}" for key in keys), str(row["matches"])] for row in rows]
        print_table(["mode", "weights", "EMA", "loss", "matches"], table)
    for row in results.get("profile", []):
        report = row["report"]
        print(f"\n{row['mode']}: a step took {report['milliseconds']:.2f} ms while profiled.")
        for title, table in (("part, on the host", report["parts"]), ("kind of work", report["groups"])):
            sorted_rows = sorted(table.items(), key=lambda pair: -pair[1])
            cells = [[name, f"{ms:.2f}", f"{ms / report['milliseconds']:.1%}"] for name, ms in sorted_rows]
            print_table([title, "ms", "share"], cells)
    if rows := results.get("stall"):
        print(
            "\nSeconds that each checkpoint takes from the training, and of them those in which the loop stands still:"
        )
        figures = ("lost_seconds", "stopped_seconds", "usual_seconds")
        table = [
            [row["mode"], *(" ".join(f"{s:.2f}" for s in np.atleast_1d(row[key])) for key in figures)] for row in rows
        ]
        print_table(["mode", "taken", "still", "as many steps without"], table)


def print_speed(rows):
    """Print the table of all modes, with ratios to the first one and to the best example script of the same batch."""
    first, table, stand_in = rows[0], [], "Stand-in" in rows[0]["report"]["device"]
    for row in rows:
        rate = row["images_per_second"]
        rivals = [r["images_per_second"] for r in rows if r["mode"][0] == "B" and r["batch"] == row["batch"]]
        table.append({
            "mode": row["mode"],
            "images/s": f"{rate:.2f}",
            "windows": " ".join(f"{window:.2f}" for window in row["windows"]),
            f"x {first['mode']}": f"{rate / first['images_per_second']:.2f}",
            "x B": f"{rate / max(rivals):.2f}" if rivals else "",
            "steps/s": f"{row['steps_per_second']:.2f}",
            "MFU": " ".join(f"{share:.1%}" for share in row["mfu"]),
            "GPU GiB": " ".join(f"{row[key][0]:.2f}" for key in ("gpu_allocated_gib", "gpu_reserved_gib") if row[key]),
            "RSS GiB": f"{row['rss_gib']:.2f}",
            "host ms": f"{row['host_milliseconds']:.1f}",
            "processor ms": f"{row['processor_milliseconds']:.1f}",
            "first s": f"{row['seconds_to_first_step']:.1f}",
            "compile s": f"{row['compile_seconds']:.1f}",
            "steps": str(row["steps"]),
            **({"launches": f"{row['launches_per_step']:.0f}", "kernels": "take no time"} if stand_in else {}),
        })  # fmt: skip
    print(f"\nOn {first['report']['device']}. MFU: of {PEAKS[0]} and {PEAKS[1]} TFLOP/s. GPU: allocated and reserved.")
    print_table(list(table[0]), [list(row.values()) for row in table])
    print()
    for row in rows:
        print(f"{row['mode']}, {row['description']}:\n    {row['command']}")


def print_table(title, rows):
    """Print rows of strings in aligned columns."""
    widths = [max(map(len, column)) for column in zip(title, *rows, strict=True)]
    print()
    for row in (title, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def describe_machine():
    """Return what figures depend on besides the device: date, versions, processor cores."""
    wanted = {"torch", "diffusers", "transformers", "accelerate", "datasets", "torchao", "triton"}
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    } | {name: version for name, version in sorted(found.items()) if name in wanted}


if __name__ == "__main__":
    main()
