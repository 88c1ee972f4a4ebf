"""Everything that can be decided about a run without torch: its flags, their checks, its plan.

Only the standard library is imported, so `--help` and a typo answer at once. Every problem found is
reported together with the others, and ends the process with exit code 2.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
MODEL, DATA = "stable-diffusion-v1-5/stable-diffusion-v1-5", "lambdalabs/naruto-blip-captions"
MOVED_MODELS = {"runwayml/stable-diffusion-v1-5": MODEL}
# What a checkpoint's trainer_state.json holds.
STATE = {"step", "seed", "effective_batch", "rows", "use_ema", "ema_step", "scaler", "loss"}
STATE |= {"prediction_type", "base_model", "args"}
# What a run writes into its output folder, besides checkpoints and logs.
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
OUTPUT = (*PARTS, "model_index.json", "README.md", "samples")
# The optional packages, by the flag value that needs them, and what `pip install` calls them.
PACKAGES = {
    "report_to swanlab": "swanlab",
    "report_to tensorboard": "tensorboard",
    "report_to wandb": "wandb",
    "use_8bit_adam True": "torchao",
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


def stop(problems):
    """Print every problem on standard error, one a line, and exit with code 2. Nothing happens if there are none."""
    if not problems:
        return
    for problem in problems:
        # Of the processes on one machine, which find the same problems, the first speaks for all.
        if os.environ.get("LOCAL_RANK", "0") == "0" or "LOCAL_RANK" in problem:
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
    group.add_argument("--cache_dir", help="Folder for models and data sets downloaded from the Hub.")

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
    group.add_argument("--use_8bit_adam", action="store_true", help="Keep AdamW's moments in 8 bits (needs torchao).")
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


def integer(low, high=None, *, multiple_of=1):
    """Return a flag type for whole numbers from `low` to `high` that are multiples of `multiple_of`."""
    allowed = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    if multiple_of > 1:
        allowed = f"a multiple of {multiple_of}, at least {low}"

    def parse(text):
        accepted = re.fullmatch(r"[+-]?\d+", text.strip()) is not None
        value = int(text) if accepted else 0
        accepted = accepted and low <= value <= (value if high is None else high) and value % multiple_of == 0
        return value if accepted else Rejected(f"{text}: must be {allowed}")

    parse.metavar = "N"
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
    if args.dream_training and args.prediction_type == "v_prediction":
        problems.append("--dream_training: defined for epsilon only; leave out --prediction_type v_prediction")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        problems.append(f"--learning_rate {args.learning_rate}: must be above 1e-7, where the polynomial schedule ends")
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
        "validation_epochs": args.validation_prompts,
        "tracker_project_name": args.report_to != "none",
        "logging_dir": args.report_to != "none",
    }
    for flag in (flag for flag, used in needs.items() if flag in given and not used):
        yield f"--{flag} changes nothing in this run: what it adjusts is off"


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
        problems.extend(pipeline_problems(flag, name))
        for revision in ("revision", "non_ema_revision"):
            if getattr(args, revision) is not None:
                problems.append(
                    f"--{revision} {getattr(args, revision)}: {name} is a local folder, which has no revisions"
                )
    if args.non_ema_revision is None:
        args.non_ema_revision = args.revision


def pipeline_problems(flag, folder):
    """Name what keeps a local folder from being a diffusers pipeline: no index, or parts that the index lists."""
    index = Path(folder, "model_index.json")
    if not os.path.isdir(folder):
        return [f"{flag} {folder}: no such folder (a Hub model is written owner/name)"]
    if not index.is_file():
        return [f"{flag} {folder}: no model_index.json in it, so it is not a diffusers pipeline"]
    try:
        parts = json.loads(index.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError) as error:
        return [f"{flag} {folder}: its model_index.json cannot be read: {error}"]
    # A part is written as [library, class], or [null, null] where there is none.
    parts = [name for name, value in parts if isinstance(value, list) and value and value[0] is not None]
    missing = ", ".join(name for name in parts if not Path(folder, name).is_dir())
    return [f"{flag} {folder}: its model_index.json lists {missing}, which is not there"] if missing else []


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
    if wanted is not None:
        if args.overwrite_output_dir:
            problems.append("--overwrite_output_dir: would delete the run that --resume_from_checkpoint goes on with")
        args.resume_from_checkpoint = find_checkpoint(wanted, output, problems, notices)
    if not args.output_dir or (output.exists() and not output.is_dir()):
        problems.append(f"--output_dir {args.output_dir}: must be a folder, there already or not")
    subfolder = args.train_data_dir and os.path.join(args.dataset_name or "", args.train_data_dir)
    inputs = {
        "--pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "--dataset_name": args.dataset_name,
    }
    inputs |= {"--train_data_dir": subfolder, "the folder of the scripts": os.path.dirname(__file__)}
    taken = [name for name, folder in inputs.items() if folder and output.resolve() == Path(folder).resolve()]
    problems.extend(f"--output_dir {output}: is {name} itself; choose another folder" for name in taken)
    if args.output_dir and not taken:
        problems.extend(conflicts(output, wanted is None, args.resume_from_checkpoint, args.overwrite_output_dir))
    inside = Path(args.logging_dir).parts
    if not inside or inside[0] == "/" or ".." in inside or is_ours(inside[0]):
        problems.append(f"--logging_dir {args.logging_dir}: must be a folder of its own inside the output folder")


def conflicts(output, fresh, checkpoint, overwrite):
    """Say which run, or what else, a run would write over that goes on from `checkpoint` or is `fresh`."""
    complete = checkpoints(output)
    elsewhere = checkpoint is not None and checkpoint.parent.resolve() != output.resolve()
    if not complete and not (output / "model_index.json").exists():
        foreign = ", ".join(name for name in (*PARTS, "README.md") if (output / name).exists())
        if foreign:
            yield f"--output_dir {output}: holds {foreign}, of no run; choose another folder"
    elif (fresh or elsewhere) and not overwrite:
        yield (
            f"--output_dir {output}: already holds a run; add --resume_from_checkpoint latest to go on with it, "
            "--overwrite_output_dir to delete it, or choose another folder"
        )
    elif checkpoint is not None and not elsewhere and checkpoint.name != complete[-1].name:
        yield (
            f"--resume_from_checkpoint {checkpoint}: {output} holds later ones, up to {complete[-1].name}; "
            "resume from latest, delete them, or choose another --output_dir"
        )


def find_checkpoint(wanted, output, problems, notices):
    """Return the folder that --resume_from_checkpoint means, or None where there is none."""
    complete = checkpoints(output)
    if wanted != "latest":
        for folder in (output / wanted, Path(wanted)):
            if is_complete(folder):
                return folder
        known = ", ".join(folder.name for folder in complete) or "none"
        problems.append(f"--resume_from_checkpoint {wanted}: no checkpoint there (complete in {output}: {known})")
        return None
    incomplete = [folder for folder in numbered_folders(output) if folder not in complete]
    notices.extend(f"{folder}: not a complete checkpoint, left alone" for folder in incomplete)
    if complete:
        return complete[-1]
    if (output / "model_index.json").exists():
        problems.append(f"--resume_from_checkpoint latest: no checkpoint in {output}, only an exported pipeline")
    else:
        notices.append(f"--resume_from_checkpoint latest: no checkpoint in {output}, so this run starts fresh")
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


def numbered_folders(output_dir):
    """Return the folders of `output_dir` named checkpoint-N, by ascending N."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    folders = [path for path in folders if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name)[1]))


def is_complete(folder):
    """Say whether a folder holds a whole checkpoint: it was renamed into place with its state file inside."""
    return (folder / "trainer_state.json").is_file()


def checkpoints(output_dir):
    """Return the complete checkpoints of `output_dir`, oldest first."""
    return [folder for folder in numbered_folders(output_dir) if is_complete(folder)]


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arithmetic of a run. A step is an optimizer step; steps are counted from 1 once they are done.

    Attributes:
        rows (int): rows of the data set that are trained on.
        processes (int): processes that share each step.
        batch_per_process (int): samples of one step that one process sees.
        effective_batch (int): samples of one step.
        steps_per_epoch (int): steps after which every row has been seen once more, rounded up.
        max_steps (int): steps of the whole run.
        learning_rate (float): peak learning rate, after --scale_lr.
        checkpoint_bytes (int): size of one checkpoint: float32 weights, AdamW's two moments, and the EMA.
    """

    rows: int
    processes: int
    batch_per_process: int
    effective_batch: int
    steps_per_epoch: int
    max_steps: int
    learning_rate: float
    checkpoint_bytes: int
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    validation_epochs: int | None

    @classmethod
    def of(cls, args, rows, processes, parameters):
        """Return the plan for these arguments, this many rows, this many processes, and a UNet of this size."""
        batch_per_process = args.train_batch_size * args.gradient_accumulation_steps
        effective_batch = batch_per_process * processes
        steps_per_epoch = math.ceil(rows / effective_batch)
        return cls(
            rows=rows,
            processes=processes,
            batch_per_process=batch_per_process,
            effective_batch=effective_batch,
            steps_per_epoch=steps_per_epoch,
            max_steps=args.max_train_steps or args.num_train_epochs * steps_per_epoch,
            learning_rate=args.learning_rate * (effective_batch if args.scale_lr else 1),
            checkpoint_bytes=parameters * (4 + 2 * (1 if args.use_8bit_adam else 4) + (4 if args.use_ema else 0)),
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            validation_epochs=args.validation_epochs if args.validation_prompts else None,
        )

    def saves_after(self, step):
        """Say whether a checkpoint is due after `step`: at every interval, and at the end."""
        return step % self.checkpointing_steps == 0 or step == self.max_steps

    def validates_after(self, step):
        """Say whether a validation is due after `step`: after epochs 1, 1 + V, 1 + 2V, …, and at the end."""
        if self.validation_epochs is None:
            return False
        epoch, remainder = divmod(step, self.steps_per_epoch)
        return step == self.max_steps or (remainder == 0 and (epoch - 1) % self.validation_epochs == 0)

    def positions(self, step, rank=0):
        """Return the positions of the sample stream that process `rank` consumes in step `step`, counted from 0."""
        first = step * self.effective_batch + rank * self.batch_per_process
        return range(first, first + self.batch_per_process)

    def __str__(self):
        saves = sum(map(self.saves_after, range(1, self.max_steps + 1)))
        validations = sum(map(self.validates_after, range(1, self.max_steps + 1)))
        kept = min(saves, self.checkpoints_total_limit or saves)
        size = self.checkpoint_bytes / 1e9
        return (
            f"  rows             {self.rows}\n"
            f"  effective batch  {self.effective_batch} ({self.batch_per_process} x {self.processes} process(es))\n"
            f"  steps            {self.max_steps} ({self.steps_per_epoch} per epoch, "
            f"{self.max_steps / self.steps_per_epoch:.1f} epochs)\n"
            f"  learning rate    {self.learning_rate:g}\n"
            f"  checkpoints      {saves}, {kept} of them kept: {size:.2f} GB each, {kept * size:.2f} GB in all\n"
            f"  validations      {validations}"
        )


def resume_problems(saved, args, plan, seed):
    """Compare the run that a checkpoint belongs to with this one: what must agree for the stream to go on."""
    flags = {
        "seed": ("--seed", seed),
        "effective_batch": ("--train_batch_size, --gradient_accumulation_steps", plan.effective_batch),
        "rows": ("--dataset_name, --train_data_dir, --max_train_samples", plan.rows),
        "use_ema": ("--use_ema", args.use_ema),
    }
    problems = [
        f"{flag}: {name} is {value}, but {saved[name]} in the run that --resume_from_checkpoint goes on with"
        for name, (flag, value) in flags.items()
        if saved[name] != value
    ]
    if saved["step"] > plan.max_steps:
        problems.append(
            f"--max_train_steps: the checkpoint is at step {saved['step']}, past the last, {plan.max_steps}"
        )
    return problems
