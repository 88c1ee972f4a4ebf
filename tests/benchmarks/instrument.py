"""Run a training script unchanged, and measure its optimizer steps from inside its process.

    python instrument.py SETTINGS script.py --the --script's flags

`benchmark.py` starts it; SETTINGS is JSON, and `kind` in it one of `KINDS`. A hook on every optimizer's step sees the
steps of any script. Between two edges it only reads the clock; at an edge it waits for the device. When it has seen
enough it writes a report (JSON) and ends the process, wherever the script is.
"""

import collections
import json
import math
import os
import pkgutil
import re
import resource
import runpy
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import cuda_stand_in

FIRST = 5  # steps in which whatever happens once (compilation, autotuning, capturing graphs) is taken to happen
KILO = 1024 if sys.platform != "darwin" else 1  # bytes in the unit of ru_maxrss


def main():
    """Run the script that the command line names, as if it had been started itself."""
    settings, script = json.loads(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    meter = KINDS[settings["kind"]](settings)
    register_optimizer_step_pre_hook(meter.enter)
    register_optimizer_step_post_hook(meter)
    runpy.run_path(script, run_name="__main__")
    sys.exit("The script ended before everything was measured.")


class Meter:
    """Counts steps and notes when each has been issued; waits for the device at edges.

    Subclasses say in `is_edge` whether the step just issued is one (the first must be), and do in `at_edge` what is to
    be done there: at the last one, `finish`.
    """

    def __init__(self, settings):
        self.settings, self.issued, self.edges, self.loop = settings, [], [], time.perf_counter()
        self.depth = 0
        note_loaders(self)

    def enter(self, _optimizer, _args, _kwargs):
        """Be told that an optimizer begins a step, perhaps as part of another one's."""
        self.depth += 1

    def __call__(self, _optimizer, _args, _kwargs):
        """Be told that an optimizer step has been issued: for a device, not that it has been done."""
        self.depth -= 1
        if self.depth:
            return
        self.issued.append(time.perf_counter())
        if self.is_edge():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.edges.append((len(self.issued), time.perf_counter(), time.process_time()))
            if len(self.edges) == 1:
                self.first_step = time.time()
            self.at_edge()

    def finish(self, **report):
        """Write the report and end the process: no script is asked to stop early, and none need be able to."""
        report |= {
            "steps": len(self.issued),
            "edges": self.edges,  # steps done, seconds on the clock, seconds of processor; the first: after one step
            # From each edge but the last to the end of issuing the next step. A device's queue is empty at an edge, so
            # that after it the host only waits where the script makes it.
            "host_milliseconds": [1000 * (self.issued[steps] - end) for steps, end, _ in self.edges[:-1]],
            "seconds_to_first_step": self.first_step - self.settings["started"],
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILO,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        Path(self.settings["report"]).write_text(json.dumps(report), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)


def note_loaders(meter):
    """Let a meter know when a loader was last asked to begin: before the first step, that is the loop's beginning."""
    begin = torch.utils.data.DataLoader.__iter__

    def noted(loader):
        if not meter.issued:
            meter.loop = time.perf_counter()
        return begin(loader)

    torch.utils.data.DataLoader.__iter__ = noted


class Speed(Meter):
    """A warm-up of so many seconds from the end of the first step, then windows of at least so many seconds each."""

    def is_edge(self):
        if len(self.edges) < 2:  # the end of the first step, and of the first few
            return len(self.issued) in (1, FIRST)
        length = self.settings["window" if len(self.edges) > 2 else "warmup"]
        since = self.edges[-1 if len(self.edges) > 2 else 0][1]
        return self.issued[-1] - since >= length

    def at_edge(self):
        if len(self.edges) == 3:  # the warm-up is over
            self.before, self.launched = gpu_memory(), launches()
        if len(self.edges) == 3 + self.settings["windows"]:
            since = gpu_memory()
            self.finish(
                seconds_of_first_steps=self.edges[1][1] - self.loop,
                first_steps=FIRST,
                gpu_allocated_bytes=[max(self.before[0], since[0]), since[0]] if since else [],
                gpu_reserved_bytes=[max(self.before[1], since[1]), since[1]] if since else [],
                launches=launches() - self.launched,  # since the warm-up
            )


def gpu_memory():
    """Return the peaks of bytes allocated and reserved since this was last called; nothing without a GPU."""
    if not torch.cuda.is_available():
        return []
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    torch.cuda.reset_peak_memory_stats()
    return peaks


def launches():
    """Return how many kernels the stand-in for CUDA was asked to launch; 0 on any other device."""
    if cuda_stand_in.PRELOADED not in os.environ.get("LD_PRELOAD", ""):
        return 0
    return cuda_stand_in.counts()["launches"]


class Stall(Meter):
    """An edge every half of the way from one checkpoint to the next; the step at a checkpoint is saved after its edge.

    So spans with the beginning of a save, and spans without, alternate.
    """

    def is_edge(self):
        return len(self.issued) == 1 or len(self.issued) % (self.settings["every"] // 2) == 0

    def at_edge(self):
        if len(self.issued) == (self.settings["checkpoints"] + 1) * self.settings["every"]:
            self.finish()


class Profile(Meter):
    """A profile of a few steps after the warm-up: see `where_time_goes`."""

    def __init__(self, settings):
        super().__init__(settings)
        name_parts()
        torch._inductor.config.cpp.enable_kernel_profile = True  # otherwise a compiled graph is one event on a CPU
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)

    def is_edge(self):
        if len(self.edges) < 2:
            return not self.edges or self.issued[-1] - self.edges[0][1] >= self.settings["warmup"]
        return len(self.issued) == self.edges[1][0] + self.settings["steps"]

    def at_edge(self):
        if len(self.edges) == 2:
            self.profiler.start()
        elif len(self.edges) == 3:
            self.profiler.stop()
            milliseconds = 1000 * (self.edges[2][1] - self.edges[1][1])
            parts, groups = where_time_goes(self.profiler.events(), milliseconds)
            steps = self.settings["steps"]
            per_step = [{name: value / steps for name, value in table.items()} for table in (parts, groups)]
            self.finish(milliseconds=milliseconds / steps, parts=per_step[0], groups=per_step[1])


# The parts of a step on the host: a name, and the methods that do it.
PARTS = {
    "VAE": [("diffusers:AutoencoderKL", "encode")],
    "text encoder": [("transformers:CLIPTextModel", "__call__")],
    "UNet forward": [("diffusers:UNet2DConditionModel", "__call__"), ("torch._dynamo:OptimizedModule", "__call__")],
    "UNet backward": [("torch:Tensor", "backward")],
    "clipping": [("accelerate:Accelerator", "clip_grad_norm_")],
    "EMA": [("diffusers.training_utils:EMAModel", "step")],
}
# How the range of a part begins in a profile; torch itself labels optimizers and loaders.
LABELS = {part: part for part in PARTS} | {"Optimizer.step#": "optimizer", "enumerate(DataLoader)#": "data"}
LABELS |= {"aten::_foreach_lerp_": "EMA", "aten::lerp_": "EMA"}
# Kinds of work, by what kernels and operators are called; the first that fits counts.
GROUPS = {
    "attention": r"attention|flash|fmha|sdpa|softmax",
    "norm": r"norm|RowwiseMoments|welford",
    "fused by the compiler": r"triton_(poi|red|per)|cpp_fused",
    "conv": r"conv|fprop|dgrad|wgrad|winograd|nchwToNhwc|nhwcToNchw",
    "linear": r"gemm|addmm|\bmm\b|::b?mm|linear|cutlass|nvjet|splitK",
    "copies": r"memcpy|memset|copy|::(to|contiguous|cat|clone|fill_|zero_|zeros)$|CatArray|FillFunctor",
    "elementwise": r"elementwise|::(silu|gelu|add|sub|mul|div|neg|exp|sum|mean)",
}


def name_parts():
    """Make the methods in `PARTS` show up under their part's name in a profile."""
    for part, methods in PARTS.items():
        for owner, name in methods:
            label_calls(pkgutil.resolve_name(owner), name, part)


def label_calls(owner, name, label):
    """Put every call of a method inside a labelled range; what is being compiled is left alone."""
    original = getattr(owner, name)

    def labelled(*args, **kwargs):
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        with torch.profiler.record_function(label):
            return original(*args, **kwargs)

    setattr(owner, name, labelled)


def where_time_goes(events, milliseconds):
    """Add up a profile.

    Args:
        events (list[torch.autograd.profiler_util.FunctionEvent]): of some steps.
        milliseconds (float): wall clock of these steps, from one waiting for the device to the next.

    Returns:
        tuple[dict, dict]: milliseconds of the host by part of the step, and milliseconds by kind of work. On a GPU the
        second are those of its kernels, and "idle" is the time with none; on a CPU those that operators took without
        what they called, and "python" is the time outside of all operators.
    """
    parts, groups, kernels = collections.Counter(), collections.Counter(), []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            if not event.is_user_annotation:
                kernels.append((event.time_range.start, event.time_range.end))
            continue
        part, outer = part_of(event.name), enclosing_part(event)
        if part and not outer:
            parts[part] += event.time_range.elapsed_us() / 1000
        for kernel in event.kernels:
            groups[group_of(kernel.name, event.name, outer or part)] += kernel.duration / 1000
        if not torch.cuda.is_available() and (not event.is_user_annotation or part == "data"):
            groups[group_of(event.name, event.name, outer or part)] += event.self_cpu_time_total / 1000
    parts["rest"] = milliseconds - parts.total()
    if kernels:
        groups["idle"] = milliseconds - covered(kernels) / 1000
    else:
        groups["python"] = milliseconds - groups.total()
    return parts, groups


def enclosing_part(event):
    """Return the outermost part of the step that an event happened in, or None."""
    found = None
    while event := event.cpu_parent:
        found = part_of(event.name) or found
    return found


def part_of(name):
    """Return the part of the step that a labelled range stands for, or None."""
    return next((part for prefix, part in LABELS.items() if name.startswith(prefix)), None)


def group_of(kernel, operator, part):
    """Return what kind of work a kernel, or on a CPU an operator, does: for some parts, whatever it is, the part's."""
    if part in ("optimizer", "EMA", "clipping", "data"):
        return part
    names = ((group, name) for name in (kernel, operator) for group in GROUPS if re.search(GROUPS[group], name, re.I))
    return next(names, ("other", None))[0]


def covered(intervals):
    """Return the length of the union of intervals."""
    length, reached = 0, -math.inf
    for start, end in sorted(intervals):
        length += max(0, end - max(start, reached))
        reached = max(reached, end)
    return length


KINDS = {"speed": Speed, "stall": Stall, "profile": Profile}

if __name__ == "__main__":
    main()
