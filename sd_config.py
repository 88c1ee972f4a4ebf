"""Everything that can be decided about a run without torch: its flags, their checks, its plan.

Only the standard library is imported, so `--help` and a typo answer at once. Every problem found is
reported together with the others, and ends the process with exit code 2.
"""

import argparse
import difflib
import importlib.util
import json
import logging
import math
import os
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
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
MODEL, DATA = "stable-diffusion-v1-5/stable-diffusion-v1-5", "lambdalabs/naruto-blip-captions"
MOVED_MODELS = {"runwayml/stable-diffusion-v1-5": MODEL}
MANIFEST = "manifest.json"
# What a checkpoint's trainer_state.json holds.
STATE = {"step", "seed", "effective_batch", "data", "max_steps", "ema_step", "scaler", "loss"}
STATE |= {"prediction_type", "base_model", "micro_batch_size", "args"}
# The flags that change what is trained, besides those that a resumed run must share with its past.
TRAINING = """
    pretrained_model_name_or_path revision variant skip_bad_rows resolution center_crop random_flip
    image_interpolation_mode caption_dropout learning_rate scale_lr lr_scheduler lr_warmup_steps adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm use_ema prediction_type snr_gamma noise_offset input_perturbation
    dream_training dream_detail_preservation mixed_precision allow_tf32 low_memory
""".split()  # noqa: SIM905 (as one list of strings it would fill the page)
SHARD_ROWS = 256  # rows encoded between two moments at which a killed run loses nothing
FROZEN_BYTES = 2_043_000_000  # VAE, text encoder and safety checker of SD1.5 in float32, where they are not yet here
# What a run writes into its output folder, besides checkpoints and logs.
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
OUTPUT = (*PARTS, "model_index.json", "README.md", "samples")
# The parts that are loaded, and their classes.
CLASSES = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
CLASSES |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
# The optional packages, by the flag value that needs them, and what `pip install` calls them.
PACKAGES = {
    "report_to swanlab": "swanlab",
    "report_to tensorboard": "tensorboard",
    "report_to wandb": "wandb",
    "use_8bit_adam True": "torchao",
    "low_memory True": "torchao",
    "enable_xformers_memory_efficient_attention True": "xformers",
}


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """Parse and check the command line of the trainer.

    Args:
        argv (list[str], optional): the arguments; by default those of the process.

    Returns:
        argparse.Namespace: one attribute per flag. `resume_from_checkpoint` is the folder found, or None.

    Exits with code 2, after naming every problem found, if any flag or combination of flags is wrong.
    """
    args, given, problems = build_parser().parse_all(argv)
    notices = []
    if not problems:  # a value that failed its own check would only cause confusing follow-up messages
        resolve(args, given, problems, notices)
    stop(problems)
    if os.environ.get("RANK", "0") == "0":
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)
    return args


def announce_imports():
    """Say why nothing happens for a while, and keep the libraries from talking while they are imported."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("Loading PyTorch and diffusers takes some seconds.", flush=True)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def stop(problems, alone=False):
    """Print every problem on standard error, one a line, and exit with code 2. Nothing happens if there are none.

    Of the processes on one machine, which find the same problems, the first speaks for all, unless one is `alone`.
    """
    if not problems:
        return
    for problem in problems:
        if alone or os.environ.get("LOCAL_RANK", "0") == "0" or "LOCAL_RANK" in problem:
            print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def build_parser():  # noqa: PLR0915 (a list, to be read as one)
    """Return the trainer's parser: every flag, its type, default and help, in groups."""
    parser = Parser(description="Fine-tune all weights of Stable Diffusion's UNet on pictures with captions.")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="Base model: a Hub id (owner/name), or a local folder with a diffusers pipeline.",
    )
    group.add_argument("--revision", help="Branch, tag or commit of the base model on the Hub.")
    group.add_argument("--variant", help="Variant of the weight files to load, for example fp16.")
    group.add_argument(
        "--non_ema_revision",
        help="Revision of the UNet to start training from, where it differs from --revision (which then starts the "
        "EMA). Default: the same as --revision.",
    )
    group.add_argument(
        "--cache_dir",
        help="Folder for models and data sets downloaded from the Hub, and for what --cache_latents keeps.",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        default="lambdalabs/naruto-blip-captions",
        help="Training data: a Hub id, or a local folder that the datasets library can read (parquet, pictures with a "
        "metadata.jsonl, or save_to_disk).",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    group.add_argument(
        "--train_data_dir",
        help="Folder of pictures with a metadata.jsonl. Given alone, it replaces --dataset_name; given with it, it is "
        "the subfolder of that data set to use.",
    )
    group.add_argument("--image_column", default="image", help="Column that holds the pictures.")
    group.add_argument("--caption_column", default="text", help="Column that holds a caption, or a list of captions.")
    group.add_argument(
        "--max_train_samples", type=integer(1), help="Train on a random subset of this many rows. Default: all rows."
    )
    group.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="Decode every picture before training (once: the result is kept) and train without those that cannot be.",
    )
    group.add_argument(
        "--resolution",
        type=integer(8, multiple_of=8),
        default=512,
        help="Side in pixels of the square pictures trained on: the shorter side is resized to it, the longer cropped.",
    )
    group.add_argument("--center_crop", action="store_true", help="Crop the centre. Default: a random place.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the samples left to right.")
    group.add_argument(
        "--image_interpolation_mode",
        type=choice("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"),
        default="bilinear",
        help="Filter used to resize the pictures.",
    )
    group.add_argument(
        "--caption_dropout",
        type=real(0, 1),
        default=0.0,
        help="Probability of training a sample on the empty caption. Classifier-free guidance wants about 0.1.",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=integer(0),
        default=0,
        help="Processes that read and decode pictures. 0: the training process does. The result does not depend on it.",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--seed",
        type=integer(0, 2**32 - 1),
        help="Seed of every random draw of the run. Default: one is drawn and printed.",
    )
    group.add_argument(
        "--train_batch_size", type=integer(1), default=16, help="Samples in one micro-batch, per device."
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=integer(1),
        default=1,
        help="Micro-batches whose gradients are averaged into one optimizer step.",
    )
    group.add_argument("--num_train_epochs", type=integer(1), default=100, help="Passes over the data.")
    group.add_argument(
        "--max_train_steps", type=integer(1), help="Optimizer steps of the whole run. Overrides --num_train_epochs."
    )
    group.add_argument("--learning_rate", type=real(0), default=1e-4, help="Peak learning rate.")
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by batch size, accumulation steps and number of processes.",
    )
    group.add_argument(
        "--lr_scheduler",
        type=choice("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        default="constant",
        help="How the learning rate moves over the run.",
    )
    group.add_argument(
        "--lr_warmup_steps",
        type=integer(0),
        default=500,
        help="Steps in which the learning rate climbs to its peak. The schedule `constant` has no warm-up.",
    )
    group.add_argument("--adam_beta1", type=real(0, 1, below=True), default=0.9, help="Decay of AdamW's first moment.")
    group.add_argument("--adam_beta2", type=real(0, 1, below=True), default=0.999, help="Decay of the second moment.")
    group.add_argument("--adam_weight_decay", type=real(0), default=1e-2, help="Decoupled weight decay.")
    group.add_argument("--adam_epsilon", type=real(0), default=1e-8, help="Term added to AdamW's denominator.")
    group.add_argument(
        "--use_8bit_adam",
        action="store_true",
        help="Keep AdamW's moments in 8 bits (needs torchao, which compiles its part of a step at the first one).",
    )
    group.add_argument(
        "--max_grad_norm",
        type=real(0, above=True, infinite=True),
        default=1.0,
        help="Global norm to which gradients are clipped. inf: never.",
    )
    group.add_argument(
        "--use_ema",
        action="store_true",
        help="Keep an exponential moving average of the weights: validated, and exported as the UNet.",
    )

    group = parser.add_argument_group("loss")
    group.add_argument(
        "--prediction_type",
        type=choice("epsilon", "v_prediction"),
        help="What the UNet predicts. Default: what the base model's scheduler says.",
    )
    group.add_argument(
        "--snr_gamma", type=real(0, above=True), help="Min-SNR loss weighting; 5.0 is usual. Default: off."
    )
    group.add_argument("--noise_offset", type=real(0), default=0.0, help="Scale of a noise constant over each channel.")
    group.add_argument(
        "--input_perturbation",
        type=real(0),
        default=0.0,
        help="Scale of extra noise added to the UNet's input but not to its target; 0.1 is usual.",
    )
    group.add_argument(
        "--dream_training", action="store_true", help="DREAM: rectify the target with one more forward pass."
    )
    group.add_argument(
        "--dream_detail_preservation",
        type=real(0, above=True),
        default=1.0,
        help="DREAM's exponent p: larger preserves more detail.",
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--cache_latents",
        type=choice("auto", "on", "off"),
        default="auto",
        help="Encode every picture and caption once, and keep the result in --cache_dir, or else in the output folder. "
        "auto: if the crop is fixed (--center_crop), each view is used more than once, and the disk has room.",
    )
    group.add_argument(
        "--micro_batch_size",
        type=integer(1, word="auto"),
        help="Samples that go through the network at once, whatever --train_batch_size and "
        "--gradient_accumulation_steps make of a step: the training is the same. auto: as many as fit into memory. "
        "Default: --train_batch_size.",
    )
    group.add_argument(
        "--torch_compile", action="store_true", help="Compile the UNet: faster steps after minutes of compilation."
    )
    group.add_argument(
        "--low_memory",
        action="store_true",
        help="Weights in bf16 with stochastic rounding, AdamW's moments in 8 bits, the EMA in the host's memory, "
        "--gradient_checkpointing, --mixed_precision bf16, --use_8bit_adam (needs torchao).",
    )
    group.add_argument(
        "--mixed_precision",
        type=choice("no", "fp16", "bf16"),
        help="Precision of the forward and backward passes. Default: that of `accelerate config`, or no.",
    )
    group.add_argument("--allow_tf32", action="store_true", help="Let float32 matrix products use TF32.")
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, more time."
    )
    group.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention."
    )
    group.add_argument(
        "--local_rank",
        "--local-rank",
        type=integer(-1),
        default=-1,
        help="Accepted from launchers; must be LOCAL_RANK.",
    )

    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--output_dir",
        default="sd-naruto-model",
        help="Folder for the trained pipeline, checkpoints, samples and logs.",
    )
    group.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Delete the run that the output folder already holds (not its logs), once every check has passed.",
    )
    group.add_argument("--checkpointing_steps", type=integer(1), default=500, help="Steps between two checkpoints.")
    group.add_argument(
        "--checkpoints_total_limit", type=integer(1), help="Checkpoints to keep; the oldest go. Default: all of them."
    )
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="PATH|latest",
        help="Go on from a checkpoint: its folder, its name in the output folder (checkpoint-500), or latest.",
    )
    group.add_argument("--dry_run", action="store_true", help="Run every check, print the plan of the run, and stop.")

    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_prompts",
        nargs="*",
        metavar="PROMPT",
        default=[
            "Bill Gates with a hoodie",
            "John Oliver with Naruto style",
            "Lebron James with a hat",
            "Mickael Jackson as a ninja",
        ],
        help="Prompts to draw during training. The flag without any prompt turns validation off.",
    )
    group.add_argument(
        "--validation_guidance_scale",
        type=real(0),
        default=7.5,
        help="Strength of classifier-free guidance in these pictures; up to 1 turns it off.",
    )
    group.add_argument(
        "--validation_samples",
        type=integer(0),
        default=0,
        help="Rows to keep out of training, on which every validation measures the loss: always the same rows, noise "
        "and timesteps. A resumed run must keep out as many.",
    )
    group.add_argument(
        "--validation_epochs",
        type=integer(1),
        default=5,
        help="Epochs between two validations. The first comes after the first epoch, the last at the end.",
    )

    group = parser.add_argument_group("logging")
    group.add_argument(
        "--report_to",
        type=choice("swanlab", "tensorboard", "wandb", "none"),
        default="swanlab",
        help="Where metrics and sample images go.",
    )
    group.add_argument("--tracker_project_name", default="SD-Naruto", help="Name of the project in the tracker.")
    group.add_argument("--logging_dir", default="logs", help="Folder inside the output folder for the tracker's files.")
    return parser


class Parser(argparse.ArgumentParser):
    """An argument parser that finds all problems before it reports any, and abbreviates nothing."""

    def __init__(self, **kwargs):
        super().__init__(
            usage="%(prog)s [--flag value ...]", allow_abbrev=False, formatter_class=HelpFormatter, **kwargs
        )

    def error(self, message):
        stop([f"{message} (--help lists all flags)"])

    def parse_all(self, argv=None):
        """Return the namespace, the set of flags that were given, and the list of problems."""
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        absent = object()
        # argparse fills in a default only where the namespace has nothing yet: what stays absent was not given.
        args, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent)))
        given = {name for name, value in vars(args).items() if value is not absent}
        for name in defaults.keys() - given:
            setattr(args, name, defaults[name])
        problems = [f"--{name} {value}" for name, value in vars(args).items() if isinstance(value, Rejected)]
        return args, given, [*self.unknown_flags(unknown), *problems]

    def unknown_flags(self, unknown):
        """Name the arguments that are no flags, each with the flag that it resembles most."""
        for index, argument in enumerate(unknown):
            if not argument.startswith("-"):
                if index == 0 or "=" in unknown[index - 1] or not unknown[index - 1].startswith("-"):
                    yield f"{argument}: belongs to no flag"
                continue
            name = argument.split("=")[0]
            close = difflib.get_close_matches(
                name.replace("-", "_").replace("__", "--", 1), self._option_string_actions, 1
            )
            yield f"{name}: no such flag" + (f"; did you mean {close[0]}?" if close else " (--help lists all flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default where it is a value (where it is nothing, the help says so in words), and short placeholders."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", "TEXT")


class Rejected(str):
    """What a flag's type returns instead of a value that it does not accept: the value, and what is allowed."""


def integer(low, high=None, *, multiple_of=1, word=None):
    """Return a flag type for whole numbers from `low` to `high` that are multiples of `multiple_of`, or one `word`."""
    allowed = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    if multiple_of > 1:
        allowed = f"a multiple of {multiple_of}, at least {low}"
    if word:
        allowed += f", or {word}"

    def parse(text):
        if text == word:
            return text
        accepted = re.fullmatch(r"[+-]?\d{1,18}", text.strip()) is not None
        value = int(text) if accepted else 0
        accepted = accepted and low <= value <= (value if high is None else high) and value % multiple_of == 0
        return value if accepted else Rejected(f"{text}: must be {allowed}")

    parse.metavar = f"N|{word}" if word else "N"
    return parse


def real(low, high=math.inf, *, above=False, below=False, infinite=False):
    """Return a flag type for numbers from `low` to `high`; `above` and `below` exclude the ends themselves."""
    allowed = f"a number {'above' if above else 'of at least'} {low}"
    if high < math.inf:
        allowed += f" and {'below' if below else 'of at most'} {high}"
    if infinite:
        allowed += ", or inf"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        accepted = (low < value if above else low <= value) and (value < high if below else value <= high)
        return value if accepted and (infinite or value < math.inf) else Rejected(f"{text}: must be {allowed}")

    parse.metavar = "X"
    return parse


def choice(*values):
    """Return a flag type that accepts only the given words."""

    def parse(text):
        return text if text in values else Rejected(f"{text}: must be one of {', '.join(values)}")

    parse.metavar = "|".join(values)
    return parse


# ------------------------------------------------------------------------------------------------------------
# Checks that need more than one flag, or the file system
# ------------------------------------------------------------------------------------------------------------


def resolve(args, given, problems, notices):
    """Complete `args` in place from the environment and the file system, adding to `problems` and `notices`."""
    for condition, package in PACKAGES.items():
        flag, value = condition.split()
        if str(getattr(args, flag)) == value and importlib.util.find_spec(package) is None:
            problems.append(f"--{condition.removesuffix(' True')}: {package} is not installed: pip install {package}")
    compiled = [name for name in ("torch_compile", "use_8bit_adam", "low_memory") if getattr(args, name)]
    if compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        problems.append(f"--{compiled[0]}: needs a C++ compiler, such as g++; name another in the variable CXX")
    if args.dream_training and args.prediction_type == "v_prediction":
        problems.append("--dream_training: defined for epsilon only; leave out --prediction_type v_prediction")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        problems.append(f"--learning_rate {args.learning_rate}: must be above 1e-7, where the polynomial schedule ends")
    if args.image_column == args.caption_column:
        problems.append(f"--caption_column {args.caption_column}: is --image_column too")
    if args.cache_dir is not None and os.path.isfile(args.cache_dir):
        problems.append(f"--cache_dir {args.cache_dir}: is a file, and must be a folder")
    resolve_memory(args, problems)
    resolve_rank(args, problems)
    resolve_model(args, problems, notices)
    resolve_data(args, given, problems)
    resolve_output(args, problems, notices)
    notices.extend(ignored_flags(args, given))


def ignored_flags(args, given):
    """Say which of the flags given change nothing, and why."""
    if args.lr_scheduler == "constant" and args.lr_warmup_steps > 0:
        yield f"--lr_warmup_steps {args.lr_warmup_steps}: unused, `constant` has no warm-up (constant_with_warmup has)"
    if {"max_train_steps", "num_train_epochs"} <= given:
        yield f"--max_train_steps {args.max_train_steps} overrides --num_train_epochs {args.num_train_epochs}"
    needs = {
        "dream_detail_preservation": args.dream_training,
        "validation_epochs": args.validation_prompts or args.validation_samples,
        "validation_guidance_scale": args.validation_prompts,
        "tracker_project_name": args.report_to != "none",
        "logging_dir": args.report_to != "none",
    }
    for flag in (flag for flag, used in needs.items() if flag in given and not used):
        yield f"--{flag} changes nothing in this run: what it adjusts is off"


def resolve_memory(args, problems):
    """Complete what the flags for memory and speed leave open, and check that they fit together."""
    if args.cache_latents == "on" and not args.center_crop:
        problems.append("--cache_latents on: a random crop is never the same twice; add --center_crop")
    batch, size = args.train_batch_size * args.gradient_accumulation_steps, args.micro_batch_size
    if size is None:
        args.micro_batch_size = args.train_batch_size
    elif size != "auto" and batch % size:
        product = f"--train_batch_size x --gradient_accumulation_steps = {batch}"
        problems.append(f"--micro_batch_size {size}: must be a divisor of {product}, or auto")
    if args.low_memory:
        args.use_8bit_adam = args.gradient_checkpointing = True
        args.mixed_precision = args.mixed_precision or "bf16"
        if args.mixed_precision != "bf16":
            problems.append(f"--mixed_precision {args.mixed_precision}: --low_memory needs bf16")


def resolve_rank(args, problems):
    """Take the rank from the launcher's environment; a flag that contradicts it means a broken launch."""
    value = os.environ.get("LOCAL_RANK", "-1")
    if not re.fullmatch(r"-1|\d+", value):
        problems.append(f"LOCAL_RANK {value!r}: a launcher sets it to a whole number; unset it")
        return
    rank = int(value)
    if args.local_rank not in (-1, max(rank, 0)):
        problems.append(
            f"--local_rank {args.local_rank}: LOCAL_RANK is {rank if rank >= 0 else 'not set'}; leave it out"
        )
    args.local_rank = rank


def resolve_model(args, problems, notices):
    """Map the old id of SD1.5, find out whether the base model is local, and check what can be checked of it."""
    flag, name = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
    if name in MOVED_MODELS and not os.path.isdir(name):
        args.pretrained_model_name_or_path = MOVED_MODELS[name]
        notices.append(f"{flag} {name} is gone from the Hub: using {MOVED_MODELS[name]}, where it moved")
    elif is_local(name):
        problems.extend(pipeline_problems(flag, name, args.variant))
        for revision in ("revision", "non_ema_revision"):
            if getattr(args, revision) is not None:
                problems.append(
                    f"--{revision} {getattr(args, revision)}: {name} is a local folder, which has no revisions"
                )
    if args.non_ema_revision is None:
        args.non_ema_revision = args.revision


def pipeline_problems(flag, name, variant=None):
    """Name what keeps a local folder from being a pipeline like SD1.5's, as far as can be seen without loading it."""
    folder = Path(name)
    file = folder / "model_index.json"
    if not folder.is_dir():
        return [f"{flag} {name}: no such folder (a Hub model is written owner/name)"]
    if not file.is_file():
        return [f"{flag} {name}: no model_index.json in it, so it is not a diffusers pipeline"]
    try:
        parts = json.loads(file.read_text(encoding="utf-8")).items()
        # A part is written as [library, class], or [null, null] where there is none.
        parts = {part: kind for part, kind in parts if isinstance(kind, list) and any(kind)}
        for file in (file for part in parts for file in (folder / part).glob("*.json")):
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        return [f"{flag} {name}: its {file.relative_to(folder)} cannot be read: {error}"]
    missing = [part for part in parts if not (folder / part).is_dir()]
    problems = [f"its model_index.json lists {part}, which is not there" for part in missing]
    weights = []
    for part, kind in CLASSES.items():
        if parts.get(part) not in (kind, [kind[0], f"{kind[1]}Fast"]):
            problems.append(f"its {part} is {parts.get(part)}, and must be {kind}")
        elif part not in (*missing, "tokenizer"):
            found = [path.name for path in (folder / part).iterdir() if path.suffix in (".safetensors", ".bin")]
            problems.extend([] if found else [f"no weights in its {part}"])
            weights.extend(found)
    if variant is not None and weights and not any(f".{variant}." in file for file in weights):
        problems.append(f"no weights of --variant {variant} in it")
    return [f"{flag} {name}: {problem}" for problem in problems]


def resolve_data(args, given, problems):
    """Decide between --dataset_name and --train_data_dir, and check that local folders exist."""
    if args.train_data_dir is not None and "dataset_name" not in given:
        args.dataset_name = None
    if args.train_data_dir is not None and (args.dataset_name is None or is_local(args.dataset_name)):
        within = Path(args.dataset_name or "")
        if not (within / args.train_data_dir).is_dir():
            problems.append(f"--train_data_dir {within / args.train_data_dir}: no such folder")
    if args.dataset_name is not None and is_local(args.dataset_name) and not os.path.isdir(args.dataset_name):
        problems.append(f"--dataset_name {args.dataset_name}: no such folder (a Hub data set is written owner/name)")
    saved = args.dataset_name is not None and is_saved_dataset(args.dataset_name)
    if args.dataset_config_name is not None and (args.dataset_name is None or saved):
        problems.append(f"--dataset_config_name {args.dataset_config_name}: this folder has no configurations")
    if args.train_data_dir is not None and saved:
        problems.append(f"--train_data_dir {args.train_data_dir}: {args.dataset_name} has no subfolders to choose from")


def resolve_output(args, problems, notices):
    """Find the checkpoint to resume from, and refuse to write where no run may write."""
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    try:
        there = output.exists()
    except OSError as error:  # a name that is too long
        problems.append(f"--output_dir {args.output_dir}: {error.strerror}")
        return
    if wanted is not None:
        if args.overwrite_output_dir:
            problems.append("--overwrite_output_dir: would delete the run that --resume_from_checkpoint goes on with")
        args.resume_from_checkpoint = find_checkpoint(wanted, output, problems, notices)
    files = [path for path in (output, *output.parents) if path.is_file()]
    if not args.output_dir or files:
        problems.append(f"--output_dir {args.output_dir}: must be a folder, there already or not")
    elif not os.access(disk_of(output), os.W_OK | os.X_OK):
        problems.append(f"--output_dir {args.output_dir}: no permission to write in {disk_of(output)}")
    for name in ("samples", args.logging_dir):
        if there and (output / name).is_file():
            problems.append(f"--output_dir {output}: {name} in it is a file, and must be a folder")
    subfolder = args.train_data_dir and os.path.join(args.dataset_name or "", args.train_data_dir)
    inputs = {
        "--pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "--dataset_name": args.dataset_name,
    }
    inputs |= {"--train_data_dir": subfolder, "the folder of the scripts": os.path.dirname(__file__)}
    taken = [name for name, folder in inputs.items() if folder and output.resolve() == Path(folder).resolve()]
    problems.extend(f"--output_dir {output}: is {name} itself; choose another folder" for name in taken)
    if args.output_dir and not taken:
        how = {"fresh": wanted is None, "latest": wanted == "latest", "overwrite": args.overwrite_output_dir}
        problems.extend(conflicts(output, args.resume_from_checkpoint, **how))
    inside = Path(args.logging_dir).parts
    if not inside or inside[0] == "/" or ".." in inside or is_ours(inside[0]):
        problems.append(f"--logging_dir {args.logging_dir}: must be a folder of its own inside the output folder")


def conflicts(output, checkpoint, *, fresh, latest, overwrite):
    """Say which run, or what else, a run would write over that goes on from `checkpoint` or is `fresh`."""
    known = checkpoints(output)
    elsewhere = checkpoint is not None and checkpoint.parent.resolve() != output.resolve()
    if not known and not (output / "model_index.json").exists():
        foreign = ", ".join(name for name in (*PARTS, "README.md") if (output / name).exists())
        if foreign:
            yield f"--output_dir {output}: holds {foreign}, of no run; choose another folder"
    elif (fresh or elsewhere) and not overwrite:
        yield (
            f"--output_dir {output}: already holds a run; add --resume_from_checkpoint latest to go on with it, "
            "--overwrite_output_dir to delete it, or choose another folder"
        )
    elif checkpoint is not None and not elsewhere and not latest and checkpoint.name != known[-1].name:
        yield (
            f"--resume_from_checkpoint {checkpoint}: {output} holds later ones, up to {known[-1].name}; "
            "resume from latest, delete them, or choose another --output_dir"
        )


def find_checkpoint(wanted, output, problems, notices):
    """Return the folder that --resume_from_checkpoint means, or None where there is none."""
    flag, known = f"--resume_from_checkpoint {wanted}", checkpoints(output)
    if wanted != "latest":
        folder = next((path for path in (output / wanted, Path(wanted)) if path.is_dir()), None)
        if folder is None:
            names = ", ".join(path.name for path in known) or "none"
            problems.append(f"{flag}: no checkpoint there (in {output}: {names})")
        elif wrong := damage(folder):
            problems.append(f"{flag}: not a whole checkpoint: {wrong}")
        return folder
    damaged = []
    for folder in reversed(known):
        wrong = damage(folder)
        if wrong is None:
            notices.extend(damaged)
            return folder
        damaged.append(f"{folder}: skipped, not a whole checkpoint: {wrong}")
    if damaged:
        problems.extend(damaged)
        problems.append(f"{flag}: none is whole; --overwrite_output_dir instead starts over")
    elif (output / "model_index.json").exists():
        problems.append(f"{flag}: no checkpoint in {output}, only an exported pipeline")
    else:
        notices.append(f"{flag}: no checkpoint in {output}, so this run starts fresh")
    return None


def is_local(name):
    """Say whether a model or data set name means a path: anything but owner/name with no folder called owner.

    The tutorial's own two ids are never paths: the model's owner has the name of the folder that it has people unpack.
    """
    name = str(name)
    if os.path.exists(name) or HUB_ID.fullmatch(name) is None:
        return True
    return os.path.isdir(os.path.dirname(name)) and name not in (MODEL, DATA)


def is_saved_dataset(folder):
    """Say whether a folder was written by `save_to_disk` of the datasets library."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints on disk
# ------------------------------------------------------------------------------------------------------------


def is_ours(name):
    """Say whether a run writes a file or folder of this name into its output folder, besides its logs."""
    return name in OUTPUT or CHECKPOINT_NAME.fullmatch(name) is not None


def leftovers(args):
    """Return what a start deletes: the litter of a run that was killed, and the run --overwrite_output_dir gives up."""
    output = Path(args.output_dir)
    ours = [path for path in output.glob("*") if args.overwrite_output_dir and is_ours(path.name)]
    return [*output.glob(".*checkpoint-*"), *output.glob(".export"), *ours]


def checkpoints(output_dir):
    """Return the folders of `output_dir` named checkpoint-N by ascending N, whole or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    folders = [path for path in folders if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=number)


def number(checkpoint):
    """Return the step at which a checkpoint was saved, from its folder's name."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def lock(folder, wait=False):
    """Hold a folder for this process until it ends, however it ends. If another holds it, wait or exit with code 2.

    The lock is lost as soon as this process closes any file of that name, so nothing else may open it. Windows, and
    file systems that know no locks, are trusted.

    Returns:
        the open file that keeps the lock.
    """
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 (to stay open)
    except OSError as error:
        return stop(
            [f"{'--cache_dir' if wait else '--output_dir'} {folder}: cannot be written to: {error}"], alone=True
        )
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        stop([f"--output_dir {folder}: another process is training into it"], alone=True)
    except OSError:  # no locks here
        pass
    return file


def flush(folder, within=True):
    """Have the system write a folder to disk, and all that is `within`: a power cut takes what is only in memory."""
    if os.name == "nt":  # has no descriptors of folders
        return
    for path in (*(folder.rglob("*") if within else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def seal(folder):
    """Add the manifest by which `damage` knows whether a folder's files are whole, and flush it all to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    flush(folder)


def damage(folder, prefix=""):
    """Return what keeps a folder from being a checkpoint as it was saved, in words, or None if nothing does.

    Of its files only those whose names start with `prefix` are looked at, and the trainer's state.
    """
    name = MANIFEST
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = {k: v for k, v in manifest.items() if k.startswith((prefix, "trainer_state.json"))}
        for name, (size, _) in manifest.items():  # first what is quickly found
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        changed = [name for name, (_, value) in manifest.items() if checksum(folder / name) != value]
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or what it lists cannot be read: {error}"
    if changed:
        return f"{changed[0]} is not as it was saved (its checksum differs)"
    return None if "trainer_state.json" in manifest else f"{MANIFEST} lists no trainer_state.json"


def checksum(path):
    """Return the CRC-32 of a file, which finds damage, not forgery, at twice the speed of SHA-256."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def read_state(folder, flag="--resume_from_checkpoint"):
    """Return the trainer's state kept in a checkpoint folder, as the dictionary that was saved."""
    try:
        state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
        if not state.keys() >= STATE:
            raise ValueError("it is not one that this trainer wrote")
        return state
    except (OSError, ValueError, AttributeError) as error:
        return stop([f"{flag} {folder}: its trainer_state.json cannot be read: {error}"])


# ------------------------------------------------------------------------------------------------------------
# The plan of a run
# ------------------------------------------------------------------------------------------------------------


class Plan:
    """The arithmetic of a run. A step is an optimizer step; steps are counted from 1 once they are done.

    Args:
        args (argparse.Namespace): the flags.
        rows (int): rows of the data set that are trained on.
        processes (int): processes that share each step.
        parameters (int): weights of the UNet.
        texts (int): distinct captions.
        width (int): numbers in what the text encoder makes of one token.

    Attributes:
        batch_per_process (int): samples of one step that one process sees.
        effective_batch (int): samples of one step.
        steps_per_epoch (int): steps after which every row has been seen once more, rounded up.
        max_steps (int): steps of the whole run.
        learning_rate (float): peak learning rate, after --scale_lr.
        memory (dict[str, int]): bytes of what is trained, by its name.
        views (int): pictures made of each row: itself, and with --random_flip its mirror image.
        encoded (Path or None): folder of the encoded pictures and captions, if they are to be kept.
        encoded_bytes (int): their size.
        checkpoint_bytes (int): size of one checkpoint: weights, AdamW's two moments, and the EMA.
        export_bytes (int): size of the exported pipeline.
        validates (bool): whether there is anything to draw or to measure during the training.
    """

    def __init__(self, args, rows, processes, parameters, texts=0, width=768):
        self.args, self.rows, self.processes = args, rows, processes
        self.batch_per_process = args.train_batch_size * args.gradient_accumulation_steps
        self.effective_batch = self.batch_per_process * processes
        self.steps_per_epoch = math.ceil(rows / self.effective_batch)
        self.max_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        self.learning_rate = args.learning_rate * (self.effective_batch if args.scale_lr else 1)
        each = 2 if args.low_memory else 4
        self.memory = {
            "weights": each * parameters,
            "gradients": each * parameters,
            "optimizer state": 2 * (1 if args.use_8bit_adam else 4) * parameters,
            "EMA (host)" if args.low_memory else "EMA": 4 * parameters if args.use_ema else 0,
        }
        *_, average = self.memory.values()
        self.checkpoint_bytes = sum(self.memory.values()) - self.memory["gradients"]
        base = Path(args.pretrained_model_name_or_path)
        frozen = sum(size_on_disk(base / part) for part in PARTS if part != "unet") if base.is_dir() else FROZEN_BYTES
        self.export_bytes = self.memory["weights"] + average + frozen
        self.views = 2 if args.random_flip else 1
        latents = 2 * 4 * (args.resolution // 8) ** 2  # mean and log-variance, 4 channels
        self.encoded_bytes = 4 * (rows * self.views * latents + (texts + 1) * 77 * width)
        self.encoded, self.encoded_why = self.choose_encoded()
        self.validates = bool(args.validation_prompts or args.validation_samples)

    def choose_encoded(self):
        """Return the folder for encoded pictures and captions, or None and why there is none."""
        args, folder = self.args, Path(self.args.cache_dir or self.args.output_dir)
        if args.cache_latents == "off":
            return None, "--cache_latents off"
        if args.cache_latents == "auto":
            if not args.center_crop:
                return None, "random crops"
            if self.max_steps * self.effective_batch <= self.rows * self.views:
                return None, "each is used only once"
            room = shutil.disk_usage(disk_of(folder)).free - 2 * self.checkpoint_bytes - self.export_bytes
            if room + encoded_size(folder) < self.encoded_bytes:
                return None, f"{gigabytes(self.encoded_bytes)} would not fit in {folder}"
        return folder, "once"

    def saves_after(self, step):
        """Say whether a checkpoint is due after `step`: at every interval, and at the end."""
        return step % self.args.checkpointing_steps == 0 or step == self.max_steps

    def saves_from(self, step):
        """Return how many checkpoints are still due when `step` steps are done."""
        interval = self.args.checkpointing_steps
        return math.ceil(self.max_steps / interval) - step // interval if step < self.max_steps else 0

    def validates_after(self, step):
        """Say whether a validation is due after `step`: after epochs 1, 1 + V, 1 + 2V, …, and at the end."""
        if not self.validates or step == 0:
            return False
        epoch, remainder = divmod(step, self.steps_per_epoch)
        return step == self.max_steps or (remainder == 0 and (epoch - 1) % self.args.validation_epochs == 0)

    def positions(self, step, rank=0):
        """Return the positions of the sample stream that process `rank` consumes in step `step`, counted from 0."""
        first = step * self.effective_batch + rank * self.batch_per_process
        return range(first, first + self.batch_per_process)

    def __str__(self):
        saves, epoch = self.saves_from(0), self.steps_per_epoch
        regular = range(epoch, self.max_steps, epoch * self.args.validation_epochs)  # and one at the end in any case
        validations = len(regular) + 1 if self.validates else 0
        kept = min(saves, self.args.checkpoints_total_limit or saves)
        each = gigabytes(self.checkpoint_bytes)
        memory = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.memory.items())
        encoding = f"pictures and captions, each time they are used ({self.encoded_why})"
        if self.encoded:
            encoding = f"pictures and captions once, kept in {self.encoded} ({gigabytes(self.encoded_bytes)})"
        return (
            f"  rows             {self.rows}, besides {self.args.validation_samples} kept out of training\n"
            f"  effective batch  {self.effective_batch} ({self.batch_per_process} x {self.processes} process(es))\n"
            f"  micro-batches    {self.args.micro_batch_size}\n"
            f"  steps            {self.max_steps} ({self.steps_per_epoch} per epoch, "
            f"{self.max_steps / self.steps_per_epoch:.1f} epochs)\n"
            f"  learning rate    {self.learning_rate:g}\n"
            f"  memory           {memory}; activations come on top\n"
            f"  encoding         {encoding}\n"
            f"  checkpoints      {saves}, {kept} of them kept: {each} each, "
            f"{gigabytes(kept * self.checkpoint_bytes)} in all\n"
            f"  export           {gigabytes(self.export_bytes)}\n"
            f"  validations      {validations}"
        )


def gigabytes(size):
    """Return a number of bytes in words."""
    return f"{size / 1e9:.2f} GB"


def disk_of(folder):
    """Return the folder itself, or as much of its path as is there."""
    return next(path for path in (folder, *folder.resolve().parents) if path.is_dir())


def size_on_disk(path):
    """Return the bytes of a file, or of all files in a folder; 0 where there is neither."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def encoded_size(folder):
    """Return the bytes of the encoded pictures and captions that runs have left in a folder."""
    return sum(map(size_on_disk, Path(folder).glob("encoded-*")))


def compare_runs(saved, plan, now, data):
    """Compare the run that a checkpoint belongs to with the one that is to go on from it.

    Args:
        saved (dict): the trainer's state in the checkpoint.
        plan (Plan): of the run that is to go on.
        now (dict): its arguments, with the seed and the precision that it has in the end.
        data (str): fingerprint of its data set.

    Returns:
        tuple[list[str], list[str]]: problems, where the stream of samples could not go on or the checkpoint lacks what
        is needed, and warnings, where the rest of the training will differ from its beginning.
    """
    before, batch = saved["args"], "--train_batch_size x --gradient_accumulation_steps x processes"
    identity = {
        "--seed": (now["seed"], saved["seed"]),
        batch: (plan.effective_batch, saved["effective_batch"]),
        "fingerprint of the data set": (data, saved["data"]),
        "--max_train_samples": (now["max_train_samples"], before.get("max_train_samples")),
        "--validation_samples": (now["validation_samples"], before.get("validation_samples", 0)),
        "--use_8bit_adam (which --low_memory sets)": (now["use_8bit_adam"], before.get("use_8bit_adam")),
    }
    if now["use_ema"]:  # to go on without an average is possible, to start one in the middle is not
        identity["--use_ema"] = (True, before.get("use_ema"))
    problems = [
        f"{name}: {here} here, but {there} in the run that --resume_from_checkpoint goes on with"
        for name, (here, there) in identity.items()
        if here != there
    ]
    if saved["step"] > plan.max_steps:
        problems.append(f"--max_train_steps {plan.max_steps}: the checkpoint is already at step {saved['step']}")

    changes = {f"--{name}": (now[name], before.get(name)) for name in TRAINING}
    schedule = now["lr_scheduler"]
    if schedule not in ("constant", "constant_with_warmup"):
        changes[f"steps that --lr_scheduler {schedule} stretches over"] = (plan.max_steps, saved["max_steps"])
    return problems, [
        f"{name}: {then} so far, {here} from here" for name, (here, then) in changes.items() if here != then
    ]


def compare_disk(plan, step):
    """Compare what a run that stands at `step` is to write with the room there is.

    Returns:
        tuple[list[str], list[str]]: problems, where not even two checkpoints (those already there count) and the
        export fit, and warnings, where not all of them do, or they take more than 100 GB.
    """
    args, output = plan.args, Path(plan.args.output_dir).resolve()
    there = [] if args.overwrite_output_dir else checkpoints(output)
    free = shutil.disk_usage(disk_of(output)).free + sum(map(size_on_disk, leftovers(args)))
    saves, limit = plan.saves_from(step), args.checkpoints_total_limit
    most = saves if limit is None else min(saves, max(1, limit + 1 - len(there)))  # the oldest goes after the new one
    least = min(saves, 1 if there else 2)
    encoded = max(0, plan.encoded_bytes - encoded_size(plan.encoded)) if plan.encoded else 0
    least, total = (encoded + plan.export_bytes + count * plan.checkpoint_bytes for count in (least, most))
    sizes = (
        f"{most} checkpoint(s) of {gigabytes(plan.checkpoint_bytes)} and an export of {gigabytes(plan.export_bytes)}"
    )
    if free < least:
        return [f"--output_dir {output}: {gigabytes(free)} free, at least {gigabytes(least)} needed ({sizes})"], []
    if free < total or total > 100e9:
        remedy = (
            "--checkpoints_total_limit 2 keeps the last two"
            if limit is None or limit > 2
            else "another disk may have more"
        )
        return [], [f"{sizes} make {gigabytes(total)}, {gigabytes(free)} are free; {remedy}"]
    return [], []
