"""Checkpoints are written while the training goes on, and hold the step at which they were asked for all the same."""

import re
import threading

import psutil
import pytest
import torch

import faults
import sd_config
from conftest import assert_same_state, litter, trainer

FLAGS = (
    "--train_batch_size=2",
    "--max_train_steps=6",
    "--checkpointing_steps=2",
    "--use_ema",
    "--lr_scheduler=cosine",
    "--learning_rate=1e-4",
)


@pytest.fixture
def order(monkeypatch):
    """What happens, in its order: ("step", n) when step n is done, ("written", n) when checkpoint n is on disk.

    `order.hold` delays the writing of a checkpoint until that step is done.
    """
    events, passed = [], {step: threading.Event() for step in range(1, 7)}

    def after_step(run):
        events.append(("step", run.step))
        passed[run.step].set()

    def while_saving(folder):
        number = int(folder.name.rpartition("-")[2])
        if number in order.hold:
            assert passed[order.hold[number]].wait(60)
        events.append(("written", number))

    def order():
        return events

    order.hold, order.passed = {}, passed
    faults.plant(monkeypatch.setattr, after_step=after_step, while_saving=while_saving)
    return order


@pytest.mark.parametrize("flags", [(), ("--use_8bit_adam",)])
def test_training_goes_on_while_a_checkpoint_is_written(train, order, monkeypatch, flags):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "free_memory", lambda: 0)
        waited = train(*FLAGS, *flags, output="waited")
    assert order() == [
        *(("step", 1), ("step", 2), ("written", 2)),
        *(("step", 3), ("step", 4), ("written", 4)),
        *(("step", 5), ("step", 6), ("written", 6)),
    ]
    order().clear()
    for event in order.passed.values():
        event.clear()
    order.hold = {2: 4}  # the next save has to wait for this one
    went_on = train(*FLAGS, *flags, output="went-on")
    assert order().index(("written", 2)) > order().index(("step", 4))
    assert [number for what, number in order() if what == "written"] == [2, 4, 6]
    assert not litter(went_on.output)
    for step in (2, 4, 6):
        name = f"checkpoint-{step}"
        assert sd_config.find_damage(went_on.output / name) is None
        assert_same_state(went_on.output / name, waited.output / name)


def test_too_little_memory_is_said(train, order, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "free_memory", lambda: 1000)
    train(*FLAGS)
    assert "note: 0.00 GB of memory are free, too few to save while training goes on" in capsys.readouterr().out


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
    """As soon as it is known, not at the next save; and the one before stays."""
    failed = threading.Event()

    def fail(tensors, file):
        if (file.parent.parent / "checkpoint-2").exists():
            failed.set()
            raise OSError(28, "No space left on device")
        return save(tensors, file)

    def wait_for_it(run, _micro_batch):
        if run.step == 4:
            assert failed.wait(60)

    save = torch.save
    monkeypatch.setattr(torch, "save", fail)
    faults.plant(monkeypatch.setattr, before_micro_batch=wait_for_it)
    with pytest.raises(SystemExit) as end:
        train(*FLAGS)
    assert end.value.code == 1
    assert order()[-1] == ("step", 5)
    printed = capsys.readouterr().err
    assert re.findall(r"checkpoint-\d+ cannot be written", printed) == ["checkpoint-4 cannot be written"]
    assert "Last checkpoint: " in printed
    assert "checkpoint-2: add --resume_from_checkpoint latest" in printed


def test_a_copy_shares_no_memory_with_what_it_is_a_copy_of():
    tensors = {"one": torch.ones(3), "more": {0: torch.zeros(2, requires_grad=True)}}
    copies = trainer.copied_to_host(tensors)
    tensors["one"].add_(1)
    with torch.no_grad():
        tensors["more"][0].add_(1)
    assert copies["one"].tolist() == [1, 1, 1]
    assert copies["more"][0].tolist() == [0, 0]
    assert not copies["more"][0].requires_grad
