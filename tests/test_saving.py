"""Checkpoints are written while the training goes on, but hold the state of the step after which they are due."""

import collections
import concurrent.futures
import re
import shutil
import threading
import types

import psutil
import pytest
import torch

import faults
import sd_config
from conftest import assert_same_state, litter, trainer

FLAGS = (
    *("--train_batch_size=2", "--max_train_steps=6", "--checkpointing_steps=2"),
    *("--use_ema", "--lr_scheduler=cosine", "--learning_rate=1e-4"),
)


@pytest.fixture
def order(monkeypatch):
    """What happens in which order: ("step", n) when step n is done, ("written", n) when checkpoint n is on disk.

    `order.hold` maps the step of a checkpoint to a later step that must be done before it is written.
    """
    events, passed, write = [], collections.defaultdict(threading.Event), trainer.Checkpoints.write

    def after_step(run):
        events.append(("step", run.step))
        passed[run.step].set()

    def hold_and_write(checkpoints, tensors, state, *args):
        step = state.step
        if step in order.hold:
            assert passed[order.hold[step]].wait(60)
        write(checkpoints, tensors, state, *args)
        events.append(("written", step))

    order = types.SimpleNamespace(events=events, hold={}, passed=passed)
    faults.plant(monkeypatch.setattr, after_step=after_step)
    monkeypatch.setattr(trainer.Checkpoints, "write", hold_and_write)
    return order


@pytest.mark.parametrize("flags", [(), ("--use_8bit_adam",)])
@pytest.mark.usefixtures("uncompiled")
def test_training_goes_on_while_a_checkpoint_is_written(train, order, monkeypatch, capsys, flags):
    """It waits only if too little memory is free for a copy. The checkpoints, and how one goes on, are the same."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "free_memory", lambda: 1000)
        waited = train(*FLAGS, *flags, output="waited")
    note = "note: 0.00 GB of memory is free, too little to train while saving"
    assert capsys.readouterr().out.count(note) == 3
    assert order.events == [
        *(("step", 1), ("step", 2), ("written", 2)),
        *(("step", 3), ("step", 4), ("written", 4)),
        *(("step", 5), ("step", 6), ("written", 6)),
    ]
    order.events.clear()
    order.passed.clear()
    order.hold = {2: 4}  # so that the save after step 4 has to wait for the one before
    went_on = train(*FLAGS, *flags, output="went-on")
    assert order.events.index(("written", 2)) > order.events.index(("step", 4))
    assert [number for what, number in order.events if what == "written"] == [2, 4, 6]
    assert note not in capsys.readouterr().out
    assert not litter(went_on.output)
    for step in (2, 4, 6):
        name = f"checkpoint-{step}"
        assert sd_config.find_damage(went_on.output / name) is None
        assert_same_state(went_on.output / name, waited.output / name)
    halfway = f"--resume_from_checkpoint={went_on.output / 'checkpoint-4'}"
    again = train(*FLAGS, *flags, halfway, output="again")
    assert_same_state(again.output / "checkpoint-6", waited.output / "checkpoint-6")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "max", "memory.current": "1", "memory.stat": "file 1"}, None),
        ({"memory.max": "5000", "memory.current": "3000", "memory.stat": "anon 2\nfile 700\nfile_mapped 9"}, 2700),
        ({"memory.max": "5000"}, None),
        ({}, None),
    ],
    ids=["no-limit", "limit", "half", "none"],
)
def test_free_memory_heeds_a_container(tmp_path, monkeypatch, files, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**15}))
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert trainer.free_memory(tmp_path) == (free or 10**15)
    idle = {"allocated_bytes.current": 900, "active_bytes.current": 300}  # of what PyTorch has pinned
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: idle)
    assert trainer.free_memory(tmp_path) == (free or 10**15) + 600


def test_what_keeps_a_checkpoint_from_being_written_stops_the_run(train, order, monkeypatch, capsys):
    """The run stops as soon as the error is known, and not at the next save. The checkpoint before stays."""
    save = torch.save

    def fail(tensors, file):
        if (file.parent.parent.parent / "checkpoint-2").exists():
            raise OSError(28, "No space left on device")
        return save(tensors, file)

    def wait_for_it(run, _micro_batch):
        if run.step == 4:
            assert concurrent.futures.wait([run.checkpoints.writing], timeout=60).done

    monkeypatch.setattr(torch, "save", fail)
    faults.plant(monkeypatch.setattr, before_micro_batch=wait_for_it)
    with pytest.raises(SystemExit) as end:
        train(*FLAGS)
    assert end.value.code == 1
    assert order.events[-1] == ("step", 5)
    printed = capsys.readouterr().err
    assert re.findall(r"checkpoint-\d+ cannot be written", printed) == ["checkpoint-4 cannot be written"]
    assert "Last checkpoint: " in printed
    assert "checkpoint-2: add --resume_from_checkpoint latest" in printed


def test_an_output_folder_that_is_deleted_stops_the_run(train, monkeypatch, tmp_path, capsys):
    """At the next checkpoint, with one message. A validation before that only warns that it cannot draw."""

    def delete(run):
        if run.step == 3:
            shutil.rmtree(run.args.output_dir)

    faults.plant(monkeypatch.setattr, after_step=delete)
    with pytest.raises(SystemExit) as end:
        train("--max_train_steps=6", "--checkpointing_steps=4", "--train_batch_size=7", "--validation_prompts=a")
    printed = "".join(capsys.readouterr())
    assert end.value.code == 1
    assert len(re.findall("^error: .*checkpoint-4 cannot be written .*No such file", printed, re.MULTILINE)) == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
