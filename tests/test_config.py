"""The command line: flags and their defaults, checks and their messages, checkpoints, and the plan of a run."""

import argparse
import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sd_config
from conftest import DENOISING_STEPS, ROOT, TUTORIAL, assert_says, only

# Every flag and its default. NONE and OFF are the flags with the default None or False.
NONE = """
    revision variant dataset_config_name train_data_dir max_train_samples cache_dir seed max_train_steps snr_gamma
    non_ema_revision prediction_type mixed_precision checkpoints_total_limit resume_from_checkpoint micro_batch_size
    validation_steps validation_negative_prompt
"""
OFF = """
    center_crop random_flip gradient_checkpointing scale_lr dream_training use_8bit_adam allow_tf32 use_ema
    enable_xformers_memory_efficient_attention overwrite_output_dir dry_run skip_bad_rows torch_compile low_memory
    offload_ema aspect_buckets cuda_graphs
"""
DEFAULTS = {
    **dict.fromkeys(NONE.split()),
    **dict.fromkeys(OFF.split(), False),
    "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "dataset_name": "lambdalabs/naruto-blip-captions",
    **{"image_column": "image", "caption_column": "text", "image_interpolation_mode": "bilinear"},
    **{"output_dir": "sd-naruto-model", "logging_dir": "logs", "report_to": "swanlab"},
    **{"tracker_project_name": "SD-Naruto", "lr_scheduler": "constant", "cache_latents": "auto"},
    **{"resolution": 512, "train_batch_size": 16, "gradient_accumulation_steps": 1, "num_train_epochs": 100},
    **{"lr_warmup_steps": 500, "dataloader_num_workers": 0, "local_rank": -1, "checkpointing_steps": 500},
    **{"validation_epochs": 5, "validation_samples": 0},
    **{"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2},
    **{"adam_epsilon": 1e-8, "max_grad_norm": 1.0, "dream_detail_preservation": 1.0, "noise_offset": 0.0},
    **{"input_perturbation": 0.0, "caption_dropout": 0.0, "validation_guidance_scale": 7.5},
    "validation_prompts": [
        "Bill Gates with a hoodie",
        "John Oliver with Naruto style",
        "Lebron James with a hat",
        "Mickael Jackson as a ninja",
    ],
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
RESUME = "--resume_from_checkpoint"
BASE, HUB = "--pretrained_model_name_or_path", "stable-diffusion-v1-5/stable-diffusion-v1-5"
FOUND = argparse.Namespace(origin="a file")  # what is known of a package that is installed
# What is in the folder of every test. The checkpoints are whole.
FILES = """
    file empty/other.txt photos/portraits/metadata.jsonl blocked/logs drawn/samples mine/README.md mine/vae/keep.txt
    saved/state.json saved/portraits/state.json saved_splits/dataset_dict.json exported/model_index.json
    run/checkpoint-9/trainer_state.json run/checkpoint-10/trainer_state.json checkpoint-9/trainer_state.json
    elsewhere/checkpoint-3/trainer_state.json elsewhere/best/trainer_state.json na[1]me/other.txt a::b/other.txt
"""


def pipeline(folder):
    """Make a folder with the index and the subfolders of a pipeline."""
    for part in PARTS:
        (folder / part).mkdir(parents=True)
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    index = {part: ["library", kinds.get(part, "Class")] for part in PARTS}
    index |= {"safety_checker": [None, None], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Each test has its own folder with `FILES` and two pipelines, and an environment without a launcher."""
    for file in FILES.split():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}", encoding="utf-8")
    for state in tmp_path.rglob("trainer_state.json"):
        state.write_text('{"effective_batch": 4}', encoding="utf-8")
        sd_config.write_manifest(state.parent)
    own = tmp_path / "exported" / sd_config.OWN
    own.mkdir()
    (own / "manifest.json").write_text('{"model_index.json": [2, 0]}', encoding="utf-8")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/checkpoint-3").symlink_to(tmp_path / "elsewhere/checkpoint-3")
    for name in ("base", "partial"):
        pipeline(tmp_path / name)
    (tmp_path / "partial/vae").rmdir()
    (tmp_path / "partial/model_index.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sd_config, "FROZEN_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def accept(capsys):
    """A function that parses flags, and returns them with the notices. Warm-up is off, or it would cause a notice."""

    def run(*flags):
        args = sd_config.parse_args(["--lr_warmup_steps=0", *flags])
        out, err = capsys.readouterr()
        assert not out
        assert all(line.startswith("note: --") or "checkpoint-" in line for line in err.splitlines())
        return args, err.splitlines()

    return run


@pytest.fixture
def refuse(capsys):
    """A function that parses flags, which must end with exit code 2, and returns the messages."""

    def run(*flags):
        with pytest.raises(SystemExit) as exit_info:
            sd_config.parse_args(flags)
        out, err = capsys.readouterr()
        assert (exit_info.value.code, out) == (2, "")
        assert all(line.startswith("error: ") for line in err.splitlines())
        return [line.removeprefix("error: ") for line in err.splitlines()]

    return run


# The flags


def test_every_flag_has_its_default_which_passes_every_check(accept):
    args, notices = accept("--lr_warmup_steps=500", "--lr_scheduler=constant_with_warmup")
    found = vars(args) | {"lr_scheduler": "constant"}
    assert found == DEFAULTS
    assert {name: type(value) for name, value in found.items()} == {n: type(value) for n, value in DEFAULTS.items()}
    assert notices == []


def test_command_of_the_tutorial_parses_unchanged(accept):
    args, notices = accept(*shlex.split(TUTORIAL))
    changed = dict.fromkeys(("use_ema", "center_crop", "random_flip", "gradient_checkpointing"), True)
    changed |= {"train_batch_size": 1, "gradient_accumulation_steps": 4, "seed": 42}
    changed |= {"max_train_steps": 15000, "learning_rate": 1e-5, "lr_warmup_steps": 0}
    assert vars(args) == DEFAULTS | changed
    assert notices == []


def test_defaults_can_be_edited_in_the_file(tmp_path, monkeypatch, capsys):
    pipeline(tmp_path / "stable-diffusion-v1-5")
    (tmp_path / "naruto-blip-captions").mkdir()
    text = (ROOT / "sd_config.py").read_text(encoding="utf-8")
    for flag in ("pretrained_model_name_or_path", "dataset_name"):
        entry = f'("{flag}", "{DEFAULTS[flag]}"'
        assert text.count(entry) == 1
        text = text.replace(entry, f'("{flag}", "./{DEFAULTS[flag].split("/")[1]}"')
    (tmp_path / "edited.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited")
    args = edited.parse_args([])
    assert args.pretrained_model_name_or_path == "./stable-diffusion-v1-5"
    assert args.dataset_name == "./naruto-blip-captions"
    (tmp_path / "stable-diffusion-v1-5/model_index.json").unlink()  # checked like a folder that was given
    with pytest.raises(SystemExit):
        edited.parse_args([])
    assert "./stable-diffusion-v1-5: no model_index.json" in capsys.readouterr().err


def test_defaults_are_on_the_hub_whatever_lies_in_the_folder(accept, tmp_path):
    """The tutorial unpacks the model into a folder with the name of the Hub model's owner."""
    for owner in ("stable-diffusion-v1-5", "lambdalabs"):
        (tmp_path / owner).mkdir()
    args = accept()[0]
    assert (args.pretrained_model_name_or_path, args.dataset_name) == (HUB, "lambdalabs/naruto-blip-captions")


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        sd_config.parse_args(["--help"])
    assert {f"--{name}" for name in DEFAULTS} <= set(capsys.readouterr().out.split())


# Values that are refused

# What is allowed, as the message says it, and values that are not.
BAD = {
    "at least -1": "local_rank=-2",
    "at least 0": """
        dataloader_num_workers=-1 learning_rate=-1e-5 lr_warmup_steps=-1 adam_weight_decay=-1 adam_epsilon=-1e-8
        noise_offset=-0.1 noise_offset=inf input_perturbation=-0.1 validation_samples=-1 validation_guidance_scale=-1
    """,
    "at least 0 and below 1": "adam_beta1=1 adam_beta2=-0.1",
    "at least 0 and of at most 1": "caption_dropout=1.1 caption_dropout=nan",
    "above 0": "snr_gamma=0 dream_detail_preservation=0",
    "above 0, or inf": "max_grad_norm=0 max_grad_norm=nan",
    "at least 1": """
        max_train_samples=0 train_batch_size=0 gradient_accumulation_steps=0 num_train_epochs=0 max_train_steps=0
        checkpointing_steps=0 checkpoints_total_limit=0 validation_epochs=0
        validation_steps=0
    """,
    "at least 1, or auto": "micro_batch_size=0 micro_batch_size=all",
    "multiple of 8 of at least 8": "resolution=100",
    "from 0 to 4294967295": f"seed=4294967296 seed={'9' * 5000}",
    "a whole number": "train_batch_size=1.5",
    "a number": "learning_rate=fast",
    "auto, on, off": "cache_latents=yes",
    "no, fp16, bf16": "mixed_precision=fp8",
    "epsilon, v_prediction": "prediction_type=sample",
    "swanlab, tensorboard, wandb, none": "report_to=mlflow",
    "nearest, box, bilinear, hamming, bicubic, lanczos": "image_interpolation_mode=cubic",
    "linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup": "lr_scheduler=warp",
}
BAD_VALUES = [(flag, allowed) for allowed, flags in BAD.items() for flag in flags.split()]


@pytest.mark.parametrize(("flag", "allowed"), BAD_VALUES)
def test_bad_value_is_named_with_what_is_allowed(refuse, flag, allowed):
    problem = only(refuse(f"--{flag}"))
    assert problem.startswith(f"--{flag.replace('=', ' ')}: must be ")
    assert allowed in problem


def test_every_flag_with_a_range_was_given_a_bad_value():
    kinds = {names.split()[0]: kind for group in sd_config.FLAGS.values() for names, _, kind, _ in group}
    ranged = {name for name, kind in kinds.items() if callable(kind) and kind not in (str, bool, sd_config.PATH)}
    assert ranged == {flag.split("=")[0] for flag, _ in BAD_VALUES}


ENDS = """
    resolution=8 caption_dropout=0 caption_dropout=1 seed=0 seed=4294967295 learning_rate=0 adam_beta1=0
    max_grad_norm=inf max_train_samples=1 snr_gamma=1e-300
"""


@pytest.mark.parametrize("end", ENDS.split())
def test_ends_of_the_ranges_are_accepted(accept, end):
    name, value = end.split("=")
    assert getattr(accept(f"--{end}")[0], name) == float(value)


def test_all_problems_are_reported_together(refuse):
    problems = refuse("--seed=-1", "--lr_scheduler", "warp", "--learing_rate=1", "--report_to=mlflow")
    flags = ["--learing_rate:", "--lr_scheduler", "--report_to", "--seed"]
    assert sorted(problem.split()[0] for problem in problems) == flags
    problems = refuse("--train_data_dir=missing", "--output_dir=run", "--local_rank=3", f"{BASE}=empty")
    flags = ["--local_rank", "--output_dir", BASE, "--train_data_dir"]
    assert sorted(problem.split()[0] for problem in problems) == flags


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--learing_rate 1e-5", "--learing_rate: no such flag; did you mean --learning_rate?"),
        ("--train-batch-size=4", "--train-batch-size: no such flag; did you mean --train_batch_size?"),
        ("-seed 5", "-seed: no such flag; did you mean --seed?"),
        ("--qqqqqq", "--qqqqqq: no such flag (--help lists all flags)"),
        ("--train_batch 4", "--train_batch: no such flag; did you mean --train_batch_size?"),
        ("naruto --use_ema", "naruto: belongs to no flag"),
        ("--seed=1 naruto", "naruto: belongs to no flag"),
        ("--seed", "argument --seed: expected one argument (--help lists all flags)"),
        ("--use_ema=yes", "argument --use_ema: ignored explicit argument 'yes' (--help lists all flags)"),
    ],
)
def test_what_is_no_flag_is_named_and_corrected(refuse, flags, problem):
    """An abbreviation is refused, too, because a new flag could make it ambiguous."""
    assert refuse(*flags.split()) == [problem]


# Checks of several flags, the environment and the file system

# These are not inside the output folder, or a run writes something else there.
LOGS = ("", "/tmp/logs", "a/../../b", "samples/logs", "checkpoint-5")
# Flags, the beginning of the message, and a part of it.
REFUSED = [
    "--dream_training --prediction_type=v_prediction | --dream_training | epsilon only",
    "--lr_scheduler=polynomial --learning_rate=1e-7 | --learning_rate 1e-07 | above 1e-7",
    "--cache_dir=file | --cache_dir file | is a file",
    "--cache_latents=on | --cache_latents on | add --center_crop",
    *(f"--aspect_buckets --resolution={n} | --resolution {n} | must be 128, 192, 256, ..." for n in (64, 136)),
    "--aspect_buckets --torch_compile | --torch_compile | for every shape of --aspect_buckets",
    *(
        f"--validation_negative_prompt=x --validation_guidance_scale={scale} | --validation_negative_prompt "
        "| has no effect … guidance_scale above 1"
        for scale in (0, 1)
    ),
    "--train_batch_size=3 --gradient_accumulation_steps=2 --micro_batch_size=4 | --micro_batch_size 4 "
    "| must be a divisor of --train_batch_size x --gradient_accumulation_steps = 6, or auto",
    "--low_memory --mixed_precision=fp16 | --mixed_precision fp16 | --low_memory needs bf16",
    f"{BASE}=./missing | {BASE} ./missing | no such folder",
    f"{BASE}=missing | {BASE} missing | a Hub model is written owner/name",
    f"{BASE}=photos/missing | {BASE} photos/missing | no such folder",
    f"{BASE}=file | {BASE} file | no such folder",
    f"{BASE}=empty | {BASE} empty | no model_index.json",
    f"{BASE}=partial | {BASE} partial | has no folder vae",
    f"{BASE}=base --revision=main | --revision main | base is a local folder",
    "--dataset_name=missing | --dataset_name missing | a Hub data set is written owner/name",
    "--train_data_dir=missing | --train_data_dir missing | no such folder",
    "--dataset_name=photos --train_data_dir=missing | --train_data_dir photos/missing | no such folder",
    "--dataset_name=saved --train_data_dir=portraits | --train_data_dir portraits | saved has no subfolders",
    "--train_data_dir=photos --dataset_config_name=en | --dataset_config_name en | no configurations",
    "--dataset_name=saved_splits --dataset_config_name=en | --dataset_config_name en | no configurations",
    "--output_dir=file | --output_dir file | must be a folder",
    "--output_dir=file/run | --output_dir file/run | must be a folder",
    f"--output_dir={'x' * 256} | --output_dir {'x' * 256} | names have at most 255 bytes",
    f"--cache_dir=a/{'火' * 86}/b | --cache_dir a/{'火' * 86}/b | names have at most 255 bytes",
    "--train_data_dir=a::b | --train_data_dir a::b | rename the folder",
    *(f"--dataset_name={name} | --dataset_name {name} | rename the folder" for name in ("na[1]me", "a::b")),
    "--output_dir=blocked | --output_dir blocked | logs in it is a file",
    "--output_dir=new --cache_dir=new/.train_sd1-5_naruto | --output_dir new | mix with --cache_dir",
    "--tracker_project_name=caf\udce9 | --tracker_project_name 'caf\\udce9' | is not UTF-8",
    "--output_dir=drawn | --output_dir drawn | no run wrote samples in it",
    *(f"--logging_dir={name} | --logging_dir {name} | must be a folder of its own inside" for name in LOGS),
    "--output_dir=run | --output_dir run | holds a run; add --resume_from_checkpoint latest",
    "--output_dir=exported | --output_dir exported | holds a run",
    f"{BASE}=base --output_dir=photos/../base/ --overwrite_output_dir | --output_dir photos/../base | mix with {BASE}",
    "--dataset_name=photos --output_dir=photos | --output_dir photos | mix with --dataset_name",
    "--train_data_dir=photos --output_dir=./photos | --output_dir photos | mix with --train_data_dir",
    "--dataset_name=photos --train_data_dir=portraits --output_dir=photos/portraits "
    "| --output_dir photos/portraits | mix with --train_data_dir",
    f"--output_dir=run {RESUME}=latest --overwrite_output_dir | --overwrite_output_dir | {RESUME}",
    f"--output_dir=run {RESUME}=checkpoint-11 "
    f"| {RESUME} checkpoint-11 | no checkpoint there (in run: checkpoint-9, checkpoint-10)",
    f"--output_dir=new {RESUME}=photos | {RESUME} photos | not a whole checkpoint: manifest.json is missing",
    f"--output_dir=exported {RESUME}=latest | {RESUME} latest | no checkpoint in exported, only an exported pipeline",
    f"--output_dir=run {RESUME}=checkpoint-9 | {RESUME} run/checkpoint-9 | holds later ones, up to checkpoint-10",
    "--output_dir=mine --overwrite_output_dir | --output_dir mine | no run wrote vae/keep.txt, README.md in it",
    "--output_dir= | --output_dir  | must be a folder",
    f"--output_dir=run {RESUME}=elsewhere/checkpoint-3 | --output_dir run | holds a run",
    # Overwriting or exporting there would replace the README.md of the scripts.
    f"--overwrite_output_dir --output_dir={shlex.quote(str(ROOT))} | --output_dir {ROOT} | mix with the folder",
]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(refuse, case):
    flags, names, says = case.split(" | ")
    assert_says(only(refuse(*shlex.split(flags))), f"{names}: … {says}")


ACCEPTED = [
    f"{BASE}=base",
    "--dataset_name=photos --train_data_dir=portraits",
    "--aspect_buckets --resolution=320",
    "--lr_scheduler=polynomial --learning_rate=2e-7",
    "--lr_scheduler=cosine --learning_rate=1e-7",
    "--dataset_config_name=en",
    "--dataset_name=photos --dataset_config_name=en",
    "--dataset_name=saved",
    "--output_dir=photos",
    "--output_dir=run --overwrite_output_dir",
    "--dream_training --dream_detail_preservation=2",
    "--lr_scheduler=constant_with_warmup --lr_warmup_steps=500",
    "--tracker_project_name=x --logging_dir=y",
    "--validation_steps=5 --validation_negative_prompt=x",
    "--validation_steps=5 --validation_prompts --validation_samples=3",
]


@pytest.mark.parametrize("flags", ACCEPTED)
def test_accepted_without_a_word(accept, flags):
    assert accept(*flags.split())[1] == []


# Flags, the beginning of the notice, and a part of it.
NOTICED = [
    "--lr_warmup_steps=500 | --lr_warmup_steps 500 | constant_with_warmup",
    "--max_train_steps=5 --num_train_epochs=3 | --max_train_steps 5 | overrides --num_train_epochs 3",
    "--dream_detail_preservation=2 | --dream_detail_preservation | changes nothing",
    "--validation_steps=5 --validation_epochs=3 | --validation_steps 5 | overrides --validation_epochs 3",
    "--validation_epochs=2 --validation_prompts | --validation_epochs | changes nothing",
    "--validation_steps=2 --validation_prompts | --validation_steps | changes nothing",
    "--validation_negative_prompt=x --validation_prompts | --validation_negative_prompt | changes nothing",
    "--report_to=none --tracker_project_name=x | --tracker_project_name | changes nothing",
    "--report_to=none --logging_dir=x | --logging_dir | changes nothing",
    f"--output_dir=new {RESUME}=latest | {RESUME} latest | no checkpoint in new, so this run starts fresh",
    f"--output_dir=photos {RESUME}=latest | {RESUME} latest | no checkpoint in photos, so this run starts fresh",
]


@pytest.mark.parametrize("case", NOTICED)
def test_accepted_with_a_notice(accept, case):
    flags, name, says = case.split(" | ")
    assert_says(only(accept(*flags.split())[1]), f"note: {name} … {says}")


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ("--enable_xformers_memory_efficient_attention", "xformers"),
        ("--use_8bit_adam", "torchao"),
        ("--low_memory", "torchao"),
        ("--report_to wandb", "wandb"),
    ],
)
def test_missing_package_is_named_with_its_remedy(refuse, monkeypatch, flags, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else FOUND)
    problem = only(refuse(*flags.split()))
    assert problem == f"{flags}: {package} is not installed: pip install {package}"


@pytest.mark.parametrize("flag", ["--torch_compile", "--use_8bit_adam", "--low_memory"])
def test_what_is_compiled_needs_a_compiler(accept, refuse, monkeypatch, tmp_path, flag):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: FOUND)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(refuse(flag)) == f"{flag}: needs a C++ compiler, such as g++; name another in the variable CXX"
    assert accept()[1] == []
    other = tmp_path / "compiler"
    other.touch(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert accept(flag)[1] == []


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("", "its model_index.json cannot be read: "),
        ("[]", "its model_index.json cannot be read: "),
        ('{"extra": ["library", "Class"]}', "has no folder extra"),
        ('{"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}', "its scheduler is diffusers.FlowMatch"),
        (
            '{"vae": ["diffusers", "AutoencoderTiny"]}',
            "its vae is diffusers.AutoencoderTiny, but must be AutoencoderKL",
        ),
    ],
)
def test_index_that_does_not_fit_its_folder_is_refused(refuse, tmp_path, index, says):
    (tmp_path / "base/model_index.json").write_text(index, encoding="utf-8")
    assert only(refuse(f"{BASE}=base")).startswith(f"{BASE} base: {says}")


def test_micro_batches_as_large_as_fit_are_found_by_one_process_only(accept, refuse, monkeypatch):
    assert accept("--micro_batch_size=auto")[0].micro_batch_size == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert only(refuse("--micro_batch_size=auto")).startswith("--micro_batch_size auto: works in a run of one process")


@pytest.mark.parametrize(
    ("flags", "device", "processes", "system", "size", "halves"),
    [
        ("", "cuda", 1, "posix", 12, True),
        ("", "cuda", 1, "nt", 3, False),
        ("", "cuda", 2, "posix", 3, False),
        ("", "cpu", 1, "posix", 3, False),
        ("--micro_batch_size=6", "cuda", 1, "posix", 6, False),
        ("--micro_batch_size=auto", "cpu", 1, "posix", 12, True),
    ],
)
def test_micro_batches_fill_the_memory_only_where_more_is_an_error(
    monkeypatch, flags, device, processes, system, size, halves
):
    args = sd_config.parse_args(f"--train_batch_size=3 --gradient_accumulation_steps=4 {flags}".split())
    monkeypatch.setattr(sd_config, "os", argparse.Namespace(name=system))
    plan = sd_config.Plan(args, rows=9, processes=processes, parameters=1, device=device)
    assert (plan.micro_batch_size, plan.halves) == (size, halves)


def test_old_model_id_is_mapped_with_a_notice(accept):
    args, notices = accept(f"{BASE}=runwayml/stable-diffusion-v1-5")
    assert args.pretrained_model_name_or_path == HUB
    assert only(notices).startswith(f"note: {BASE} runwayml/stable-diffusion-v1-5 has moved")
    assert HUB in notices[0]


def launch(monkeypatch, rank):
    """Set what a launcher sets for a process of this rank. Without a launcher (None), nothing is set."""
    for name in ("RANK", "LOCAL_RANK") if rank is not None else ():
        monkeypatch.setenv(name, rank)


@pytest.mark.parametrize(
    ("launched", "flag"),
    [("0", "--local-rank=0"), ("1", "--local_rank=-1"), ("1", "--local_rank=1"), (None, "--local_rank=0")],
)
def test_local_rank_may_be_that_of_the_launcher(accept, monkeypatch, launched, flag):
    launch(monkeypatch, launched)
    accept(flag)


@pytest.mark.parametrize(
    ("launched", "flag", "says"),
    [
        ("1", "--local_rank=0", "--local_rank 0: LOCAL_RANK is 1"),  # of other problems, only the first process speaks
        (None, "--local_rank=2", "--local_rank 2: LOCAL_RANK is not set"),
    ],
)
def test_local_rank_must_be_that_of_the_launcher(refuse, monkeypatch, launched, flag, says):
    launch(monkeypatch, launched)
    assert only(refuse(flag)).startswith(says)


def test_only_the_first_process_prints_problems_and_notices(accept, refuse, monkeypatch):
    for rank, lines in (("0", 1), ("1", 0)):
        launch(monkeypatch, rank)
        assert len(refuse("--seed=-1")) == len(accept("--lr_warmup_steps=5")[1]) == lines


# The checkpoint to resume from


@pytest.mark.parametrize(
    ("output", "given", "found"),
    [
        ("run", "run/checkpoint-10/", "run/checkpoint-10"),
        ("run", "{here}/run/checkpoint-10", "run/checkpoint-10"),
        ("run", "checkpoint-10", "run/checkpoint-10"),
        ("run", "latest", "run/checkpoint-10"),
        ("new", "elsewhere/checkpoint-3", "elsewhere/checkpoint-3"),
        ("new", "{here}/elsewhere/best/", "elsewhere/best"),
        ("linked", "latest", "elsewhere/checkpoint-3"),  # a link, as to another disk, counts as in the folder
    ],
)
def test_checkpoint_is_found(accept, tmp_path, output, given, found):
    args, notices = accept(f"--output_dir={output}", f"{RESUME}={given.format(here=tmp_path)}")
    assert args.resume_from_checkpoint.resolve() == tmp_path / found
    assert notices == []


def test_latest_passes_over_what_is_no_whole_checkpoint(accept, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-old", ".checkpoint-100", "checkpoint-12.bak"):  # whole, but not named like checkpoints
        shutil.copytree(run / "checkpoint-9", run / name)
    for name in ("checkpoint-98", "checkpoint-99"):
        (run / name).mkdir()
    args, notices = accept("--output_dir=run", f"{RESUME}=latest")
    assert args.resume_from_checkpoint == Path("run/checkpoint-10")
    assert notices == [
        f"note: run/checkpoint-{step}: skipped, not a whole checkpoint: manifest.json is missing" for step in (99, 98)
    ]


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff\xfe", b"{}"])
def test_unreadable_state_is_a_message(tmp_path, capsys, content):
    """It names the entries that are missing."""
    file = tmp_path / "run/checkpoint-9/trainer_state.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        sd_config.read_state("run/checkpoint-9", "--checkpoint")
    assert exit_info.value.code == 2
    fields, absent = dataclasses.fields(sd_config.TrainerState), dataclasses.MISSING
    needed = [field for field in fields if field.default is field.default_factory is absent]
    missing = [f"'{field.name}'" for field in needed if content == b"{}"]
    says = "error: --checkpoint run/checkpoint-9: its trainer_state.json cannot be read: "
    assert_says(capsys.readouterr().err, " … ".join([says, *missing]))


def test_state_is_read_as_it_was_written_without_what_later_versions_add(tmp_path):
    fields = dataclasses.fields(sd_config.TrainerState)
    state, folder = sd_config.TrainerState(*range(len(fields))), tmp_path / "run/checkpoint-9"
    state.write(folder)
    file = folder / "trainer_state.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(saved | {"of_a_later_version": 1}), encoding="utf-8")
    assert sd_config.read_state(folder) == state


# Damaged checkpoints

UNREADABLE = "manifest.json or what it lists cannot be read: "


@pytest.fixture
def checkpoint(tmp_path):
    """The last checkpoint of `run`, which is whole, and whose files but the state have 15 bytes each."""
    folder = tmp_path / "run/checkpoint-10"
    shutil.rmtree(folder)
    for name in ("optimizer.pt", "trainer_state.json", "unet/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"fifteen bytes, ")
    (folder / "trainer_state.json").write_bytes(b'{"effective_batch": 4}')
    sd_config.write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("optimizer.pt", "fourteen bytes", "optimizer.pt has 14 bytes instead of 15"),
        ("trainer_state.json", "", "trainer_state.json has 0 bytes instead of 22"),
        ("optimizer.pt", "fifteen bytes; ", "optimizer.pt is not as it was saved (its checksum differs)"),
        ("unet/model.safetensors", None, "unet/model.safetensors is missing"),
        ("manifest.json", None, "manifest.json is missing"),
        ("manifest.json", "", f"{UNREADABLE}Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_damaged_file_of_a_checkpoint_is_named(accept, refuse, checkpoint, name, content, says):
    assert sd_config.find_damage(checkpoint) is None
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_text(content)
    assert sd_config.find_damage(checkpoint) == says
    args, notices = accept("--output_dir=run", f"{RESUME}=latest")
    assert args.resume_from_checkpoint == Path("run/checkpoint-9")
    assert notices == [f"note: run/checkpoint-10: skipped, not a whole checkpoint: {says}"]
    for given in ("checkpoint-10", "run/checkpoint-10"):
        assert refuse("--output_dir=run", f"{RESUME}={given}") == [f"{RESUME} {given}: not a whole checkpoint: {says}"]
    (checkpoint.with_name("checkpoint-9") / "trainer_state.json").unlink()
    assert refuse("--output_dir=run", f"{RESUME}=latest") == [
        f"run/checkpoint-10: skipped, not a whole checkpoint: {says}",
        "run/checkpoint-9: skipped, not a whole checkpoint: trainer_state.json is missing",
        f"{RESUME} latest: none is whole; to start over, give --overwrite_output_dir instead",
    ]


def test_every_flipped_bit_of_a_checkpoint_is_found(checkpoint):
    for name in ("optimizer.pt", "manifest.json"):
        content = (checkpoint / name).read_bytes()
        for index, bit in ((index, 1 << bit) for index in range(len(content)) for bit in range(8)):
            flipped = bytes([content[index] ^ bit])
            (checkpoint / name).write_bytes(content[:index] + flipped + content[index + 1 :])
            assert isinstance(sd_config.find_damage(checkpoint), str), (name, index, bit)
        (checkpoint / name).write_bytes(content)
    assert sd_config.find_damage(checkpoint) is None


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("{", UNREADABLE),
        ("[]", UNREADABLE),
        ('{"unet": 5}', UNREADABLE),
        ("{}", "manifest.json lists no trainer_state.json"),
        ('{"trainer_state.json": [22, "x"]}', "trainer_state.json is not as it was saved"),
        ('{"/optimizer.pt": [15, 0]}', "/optimizer.pt is missing"),
    ],
)
def test_manifest_that_no_checkpoint_has_is_damage(checkpoint, manifest, says):
    (checkpoint / "manifest.json").write_text(manifest, encoding="utf-8")
    assert sd_config.find_damage(checkpoint).startswith(says)


def test_folder_in_the_place_of_a_file_is_damage(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer.pt").mkdir()
    assert "optimizer.pt" in sd_config.find_damage(checkpoint)
    assert "manifest.json" in sd_config.find_damage(checkpoint / "trainer_state.json")


def test_with_its_manifest_all_of_a_checkpoint_is_flushed_to_disk(checkpoint, monkeypatch):
    flushed, original = set(), os.fsync

    def fsync(descriptor):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    sd_config.write_manifest(checkpoint)
    assert flushed == {checkpoint, *checkpoint.rglob("*")}
    assert checkpoint / "manifest.json" in flushed


# The comparison of two runs

RESUMED = f"--num_train_epochs=3 --output_dir=run {RESUME}=latest"


def compare(flags="", **changes):
    """Return the problems and the warnings of a run of 32 rows that goes on from a checkpoint with a changed state."""
    args = sd_config.parse_args(RESUMED.split() + flags.split())
    plan = sd_config.Plan(args, rows=32, processes=1, parameters=1)
    state = dict.fromkeys(field.name for field in dataclasses.fields(sd_config.TrainerState))
    state |= {"seed": 7, "effective_batch": 16, "data": "abc", "step": 6, "max_steps": 6, "prediction_type": "epsilon"}
    state["args"] = vars(sd_config.parse_args(RESUMED.split())) | changes.pop("args", {})
    saved = sd_config.TrainerState(**state | changes)
    settled = {"seed": 7, "prediction_type": args.prediction_type or "epsilon"}
    return sd_config.compare_runs(saved, plan, vars(args) | settled, data="abc")


PROBLEM, WARNING = 0, 1
COSINE = {"args": {"lr_scheduler": "cosine"}, "max_steps": 4}


@pytest.mark.parametrize(
    ("flags", "changes", "kind", "says"),
    [
        ("", {"seed": 8}, PROBLEM, "--seed: 7 here, but 8 in the run that --resume_from_checkpoint goes on with"),
        ("", {"effective_batch": 8}, PROBLEM, "--gradient_accumulation_steps x processes: 16 here, but 8 in the run"),
        (
            "",
            {"data": "def"},
            PROBLEM,
            "fingerprint of the data set (its pictures and captions): abc here, but def in the run",
        ),
        ("--max_train_samples=5", {}, PROBLEM, "--max_train_samples: 5 here, but None in the run"),
        ("--validation_samples=3", {}, PROBLEM, "--validation_samples: 3 here, but 0 in the run"),
        ("", {"args": {"use_8bit_adam": True}}, PROBLEM, "--use_8bit_adam (which --low_memory sets): False here, but"),
        ("--use_ema", {}, PROBLEM, "--use_ema: True here, but False in the run"),
        ("", {"step": 7}, PROBLEM, "--max_train_steps 6: the checkpoint is already at step 7"),
        ("--learning_rate=3e-5", {}, WARNING, "--learning_rate: 0.0001 so far, 3e-05 from here"),
        ("--snr_gamma=5", {}, WARNING, "--snr_gamma: None so far, 5.0 from here"),
        ("--lr_scheduler=cosine", COSINE, WARNING, "that --lr_scheduler cosine stretches over: 4 so far, 6 from here"),
        ("--prediction_type=v_prediction", {}, WARNING, "--prediction_type: epsilon so far, v_prediction from here"),
        ("--skip_bad_rows", {}, WARNING, "--skip_bad_rows: False so far, True from here"),
        ("", {"args": {"use_ema": True}}, WARNING, "--use_ema: True so far, False from here"),
    ],
)
def test_what_differs_from_the_run_so_far_is_said(flags, changes, kind, says):
    found = compare(flags, **changes)
    assert says in only(found[kind])
    assert kind == PROBLEM or found[PROBLEM] == []


def test_what_changes_nothing_is_not_spoken_of():
    assert compare() == ([], [])
    assert compare("--train_batch_size=8 --gradient_accumulation_steps=2") == ([], [])
    assert compare("--dataloader_num_workers=3 --checkpointing_steps=7 --validation_epochs=2") == ([], [])
    assert compare("--max_train_steps=50 --report_to=none --validation_prompts") == ([], [])
    assert compare("--prediction_type=epsilon") == ([], [])
    assert compare(args={"aspect_buckets": None}) == ([], []), "a checkpoint that was saved before there was the flag"


def test_every_flag_is_known_to_change_the_training_or_not_to():
    """A new flag must be added to one of these lists, so that a resumed run does not change without a warning."""
    neutral = """
        non_ema_revision cache_dir dataset_name dataset_config_name train_data_dir image_column caption_column
        dataloader_num_workers num_train_epochs max_train_steps gradient_checkpointing
        enable_xformers_memory_efficient_attention local_rank output_dir overwrite_output_dir checkpointing_steps
        checkpoints_total_limit resume_from_checkpoint dry_run validation_prompts validation_epochs report_to
        validation_guidance_scale tracker_project_name logging_dir train_batch_size gradient_accumulation_steps
        validation_negative_prompt validation_steps cache_latents micro_batch_size torch_compile offload_ema
        cuda_graphs
    """
    compared = {"seed", "max_train_samples", "validation_samples", "use_8bit_adam"}
    flags = set(vars(sd_config.parse_args([])))
    assert set(sd_config.TRAINING) | set(neutral.split()) | compared == flags


# The plan


def plan_of(flags, rows, processes=1, parameters=1):
    return sd_config.Plan(sd_config.parse_args(flags.split()), rows, processes, parameters)


@pytest.mark.parametrize(
    ("flags", "rows", "processes", "per_process", "effective", "per_epoch", "steps", "rate"),
    [
        ("", 1221, 1, 16, 16, 77, 7700, 1e-4),
        ("--train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=9", 1221, 1, 4, 4, 306, 9, 1e-4),
        ("--train_batch_size=2 --gradient_accumulation_steps=3 --scale_lr", 24, 4, 6, 24, 1, 100, 24e-4),
        ("--train_batch_size=2 --gradient_accumulation_steps=3 --num_train_epochs=3", 25, 4, 6, 24, 2, 6, 1e-4),
        ("--train_batch_size=4 --num_train_epochs=2 --max_train_steps=7", 3, 1, 4, 4, 1, 7, 1e-4),
    ],
)
def test_plan_counts(flags, rows, processes, per_process, effective, per_epoch, steps, rate):
    plan = plan_of(flags, rows, processes)
    assert (plan.batch_per_process, plan.effective_batch) == (per_process, effective)
    assert (plan.steps_per_epoch, plan.max_steps) == (per_epoch, steps)
    assert plan.learning_rate == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "saves", "validates"),
    [
        ("--num_train_epochs=6 --checkpointing_steps=5 --validation_epochs=2", {5, 10, 15, 18}, {3, 9, 15, 18}),
        ("--num_train_epochs=5 --checkpointing_steps=15 --validation_epochs=2", {15}, {3, 9, 15}),
        ("--max_train_steps=7 --checkpointing_steps=1 --validation_epochs=1", set(range(1, 8)), {3, 6, 7}),
        ("--max_train_steps=2", {2}, {2}),
        ("--max_train_steps=7 --validation_steps=2", {7}, {2, 4, 6, 7}),
        ("--max_train_steps=6 --validation_steps=2 --validation_epochs=1", {6}, {2, 4, 6}),
        ("--max_train_steps=6 --validation_steps=9 --validation_prompts --validation_samples=1", {6}, {6}),
        ("--max_train_steps=7 --validation_prompts", {7}, set()),
        ("--max_train_steps=7 --validation_prompts --validation_samples=1", {7}, {3, 7}),
    ],
)
def test_plan_saves_and_validates(flags, saves, validates):
    """An epoch has three steps here."""
    plan = plan_of(f"--train_batch_size=4 {flags}", rows=11)
    steps = range(1, plan.max_steps + 1)
    assert {step for step in steps if plan.saves_after(step)} == saves
    assert {step for step in steps if plan.validates_after(step)} == validates
    lines = dict(line.strip().split("  ", 1) for line in str(plan).splitlines())
    assert lines["checkpoints"].split(",")[0].strip() == str(len(saves))
    assert int(lines["validations"].split(",")[0]) == len(validates)


@pytest.mark.parametrize(("limit", "kept", "together"), [(2, 2, 27.50), (30, 30, 412.57), (31, 30, 412.57)])
def test_plan_says_what_the_checkpoints_weigh(limit, kept, together):
    """These are the sizes of the tutorial's run, with SD1.5's UNet: weights, two moments and the average in float32."""
    flags = f"--max_train_steps=15000 --use_ema --checkpoints_total_limit={limit}"
    plan = plan_of(flags, rows=1221, parameters=859_520_964)
    assert f"30, {kept} of them kept: 13.75 GB each, {together:.2f} GB in all" in str(plan)


@pytest.mark.parametrize(("limit", "kept"), [(1, 2), (2, 3), (9, 10), (10, 10), (11, 10), (None, 10)])
def test_plan_counts_the_best_checkpoint_besides_the_limit(limit, kept):
    flags = "--max_train_steps=100 --checkpointing_steps=10 --validation_samples=3"
    flags += f" --checkpoints_total_limit={limit}" if limit else ""
    assert f"10, {kept} of them kept" in str(plan_of(flags, rows=32))


@pytest.mark.parametrize(
    ("flags", "rows", "processes", "validations", "drawing"),
    [
        # Pictures, steps of each, and passes of a step; then steps, samples, and passes of each.
        ("", 20, 1, 601, 601 * 4 * 20 * 2 / (601 * 4 * 20 * 2 + 15000 * 4 * 4)),
        ("--validation_steps=500", 20, 1, 30, 30 * 4 * 20 * 2 / (30 * 4 * 20 * 2 + 15000 * 4 * 4)),
        ("--validation_steps=500 --dream_training", 20, 1, 30, 4800 / (4800 + 15000 * 4 * 5)),
        ("--validation_steps=500 --validation_guidance_scale=1", 20, 1, 30, 2400 / (2400 + 15000 * 4 * 4)),
        ("--validation_steps=500", 20, 3, 30, 4800 / (4800 + 15000 * 4 * 4)),  # the other two wait
        ("--validation_samples=3 --validation_prompts", 20, 1, 601, 0),
        ("--validation_prompts", 20, 1, 0, 0),
    ],
)
def test_plan_says_how_much_of_a_run_is_drawing(monkeypatch, flags, rows, processes, validations, drawing):
    """In forward passes of one sample, or their equivalent, with the flags of the tutorial."""
    monkeypatch.setattr(sd_config, "DENOISING_STEPS", DENOISING_STEPS)
    plan = plan_of(" ".join([*shlex.split(TUTORIAL), flags]), rows, processes)
    assert plan.drawing == pytest.approx(drawing)
    assert f"{validations}, drawing is {drawing:.1%} of the UNet's passes" in str(plan)


def test_without_checkpointing_a_training_pass_costs_three(monkeypatch):
    monkeypatch.setattr(sd_config, "DENOISING_STEPS", 1)
    flags = "--train_batch_size=2 --max_train_steps=3 --validation_prompts a b --validation_guidance_scale=1.5"
    assert plan_of(flags, rows=8).drawing == pytest.approx(4 / (4 + 3 * 2 * 3))


@pytest.mark.parametrize("interval", [1, 4, 5, 6, 7, 17, 18, 19])
def test_plan_counts_the_checkpoints_still_due(interval):
    plan = plan_of(f"--max_train_steps=18 --checkpointing_steps={interval}", rows=3)
    for step in range(19):
        assert plan.saves_from(step) == sum(map(plan.saves_after, range(step + 1, 19))), step


def test_plan_knows_the_memory_of_what_is_trained(monkeypatch):
    plan = plan_of("--use_ema", rows=32, parameters=250_000_000)
    sizes = {"weights": 1, "gradients": 1, "optimizer state": 2, "EMA": 1}
    assert plan.memory.items() > {name: size * 10**9 for name, size in sizes.items()}.items()
    assert plan.needed == sum(plan.memory.values())
    assert (plan.checkpoint_bytes, plan.export_bytes) == (4 * 10**9, 2 * 10**9)
    assert "weights 1.00 GB, gradients 1.00 GB, optimizer state 2.00 GB, EMA 1.00 GB" in str(plan)
    plan = plan_of("--use_8bit_adam", rows=32, parameters=250_000_000)
    assert (plan.memory["optimizer state"], plan.memory["EMA"]) == (5 * 10**8, 0)
    assert (plan.checkpoint_bytes, plan.export_bytes) == (15 * 10**8, 10**9)
    monkeypatch.setattr(sd_config, "FROZEN_BYTES", 5)
    plan = plan_of("--low_memory --use_ema", rows=32, parameters=10**9)
    sizes = {"weights": 2, "gradients": 2, "optimizer state": 2, "EMA (host)": 4}
    assert plan.memory.items() > {name: size * 10**9 for name, size in sizes.items()}.items()
    assert plan.needed == sum(plan.memory.values()) - 4 * 10**9
    small, large = (
        plan_of(f"--train_batch_size=4 --resolution={side}", rows=32, parameters=10**9) for side in (512, 1024)
    )
    assert large.memory["activations"] == 4 * small.memory["activations"] > 0
    assert (plan.checkpoint_bytes, plan.export_bytes) == (8 * 10**9, 6 * 10**9 + 5)


def test_export_has_the_frozen_parts_of_a_local_model(tmp_path):
    for file, size in {"unet/a": 10_000, "vae/a": 30, "text_encoder/deep/a": 500, "other/a": 7000}.items():
        (tmp_path / "base" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / file).write_bytes(bytes(size))
    assert plan_of(f"{BASE}=base", rows=1, parameters=1).export_bytes == 4 + 530


# The disk


@pytest.fixture
def disk(monkeypatch):
    """A function that compares a run's plan with a disk that has some bytes free, and returns problems and warnings."""

    def compare(free, flags, step=0, parameters=250_000_000):
        asked = []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or argparse.Namespace(free=free))
        problems, warnings = sd_config.compare_disk(plan_of(flags, rows=32, parameters=parameters), step)
        assert all(path.is_dir() for path in asked)
        return problems, warnings

    return compare


def test_command_of_the_tutorial_fills_a_disk_with_a_warning(disk):
    flags = " ".join(shlex.split(TUTORIAL))
    sizes = "30 checkpoint(s) of 13.75 GB, an export of 6.88 GB"
    remedy = "--checkpoints_total_limit 2 keeps fewer"
    for free, shown in ((500 * 10**9, "500.00"), (34_380_838_560, "34.38")):
        said = f"{sizes}: 419.45 GB in all, {shown} GB free; {remedy}"
        assert disk(free, flags, parameters=859_520_964) == ([], [said])
    problems, warnings = disk(34_380_838_559, flags, parameters=859_520_964)
    folder = Path("sd-naruto-model").resolve()
    assert only(problems) == f"--output_dir {folder}: 34.38 GB free, at least 34.38 GB needed ({sizes})"
    assert warnings == []
    assert disk(500 * 10**9, f"{flags} --checkpoints_total_limit=2", parameters=859_520_964) == ([], [])


TEN, HELD_OUT = "--max_train_steps=1000 --checkpointing_steps=100", "--validation_samples=3"
LATEST = f"{RESUME}=latest --output_dir=run"
# Flags, the step from which a run goes on, and how many gigabytes it then writes at least, and in all. A checkpoint has
# 3 GB, and an export 1 GB. The folder `run` has two checkpoints.
ROOM = {
    "all of ten": (TEN, 0, 7, 31),
    "only the last, besides the one that it replaces": (f"{TEN} --checkpoints_total_limit=1", 0, 7, 7),
    "the last two, and the third from the end": (f"{TEN} --checkpoints_total_limit=2", 0, 7, 10),
    "a limit that is never reached": (f"{TEN} --checkpoints_total_limit=11", 0, 7, 31),
    "the last, the best, and the one it replaces": (f"{TEN} {HELD_OUT} --checkpoints_total_limit=1", 0, 7, 10),
    "the last two, and the best": (f"{TEN} {HELD_OUT} --checkpoints_total_limit=2", 0, 7, 13),
    "never more than are saved": (f"{TEN} {HELD_OUT} --checkpoints_total_limit=9", 0, 7, 31),
    "the best of them all": (f"{TEN} {HELD_OUT}", 0, 7, 31),
    "one at the end": ("--max_train_steps=50", 0, 4, 4),
    "the rest of a run": (f"{TEN} {LATEST}", 500, 4, 16),
    "the rest of a run, replacing": (f"{TEN} {LATEST} --checkpoints_total_limit=2", 500, 4, 4),
    "the rest of a run, and the best": (f"{TEN} {HELD_OUT} {LATEST} --checkpoints_total_limit=2", 500, 4, 7),
    "the rest of a run, replacing all": (f"{TEN} {LATEST} --checkpoints_total_limit=1", 500, 4, 4),
    "the end of a run that is at its end": (f"{TEN} {LATEST}", 1000, 1, 1),
    "the rest of a run, elsewhere": (f"{TEN} {RESUME}=run/checkpoint-10 --output_dir=new", 500, 7, 16),
    "in the place of another run": (f"{TEN} --output_dir=run --overwrite_output_dir", 0, 7, 31),
}


@pytest.mark.parametrize(("flags", "step", "least", "total"), ROOM.values(), ids=ROOM)
def test_disk_has_room_for_two_checkpoints_and_the_export(disk, flags, step, least, total):
    deleted = sd_config.size_on_disk(Path("run")) if "overwrite" in flags else 0
    least, total = (size * 10**9 - deleted for size in (least, total))
    assert disk(total, flags, step) == ([], [])
    for free in {least, total - 1} if least < total else ():
        problems, warnings = disk(free, flags, step)
        assert problems == []
        tight = re.search("total_limit=[12]$", flags) is not None
        assert only(warnings).endswith("another disk may have more" if tight else "2 keeps fewer")
    problems, warnings = disk(least - 1, flags, step)
    assert warnings == []
    assert "GB needed (" in only(problems)


@pytest.mark.parametrize(("steps", "warned"), [(3300, 0), (3400, 1)])
def test_more_than_100_gigabytes_are_warned_of_where_they_fit(disk, steps, warned):
    problems, warnings = disk(10**15, f"--max_train_steps={steps} --checkpointing_steps=100")
    assert problems == []
    assert len(warnings) == warned
    assert all("34 checkpoint(s) of 3.00 GB, an export of 1.00 GB: 103.00 GB in all" in line for line in warnings)


@pytest.mark.parametrize(
    ("flags", "file", "counts"),
    [
        ("--output_dir=new", f"new/{sd_config.OWN}/checkpoint-5/unet/half", True),
        ("--output_dir=new", f"new/{sd_config.OWN}/export/unet/half", True),
        ("--output_dir=run --overwrite_output_dir", "run/checkpoint-9/trainer_state.json", True),
        ("--output_dir=run --overwrite_output_dir", "run/mine/large", False),
    ],
)
def test_what_will_be_deleted_counts_as_free(disk, tmp_path, flags, file, counts):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    with open(tmp_path / file, "wb") as sparse:
        sparse.truncate(5 * 10**9)
    assert bool(disk(2 * 10**9, f"{TEN} {flags}")[0]) != counts


@pytest.mark.parametrize(
    ("folder", "there"), [("run", "run"), ("new", ""), ("new/deeper", ""), ("run/a/b", "run"), ("file/a", "")]
)
def test_disk_of_a_folder_that_is_not_there_yet(tmp_path, folder, there):
    assert sd_config.disk_of(Path(folder)).resolve() == tmp_path / there
    assert sd_config.disk_of(tmp_path / folder) == tmp_path / there


@pytest.mark.parametrize(("folder", "there"), [("photos", "photos"), ("new/deeper", "{here}")])
def test_folder_without_write_permission_is_refused(refuse, tmp_path, monkeypatch, folder, there):
    there, asked = Path(there.format(here=tmp_path)), []
    monkeypatch.setattr(os, "access", lambda *given: asked.append(given))  # root may write everywhere
    assert refuse(f"--output_dir={folder}") == [f"--output_dir {folder}: no permission to write in {there}"]
    assert asked == [(there, os.W_OK | os.X_OK)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plan_gives_every_position_to_one_process_in_order(processes):
    plan = plan_of("--train_batch_size=2 --gradient_accumulation_steps=3", rows=10, processes=processes)
    stream = [p for step in range(5) for rank in range(processes) for p in plan.positions(step, rank)]
    assert stream == list(range(5 * 6 * processes))


# The scripts


@pytest.mark.parametrize(
    ("script", "flag", "code", "says"),
    [
        ("train_sd1-5_naruto.py", "--help", 0, "--learning_rate X"),
        ("train_sd1-5_naruto.py", "--learing_rate=1", 2, "did you mean --learning_rate?"),
        ("infer.py", "--help", 0, "--guidance_scale X"),
        ("infer.py", "--promt=x", 2, "did you mean --prompt?"),
    ],
)
def test_help_and_typos_are_answered_without_slow_imports(tmp_path, monkeypatch, script, flag, code, says):
    for name in ("torch", "torchvision", "numpy", "PIL", "diffusers", "transformers", "accelerate", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = subprocess.run([sys.executable, ROOT / script, flag], capture_output=True, text=True, check=False)
    assert answer.returncode == code
    assert says in (answer.stderr if code else answer.stdout)
    assert not (answer.stdout if code else answer.stderr)


def test_sd_config_imports_nothing_but_the_standard_library():
    tree = ast.parse((ROOT / "sd_config.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "argparse" in names
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
