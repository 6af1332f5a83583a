"""The model card of libra-tiny: filled in, and valid for the Hub."""

import shutil

import pytest
from huggingface_hub import ModelCard

from training.card import write_card


def test_numbers_are_in_the_card(repo, tmp_path):
    folder = tmp_path / "repo"
    shutil.copytree(repo, folder)
    for shard in folder.glob("model-*.safetensors"):
        shutil.copyfile(shard, folder / "model.safetensors")
    write_card(folder, {"train_vendors": 0.93, "unseen_vendor": 0.47, "chance": 0.01})
    card = ModelCard.load(folder / "README.md")
    assert "$" not in card.text
    assert "| 93% |" in card.text
    assert "| 47% |" in card.text
    values = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert values == {"fluent-emoji-flat": 0.47, "emoji-train-vendors": 0.93}
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-text-to-text")
    assert card.data.language == ["en", "zh"]


def test_missing_numbers_are_named(repo):
    with pytest.raises(KeyError, match="unseen_vendor"):
        write_card(repo, {"train_vendors": 0.93})
