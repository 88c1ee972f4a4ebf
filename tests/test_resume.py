"""A run depends on its seed alone, and not on how often it is resumed, or by how many workers its data is read."""

import re

import datasets
import pytest
import torch

import sd_config
from conftest import assert_same, assert_same_state, learned, weights

# Everything that is random, and a rate that changes. (Each row has several captions, too.)
RANDOM = (
    *("--random_flip", "--caption_dropout=0.3", "--noise_offset=0.05", "--input_perturbation=0.1", "--use_ema"),
    *("--lr_scheduler=cosine", "--lr_warmup_steps=2", "--learning_rate=1e-4", "--max_train_steps=7"),
)


@pytest.fixture(scope="module")
def rows(assets, tmp_path_factory):
    """A data set of `save_to_disk` with 11 rows, each with a list of captions. An epoch is three steps of 4."""
    photos = datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train").select(range(11))
    captions = [[caption, f"a photo of {caption}"] for caption in photos["text"]]
    folder = tmp_path_factory.mktemp("rows")
    photos.remove_columns("text").add_column("text", captions).save_to_disk(folder)
    return f"--dataset_name={folder}"


def test_resume_at_every_step_is_bit_identical(train, rows):
    """Also after the steps of the third epoch, which begins within step 6."""
    flags = (*RANDOM, rows, "--train_batch_size=2", "--gradient_accumulation_steps=2", "--checkpointing_steps=1")
    whole = train(*flags, output="whole", data=None)
    for step in range(1, 7):
        checkpoint = f"--resume_from_checkpoint={whole.output / f'checkpoint-{step}'}"
        resumed = train(*flags, checkpoint, "--checkpointing_steps=12", output=f"resumed-{step}", data=None)
        assert_same_state(whole.output / "checkpoint-7", resumed.output / "checkpoint-7")
        assert_same(weights(whole.output / "unet"), weights(resumed.output / "unet"))
        logged = learned(resumed)
        assert list(logged) == list(range(step + 1, 8))
        assert logged == {later: values for later, values in learned(whole).items() if later > step}


def test_workers_change_nothing(train, rows):
    flags = (*RANDOM, rows, "--train_batch_size=4", "--max_train_steps=4", "--checkpointing_steps=4")
    alone = train(*flags, output="alone", data=None)
    for workers, method in ((3, "fork"), (1, "spawn")):
        torch.multiprocessing.set_start_method(method, force=True)
        try:
            helped = train(*flags, f"--dataloader_num_workers={workers}", output=method, data=None)
        finally:
            torch.multiprocessing.set_start_method(None, force=True)
        assert_same_state(alone.output / "checkpoint-4", helped.output / "checkpoint-4")
        assert learned(alone) == learned(helped)


def test_a_resumed_run_obeys_its_own_flags(train):
    """The settings of the checkpoint's optimizer must not take precedence over the flags of the resumed run."""
    flags = ("--train_batch_size=2", "--max_train_steps=2", "--checkpointing_steps=1")
    whole = train(*flags).output
    checkpoint = f"--resume_from_checkpoint={whole / 'checkpoint-1'}"
    frozen = train(*flags, checkpoint, "--learning_rate=0", output="frozen")
    assert frozen.logs[2]["train/lr"] == 0
    assert_same(weights(whole / "checkpoint-1/unet"), weights(frozen.output / "checkpoint-2/unet"))


def test_without_a_seed_one_is_drawn_printed_and_remembered(train, capsys):
    flags = ("--train_batch_size=2", "--max_train_steps=2", "--checkpointing_steps=1")
    first = train(*flags, output="first", seed=None)
    drawn = int(re.search(r"No --seed given: drew (\d+)", capsys.readouterr().out)[1])
    assert sd_config.read_state(first.output / "checkpoint-2").seed == drawn
    checkpoint = f"--resume_from_checkpoint={first.output / 'checkpoint-1'}"
    resumed = train(*flags, checkpoint, output="resumed", seed=None)
    assert_same_state(first.output / "checkpoint-2", resumed.output / "checkpoint-2")
