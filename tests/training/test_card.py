"""The model card of libra-tiny: filled in, and valid for the Hub."""

import re
import shutil

import pytest
from huggingface_hub import ModelCard

from training.card import LOSS_CURVES, eval_results, write_card
from training.emoji_evaluation import DRAWN, MAIN, PSNR, TITLES
from training.emoji_pictures import PICTURES


def make_report():
    results = {}
    for place, (name, title) in enumerate(TITLES.items()):
        value = 21.5 if name == PSNR else (40 + place) / 100
        known = {"value": value, "low": value - 0.05, "high": value + 0.05, "count": 300}
        unseen = None if name == DRAWN else known | {"value": value - 0.01}
        results[name] = {"title": title, "train_vendors": known, "unseen_vendor": unseen, "chance": 0.01}
    return {"results": results, "num_images": 500, "temperature": 1.0}


def add_pictures(folder):
    for name in (LOSS_CURVES, *PICTURES):
        (folder / name).write_bytes(b"")


def test_numbers_are_in_the_card(repo, tmp_path):
    folder = tmp_path / "repo"
    shutil.copytree(repo, folder)
    for shard in folder.glob("model-*.safetensors"):
        shutil.copyfile(shard, folder / "model.safetensors")
    add_pictures(folder)
    write_card(folder, make_report())
    card = ModelCard.load(folder / "README.md")
    assert "$" not in card.text
    assert "| single object named | 40.0% (35.0%-45.0%) | 39.0% (35.0%-45.0%) | 1.0% |" in card.text
    assert "F1 | 0.44 (0.39-0.49) | 0.43 (0.39-0.49) | 0.01 |" in card.text
    assert "dB | 21.5 (21.4-21.6) | 21.5 (21.4-21.6) | 0.0 |" in card.text
    values = {(result.dataset_type, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert values[("fluent-emoji-flat", TITLES["label"])] == 0.39
    assert values[("emoji-train-vendors", TITLES["label"])] == 0.4
    assert len(values) == 2 * len(MAIN) - 1  # drawings have no vendor
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy", "f1", "psnr"}
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-text-to-text")
    assert card.data.language == ["en", "zh"]
    shown = re.findall(r"!\[.+\]\((.+)\)", card.text)
    assert sorted(shown) == sorted((LOSS_CURVES, *PICTURES))


def test_missing_numbers_and_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks loss_curves.png, samples.png"):
        write_card(tmp_path, make_report())
    report = make_report()
    del report["results"]["place"]
    with pytest.raises(KeyError, match="place"):
        eval_results(report["results"])
