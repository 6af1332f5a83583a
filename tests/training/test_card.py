"""The model card of libra-tiny: filled in, and valid for the Hub."""

import re
import shutil

import pytest
from huggingface_hub import ModelCard

from training.card import write_card


def add_pictures(folder):
    for name in ("loss_curves.png", "samples.png"):
        (folder / name).write_bytes(b"")


def test_numbers_are_in_the_card(repo, tmp_path):
    folder = tmp_path / "repo"
    shutil.copytree(repo, folder)
    for shard in folder.glob("model-*.safetensors"):
        shutil.copyfile(shard, folder / "model.safetensors")
    add_pictures(folder)
    write_card(folder, {"train_vendors": 0.93, "unseen_vendor": 0.47, "chance": 0.01})
    card = ModelCard.load(folder / "README.md")
    assert "$" not in card.text
    assert "| 93% |" in card.text
    assert "| 47% |" in card.text
    values = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert values == {"fluent-emoji-flat": 0.47, "emoji-train-vendors": 0.93}
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-text-to-text")
    assert card.data.language == ["en", "zh"]
    shown = re.findall(r"!\[.+\]\((.+)\)", card.text)
    assert sorted(shown) == ["loss_curves.png", "samples.png"]
    assert all((folder / name).is_file() for name in shown)


def test_missing_numbers_and_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks loss_curves.png, samples.png"):
        write_card(tmp_path, {"train_vendors": 0.93, "unseen_vendor": 0.47})
    add_pictures(tmp_path)
    with pytest.raises(KeyError, match="unseen_vendor"):
        write_card(tmp_path, {"train_vendors": 0.93})
