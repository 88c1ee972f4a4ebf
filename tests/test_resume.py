"""A run is a pure function of its seed: however often it is stopped, loaded by whom, and split into whatever pieces."""

import re

import datasets
import pytest
import torch

from conftest import assert_same, assert_same_state, difference, learned, trainer, weights

# Everything random at once: random crops, flips, several captions a row, dropped captions, and a moving rate.
RANDOM = (
    "--random_flip",
    "--caption_dropout=0.3",
    "--use_ema",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=2",
    "--noise_offset=0.05",
    "--input_perturbation=0.1",
    "--learning_rate=1e-4",
    "--max_train_steps=12",
)


@pytest.fixture(scope="module")
def twelve(assets, tmp_path_factory):
    """A data set of 11 rows, saved with `save_to_disk`: three steps of 4 an epoch, a list of captions in each row."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(assets[1]), split="train").select(range(11))
    captions = [[caption, f"a photo of {caption}"] for caption in rows["text"]]
    folder = tmp_path_factory.mktemp("rows")
    rows.remove_columns("text").add_column("text", captions).save_to_disk(folder)
    return f"--dataset_name={folder}"


def test_resume_at_every_step_is_bit_identical(train, twelve):
    flags = (*RANDOM, twelve, "--train_batch_size=2", "--gradient_accumulation_steps=2", "--checkpointing_steps=1")
    whole = train(*flags, output="whole", data=None)
    for step in range(1, 12):
        checkpoint = f"--resume_from_checkpoint={whole.output / f'checkpoint-{step}'}"
        resumed = train(*flags, checkpoint, "--checkpointing_steps=12", output=f"resumed-{step}", data=None)
        assert_same_state(whole.output / "checkpoint-12", resumed.output / "checkpoint-12")
        assert_same(weights(whole.output / "unet"), weights(resumed.output / "unet"))
        logged = learned(resumed)
        assert list(logged) == list(range(step + 1, 13))
        assert logged == {later: values for later, values in learned(whole).items() if later > step}


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_workers_change_nothing(train, twelve, workers, method, monkeypatch):
    flags = (*RANDOM, twelve, "--train_batch_size=4", "--max_train_steps=4", "--checkpointing_steps=4")
    alone = train(*flags, output="alone", data=None)
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        helped = train(*flags, f"--dataloader_num_workers={workers}", output="helped", data=None)
    finally:
        torch.multiprocessing.set_start_method(None, force=True)
    assert_same_state(alone.output / "checkpoint-4", helped.output / "checkpoint-4")
    assert learned(alone) == learned(helped)


def test_splits_of_the_effective_batch_train_the_same(train, twelve, assets):
    start = weights(assets[0] / "unet")
    runs = [
        train(
            *RANDOM,
            twelve,
            f"--train_batch_size={size}",
            f"--gradient_accumulation_steps={8 // size}",
            output=str(size),
            data=None,
        )
        for size in (8, 4, 1)
    ]
    for run in runs[1:]:
        for part in ("unet", "unet_ema"):
            one, other = (weights(r.output / "checkpoint-12" / part) for r in (run, runs[0]))
            assert difference(one, other, start) <= 1e-4


def test_a_finished_run_only_exports(train):
    flags = ("--max_train_steps=2", "--train_batch_size=2")
    finished = train(*flags)
    (finished.output / "model_index.json").unlink()
    again = train(*flags, "--resume_from_checkpoint=latest")
    assert not again.logs
    assert (finished.output / "model_index.json").exists()
    assert_same(weights(finished.output / "checkpoint-2/unet"), weights(finished.output / "unet"))


def test_a_resumed_run_obeys_its_own_flags(train):
    """What the checkpoint's optimizer was set to must not win over the flags of the run that goes on."""
    train("--max_train_steps=1", "--train_batch_size=2")
    resumed = train(
        "--max_train_steps=2", "--train_batch_size=2", "--resume_from_checkpoint=latest", "--learning_rate=3e-5"
    )
    assert resumed.logs[2]["train/lr"] == 3e-5
    frozen = train(
        "--max_train_steps=3", "--train_batch_size=2", "--resume_from_checkpoint=latest", "--learning_rate=0"
    )
    assert_same(weights(frozen.output / "checkpoint-2/unet"), weights(frozen.output / "checkpoint-3/unet"))


def test_without_a_seed_one_is_drawn_printed_and_remembered(train, capsys):
    flags = ("--train_batch_size=2", "--max_train_steps=2", "--checkpointing_steps=1")
    first = train(*flags, output="one", seed=None)
    drawn = int(re.search(r"No --seed given: drew (\d+)", capsys.readouterr().out)[1])
    repeated = train(*flags, f"--seed={drawn}", output="two")
    assert_same_state(first.output / "checkpoint-2", repeated.output / "checkpoint-2")
    checkpoint = f"--resume_from_checkpoint={first.output / 'checkpoint-1'}"
    resumed = train(*flags, checkpoint, output="three", seed=None)
    assert_same_state(first.output / "checkpoint-2", resumed.output / "checkpoint-2")


def test_main_module_has_no_side_effects():
    assert trainer.__name__ == "train_sd1-5_naruto"
    assert not hasattr(trainer, "ARGS")
