"""The recipes of libra-tiny: stages follow each other, and their settings are read."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from training.adapters import AdapterArguments
from training.conversations import ConversationArguments
from training.data import DataArguments
from training.rehearsal import RehearsalArguments
from training.run import StageParser
from training.sft import SFTArguments
from training.tiny import FULL, HOUR, TRAINING, hour_training, main
from training.unspoken import UnspokenArguments

RECIPES = {FULL: TRAINING, HOUR: hour_training()}


def _command_line(stage):
    return list(stage.command[stage.command.index("--config") :])


def _settings(stage):
    """Of its YAML file, and those that the command line has in their place."""
    _, config, *flags = _command_line(stage)
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    return settings | {flag.removeprefix("--"): value for flag, value in pairwise(flags) if flag.startswith("--")}


@pytest.mark.parametrize("folder", RECIPES, ids=str)
def test_stages_start_from_stages_before_them(folder):
    done: set[Path] = set()
    for stage in RECIPES[folder]:
        settings = _settings(stage)
        read = [
            Path(value) for key, value in settings.items() if str(value).startswith("runs/") and key != "output_dir"
        ]
        assert all(any(path.is_relative_to(output) for output in done) for path in read), stage.name
        assert Path(settings["output_dir"]) == folder / stage.name == stage.result.parent
        done.add(folder / stage.name)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, id=f"{folder.name}-{stage.name}")
        for folder, stages in RECIPES.items()
        for stage in stages
        if "training.sft" in stage.command
    ],
)
def test_instruction_tuning_sees_no_scene_twice(stage):
    beside = (RehearsalArguments, UnspokenArguments, AdapterArguments)
    options = (SFTArguments, DataArguments, ConversationArguments, *beside, SFTConfig)
    arguments, data, *_, training = StageParser("sft", options).parse_args_and_config(_command_line(stage))
    assert arguments.global_batch_size == 2 * training.per_device_train_batch_size
    seen = training.max_steps * arguments.global_batch_size
    assert data.train_samples == seen or (stage in RECIPES[HOUR] and data.train_samples > seen)


def test_an_unknown_last_stage_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--hour", "--until", "letters"])  # a stage of the other recipe
    assert "one of clip, tokenizer, llm, pretrain, sft, export, evaluate" in capsys.readouterr().err
