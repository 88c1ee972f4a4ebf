"""However a step is divided into micro-batches, and whenever memory runs out, the training is the same."""

import pytest
import torch

import faults
import sd_config
from conftest import assert_same_state, difference, learned, weights

# Steps of four samples, one at a time as in the tutorial.
FLAGS = (
    *("--train_batch_size=1", "--gradient_accumulation_steps=4", "--max_train_steps=6", "--checkpointing_steps=3"),
    *("--use_ema", "--random_flip", "--snr_gamma=5", "--learning_rate=3e-4"),
)


@pytest.fixture
def batches(monkeypatch):
    """The step and size of every micro-batch, in `sizes`. Where `fails` is true, memory runs out.

    `fails` is given the step, the size, and how many micro-batches of that size the step has had, with this one.
    """
    sizes = []

    def note(run, micro_batch):
        size = len(micro_batch["timesteps"])
        sizes.append((run.step, size))
        if note.fails(run.step, size, [each for step, each in sizes if step == run.step].count(size)):
            raise note.error

    note.fails = lambda step, size, count: False
    note.sizes = sizes
    note.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    faults.plant(monkeypatch.setattr, before_micro_batch=note)
    return note


@pytest.fixture
def plain(train_once, batches):
    """A run with the micro-batches of the flags, which never runs out of memory."""
    run = train_once(*FLAGS)
    assert batches.sizes in ([(step, 1) for step in range(6) for _ in range(4)], [])
    batches.sizes.clear()
    return run


def assert_trains_alike(run, plain, start):
    """Weights, average, and what was logged are the same up to rounding."""
    for part in ("unet", "unet_ema"):
        one, other = (weights(each.output / "checkpoint-6" / part) for each in (run, plain))
        assert difference(one, other, start) <= 1e-4
    for step, values in learned(plain).items():
        assert learned(run)[step] == pytest.approx(values, rel=1e-3)


def test_micro_batches_of_any_size_train_the_same(train, assets, batches, plain):
    for size, expected in ((2, 2), (4, 4), ("auto", 4)):
        batches.sizes.clear()
        run = train(*FLAGS, f"--micro_batch_size={size}", output=f"by-{size}")
        assert batches.sizes == [(step, expected) for step in range(6) for _ in range(4 // expected)]
        assert_trains_alike(run, plain, weights(assets[0] / "unet"))
        assert sd_config.read_state(run.output / "checkpoint-6").micro_batch_size == expected


@pytest.mark.parametrize(
    ("fails", "found"),
    [
        (lambda step, size, count: size == 4, 2),
        (lambda step, size, count: size > 1, 1),
        (lambda step, size, count: step == 4 and size == 4, 2),
        (lambda step, size, count: step >= 2 and (size == 4 or (size > 1 and count == 2)), 1),
    ],
    ids=["first", "first-twice", "later", "later-halfway"],
)
def test_out_of_memory_leads_to_the_same_result(train, assets, batches, plain, capsys, fails, found):
    """Also if it happens in the middle of a step, when some micro-batches have added their gradients."""
    batches.fails = fails
    run = train(*FLAGS, "--micro_batch_size=auto", output="auto")
    assert_trains_alike(run, plain, weights(assets[0] / "unet"))
    assert batches.sizes[-1] == (5, found)
    printed = capsys.readouterr().out
    assert f"note: out of memory; micro-batches of {found} instead of {2 * found} from here on" in printed
    assert sd_config.read_state(run.output / "checkpoint-6").micro_batch_size == found
    batches.sizes.clear()
    resumed = [f"--resume_from_checkpoint={run.output / 'checkpoint-3'}", "--micro_batch_size=auto"]
    saved = sd_config.read_state(run.output / "checkpoint-3").micro_batch_size
    batches.fails = lambda step, size, count: False
    again = train(*FLAGS, *resumed, output="again")
    assert {size for _, size in batches.sizes} == {saved}
    if saved == found:
        assert_same_state(again.output / "checkpoint-6", run.output / "checkpoint-6")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_every_library_says_in_its_own_words_that_memory_has_run_out(train, batches, message):
    batches.fails, batches.error = lambda step, size, count: size > 1, RuntimeError(message)
    train("--train_batch_size=2", "--max_train_steps=1", "--micro_batch_size=auto")
    assert [size for _, size in batches.sizes] == [2, 1, 1]


def test_each_size_divides_the_step(train, batches):
    batches.fails = lambda step, size, count: size > 1
    train("--train_batch_size=12", "--max_train_steps=1", "--micro_batch_size=auto")
    assert [size for _, size in batches.sizes] == [12, 6, 3] + 12 * [1]


@pytest.mark.parametrize(
    ("flags", "message", "sizes"),
    [
        (["--micro_batch_size=2"], "out of memory", [2]),
        (["--micro_batch_size=auto"], "out of memory", [4, 2, 1]),
        ([], "out of memory", [1]),
        (["--micro_batch_size=auto"], "something else", [4]),
    ],
)
def test_an_error_that_smaller_micro_batches_do_not_avoid_stops_the_run(train, batches, capsys, flags, message, sizes):
    """They are tried only if memory has run out, `auto` allows it, and there are smaller ones."""
    batches.fails, batches.error = lambda step, size, count: step == 1, RuntimeError(message)
    with pytest.raises(SystemExit) as end:
        train(*FLAGS, *flags, "--checkpointing_steps=1")
    assert end.value.code == 1
    assert message in capsys.readouterr().err
    assert [size for step, size in batches.sizes if step == 1] == sizes
