"""--cuda_graphs: what a graph repeats, on the memory of its capture, trains exactly what separate launches train.

There is no GPU here: a graph is a record of the operations on a CPU (and in test_cuda.py a capture whose kernels
compute nothing). As on a GPU, a capture computes nothing, and a graph goes on to use the tensors that it has seen.
"""

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import faults
import infer
from conftest import assert_same, assert_same_state, learned, trainer, weights
from test_buckets import write

FLAGS = (
    *("--aspect_buckets", "--resolution=128", "--train_batch_size=6", "--learning_rate=3e-4", "--random_flip"),
    *("--micro_batch_size=auto", "--use_ema", "--max_train_steps=9", "--checkpointing_steps=3", "--noise_offset=0.1"),
)
KINDS = {
    "encoded at each step": [],
    "encoded once, DREAM": ["--center_crop", "--cache_latents=on", "--dream_training"],
    "bf16, checkpointing": ["--mixed_precision=bf16", "--gradient_checkpointing", "--input_perturbation=0.1"],
    "micro-batches of one": ["--micro_batch_size=1", "--snr_gamma=5"],
    "validation between": ["--validation_prompts=a cat", "--validation_steps=4", "--validation_samples=2"],
}


class Graph(TorchDispatchMode):
    """In place of `torch.cuda.CUDAGraph`: the operations that were done while it was captured."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def undo(self):
        """Take back what the capture has changed."""
        with torch.no_grad():
            for tensor, before in reversed(self.before):
                tensor.copy_(before)

    def replay(self):
        """Do the operations again, so that their results lie where they lay."""
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                for place, value in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(value, torch.Tensor) and value.data_ptr() != place.data_ptr():
                        place.copy_(value)

    def pool(self):
        """Return the name of the graph's memory."""
        return "pool"


class Captures:
    """Whether a graph is being captured, and for each capture the step and the name of the memory that it was given."""

    def __init__(self):
        self.capturing, self.steps, self.pools = False, [], []

    def __len__(self):
        return len(self.pools)


@pytest.fixture
def graphs(monkeypatch):
    """Have --cuda_graphs work on this CPU. Returns what has been captured."""
    seen = Captures()

    @contextlib.contextmanager
    def capture(graph, pool, *, capture_error_mode):
        seen.pools.append(pool)
        assert capture_error_mode == "thread_local"  # or else the thread that pins samples would end it
        seen.capturing = True
        try:
            with graph:
                yield
        except torch.OutOfMemoryError as error:  # the end of such a capture may fail too
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        finally:
            seen.capturing = False
            graph.undo()

    create, original = trainer.create_accelerator, trainer.Launcher.capture

    def capture_of(launcher, places):
        seen.steps.append(launcher.run.step)
        return original(launcher, places)

    monkeypatch.setattr(trainer.Launcher, "capture", capture_of)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)

    def create_accelerator(args):
        allowed = copy.copy(args)
        allowed.cuda_graphs = False
        return create(allowed)

    monkeypatch.setattr(trainer, "create_accelerator", create_accelerator)
    return seen


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of pictures in three shapes."""
    sizes = [(96, 96), (160, 80), (80, 160), (90, 90), (200, 100), (96, 95)]
    return write(tmp_path_factory.mktemp("data") / "pictures", 2 * sizes)


def assert_trains_the_same(one, other):
    """Weights, moments, average and what was logged agree bit by bit, at every checkpoint."""
    for step in (3, 6, 9):
        assert_same_state(one.output / f"checkpoint-{step}", other.output / f"checkpoint-{step}")
    assert_same(weights(one.output / "unet"), weights(other.output / "unet"))
    assert learned(one) == learned(other)


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_training_is_bit_identical(train, data, graphs, monkeypatch, flags):
    measure, draw = trainer.held_out_loss, infer.draw

    def held_out_loss(run):
        assert not run.add_micro_batch.graphs
        return measure(run)

    def draw_without_gradients(pipeline, *rest):
        assert all(weight.grad is None for weight in pipeline.unet.parameters())
        return draw(pipeline, *rest)

    monkeypatch.setattr(trainer, "held_out_loss", held_out_loss)
    monkeypatch.setattr(infer, "draw", draw_without_gradients)
    one, other = (
        train(*FLAGS, *flags, *more, data=data, output=output)
        for more, output in (((), "one"), (["--cuda_graphs"], "other"))
    )
    assert_trains_the_same(one, other)
    assert min(graphs.steps) > 0  # AdamW has taken its memory
    # Graphs share their memory, which is given up when validation needs it.
    assert (graphs.pools.count(None) > 1) == ("--validation_samples=2" in flags)


def test_each_shape_and_number_has_a_graph_of_its_own_from_its_second_time_on(train, data, graphs, monkeypatch):
    met, called = [], []
    faults.plant(monkeypatch.setattr, before_micro_batch=lambda run, batch: called.append(batch["noise"].shape))
    original = trainer.Launcher.__call__

    def launch(launcher, micro_batch):
        met.append(micro_batch["noise"].shape)
        return original(launcher, micro_batch)

    monkeypatch.setattr(trainer.Launcher, "__call__", launch)
    train(*FLAGS, "--cuda_graphs", data=data)
    assert len(set(met)) >= 5
    repeated = {shape for shape in met if met.count(shape) > 1}
    assert len(graphs) == len(repeated)
    assert sorted(called) == sorted([*set(met), *repeated])  # without a graph, and to capture one


@pytest.mark.parametrize("capturing", [False, True], ids=["between", "capturing"])
def test_memory_that_runs_out_drops_the_graphs(train, data, graphs, monkeypatch, capturing):
    """Also at the end of a capture. The step then starts anew, whatever gradients it already has."""
    original, failed = trainer.add_micro_batch, []

    def full(run, micro_batch):
        loss = original(run, micro_batch)
        ready = graphs.capturing if capturing else run.add_micro_batch.graphs and not graphs.capturing
        if not failed and run.step > 4 and ready:
            failed.append(run.step)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    def full_at_the_same_step(run, micro_batch):
        if run.step == failed[0] and run.micro_batch_size == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(run, micro_batch)

    runs = []
    for fails, flags in ((full, ["--cuda_graphs"]), (full_at_the_same_step, [])):
        monkeypatch.setattr(trainer, "add_micro_batch", fails)
        runs.append(train(*FLAGS, *flags, data=data, output=str(len(flags))))
    assert [run.run.micro_batch_size for run in runs] == [3, 3]
    assert_trains_the_same(*runs)
    assert graphs.pools.count(None) == 2  # the memory of those dropped is not used again
