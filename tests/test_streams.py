"""Whatever ends a run: first it saves, then it speaks; and a stream that has died, or lacks a letter, ends nothing."""

import importlib.util
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch

import faults
import sd_config
from conftest import ROOT, trainer

FLAGS = ("--max_train_steps=4", "--checkpointing_steps=100", "--train_batch_size=2")


@pytest.fixture
def command(assets, tmp_path):
    """The command line of a short run, quoted for a shell."""
    model, data = assets
    flags = (
        f"--pretrained_model_name_or_path={model} --train_data_dir={data} --resolution=64 --output_dir={tmp_path}/run"
    )
    return f"{sys.executable} {ROOT}/train_sd1-5_naruto.py {flags} {' '.join(FLAGS)} --seed=7 --validation_prompts"


@pytest.mark.parametrize(
    ("environment", "shell"),
    [
        ({"PYTHONIOENCODING": "gbk"}, "{} 2>&1 | head -n 3; exit ${{PIPESTATUS[0]}}"),  # the tracker prints a rocket
        ({"PYTHONIOENCODING": "ascii"}, "{} --report_to=none --output_dir=run/火影 > /dev/full 2>&1"),
        ({}, "{} --report_to=none <&- >&- 2>&-"),
    ],
    ids=["a reader that leaves", "a full disk", "all are closed"],
)
def test_a_dead_stream_stops_nothing(command, tmp_path, environment, shell):
    process = ["bash", "-c", shell.format(command)]
    assert subprocess.run(process, cwd=tmp_path, env=os.environ | environment, check=False).returncode == 0
    assert [*tmp_path.glob("run/**/model_index.json")]


def test_a_picture_of_any_prompt_is_announced_in_any_locale(assets, tmp_path):
    flags = [f"--model_path={assets[0]}", "--prompt=火影忍者", "--num_inference_steps=1"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    subprocess.run([sys.executable, str(ROOT / "infer.py"), *flags], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "result.png").exists()


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_closed_terminal_is_a_signal_unless_it_is_ignored(train, monkeypatch, tmp_path, ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    faults.plant(monkeypatch.setattr, after_step=lambda run: run.step == 2 and os.kill(os.getpid(), signal.SIGHUP))
    try:
        if ignored:
            assert train(*FLAGS).run.step == 4
        else:
            with pytest.raises(SystemExit) as end:
                train(*FLAGS)
            assert end.value.code == 128 + signal.SIGHUP
            assert sd_config.find_damage(tmp_path / "run/checkpoint-2") is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_is_told_once_what_was_trained_is_safe(train, monkeypatch, tmp_path):
    """So that a stream that cannot be written to, in the hands of somebody who imports the trainer, loses nothing."""

    def fail(run, _micro_batch):
        if run.step == 2:
            raise RuntimeError("unexpected")

    def explain(*_args):
        raise BrokenPipeError

    faults.plant(monkeypatch.setattr, before_micro_batch=fail)
    monkeypatch.setattr(trainer, "explain", explain)
    with pytest.raises(BrokenPipeError):
        train(*FLAGS)
    assert sd_config.find_damage(tmp_path / "run/checkpoint-2") is None


def test_swanlab_asks_for_its_key_only_where_somebody_can_answer(command, tmp_path):
    """Here, standard input is a terminal, but the output goes to a file."""
    keyboard, terminal = pty.openpty()
    environment = {**os.environ, "HOME": str(tmp_path)}
    del environment["SWANLAB_MODE"]
    environment.pop("SWANLAB_API_KEY", None)
    with open(tmp_path / "log", "w+", encoding="utf-8") as log:
        run = subprocess.run(
            command.split(), stdin=terminal, stdout=log, stderr=log, env=environment, check=False, timeout=200
        )
        log.seek(0)
        printed = log.read()
    os.close(keyboard)
    os.close(terminal)
    assert run.returncode == 0, printed
    assert "warning: swanlab cannot start: it has no key" in printed
    assert [*tmp_path.glob("run/logs/run-*")]


def test_an_unknown_mode_of_swanlab_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setenv("SWANLAB_MODE", "bogus")
    with pytest.raises(SystemExit) as end:
        sd_config.parse_args(["--lr_warmup_steps=0"])
    assert (end.value.code, "SWANLAB_MODE bogus: must be one of online" in capsys.readouterr().err) == (2, True)


def test_swanlabs_dashboard_is_asked_for_before_the_run(monkeypatch, capsys):
    """SwanLab itself would only print an error, and record nothing."""
    installed = {"swanlab": importlib.util.find_spec("swanlab")}
    monkeypatch.setenv("SWANLAB_MODE", "local")
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    with pytest.raises(SystemExit):
        sd_config.parse_args(["--lr_warmup_steps=0"])
    assert 'SWANLAB_MODE local: needs its dashboard: pip install "swanlab[dashboard]"' in capsys.readouterr().err
    installed["swanboard"] = installed["swanlab"]
    sd_config.parse_args(["--lr_warmup_steps=0"])


@pytest.mark.parametrize(
    "flags", [("--adam_epsilon=0",), ("--learning_rate=1e39",), ("--learning_rate=1e39", "--use_ema")]
)
def test_what_is_not_finite_is_never_saved(train, tmp_path, capsys, flags):
    """Though the losses were finite: the optimizer itself divides by zero here, or overflows."""
    with pytest.raises(SystemExit) as end:
        train(*FLAGS, "--max_train_steps=1", *flags)
    printed = capsys.readouterr().err
    assert end.value.code == 1
    assert "error: step 1: the weights, their average or AdamW's moments are not finite" in printed
    assert "Last checkpoint: none" in printed
    assert not [*tmp_path.glob("run/checkpoint-*"), *tmp_path.glob("run/*.json")]


def test_only_copies_from_cuda_are_not_waited_for():
    """Elsewhere nothing says when a copy that was not waited for has arrived, and it would be saved as it was."""

    class OnAnotherDevice(torch.Tensor):
        is_cuda, device, asked = False, torch.device("mps"), []

        def detach(self):
            return self

        def to(self, *args, **kwargs):
            self.asked.append(kwargs.get("non_blocking", False))
            return torch.zeros(3)

    trainer.copied_to_host({"weight": OnAnotherDevice(3)})
    assert OnAnotherDevice.asked == [False]


def test_a_signal_during_the_last_save_leaves_the_export_to_the_next_run(train, monkeypatch, tmp_path):
    def interrupt(folder):
        if folder.name == "checkpoint-2":
            os.kill(os.getpid(), signal.SIGINT)

    faults.plant(monkeypatch.setattr, while_saving=interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            train(*FLAGS, "--max_train_steps=2")
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 128 + signal.SIGINT
    assert sd_config.find_damage(tmp_path / "run/checkpoint-2") is None
    assert not (tmp_path / "run/model_index.json").exists()


def test_a_folder_of_logs_that_cannot_be_made_stops_nothing(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").symlink_to(tmp_path / "nowhere/at/all")
    assert list(train(*FLAGS, "--report_to=tensorboard", "--max_train_steps=1").logs) == [1]
    assert "warning: tensorboard cannot start: " in capsys.readouterr().out
