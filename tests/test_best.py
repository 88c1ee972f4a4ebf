"""The best checkpoint: held-out losses are planted, and what is kept, named and told about it is compared."""

import json
import math
import os
import shlex
import shutil
import signal

import pytest

import faults
import infer
import sd_config
from conftest import steps, trainer

FLAGS = ("--train_batch_size=1", "--checkpointing_steps=1", "--validation_samples=1", "--validation_epochs=100")
# Of the averaged weights, and of the weights themselves, which do best at another step.
EMA = {0: 0.9, 1: 0.7, 2: 0.5, 3: 0.3, 4: 0.6, 5: 0.4, 6: 0.5}
RAW = {0: 0.9, 1: 0.8, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.2, 6: 0.8}


@pytest.fixture
def course(monkeypatch):
    """Plants the losses above, and notes what is measured, and what is on disk after each checkpoint was written."""
    losses = {"val/loss": dict(RAW), "val/loss_ema": dict(EMA)}
    losses |= {"measured": [], "kept": {}}
    write = trainer.Checkpoints.write

    def held_out_loss(run):
        name = "val/loss" if run.consistent else "val/loss_ema"  # the average is swapped in
        losses["measured"].append((run.step, name))
        return losses[name][run.step]

    def write_and_note(checkpoints, tensors, state, *args):
        write(checkpoints, tensors, state, *args)
        losses["kept"][state.step] = steps(checkpoints.plan.args.output_dir)

    monkeypatch.setattr(trainer, "held_out_loss", held_out_loss)
    monkeypatch.setattr(trainer.Checkpoints, "write", write_and_note)
    return losses


def told(capsys):
    """What the run printed last."""
    return capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (1, {1: [1], 2: [2], 3: [3], 4: [3, 4], 5: [3, 5], 6: [3, 6]}),
        (2, {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [3, 4, 5], 6: [3, 5, 6]}),
        (None, {step: list(range(1, step + 1)) for step in range(1, 7)}),
    ],
)
def test_the_best_is_kept_besides_the_limit_and_named(train, course, capsys, limit, kept):
    """By the loss of the average. The last is what is exported, and the name of the best stands in the model card."""
    limited = [f"--checkpoints_total_limit={limit}"] if limit else []
    run = train(*FLAGS, "--use_ema", "--max_train_steps=6", *limited)
    assert course["kept"] == kept
    said = told(capsys)
    assert said.startswith("The best checkpoint: val/loss_ema 0.3000 at step 3, 40.0% below the last step's 0.5000. ")
    _, script, checkpoint = shlex.split(said.partition("Draw with it: ")[2])
    assert script == "infer.py"
    assert infer.parse_args([checkpoint]).checkpoint == str(run.output / "checkpoint-3")
    assert trainer.escaped(said) in (run.output / "README.md").read_text(encoding="utf-8")
    state = sd_config.read_state(run.output / "checkpoint-3")
    planted = {str(step): {"val/loss": RAW[step], "val/loss_ema": EMA[step]} for step in range(7)}
    assert state.losses == {step: losses for step, losses in planted.items() if int(step) <= 3}
    assert run.run.losses == planted
    assert [run.logs[step] for step in (0,)] == [planted["0"]]
    assert all(run.logs[step].items() >= planted[str(step)].items() for step in range(1, 7))
    assert course["measured"] == [(step, name) for step in range(7) for name in ("val/loss", "val/loss_ema")]


def test_without_an_average_the_weights_decide(train, course, capsys):
    assert steps(train(*FLAGS, "--max_train_steps=6", "--checkpoints_total_limit=1").output) == [5, 6]
    assert "The best checkpoint: val/loss 0.2000 at step 5, 75.0% below the last step's 0.8000." in told(capsys)
    assert {name for _, name in course["measured"]} == {"val/loss"}


def test_a_last_step_that_is_the_best_is_named(train, course, capsys):
    """Of equal losses, the later counts."""
    course["val/loss"][4] = RAW[2]
    run = train(*FLAGS, "--max_train_steps=4", "--checkpoints_total_limit=1")
    assert steps(run.output) == [4]
    assert told(capsys) == "The last checkpoint is the best: val/loss 0.5000."


def test_a_resumed_run_knows_the_past(train, course, capsys):
    """It keeps the best of the run before, and measures no step again."""
    flags = (*FLAGS, "--use_ema", "--checkpoints_total_limit=1")
    train(*flags, "--max_train_steps=4")
    course["measured"].clear()
    run = train(*flags, "--max_train_steps=6", "--resume_from_checkpoint=latest")
    assert course["kept"][5] == [3, 5]
    assert course["kept"][6] == [3, 6]
    assert sorted({step for step, _ in course["measured"]}) == [5, 6]
    assert sorted(run.run.losses, key=int) == [str(step) for step in range(7)]
    assert "val/loss_ema 0.3000 at step 3" in told(capsys)
    course["measured"].clear()
    again = train(*flags, "--max_train_steps=6", "--resume_from_checkpoint=latest")
    assert course["measured"] == []  # also the validation at the end, which is due
    assert "val/loss_ema 0.3000 at step 3" in told(capsys)
    assert again.run.losses == run.run.losses


def test_a_better_one_takes_the_place_of_the_best(train, course):
    course["val/loss_ema"][6] = 0.1
    train(*FLAGS, "--use_ema", "--max_train_steps=6", "--checkpoints_total_limit=1")
    assert course["kept"][5] == [3, 5]
    assert course["kept"][6] == [6]


def test_only_checkpoints_of_this_folder_count(train, course, capsys):
    first = train(*FLAGS, "--use_ema", "--max_train_steps=4", output="first").output
    halfway = f"--resume_from_checkpoint={first / 'checkpoint-4'}"
    flags = (*FLAGS, "--use_ema", "--max_train_steps=6", "--checkpoints_total_limit=1")
    assert steps(train(*flags, halfway, output="second").output) == [5, 6]
    assert "val/loss_ema 0.4000 at step 5" in told(capsys)
    assert steps(first) == [1, 2, 3, 4]


@pytest.mark.parametrize("end", ["signal", "error"])
def test_what_a_signal_or_an_error_saves_is_not_measured(train, course, capsys, end):
    """Until the run has been resumed, and a later regular save is due."""

    def stop(run):
        if run.step == 3 and end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif run.step == 3:
            raise RuntimeError("planted")

    flags = (*FLAGS, "--checkpointing_steps=2", "--max_train_steps=5", "--checkpoints_total_limit=1")
    with pytest.MonkeyPatch.context() as patch:
        faults.plant(patch.setattr, after_step=stop)
        with pytest.raises(SystemExit):
            train(*flags)
    output = train(*flags, "--resume_from_checkpoint=latest").output
    assert course["kept"] == {2: [2], 3: [2, 3], 4: [2, 4], 5: [5]}
    assert sorted(sd_config.read_state(output / "checkpoint-5").losses) == ["0", "2", "4", "5"]
    assert [step for step, _ in course["measured"]] == [0, 2, 4, 5]


def test_a_last_step_that_a_signal_saved_may_be_the_best(train, course, capsys):
    """Its checkpoint does not tell its loss, but the end of the run does."""
    course["val/loss"][3] = 0.1
    flags = (*FLAGS, "--checkpointing_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        faults.plant(patch.setattr, after_step=lambda run: run.step == 3 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(*flags, "--max_train_steps=5")
    train(*flags, "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert told(capsys) == "The last checkpoint is the best: val/loss 0.1000."


def test_a_signal_while_the_base_model_is_measured_ends_the_run_in_order(train, course, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "held_out_loss", lambda run: os.kill(os.getpid(), signal.SIGTERM) or 0.5)
    with pytest.raises(SystemExit) as end:
        train(*FLAGS, "--max_train_steps=4")
    assert end.value.code == 143
    assert "Stopped at step 0. Last checkpoint: none" in capsys.readouterr().err


def test_the_best_is_drawn_as_the_run_draws(train, course, capsys):
    flags = ("--validation_guidance_scale=2", "--validation_prompts", "a cat's hat", "a dog")
    output = train(*FLAGS, "--max_train_steps=6", *flags).output
    command = shlex.split(told(capsys).partition("Draw with it: ")[2])[2:]
    assert command == [f"--checkpoint={output / 'checkpoint-5'}", "--prompt=a cat's hat", "--guidance_scale=2.0"]


def test_weights_that_have_diverged_are_spoken_of(train, course, capfd):
    course["val/loss"][6] = math.nan
    train(*FLAGS, "--max_train_steps=6", "--checkpoints_total_limit=1")
    assert "warning: the weights of step 6 have diverged" in "".join(capfd.readouterr())
    assert course["kept"][6] == [5, 6]


def save(output, step, loss, **state):
    """Write as much of a checkpoint as tells of its loss."""
    (output / sd_config.OWN).mkdir(exist_ok=True)
    (output / f"checkpoint-{step}").mkdir(parents=True)
    losses = {str(step): {"val/loss": loss}, "77": {"val/loss": 0.0}}  # of its own step, and of another
    state = {"step": step, "effective_batch": 1, "losses": losses} | state
    (output / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (output / f"checkpoint-{step}/optimizer.pt").write_bytes(b"moments")
    sd_config.write_manifest(output / f"checkpoint-{step}")


ODD = [{}, [], None, {"3": "low"}, {"3": {}}, {"3": {"val/loss": "low"}}, {"3": {"val/loss": math.nan}}]


@pytest.mark.parametrize("state", [*({"losses": losses} for losses in ODD), "renamed", "flipped", "older"], ids=str)
def test_what_is_damaged_or_not_measured_is_not_the_best(tmp_path, state):
    """Then the next lowest is kept besides the limit."""
    for step, loss in ((1, 0.7), (2, 0.5), (3, 0.3), (4, 0.6), (5, 0.8)):
        save(tmp_path, step, loss, **(state if step == 3 and isinstance(state, dict) else {}))
    if state == "renamed":
        shutil.rmtree(tmp_path / "checkpoint-3")
        save(tmp_path, 7, 0.3, losses={"3": {"val/loss": 0.3}})
        (tmp_path / "checkpoint-7").rename(tmp_path / "checkpoint-3")
    if state == "flipped":
        (tmp_path / "checkpoint-3/optimizer.pt").write_bytes(b"moment5")
    if state == "older":
        saved = tmp_path / "checkpoint-3/trainer_state.json"
        saved.write_text(json.dumps({"step": 3, "effective_batch": 1}), encoding="utf-8")
        sd_config.write_manifest(saved.parent)
    sd_config.prune_checkpoints(tmp_path, 1, step=5, last_step=4)
    assert steps(tmp_path, check=False) == [2, 5]
    assert sd_config.best_checkpoint(sd_config.checkpoints(tmp_path)) == (tmp_path / "checkpoint-2", "val/loss", 0.5)


def test_without_losses_the_limit_alone_counts(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, 0.5, losses={})
    sd_config.prune_checkpoints(tmp_path, 2, step=5, last_step=4)
    assert steps(tmp_path) == [4, 5]
    assert sd_config.best_checkpoint(sd_config.checkpoints(tmp_path)) == (None, None, None)


def test_a_damaged_one_between_two_saves_goes_even_with_the_lowest_loss(tmp_path):
    """Those after the checkpoint that a run was resumed from are damaged: else it had been resumed from them."""
    for step, loss in ((2, 0.5), (3, 0.1), (4, 0.6)):
        save(tmp_path, step, loss)
    sd_config.prune_checkpoints(tmp_path, 1, step=4, last_step=2)
    assert steps(tmp_path) == [2, 4]
