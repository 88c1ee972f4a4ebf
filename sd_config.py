"""The command line, the plan of a run, and checkpoints as folders: all that arguments and files alone decide.

Only the standard library is imported, so `--help` and wrong flags are answered at once. All problems of a command line
are reported together, and end the process with exit code 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MODEL, DATA = "stable-diffusion-v1-5/stable-diffusion-v1-5", "lambdalabs/naruto-blip-captions"
MOVED_MODELS = {"runwayml/stable-diffusion-v1-5": MODEL}
# Flags that affect the training but may change when a run is resumed (`compare_runs` then warns).
TRAINING = """
    pretrained_model_name_or_path revision variant skip_bad_rows resolution aspect_buckets center_crop random_flip
    image_interpolation_mode caption_dropout learning_rate scale_lr lr_scheduler lr_warmup_steps adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm use_ema prediction_type snr_gamma noise_offset input_perturbation
    dream_training dream_detail_preservation mixed_precision allow_tf32 low_memory
""".split()  # noqa: SIM905 (as one list of strings it would fill the page)
FROZEN_BYTES = 2_043_000_000  # SD1.5's VAE, text encoder and safety checker in float32: an estimate before the download
# Bytes that a step of SD1.5 takes besides weights, gradients, moments and EMA, by half precision and checkpointing,
# with four samples of 512 x 512 at once, and hardly less with fewer: measured (tests/benchmarks/README.md).
ACTIVATIONS = {(False, False): 4.3e9, (False, True): 1.1e9, (True, False): 3.5e9, (True, True): 0.7e9}
DENOISING_STEPS = 20  # per validation picture
# The names in an output folder. Logs lie in a folder that --logging_dir names.
MANIFEST, STATE, INDEX, SAMPLES, LOCK = "manifest.json", "trainer_state.json", "model_index.json", "samples", ".lock"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
EXPORT = (*PARTS, "image_encoder", "README.md", INDEX)
CHECKPOINT = ("unet", "unet_ema", "optimizer.pt", STATE, MANIFEST)
# The text in our pictures, of a name that no other program reads (ComfyUI parses `prompt`), and that in older ones.
PNG_TEXT, OLD_PNG_TEXTS = "sd_naruto", {"prompt", "seed", "num_inference_steps"}
# This folder is the program's own: its lock, the manifest of the export, what is not whole yet, what is being deleted.
OWN = ".train_sd1-5_naruto"


# -- The command line: the types of flags, the flags, and their parser ---------------------------------------


class Rejected(str):
    """What a flag's type returns for a value that it does not accept: the value, and what is allowed."""


def flag_type(metavar, allowed, convert):
    """Return a flag type. `convert` maps a text to its value, or to None if it is not what `allowed` says."""

    def parse(text):
        value = convert(text)
        return Rejected(f"{text}: must be {allowed}") if value is None else value

    parse.metavar = metavar
    return parse


def integer(low, high=None, *, multiple_of=1, word=None):
    """Return a flag type for whole numbers from `low` to `high`, in steps of `multiple_of`, or one `word` instead."""
    allowed = f"a {'whole number' if multiple_of == 1 else f'multiple of {multiple_of}'} "
    allowed += f"of at least {low}" if high is None else f"from {low} to {high}"
    numbers = range(low, 10**18 if high is None else high + 1, multiple_of)

    def convert(text):
        if re.fullmatch(r"[+-]?\d{1,18}", text.strip()) and int(text) in numbers:
            return int(text)
        return text if text == word else None

    return flag_type(f"N|{word}" if word else "N", f"{allowed}, or {word}" if word else allowed, convert)


def real(low, high=math.inf, *, above=False, below=False, infinite=False):
    """Return a flag type for numbers from `low` to `high`; `above` and `below` exclude the ends themselves."""
    allowed = f"a number {'above' if above else 'of at least'} {low}"
    if high < math.inf:
        allowed += f" and {'below' if below else 'of at most'} {high}"

    def convert(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            inside = (low < value if above else low <= value) and (value < high if below else value <= high)
            return value if inside and (infinite or value < math.inf) else None

    return flag_type("X", f"{allowed}, or inf" if infinite else allowed, convert)


def choice(*values):
    """Return a flag type that accepts only the given words."""
    return flag_type("|".join(values), f"one of {', '.join(values)}", lambda text: text if text in values else None)


def path(text):
    """Return the path of a file or folder with ~ expanded, or None if no path can be like this."""
    fits = "\0" not in text and all(len(os.fsencode(name)) < 256 for name in text.split(os.sep))
    return os.path.expanduser(text) if fits else None


PATH = flag_type("PATH", "a path whose names have at most 255 bytes", path)


# By group: name (and alias), default, type, help. The type bool is a switch; "*" is any number of words.
# fmt: off
FLAGS = {
    "model": [
        ("pretrained_model_name_or_path", "stable-diffusion-v1-5/stable-diffusion-v1-5", PATH,
         "Base model: a Hub id (owner/name), or a local folder with a diffusers pipeline."),
        ("revision", None, str, "Branch, tag or commit of the base model on the Hub."),
        ("variant", None, str, "Variant of the weight files to load, for example fp16."),
        ("non_ema_revision", None, str,
         "Revision of the UNet to start training from. Default: the same as --revision."),
        ("cache_dir", None, PATH,
         "Folder for models and data sets downloaded from the Hub, and for what --cache_latents keeps."),
    ],
    "data": [
        ("dataset_name", "lambdalabs/naruto-blip-captions", PATH, "Training data: a Hub id, or a local folder that the "
         "datasets library can read (parquet, WebDataset, save_to_disk), or of pictures with captions."),
        ("dataset_config_name", None, str, "Configuration of the data set, where it has several."),
        ("train_data_dir", None, PATH, "Folder of pictures, whose captions are in .txt files beside them or in a "
         "metadata.jsonl or .csv. Given alone, it replaces --dataset_name; given with it, it is the subfolder of that "
         "data set to use."),
        ("image_column", "image", str, "Column that holds the pictures."),
        ("caption_column", "text", str, "Column that holds a caption, or a list of captions."),
        ("max_train_samples", None, integer(1), "Train on a random subset of this many rows. Default: all rows."),
        ("skip_bad_rows", False, bool,
         "Decode every picture before training (once: the result is kept) and train without those that fail."),
        ("resolution", 512, integer(8, multiple_of=8),
         "Side in pixels of the square pictures trained on: the shorter side is resized to it, the longer cropped."),
        ("aspect_buckets", False, bool,
         "Crop each picture to the most similar of several shapes, with sides of multiples of 64 and an area of about "
         "--resolution x --resolution, instead of to the square. The plan lists them."),
        ("center_crop", False, bool, "Crop the centre. Default: a random place."),
        ("random_flip", False, bool, "Mirror half of the samples left to right."),
        ("image_interpolation_mode", "bilinear", choice("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"),
         "Filter used to resize the pictures."),
        ("caption_dropout", 0.0, real(0, 1),
         "Probability of training a sample on the empty caption. Classifier-free guidance wants about 0.1."),
        ("dataloader_num_workers", 0, integer(0),
         "Processes that read and decode pictures. 0: the training process itself. Results do not depend on it."),
    ],
    "optimisation": [
        ("seed", None, integer(0, 2**32 - 1), "Seed of every random draw. Default: one is drawn, and printed."),
        ("train_batch_size", 16, integer(1), "Samples in a batch, per device."),
        ("gradient_accumulation_steps", 1, integer(1), "Batches that make one optimizer step."),
        ("num_train_epochs", 100, integer(1), "Passes over the data."),
        ("max_train_steps", None, integer(1), "Optimizer steps of the whole run. Overrides --num_train_epochs."),
        ("learning_rate", 1e-4, real(0), "Peak learning rate."),
        ("scale_lr", False, bool,
         "Multiply the learning rate by batch size, accumulation steps and number of processes."),
        ("lr_scheduler", "constant",
         choice("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
         "How the learning rate moves over the run."),
        ("lr_warmup_steps", 500, integer(0),
         "Steps in which the learning rate climbs to its peak. The schedule `constant` has no warm-up."),
        ("adam_beta1", 0.9, real(0, 1, below=True), "Decay of AdamW's first moment."),
        ("adam_beta2", 0.999, real(0, 1, below=True), "Decay of the second moment."),
        ("adam_weight_decay", 1e-2, real(0), "Decoupled weight decay."),
        ("adam_epsilon", 1e-8, real(0), "Term added to AdamW's denominator."),
        ("use_8bit_adam", False, bool,
         "Keep AdamW's moments in 8 bits (needs torchao, which compiles the update at the first step)."),
        ("max_grad_norm", 1.0, real(0, above=True, infinite=True),
         "Global norm to which gradients are clipped. inf: never."),
        ("use_ema", False, bool,
         "Keep an exponential moving average of the weights: validated, and exported as the UNet."),
    ],
    "loss": [
        ("prediction_type", None, choice("epsilon", "v_prediction"),
         "What the UNet predicts. Default: what the base model's scheduler says."),
        ("snr_gamma", None, real(0, above=True), "Min-SNR loss weighting; 5.0 is usual. Default: off."),
        ("noise_offset", 0.0, real(0), "Scale of extra noise that is constant over a channel."),
        ("input_perturbation", 0.0, real(0),
         "Scale of extra noise added to the UNet's input but not to its target; 0.1 is usual."),
        ("dream_training", False, bool, "DREAM: rectify the target with one more forward pass."),
        ("dream_detail_preservation", 1.0, real(0, above=True), "DREAM's exponent p: larger preserves more detail."),
    ],
    "memory and speed": [
        ("cache_latents", "auto", choice("auto", "on", "off"),
         "Encode every picture and caption once, and keep the result in --cache_dir, or else in the output folder. "
         "auto: only if the crop is fixed (--center_crop), views are reused, and the disk has room."),
        ("micro_batch_size", None, integer(1, word="auto"), "Samples in one forward and backward pass, into which a "
         "step's --train_batch_size x --gradient_accumulation_steps are split; the training is the same. auto: as many "
         "as fit into memory, in a run of one process. Default: auto on CUDA (not on Windows, which lends the host's "
         "memory instead), else --train_batch_size."),
        ("torch_compile", False, bool, "Compile the UNet: faster steps after minutes of compilation."),
        ("cuda_graphs", False, bool, "Launch forward and backward pass at once, as a CUDA graph: for a GPU that would "
         "have to wait for its host. Takes more memory."),
        ("offload_ema", False, bool, "Keep the EMA in the host's memory, where a thread updates it."),
        ("low_memory", False, bool, "Weights in bf16 with stochastic rounding; sets --offload_ema, "
         "--gradient_checkpointing, --mixed_precision bf16 and --use_8bit_adam (needs torchao)."),
        ("mixed_precision", None, choice("no", "fp16", "bf16"),
         "Precision of the forward and backward passes. Default: what `accelerate launch` sets, or no."),
        ("allow_tf32", False, bool, "Let float32 matrix products use TF32."),
        ("gradient_checkpointing", False, bool, "Recompute activations: less memory, more time."),
        ("enable_xformers_memory_efficient_attention", False, bool, "Use xformers' attention."),
        ("local_rank local-rank", -1, integer(-1), "Passed by launchers; must equal LOCAL_RANK."),
    ],
    "checkpoints": [
        ("output_dir", "sd-naruto-model", PATH, "Folder for the trained pipeline, checkpoints, samples and logs."),
        ("overwrite_output_dir", False, bool,
         "Delete the run that the output folder already holds (not its logs), once every check has passed."),
        ("checkpointing_steps", 500, integer(1), "Steps between two checkpoints."),
        ("checkpoints_total_limit", None, integer(1), "Checkpoints to keep; the oldest go. Default: all of them."),
        ("resume_from_checkpoint", None, PATH,
         "Go on from a checkpoint: its folder, its name in the output folder (checkpoint-500), or latest."),
        ("dry_run", False, bool, "Run every check, print the plan of the run, and stop."),
    ],
    "validation": [
        ("validation_prompts", ["Bill Gates with a hoodie", "John Oliver with Naruto style", "Lebron James with a hat",
                                "Mickael Jackson as a ninja"], "*",
         "Prompts to draw during training. The flag alone, without prompts, draws none."),
        ("validation_guidance_scale", 7.5, real(0),
         "Strength of classifier-free guidance in these pictures; 1 or less turns it off."),
        ("validation_negative_prompt", None, str, "What these pictures should not show."),
        ("validation_samples", 0, integer(0), "Rows to keep out of training, on which every validation and checkpoint "
         "measures the loss: always the same rows, noise and timesteps. The checkpoint with the lowest is kept besides "
         "the limit. A resumed run needs the same number."),
        ("validation_epochs", 5, integer(1),
         "Epochs between two validations. The first comes after the first epoch, the last at the end."),
        ("validation_steps", None, integer(1), "Steps between two validations, in place of --validation_epochs."),
    ],
    "logging": [
        ("report_to", "swanlab", choice("swanlab", "tensorboard", "wandb", "none"),
         "Where metrics and sample images go."),
        ("tracker_project_name", "SD-Naruto", str, "Name of the project in the tracker."),
        ("logging_dir", "logs", PATH, "Folder inside the output folder for the tracker's files."),
    ],
}
# fmt: on


def parse_args(argv=None):
    """Return the flags, checked, with the folder of `resume_from_checkpoint`, if any; exit with 2 on problems."""
    parser, notices = Parser("Fine-tune all weights of Stable Diffusion's UNet on pictures with captions.", FLAGS), []
    args = parser.parse_checked(argv, lambda *found: resolve(*found, notices))
    if os.environ.get("RANK", "0") == "0":
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)
    return args


class LossyFile(io.FileIO):
    """A file descriptor that stops nothing: what cannot be written, as when a reader or terminal is gone, is lost."""

    def write(self, data):
        try:
            return super().write(data) or len(data)  # None, where it would have to wait
        except OSError:
            return len(data)


def outlive_streams():
    """Have this process go on, whatever becomes of its output. What a terminal's encoding lacks is escaped."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is None:  # it is closed, and no other file may get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        file = io.BufferedWriter(LossyFile(number, "w", closefd=False))
        encoding = stream.encoding if stream else "utf-8"
        setattr(sys, name, io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=True))


def announce_imports():
    """Say why nothing happens for a while, and keep the libraries from talking while they are imported."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("Loading PyTorch and diffusers takes a few seconds.", flush=True)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def stop_if(problems):
    """If there are any problems, print each on a line of standard error, and exit with code 2."""
    for problem in problems:
        # All processes of a machine find the same problems: only the first prints them, except about LOCAL_RANK.
        if os.environ.get("LOCAL_RANK", "0") == "0" or "LOCAL_RANK" in problem:
            print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(2)


def stop(problem):
    """Print a problem that the other processes may not have, and exit with its code, where it has one, or 2."""
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(getattr(problem, "code", 2))


@contextlib.contextmanager
def exit_on(*errors):
    """Exit with the error's code, or 2, and its message in place of a traceback, if one of `errors` is raised."""
    try:
        yield
    except errors as error:
        stop(error)


class Parser(argparse.ArgumentParser):
    """Collects all problems before reporting, and accepts no abbreviations. `groups` is a dictionary like `FLAGS`."""

    def __init__(self, description, groups):
        super().__init__(usage="%(prog)s [--flag value ...]", description=description, allow_abbrev=False)
        for title, flags in groups.items():
            group = self.add_argument_group(title)
            for names, default, kind, text in flags:
                options = {"default": default, "type": kind, "metavar": getattr(kind, "metavar", "TEXT")}
                if kind is bool:
                    options = {"action": "store_true"}
                elif kind in ("*", "+"):
                    options |= {"type": str, "nargs": kind, "metavar": "PROMPT"}
                shown = text if default is None or default is False else f"{text} (default: {default})"
                group.add_argument(*(f"--{name}" for name in names.split()), help=shown, **options)

    def error(self, message):
        stop_if([f"{message} (--help lists all flags)"])

    def parse_checked(self, argv, resolve):
        """Return the namespace that `resolve(namespace, given, problems)` has completed; exit if there are problems."""
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        absent = object()
        # argparse fills in a default only where the namespace has nothing yet: what stays absent was not given.
        args, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent)))
        given = {name for name, value in vars(args).items() if value is not absent}
        vars(args).update({name: default for name, default in defaults.items() if name not in given})
        problems = [*self.unknown_flags(unknown)]
        problems += [f"--{name} {value}" for name, value in vars(args).items() if isinstance(value, Rejected)]
        for name, value in vars(args).items():
            if re.search("[\ud800-\udfff]", "".join(value) if isinstance(value, list) else str(value)):
                problems.append(f"--{name} {value!a}: is not UTF-8")
        if not problems:  # a value that failed its own check would only cause confusing follow-up messages
            with exit_on(OSError):
                resolve(args, given, problems)
        stop_if(problems)
        return args

    def unknown_flags(self, unknown):
        """Yield a problem for each argument that is no flag, with the flag that resembles it most."""
        for previous, argument in itertools.pairwise(["", *unknown]):
            if argument.startswith("-"):
                name = argument.split("=")[0]
                spelled = name.replace("-", "_").replace("__", "--", 1)
                close = difflib.get_close_matches(spelled, self._option_string_actions, 1)
                remedy = f"; did you mean {close[0]}?" if close else " (--help lists all flags)"
                yield f"{name}: no such flag{remedy}"
            elif "=" in previous or not previous.startswith("-"):
                yield f"{argument}: belongs to no flag"


# -- Checks that need more than one flag, or the file system -------------------------------------------------


def resolve(args, given, problems, notices):
    """Complete `args` in place from the environment and the file system, adding to `problems` and `notices`."""
    packages = {"report_to": args.report_to, "use_8bit_adam": "torchao", "low_memory": "torchao"}
    packages["enable_xformers_memory_efficient_attention"] = "xformers"
    for flag, package in packages.items():
        value = getattr(args, flag)
        found = value in (False, "none") or getattr(importlib.util.find_spec(package), "origin", None)
        if not found:  # a mere folder of this name, as wandb leaves it, has no origin
            given_as = flag if value is True else f"{flag} {value}"
            problems.append(f"--{given_as}: {package} is not installed: pip install {package}")
    compiled = [name for name in ("torch_compile", "use_8bit_adam", "low_memory") if getattr(args, name)]
    if compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        problems.append(f"--{compiled[0]}: needs a C++ compiler, such as g++; name another in the variable CXX")
    if args.dream_training and args.prediction_type == "v_prediction":
        problems.append("--dream_training: defined for epsilon only; leave out --prediction_type v_prediction")
    if args.validation_negative_prompt is not None and args.validation_guidance_scale <= 1:
        problems.append("--validation_negative_prompt: has no effect without a --validation_guidance_scale above 1")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        problems.append(f"--learning_rate {args.learning_rate}: must be above 1e-7, where the polynomial schedule ends")
    if args.cache_dir is not None and os.path.isfile(args.cache_dir):
        problems.append(f"--cache_dir {args.cache_dir}: is a file, and must be a folder")
    mode, modes = os.environ.get("SWANLAB_MODE"), ("online", "cloud", "offline", "local", "disabled")
    if args.report_to == "swanlab" and mode and mode not in modes:
        problems.append(f"SWANLAB_MODE {mode}: must be one of {', '.join(modes)}")
    if args.report_to == "swanlab" and mode == "local" and not importlib.util.find_spec("swanboard"):
        problems.append('SWANLAB_MODE local: needs its dashboard: pip install "swanlab[dashboard]"')
    resolve_memory(args, problems)
    resolve_model(args, problems, notices)
    resolve_data(args, given, problems)
    resolve_output(args, problems, notices)
    notices.extend(ignored_flags(args, given))


def ignored_flags(args, given):
    """Yield a notice for each of the flags given that changes nothing in this run."""
    if args.lr_scheduler == "constant" and "lr_warmup_steps" in given and args.lr_warmup_steps > 0:
        yield f"--lr_warmup_steps {args.lr_warmup_steps}: unused, `constant` has no warm-up (constant_with_warmup has)"
    for steps, epochs in (("max_train_steps", "num_train_epochs"), ("validation_steps", "validation_epochs")):
        if {steps, epochs} <= given:
            yield f"--{steps} {getattr(args, steps)} overrides --{epochs} {getattr(args, epochs)}"
    drawn, tracked = args.validation_prompts, args.report_to != "none"
    needs = {"dream_detail_preservation": args.dream_training, "offload_ema": args.use_ema}
    needs |= dict.fromkeys(("validation_epochs", "validation_steps"), drawn or args.validation_samples)
    needs |= dict.fromkeys(("validation_guidance_scale", "validation_negative_prompt"), drawn)
    needs |= dict.fromkeys(("tracker_project_name", "logging_dir"), tracked)
    for flag in (flag for flag, used in needs.items() if flag in given and not used):
        yield f"--{flag} changes nothing in this run: what it adjusts is off"


def resolve_memory(args, problems):
    """Complete the flags for memory and speed that were left open, and check that they fit together."""
    if args.aspect_buckets and args.resolution not in range(128, 10**9, 64):  # at 64 there is the square only
        problems.append(f"--resolution {args.resolution}: must be 128, 192, 256, ... with --aspect_buckets")
    if args.aspect_buckets and args.torch_compile:
        problems.append("--torch_compile: would compile for every shape of --aspect_buckets; leave one of them out")
    if args.cache_latents == "on" and not args.center_crop:
        problems.append("--cache_latents on: a random crop is never the same twice; add --center_crop")
    batch, size = args.train_batch_size * args.gradient_accumulation_steps, args.micro_batch_size
    if size == "auto" and os.environ.get("WORLD_SIZE", "1") != "1":
        problems.append("--micro_batch_size auto: works in a run of one process only; give a number, or leave it out")
    elif size not in (None, "auto") and batch % size:
        product = f"--train_batch_size x --gradient_accumulation_steps = {batch}"
        problems.append(f"--micro_batch_size {size}: must be a divisor of {product}, or auto")
    launched = os.environ.get("LOCAL_RANK", "not set")
    if str(args.local_rank) not in ("-1", launched.replace("not set", "0")):  # a broken launch
        problems.append(f"--local_rank {args.local_rank}: LOCAL_RANK is {launched}; leave it out")
    if args.low_memory:
        args.use_8bit_adam = args.gradient_checkpointing = args.offload_ema = True
        args.mixed_precision = args.mixed_precision or "bf16"
        if args.mixed_precision != "bf16":
            problems.append(f"--mixed_precision {args.mixed_precision}: --low_memory needs bf16")


def resolve_model(args, problems, notices):
    """Replace the old id of SD1.5 with its new one, and check the index of a base model that is a local folder."""
    flag, name = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
    if name in MOVED_MODELS and not os.path.isdir(name):
        args.pretrained_model_name_or_path = MOVED_MODELS[name]
        notices.append(f"{flag} {name} has moved on the Hub: using {MOVED_MODELS[name]}")
    elif is_local(name):
        problems.extend(pipeline_problems(flag, name))
        revisions = {flag: getattr(args, flag) for flag in ("revision", "non_ema_revision")}
        what = f"{name} is a local folder, which has no revisions"
        problems.extend(f"--{flag} {value}: {what}" for flag, value in revisions.items() if value is not None)
    if args.non_ema_revision is None:
        args.non_ema_revision = args.revision


def pipeline_problems(flag, name):
    """Return what keeps a local folder from being a pipeline like SD1.5's, as far as its index tells."""
    folder, index = Path(name), Path(name, INDEX)
    if folder.is_file() and folder.suffix in (".safetensors", ".ckpt"):
        lines = f"from diffusers import StableDiffusionPipeline\nStableDiffusionPipeline.from_single_file({name!r})"
        lines += f".save_pretrained({str(folder.with_suffix('')) + '-folder'!r})"
        return [f"{flag} {name}: is one file; give the folder that two lines of Python make of it:\n{lines}"]
    if not folder.is_dir():
        return [f"{flag} {name}: no such folder (a Hub model is written owner/name)"]
    if not index.is_file():
        return [f"{flag} {name}: no {INDEX} in it, so it is not a diffusers pipeline"]
    try:
        parts = json.loads(index.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError) as error:
        return [f"{flag} {name}: its {INDEX} cannot be read: {error}"]
    # A part is written as [library, class], or as [null, null] where there is none.
    expected = {part: ".".join(map(str, kind)) for part, kind in parts if isinstance(kind, list) and any(kind)}
    needed = {*expected, *PARTS} - ({"safety_checker", "feature_extractor"} - {*expected})  # which a pipeline may lack
    problems = [f"{flag} {name}: has no folder {part}" for part in sorted(needed) if not (folder / part).is_dir()]
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    if ".FlowMatch" in expected.get("scheduler", ""):
        scheduler = expected["scheduler"]
        problems.append(f"{flag} {name}: its scheduler is {scheduler}, and Stable Diffusion 1.5 has no flow")
    for part, kind in kinds.items():
        if part in expected and not expected[part].endswith(f".{kind}"):
            problems.append(f"{flag} {name}: its {part} is {expected[part]}, but must be {kind}")
    return problems


def resolve_data(args, given, problems):
    """Decide between --dataset_name and --train_data_dir, and check that local folders exist."""
    folder = args.train_data_dir
    if folder is not None and "dataset_name" not in given:
        args.dataset_name = None
    name = args.dataset_name
    if folder is not None and (name is None or is_local(name)) and not Path(name or "", folder).is_dir():
        problems.append(f"--train_data_dir {Path(name or '', folder)}: no such folder")
    if name is not None and is_local(name) and not os.path.isdir(name):
        problems.append(f"--dataset_name {name}: no such folder (a Hub data set is written owner/name)")
    elif name is not None and re.search(r"[\[\]*?]|::", name):
        problems.append(f"--dataset_name {name}: to datasets, []*? and :: in a path are patterns; rename the folder")
    if folder is not None and "::" in folder:
        problems.append(f"--train_data_dir {folder}: to datasets, :: in a path is a pattern; rename the folder")
    saved = name is not None and is_saved_dataset(name)
    if args.dataset_config_name is not None and (name is None or saved):
        problems.append(f"--dataset_config_name {args.dataset_config_name}: this folder has no configurations")
    if folder is not None and saved:
        problems.append(f"--train_data_dir {folder}: {name} has no subfolders to choose from")


def resolve_output(args, problems, notices):
    """Find the checkpoint to resume from, and reject an unusable output folder."""
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted is not None:
        args.resume_from_checkpoint = checkpoint = find_checkpoint(wanted, output, problems, notices)
        if args.overwrite_output_dir and checkpoint is not None and output.resolve() in checkpoint.resolve().parents:
            problems.append("--overwrite_output_dir: would delete the run that --resume_from_checkpoint goes on with")
    dangling = output.is_symlink() and not output.exists()
    if not args.output_dir or dangling or any(path.is_file() for path in (output, *output.parents)):
        problems.append(f"--output_dir {args.output_dir}: must be a folder, new or existing")
        return
    if not os.access(disk_of(output), os.W_OK | os.X_OK):
        problems.append(f"--output_dir {args.output_dir}: no permission to write in {disk_of(output)}")
    logs, project = Path(args.logging_dir), Path(args.tracker_project_name)
    if (output / logs).is_file():
        problems.append(f"--output_dir {output}: {logs} in it is a file, and must be a folder")
    taken = not logs.parts or logs.parts[0].startswith(".") or is_reserved(logs.parts[0])
    if taken or logs.is_absolute() or ".." in logs.parts:
        problems.append(f"--logging_dir {args.logging_dir}: must be a folder of its own inside the output folder")
    if project.is_absolute() or ".." in project.parts:  # TensorBoard makes a folder of this name
        problems.append(f"--tracker_project_name {project}: must be a name, not a path to another folder")
    if inputs := " and ".join(inputs_in_the_way(args, output.resolve())):
        problems.append(f"--output_dir {output}: a run into it would mix with {inputs}; choose another")
    else:
        problems.extend(conflicts(args, wanted))


def inputs_in_the_way(args, output):
    """Yield which inputs of a run lie where it writes, or would count what it writes as training data."""
    subfolder = args.train_data_dir and os.path.join(args.dataset_name or "", args.train_data_dir)
    inputs = {"--dataset_name": args.dataset_name, "--train_data_dir": subfolder, "--cache_dir": args.cache_dir}
    inputs["--pretrained_model_name_or_path"] = args.pretrained_model_name_or_path
    inputs["the folder of the scripts"] = os.path.dirname(__file__)
    for name, folder in [(name, Path(folder).resolve()) for name, folder in inputs.items() if folder]:
        within = output in folder.parents and is_reserved(folder.relative_to(output).parts[0])
        read = name == ("--train_data_dir" if args.train_data_dir else "--dataset_name")
        around = read and folder in output.parents and folder.is_dir()
        if within or around or (folder == output and name != "--cache_dir"):
            yield name


def conflicts(args, wanted):
    """Yield what a run would write over: another run, its own later checkpoints, or files that no run wrote."""
    output, checkpoint, known = Path(args.output_dir), args.resume_from_checkpoint, checkpoints(args.output_dir)
    elsewhere = checkpoint is not None and checkpoint.parent.resolve() != output.resolve()
    named = checkpoint is not None and checkpoint.name in [path.name for path in known]
    step = step_of(checkpoint) if named and not elsewhere else 0
    if strangers := foreign_problems(output, step):
        yield from strangers
    elif (known or (output / INDEX).exists()) and (wanted is None or elsewhere) and not args.overwrite_output_dir:
        remedy = "add --resume_from_checkpoint latest to go on with it, --overwrite_output_dir to delete it"
        yield f"--output_dir {output}: already holds a run; {remedy}, or choose another folder"
    elif known and checkpoint is not None and not elsewhere and wanted != "latest" and step != step_of(known[-1]):
        later = f"{output} holds later ones, up to {known[-1].name}; resume from latest, delete them"
        yield f"--resume_from_checkpoint {checkpoint}: {later}, or choose another --output_dir"


def is_local(name):
    """Say whether a model or data set name is a path: it exists, is not owner/name, or the owner is a folder here."""
    name = str(name)
    # Not for the default ids: the tutorial unpacks the model into a folder that has its owner's name.
    inside = os.path.isdir(os.path.dirname(name)) and name not in (MODEL, DATA)
    return os.path.exists(name) or HUB_ID.fullmatch(name) is None or inside


def is_saved_dataset(folder):
    """Say whether a folder was written by `save_to_disk` of the datasets library."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


# -- Checkpoints on disk: found, verified, written whole, deleted --------------------------------------------


@dataclasses.dataclass
class TrainerState:
    """What a checkpoint keeps besides weights, average and moments. A field added later needs a default."""

    step: int  # steps done
    seed: int
    effective_batch: int  # samples of one step
    data: str  # fingerprint of the data set
    max_steps: int
    ema_step: int | None  # updates of the average, or None without one
    scaler: dict | None  # the state of fp16's loss scaler
    loss: float  # of the last step that was logged
    prediction_type: str
    micro_batch_size: int
    base_model: str  # Hub id or absolute path
    args: dict  # the flags, as plain values
    encoding: str | None = None  # name of the folder of what is encoded only once, or "" (None in older checkpoints)
    losses: dict = dataclasses.field(default_factory=dict)  # on held-out rows, by step (a text) and by name

    def write(self, folder):
        (folder / STATE).write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")


def read_state(folder, flag="--resume_from_checkpoint"):
    """Return the `TrainerState` of a checkpoint; exit with code 2, naming `flag`, if it cannot be read."""
    try:
        saved = json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(TrainerState)}
        return TrainerState(**{name: value for name, value in saved.items() if name in known})
    except (OSError, ValueError, AttributeError, TypeError) as error:  # a TypeError names the fields that are missing
        return stop_if([f"{flag} {folder}: its {STATE} cannot be read: {error}"])


def checkpoints(output):
    """Return the folders of `output` named checkpoint-N by ascending N, whole or not."""
    return [path for path in numbered(output, "checkpoint") if path.is_dir()]


def numbered(folder, word):
    """Return what has a name such as word-3 in a folder, by ascending number."""
    name = re.compile(rf"{word}-[1-9][0-9]*")
    return sorted((path for path in Path(folder).glob(f"{word}-*") if name.fullmatch(path.name)), key=step_of)


def step_of(path):
    """Return the step of a checkpoint, or of a folder of samples, from its name."""
    return int(path.name.rpartition("-")[2])


def find_checkpoint(wanted, output, problems, notices):
    """Return the folder that --resume_from_checkpoint means, or None where there is none."""
    flag, known, damaged = f"--resume_from_checkpoint {wanted}", checkpoints(output), []
    if wanted != "latest":
        folder = next((path for path in (output / wanted, Path(wanted)) if path.is_dir()), None)
        if folder is None:
            names = ", ".join(path.name for path in known) or "none"
            problems.append(f"{flag}: no checkpoint there (in {output}: {names})")
        elif damage := find_damage(folder):
            problems.append(f"{flag}: not a whole checkpoint: {damage}")
        return folder
    for folder in reversed(known):
        if not (damage := find_damage(folder)):
            notices.extend(damaged)
            return folder
        damaged.append(f"{folder}: skipped, not a whole checkpoint: {damage}")
    if damaged:
        problems.extend([*damaged, f"{flag}: none is whole; to start over, give --overwrite_output_dir instead"])
    elif (output / INDEX).exists():
        problems.append(f"{flag}: no checkpoint in {output}, only an exported pipeline")
    else:
        notices.append(f"{flag}: no checkpoint in {output}, so this run starts fresh")
    return None


def find_damage(folder, prefix="", holds=STATE):
    """Return what is damaged in a folder with a manifest, which must list the file that it `holds`, or None."""
    name = MANIFEST
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # Only the trainer's state and files whose names start with `prefix` are checked.
        manifest = {name: entry for name, entry in manifest.items() if name.startswith((prefix, holds))}
        for name, (size, _) in manifest.items():  # all sizes first, because checksums take seconds
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
        changed = [name for name, (_, value) in manifest.items() if checksum(folder / name) != value]
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or what it lists cannot be read: {error}"
    if changed:
        return f"{changed[0]} is not as it was saved (its checksum differs)"
    if holds not in manifest:
        return f"{MANIFEST} lists no {holds}"
    step = read_json(folder / STATE).get("step")
    renamed = step and re.fullmatch(r"checkpoint-\d+", folder.name) and folder.name != f"checkpoint-{step}"
    return f"it holds step {step}, so its name was changed" if renamed else None


def write_manifest(folder, before=None):
    """Write a folder's manifest, for `find_damage`, after the entries of one `before`, and flush all to disk."""
    # Not of the lock: to open and close it would give it up, before the manifest is there.
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, LOCK))
    entries = {path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps((before or {}) | entries), encoding="utf-8")
    for path in files:
        shutil.copymode(folder / MANIFEST, path)  # safetensors writes for the user alone, whatever the umask
    flush(folder)


def checksum(path):
    """Return the CRC-32 of a file, which finds damage, not forgery, at twice the speed of SHA-256."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def drawn_by_us(path):
    """Say whether a file is a PNG with the text that `infer.draw` writes, or wrote when each setting had a chunk."""
    head = Path(path).read_bytes().partition(b"IDAT")[0].decode("latin-1")
    names = set(re.findall(r"iTXt(\w+)\0", head))
    return head.startswith("\x89PNG") and (PNG_TEXT in names or names >= OLD_PNG_TEXTS)


def flush(folder, within=True):
    """Flush a folder and, if `within`, its content to disk: only then can no power cut lose it."""
    if os.name == "nt":  # Windows has no descriptors of folders
        return
    for path in (*(folder.rglob("*") if within else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ReportedError(Exception):
    """An error whose message says everything, and which is shown without a traceback."""

    code = 1  # the exit code of the process


class WriteError(ReportedError):
    """Something could not be written whole."""


@contextlib.contextmanager
def reported(what, size, folder, kind):
    """Make an error of this `kind` within a `WriteError`: `what`, of `size` bytes, cannot be written into `folder`."""
    try:
        yield
    except kind as error:
        room = f"{gigabytes(size)} needed, {gigabytes(shutil.disk_usage(disk_of(folder)).free)} free"
        raise WriteError(f"{what} cannot be written ({room}): {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def written_whole(hidden, what, size):
    """Yield the new, empty folder `hidden` to write `what` into; if that fails, delete it and raise a `WriteError`."""
    shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
    try:
        with reported(what, size, hidden, Exception):  # each library raises an error of its own when a disk is full
            hidden.mkdir()  # not the folders above it: an output folder deleted since the start is an error
            yield hidden
    except WriteError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def put_in_place(hidden, final):
    """Rename a complete folder, or a file, to its final name, replacing a folder that has that name."""
    final.parent.mkdir(parents=True, exist_ok=True)
    discard(final, hidden.parent)
    hidden.rename(final)
    flush(final.parent, within=False)


def discard(folder, own):
    """Delete a folder, if there is one. It is moved to `own` first, so that half a folder never has its name."""
    hidden = own / f"old-{folder.name}"
    if folder.exists():
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def put_export_in_place(staging, output):
    """Move a complete pipeline from `staging` to the output folder; its manifest lists the earlier ones' files as well.

    The old index is deleted first, and the new one moved in last: only a whole pipeline ever has one.
    """
    if problems := foreign_problems(output, math.inf):  # put there since the start
        raise ReportedError(f"{problems[0]}; the export is in {staging}, until the next start makes it anew")
    try:
        for name in (INDEX, "README.md"):  # whose checksums the manifest now has
            (output / name).unlink(missing_ok=True)
        (staging / MANIFEST).replace(output / OWN / MANIFEST)
        for part in sorted(staging.iterdir(), key=lambda path: path.name == INDEX):
            put_in_place(part, output / part.name)
    except OSError as error:
        rest = f"what has not been moved yet is in {staging}, until the next start makes it anew"
        raise ReportedError(f"{error}; {rest}") from error
    shutil.rmtree(staging, ignore_errors=True)
    flush(output / OWN, within=False)


def best_checkpoint(folders, new=None):
    """Return folder, name and value of the lowest held-out loss that a whole checkpoint has of its own step, or Nones.

    It is the loss of the averaged weights, where there are any, with which a checkpoint draws. Of equal ones, the later
    counts. The checkpoint of step `new` was written just now, and is not verified.
    """
    found = []
    for folder in folders:
        with contextlib.suppress(KeyError, TypeError):  # not measured, or saved by an older version
            losses = read_json(folder / STATE)["losses"][str(step_of(folder))]
            name = "val/loss_ema" if "val/loss_ema" in losses else "val/loss"
            found += [(losses[name], -step_of(folder), folder, name)] if losses[name] < math.inf else []
    for loss, step, folder, name in sorted(found):
        if -step == new or not find_damage(folder):
            return folder, name, loss
    return None, None, None


def prune_checkpoints(output, limit, step, last_step):
    """Keep the best and the last `limit` whole checkpoints up to `step`, just saved after the one of `last_step`."""
    past = [path for path in checkpoints(output) if step_of(path) <= step]
    # Checkpoints between these two are damaged, or the run would have resumed from one.
    whole = [path for path in past if not last_step < step_of(path) < step]
    kept = {*whole[-limit:], best_checkpoint(whole, new=step)[0]}
    try:
        for old in (path for path in past if path not in kept):
            if strangers := foreign_files(old):
                print(f"warning: {old} is kept: no run wrote {strangers[0].name} in it")
            else:
                discard(old, output / OWN)
    except OSError as error:  # it costs room, but not the run
        print(f"warning: an old checkpoint cannot be deleted: {error}")


def lock(folder, name, wait=False):
    """Lock a folder until the returned file is closed or the process ends. If another has the lock: wait, or exit."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115 (to stay open)
    except OSError as error:
        return stop(f"{name}: cannot be written to: {error}")
    try:
        # Nothing else may open the file: the lock ends when this process closes any handle of it. Windows has no lock.
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            stop(f"{name}: another process is training into it")
        print(f"Waiting for another process that writes into {name}")
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: go on without one
        pass
    return file


@contextlib.contextmanager
def claimed_output(args, step):
    """Make the output folder, and keep every other trainer out of it for as long as this is entered."""
    output = Path(args.output_dir)
    with lock(output / OWN, f"--output_dir {output}"):
        newer = [path for path in checkpoints(output) if step_of(path) > step and not args.overwrite_output_dir]
        if whole := [path.name for path in newer if not find_damage(path)]:  # saved while this process was starting
            stop(f"--output_dir {output}: {whole[-1]} was saved by another process just now; start again")
        stop_if(foreign_problems(output, step))
        yield


# -- Whose files are in the output folder --------------------------------------------------------------------


def is_reserved(name):
    """Say whether a run may write, and so delete, something of this name in its output folder."""
    return name in (*EXPORT, SAMPLES, OWN) or name.startswith(("checkpoint-", "encoded-"))


def deletions(args, encoding=None):
    """Return what a start deletes: what a killed run left unfinished and, with --overwrite_output_dir, the old run.

    The encodings in the folder named `encoding` are those of the new one.
    """
    output = Path(args.output_dir)
    unfinished = re.compile(r"(checkpoint|step)-\d+|export|old-.+")
    paths = [path for path in (output / OWN).glob("*") if unfinished.fullmatch(path.name)]
    if args.overwrite_output_dir:  # what proves whose the others are comes last
        encodings = {path for path in output.glob("encoded-" + 16 * "[0-9a-f]") if path.name != encoding}
        ours = re.compile(r"(pictures|captions)\.arrow|\.lock|manifest\.json|tmp\w{8}")  # the last is of datasets
        paths += [path for path in encodings if all(ours.fullmatch(file.name) for file in files_in(path))]
        paths += [output / name for name in EXPORT]
        paths += [*numbered(output / SAMPLES, "step"), *numbered(output, "checkpoint"), output / OWN / MANIFEST]
    return [path for path in paths if path.exists()]


@exit_on(OSError)
def clear_output(args, encoding):
    """Delete the `deletions`, each folder at once, so that a start that is killed leaves no half of one behind."""
    own = Path(args.output_dir, OWN)
    for path in deletions(args, encoding):
        if not path.is_dir():
            path.unlink()
        elif path.parent == own:
            shutil.rmtree(path, ignore_errors=True)
        else:
            discard(path, own)
    if args.overwrite_output_dir:
        with contextlib.suppress(OSError):  # there is none, or it holds what is not a run's
            (own.parent / SAMPLES).rmdir()


def foreign_problems(output, step):
    """Return a list that is empty, or says which files that no run wrote are in the way of a run from `step` on."""
    listed, strangers = read_json(output / OWN / MANIFEST), []
    proofs = [path for path in checkpoints(output) if (path / STATE).is_file() and not foreign_files(path)]
    if listed or not proofs or not (output / INDEX).exists():  # an older export is known by a checkpoint beside it
        for file in (file for name in EXPORT for file in files_in(output / name)):
            entry = listed.get(file.relative_to(output).as_posix())
            if entry is None or (file.name == "README.md" and entry[1] != checksum(file)):  # people edit model cards
                strangers.append(file)
    for path in (*numbered(output, "checkpoint"), *numbered(output / SAMPLES, "step")):
        strangers += foreign_files(path) if step_of(path) > step else []
    strangers += [path for path in (output / SAMPLES, output / OWN) if files_in(path) == [path]]  # a file, or a link
    names = ", ".join(str(path.relative_to(output)) for path in strangers[:5]) + ", ..." * (len(strangers) > 5)
    problem = f"--output_dir {output}: no run wrote {names} in it; move away what is yours, or choose another folder"
    return [problem] if strangers else []


def foreign_files(folder):
    """Return the files in a checkpoint's folder, or in one of samples, that no run is known to have written."""
    files = {file.relative_to(folder).as_posix(): file for file in files_in(folder)}
    listed = read_json(folder / MANIFEST)
    if STATE in listed:
        return [file for name, file in files.items() if name not in {*listed, MANIFEST}]
    if "effective_batch" in read_json(folder / STATE):  # its manifest is damaged
        return [file for name, file in files.items() if name.split("/")[0] not in CHECKPOINT]
    drawn = [file for file in files.values() if not file.is_symlink() and drawn_by_us(file)]
    return [file for file in files.values() if file not in drawn and not (drawn and file.name == "grid.png")]


def files_in(path):
    """Return the files and symbolic links in a folder, or a file or link itself; none where there is nothing."""
    if path.is_symlink() or path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir()]
    return [file for file in files if file.name not in (".DS_Store", "Thumbs.db", "desktop.ini")]  # of file managers


def read_json(path):
    """Return the dictionary in a JSON file, or an empty one if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# -- The plan of a run ---------------------------------------------------------------------------------------


class Plan:
    """The arithmetic of a run. Steps are optimizer steps; a `step` given to a method is the number done so far.

    `rows` is the number of rows trained on, and `area` the pixels of their pictures, by `processes` that share each
    step. `parameters` counts the UNet's weights, and `texts` the distinct captions; `width` is the hidden size of the
    text encoder. `encoding` is what the checkpoint to be resumed says of it (`TrainerState.encoding`). `device` is
    torch's name of the kind of device, and `precision` what accelerate settled on.
    """

    def __init__(
        self, args, rows, processes, parameters, texts=0, width=768, area=0, encoding=None, device="cpu", precision=None
    ):
        self.args, self.rows, self.processes = args, rows, processes
        self.batch_per_process = args.train_batch_size * args.gradient_accumulation_steps  # samples per step
        self.effective_batch = self.batch_per_process * processes
        size = args.micro_batch_size
        # By itself only where it is an error: on a CPU the process would be killed, and Windows lends the host's.
        lends = os.name == "nt" or "microsoft" in platform.release().lower()
        self.halves = size == "auto" or (size is None and device == "cuda" and processes == 1 and not lends)
        self.micro_batch_size = self.batch_per_process if self.halves else size or args.train_batch_size
        self.steps_per_epoch = math.ceil(rows / self.effective_batch)
        self.max_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        self.learning_rate = args.learning_rate * (self.effective_batch if args.scale_lr else 1)  # at its peak
        self.limit = (limit := args.checkpoints_total_limit) and limit + bool(args.validation_samples)  # with the best
        self.validates = bool(args.validation_prompts or args.validation_samples)
        first = args.validation_steps or self.steps_per_epoch
        every = args.validation_steps or self.steps_per_epoch * args.validation_epochs
        self.validations = range(first, self.max_steps, every)  # and one at the end
        # Bytes: of what is trained, of a checkpoint, of the export.
        each, average = 2 if args.low_memory else 4, 4 * parameters if args.use_ema else 0
        moments = 2 * (1 if args.use_8bit_adam else 4) * parameters
        self.memory = {"weights": each * parameters, "gradients": each * parameters, "optimizer state": moments}
        self.memory["EMA (host)" if args.offload_ema else "EMA"] = average
        kind = (precision or args.mixed_precision) in ("fp16", "bf16"), args.gradient_checkpointing
        times = parameters / 859_520_964 * max(1, self.micro_batch_size / 4 * (args.resolution / 512) ** 2)
        self.memory["activations"] = times * ACTIVATIONS[kind]
        self.needed = sum(size for name, size in self.memory.items() if name != "EMA (host)")  # on the device
        self.checkpoint_bytes = each * parameters + moments + average
        base = Path(args.pretrained_model_name_or_path)
        frozen = sum(size_on_disk(base / part) for part in PARTS if part != "unet") if base.is_dir() else FROZEN_BYTES
        self.export_bytes = each * parameters + average + frozen

        self.views = 2 if args.random_flip else 1  # pictures made of each row: itself, and its mirror image
        latents = 2 * 4 * (area or rows * args.resolution**2) // 64  # mean and log-variance, 4 channels
        self.encoded_bytes = 4 * (self.views * latents + (texts + 1) * 77 * width)
        folder, output = Path(args.cache_dir or args.output_dir), Path(args.output_dir)
        self.encoded_missing = 0 if encoding and (folder / encoding).is_dir() else self.encoded_bytes
        self.encoded_apart = disk_of(folder).stat().st_dev != disk_of(output).stat().st_dev  # on another disk
        self.encoded, self.encoded_why = self.choose_encoded(folder, encoding)

    def choose_encoded(self, folder, encoding):
        """Return the folder for encoded pictures and captions, or None and the reason why there is none."""
        if self.args.cache_latents == "off":
            return None, "--cache_latents off"
        if self.args.cache_latents == "auto":
            if not self.args.center_crop:
                return None, "random crops"
            if encoding is not None:  # to go on exactly, a run must encode as it began
                return (folder, None) if encoding else (None, "as in the run so far")
            if self.max_steps * self.effective_batch <= self.rows * self.views:
                return None, "each is used only once"
            least = 0 if self.encoded_apart else self.export_bytes + 2 * self.checkpoint_bytes
            if shutil.disk_usage(disk_of(folder)).free < least + self.encoded_missing:
                return None, f"{gigabytes(self.encoded_bytes)} would not fit in {folder}"
        return folder, None

    def saves_after(self, step):
        """Say whether a checkpoint is due when `step` steps are done: at every interval, and at the end."""
        return step % self.args.checkpointing_steps == 0 or step == self.max_steps

    def saves_from(self, step):
        """Return how many checkpoints are still due when `step` steps are done."""
        interval = self.args.checkpointing_steps
        return math.ceil(self.max_steps / interval) - step // interval if step < self.max_steps else 0

    def validates_after(self, step):
        """Say whether a validation is due after `step`: after epochs 1, 1 + V, … or N, 2N, … steps, and at the end."""
        return self.validates and (step in self.validations or step == self.max_steps)

    @property
    def drawing(self):
        """The share of the UNet's passes that draws validation pictures, in the process that does.

        Passes are counted in forward passes of a sample: a backward pass costs two, checkpointing and DREAM one each.
        """
        args, pictures = self.args, self.validates * (len(self.validations) + 1) * len(self.args.validation_prompts)
        drawing = pictures * DENOISING_STEPS * (1 + (args.validation_guidance_scale > 1))
        training = self.max_steps * self.batch_per_process * (3 + args.gradient_checkpointing + args.dream_training)
        return drawing / (drawing + training)

    def positions(self, step, rank=0):
        """Return the positions of the sample stream that process `rank` consumes in step `step`, from 0."""
        first = step * self.effective_batch + rank * self.batch_per_process
        return range(first, first + self.batch_per_process)

    def __str__(self):
        args, saves, epoch = self.args, self.saves_from(0), self.steps_per_epoch
        kept = min(saves, self.limit or saves)
        sizes = f"{gigabytes(self.checkpoint_bytes)} each, {gigabytes(kept * self.checkpoint_bytes)} in all"
        memory = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.memory.items())
        validations = (len(self.validations) + 1) * self.validates
        encoding = f"pictures and captions, each time they are used ({self.encoded_why})"
        if self.encoded:
            encoding = f"pictures and captions once, kept in {self.encoded} ({gigabytes(self.encoded_bytes)})"
        lines = {
            "rows": f"{self.rows}, besides {args.validation_samples} kept out of training",
            "effective batch": f"{self.effective_batch} ({self.batch_per_process} x {self.processes} process(es))",
            "micro-batches": f"{self.micro_batch_size}{', halved whenever memory runs out' * self.halves}",
            "steps": f"{self.max_steps} ({epoch} per epoch, {self.max_steps / epoch:.1f} epochs)",
            "learning rate": f"{self.learning_rate:g}",
            "memory": memory,
            "encoding": encoding,
            "checkpoints": f"{saves}, {kept} of them kept: {sizes}",
            "export": gigabytes(self.export_bytes),
            "validations": f"{validations}, drawing is {self.drawing:.1%} of the UNet's passes",
        }
        return "\n".join(f"  {name:15}  {text}" for name, text in lines.items())


def gigabytes(size):
    return f"{size / 1e9:.2f} GB"


def disk_of(folder):
    """Return the folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.is_dir())


def size_on_disk(path):
    """Return the bytes of a file, or of all files in a folder; 0 where there is neither."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def compare_runs(saved, plan, now, data):
    """Compare a checkpoint's run (`saved`, a `TrainerState`) with the one that resumes it: plan, arguments and data.

    `now` are the arguments with what was settled on where they left it open; `data` is the data set's fingerprint.
    Returns two lists of strings: problems, where the stream of samples could not go on or the checkpoint lacks what is
    needed, and warnings, where the rest of the training will differ from its beginning.
    """
    before = saved.args | {"prediction_type": saved.prediction_type}
    batch = "--train_batch_size x --gradient_accumulation_steps x processes"
    identity = {
        "--seed": (now["seed"], saved.seed),
        batch: (plan.effective_batch, saved.effective_batch),
        "fingerprint of the data set (its pictures and captions)": (data, saved.data),
        "--max_train_samples": (now["max_train_samples"], before.get("max_train_samples")),
        "--validation_samples": (now["validation_samples"], before.get("validation_samples", 0)),
        "--use_8bit_adam (which --low_memory sets)": (now["use_8bit_adam"], before.get("use_8bit_adam")),
    }
    if now["use_ema"]:  # a run may go on without an average, but cannot start one in the middle
        identity["--use_ema"] = (True, before.get("use_ema"))
    past = "in the run that --resume_from_checkpoint goes on with"
    problems = [f"{name}: {here} here, but {then} {past}" for name, (here, then) in identity.items() if here != then]
    if saved.step > plan.max_steps:
        problems.append(f"--max_train_steps {plan.max_steps}: the checkpoint is already at step {saved.step}")
    changes = {f"--{name}": (now[name], before.get(name)) for name in TRAINING}
    if now["lr_scheduler"] not in ("constant", "constant_with_warmup"):
        changes[f"steps that --lr_scheduler {now['lr_scheduler']} stretches over"] = (plan.max_steps, saved.max_steps)
    changed = {name: pair for name, pair in changes.items() if (pair[0] or None) != (pair[1] or None)}
    warnings = [f"{name}: {then} so far, {here} from here" for name, (here, then) in changed.items()]
    return problems, warnings


def compare_disk(plan, step):
    """Compare what a run still writes after `step` with the free disk space. Return problems and warnings.

    The encodings, the export and two checkpoints, less what is there already, must fit. A warning says that not
    everything fits, or that all of it takes more than 100 GB.
    """
    args, output = plan.args, Path(plan.args.output_dir).resolve()
    kept = 0 if args.overwrite_output_dir else len(checkpoints(output))
    free = shutil.disk_usage(disk_of(output)).free + sum(map(size_on_disk, deletions(args)))
    saves, limit = plan.saves_from(step), args.checkpoints_total_limit
    # Old ones go after the new one is complete.
    most = saves if limit is None else min(saves, max(1, plan.limit + 1 - kept))
    base = plan.export_bytes + (plan.encoded_missing if plan.encoded and not plan.encoded_apart else 0)
    least, total = (base + count * plan.checkpoint_bytes for count in (min(saves, 1 if kept else 2), most))
    sizes = f"{most} checkpoint(s) of {gigabytes(plan.checkpoint_bytes)}, an export of {gigabytes(plan.export_bytes)}"
    if free < least:
        return [f"--output_dir {output}: {gigabytes(free)} free, at least {gigabytes(least)} needed ({sizes})"], []
    if free < total or total > 100e9:
        remedy = "another disk may have more" if limit and limit <= 2 else "--checkpoints_total_limit 2 keeps fewer"
        return [], [f"{sizes}: {gigabytes(total)} in all, {gigabytes(free)} free; {remedy}"]
    return [], []
