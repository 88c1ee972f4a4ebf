"""Four places at which tests plant faults in the trainer. Only this file knows the functions behind them.

A fault is a function: it may raise, send a signal, wait, take notes, or change the tensors that it is given.
"""

import importlib
import itertools

import sd_config

trainer = importlib.import_module("train_sd1-5_naruto")


def plant(set_attribute=setattr, *, in_sample=None, before_micro_batch=None, after_step=None, while_saving=None):
    """Have the trainer call faults.

    Args:
        set_attribute (callable): `monkeypatch.setattr` in a test. The default is never undone.
        in_sample (callable): called with (position,), before a sample is made, perhaps by a worker.
        before_micro_batch (callable): called with (run, micro_batch), before each forward pass of the training.
            `run.step` is the number of steps done; `micro_batch` is a dictionary of tensors on the device.
        after_step (callable): called with (run,), when weights, average and `run.step` are those after the step.
        while_saving (callable): called with (folder,), when the files of a checkpoint have been written under its
            hidden name, and its manifest has not.
    """
    if in_sample:
        original_getitem = trainer.SampleStream.__getitem__

        def getitem(stream, position):
            in_sample(position)
            return original_getitem(stream, position)

        set_attribute(trainer.SampleStream, "__getitem__", getitem)
    if before_micro_batch:
        original_add = trainer.add_micro_batch

        def add_micro_batch(run, micro_batch):
            before_micro_batch(run, micro_batch)
            return original_add(run, micro_batch)

        set_attribute(trainer, "add_micro_batch", add_micro_batch)
    if after_step:
        original_step = trainer.train_step

        def train_step(run, batch):
            metrics = original_step(run, batch)
            after_step(run)
            return metrics

        set_attribute(trainer, "train_step", train_step)
    if while_saving:
        original_write = sd_config.write_manifest

        def write_manifest(folder, *before):
            while_saving(folder)
            original_write(folder, *before)

        set_attribute(sd_config, "write_manifest", write_manifest)


def plant_in_step(step, fault, set_attribute=setattr):
    """Have the trainer call `fault` in the middle of a step: before the second of its micro-batches."""
    calls = itertools.count()

    def before_micro_batch(run, _micro_batch):
        if run.step == step - 1 and next(calls) == 1:
            fault()

    plant(set_attribute, before_micro_batch=before_micro_batch)
