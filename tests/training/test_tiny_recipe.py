"""The recipe of libra-tiny: stages follow each other, and their settings are read."""

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
from training.tiny import TRAINING
from training.unspoken import UnspokenArguments


def _settings(stage):
    return yaml.safe_load(Path(stage.command[-1]).read_text(encoding="utf-8"))


def test_stages_start_from_stages_before_them():
    done: set[str] = set()
    for stage in TRAINING:
        settings = _settings(stage)
        read = {
            value.split("/")[2]
            for key, value in settings.items()
            if str(value).startswith("runs/") and key != "output_dir"
        }
        assert read <= done, stage.name
        assert settings["output_dir"] == f"runs/tiny/{stage.name}"
        done.add(stage.name)


@pytest.mark.parametrize(
    "stage", [stage for stage in TRAINING if "training.sft" in stage.command], ids=lambda stage: stage.name
)
def test_instruction_tuning_sees_every_scene_once(stage):
    beside = (RehearsalArguments, UnspokenArguments, AdapterArguments)
    options = (SFTArguments, DataArguments, ConversationArguments, *beside, SFTConfig)
    arguments, data, *_, training = StageParser("sft", options).parse_args_and_config(["--config", stage.command[-1]])
    assert arguments.global_batch_size == 2 * training.per_device_train_batch_size
    assert data.train_samples == training.max_steps * arguments.global_batch_size
