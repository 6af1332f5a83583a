"""What a stage says about its run: before it, while it lasts, and where it logs."""

import dataclasses
import json
import re
import sys
from datetime import datetime
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from training import run
from training.checkpoints import last_checkpoint, save_whole_checkpoints
from training.data import DataArguments
from training.run import (
    Pace,
    ProgressBar,
    StageParser,
    announce_run,
    describe_duration,
    describe_pace,
    progress_line,
    run_training,
)


@dataclasses.dataclass
class Own:
    """Options of a stage."""

    size: int = dataclasses.field(default=3, metadata={"help": "Size of it."})


class Line(torch.nn.Module):
    """A loss to lower."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (self.slope * x - labels).square().mean()}


def make_args(folder, **options) -> TrainingArguments:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **defaults | options)


def make_trainer(args) -> Trainer:
    data = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(20)]
    return Trainer(Line(), args, train_dataset=data, eval_dataset=data[:4])


def announced(capsys, args) -> dict[str, str]:
    announce_run(args, "pretrain")
    return dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_an_announcement_says_what_will_be_done(tmp_path, capsys):
    args = make_args(tmp_path / "new", gradient_accumulation_steps=3)
    assert announced(capsys, args) == {
        "pretrain": f"writes to {tmp_path / 'new'}",
        "steps": "4, global batch size 6",
        "start": "at the beginning",
        "logs": "this output only; add --report_to tensorboard or trackio",
    }
    assert announced(capsys, make_args(tmp_path, max_steps=-1, num_train_epochs=2))["steps"].startswith(
        "those of 2 epochs,"
    )


def test_only_the_main_process_announces(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    assert announced(capsys, make_args(tmp_path)) == {}


@pytest.mark.parametrize("arguments", [TrainingArguments, SFTConfig])
def test_nothing_is_reported_unless_asked_for(arguments, tmp_path):
    parser = StageParser("pretrain", (Own, arguments))
    (tmp_path / "c.yaml").write_text("report_to: tensorboard\n")
    common = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False"]
    assert parser.parse_args_and_config(common)[1].report_to == []
    assert parser.parse_args_and_config([*common, "--config", str(tmp_path / "c.yaml")])[1].report_to == ["tensorboard"]
    flags = [*common, "--config", str(tmp_path / "c.yaml"), "--report_to", "none"]
    assert parser.parse_args_and_config(flags)[1].report_to == []


def test_what_is_reported_to_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "get_available_reporting_integrations", lambda: ["tensorboard"])
    announce_run(make_args(tmp_path, report_to="tensorboard"), "sft")
    with pytest.raises(ValueError, match=r"asks for trackio, which is not installed.*libra-vlm\[logging\]"):
        announce_run(make_args(tmp_path, report_to=["tensorboard", "trackio"]), "sft")
    with pytest.raises(ValueError, match=r"report_to has tensorbord; choose none, or of .*trackio"):
        announce_run(make_args(tmp_path, report_to="tensorbord"), "sft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"max_steps": -5}, "max_steps is -5"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs is 0"),
    ],
)
def test_a_run_without_steps_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        announce_run(make_args(tmp_path, **options), "sft")


def test_a_line_a_log_and_the_history_in_the_end(tmp_path, capsys):
    run_training(make_trainer(make_args(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split(" ")[1] for line in lines]
    assert steps == ["1/4", "2/4", "2/4", "3/4", "4/4", "4/4", "4/4"]  # two evaluations, and the whole run
    training, evaluation, whole = lines[0], lines[2], lines[-1]
    assert re.fullmatch(
        r"step 1/4 \(25%\) \| loss \S+ \| learning_rate \S+, grad_norm \S+ \| \S+ \S+ \| ends .+, in \d+ s", training
    )
    assert re.fullmatch(r"step 2/4 \(50%\) \| eval_loss \S+ \| took \d+ s", evaluation)
    assert re.fullmatch(r"step 4/4 \(100%\) \| train_loss \S+ \| took \d+ s", whole)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history] == [1, 2, 2, 3, 4, 4, 4]


def test_a_run_goes_on_and_says_so(tmp_path, capsys, monkeypatch):
    run_training(make_trainer(make_args(tmp_path)))
    capsys.readouterr()
    args = make_args(tmp_path, max_steps=6)
    assert announced(capsys, args)["start"] == "from checkpoint-4, step 4"
    clocks = []
    monkeypatch.setattr(run, "Pace", lambda step: clocks.append(Pace(step)) or clocks[-1])
    run_training(make_trainer(args))
    steps = [line.split(" ")[1] for line in capsys.readouterr().out.splitlines()]
    assert steps[0] == "5/6"
    assert [clock.step for clock in clocks] == [4]  # the steps before took no time of this run
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "loss" in log] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_done_trains_no_further(tmp_path, capsys):
    args = make_args(tmp_path, learning_rate=0.1, lr_scheduler_type="constant")
    first, again = make_trainer(args), make_trainer(args)
    run_training(first)
    (tmp_path / "trainer_state.json").unlink()
    capsys.readouterr()
    run_training(again)
    assert capsys.readouterr().out == "All 4 steps are done; nothing is left to train.\n"
    assert again.state.global_step == 4
    assert torch.equal(again.model.slope, first.model.slope)
    assert again.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]
    assert len(json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]) == 6


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_training(make_trainer(make_args(tmp_path, disable_tqdm=False)))
    captured = capsys.readouterr()
    assert "4/4" in captured.err
    lines = [line for line in captured.out.splitlines() if line.strip("\r ")]
    assert len(lines) == 7
    assert all(re.search(r"step \d/4 \(", line) for line in lines)


def test_the_bar_of_a_run_that_goes_on_begins_there(tmp_path):
    bar, args, control = ProgressBar(), make_args(tmp_path), TrainerControl()
    state = TrainerState(global_step=4, max_steps=6, is_world_process_zero=True)
    bar.on_train_begin(args, state, control)
    assert (bar.training_bar.initial, bar.training_bar.n) == (4, 4)
    state.global_step = 5
    bar.on_step_end(args, state, control)
    assert (bar.training_bar.initial, bar.training_bar.n) == (4, 5)
    bar.on_train_end(args, state, control)


def test_no_bar_where_it_is_off_or_nobody_looks(tmp_path, capsys, monkeypatch):
    run_training(make_trainer(make_args(tmp_path / "a", disable_tqdm=False)))
    assert "4/4 [" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_training(make_trainer(make_args(tmp_path / "b")))
    assert "4/4 [" not in capsys.readouterr().err


def test_metrics_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(make_trainer(make_args(tmp_path, report_to="tensorboard")))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events.parent)).Reload()
    assert [scalar.step for scalar in written.Scalars("train/loss")] == [1, 2, 3, 4]


def test_pace():
    times = iter([100.0, 120.0, 130.0])
    pace = Pace(40, clock=lambda: next(times))
    assert pace.measure(50, max_steps=100) == (2.0, 100.0)
    assert pace.measure(60, max_steps=100) == (1.0, 60.0)  # 30 s for 20 steps; 40 to go


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.floats(0.01, 1e4))
def test_a_steady_pace_is_found(steps, seconds_per_step):
    done = [0, *torch.tensor(steps).cumsum(0).tolist()]
    times = iter([step * seconds_per_step for step in done])
    pace = Pace(0, clock=lambda: next(times))
    for _, step in pairwise(done):
        found = pace.measure(step, done[-1])
        assert found == pytest.approx((seconds_per_step, (done[-1] - step) * seconds_per_step))


def test_speed_and_end_are_readable():
    now = datetime(2024, 5, 31, 13, 50)
    assert describe_pace(1.84, 900, now) == "1.8 s/step | ends 14:05, in 15 min"
    assert describe_pace(0.05, 5 * 86400, now) == "20.0 steps/s | ends 2024-06-05 13:50, in 5 d 0 h"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.8, "1 min"), (3599, "1 h 0 min"), (11100, "3 h 5 min"), (187200, "2 d 4 h")],
)
def test_durations(seconds, text):
    assert describe_duration(seconds) == text


def test_every_term_is_in_the_line():
    logs = {"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-4, "text_loss": 1.25, "seen": 12, "epoch": 0.5}
    assert progress_line(logs, 50, 1000) == (
        "step   50/1000 (5%) | loss 2.5, text_loss 1.25, seen 12 | learning_rate 0.0001, grad_norm 0.5"
    )


def test_wrong_configurations_are_named(tmp_path):
    parser = StageParser("sft", (Own,))
    with pytest.raises(ValueError, match="--config needs the path of a YAML file"):
        parser.parse_args_and_config(["--config"])
    (tmp_path / "broken.yaml").write_text("size: [1\n")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML"):
        parser.parse_args_and_config(["--config", str(tmp_path / "broken.yaml")])
    (tmp_path / "unknown.yaml").write_text("colour: red\n")
    with pytest.raises(ValueError, match="colour"):
        parser.parse_args_and_config(["--config", str(tmp_path / "unknown.yaml")])


def test_a_wrong_value_is_said_in_two_lines(capsys):
    with pytest.raises(SystemExit) as stopped:
        StageParser("sft", (Own, TrainingArguments)).parse_args_and_config(["--size", "large"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "usage: libra train sft [--config FILE.yaml] [--OPTION VALUE ...]",
        "libra train sft: error: argument --size: invalid int value: 'large'",
    ]


def test_mappings_are_flags_as_well():
    parser = StageParser("pretrain", (DataArguments, TrainingArguments))
    data, _ = parser.parse_args_and_config(["--augmentation", "{rotation: 8, colour: 0.5}", "--report_to", "none"])
    assert data.augmentation == {"rotation": 8, "colour": 0.5}


@pytest.mark.parametrize("text", ["8", "{rotation: 8"])
def test_flags_that_are_no_mappings_are_refused(text, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        StageParser("pretrain", (DataArguments, TrainingArguments)).parse_args_and_config(["--augmentation", text])
    assert "expected a mapping such as '{rotation: 8}'" in capsys.readouterr().err + str(refused.value)


def test_folders_of_a_users_own_are_left_alone(tmp_path):
    """Neither taken for a checkpoint nor deleted as the rest of one."""
    for name, inside in (("checkpoint-5", "trainer_state.json"), ("checkpoint-100-best", "trainer_state.json"),
                         ("checkpoint-7", "model.safetensors"), ("checkpoint-9", "unfinished")):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path), should_save=True), _save_checkpoint=None)
    save_whole_checkpoints(trainer)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "checkpoint-100-best",
        "checkpoint-5",
        "checkpoint-7",
    ]
