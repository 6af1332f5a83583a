"""Pretraining rehearsed beside conversations: of what, what it adds to the loss, that it is learned."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from libra_cli.loading import load_libra
from processing.processing_libra import LibraProcessor
from tests.training import tuning
from tests.training.caption_files import write_shards
from tests.training.tuning import logged
from training import sft
from training.data import DataArguments, load_worlds
from training.rehearsal import DRAWINGS_OF_TEN, Rehearsal, RehearsalArguments, WorldSamples, mix_codes
from training.world.concepts import Subject


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Tars of twelve captioned images."""
    return write_shards(tmp_path_factory.mktemp("captions"), shards=2, rows=6)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A json file of two conversations in LLaVA's form, and its image."""
    folder = tmp_path_factory.mktemp("talks")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    text = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}]
    samples = [
        {"id": "0", "image": "red.png", "conversations": turns},
        {"id": "1", "conversations": text},
    ]
    (folder / "talks.json").write_text(json.dumps(samples))
    return folder / "talks.json"


@pytest.fixture
def rehearsal(repo, icons) -> Rehearsal:
    """Of the world; all its images are drawn."""
    arguments = RehearsalArguments(rehearsal_weight=1.0, rehearsal_batch_size=2, rehearsal_draws=1.0)
    found = arguments.open(DataArguments(icons=str(icons), num_concepts=8), LibraProcessor.from_pretrained(repo), 0)
    assert found is not None
    return found


def tune(repo, talks, out, *flags, max_steps=2):
    return tuning.tune(repo, out, *flags, dataset=talks, max_steps=max_steps)


def test_nothing_is_rehearsed_by_default(repo, talks, tmp_path, icons):
    assert RehearsalArguments().open(DataArguments(icons=str(icons)), LibraProcessor.from_pretrained(repo), 0) is None
    assert logged(tune(repo, talks, tmp_path / "out"), "rehearsal_vision_loss") == []


def test_the_world_has_drawings_and_scenes(icons):
    """All things, each always drawn alike, and scenes as pretraining has them."""
    scenes = load_worlds(DataArguments(icons=str(icons), num_concepts=8, train_samples=40))[0]
    samples = WorldSamples(scenes)
    places = [place for place in range(40) if place % 10 < DRAWINGS_OF_TEN]
    drawn = [samples[place] for place in places]
    assert {sample["text"] for sample in drawn} == {subject.label for subject in scenes.subjects}
    pixels: dict = {}
    for sample in drawn:
        image = np.asarray(sample["image"])
        assert np.array_equal(pixels.setdefault(sample["text"], image), image)
        assert (image[0, 0] == 255).all()
    for place in (DRAWINGS_OF_TEN, 39):
        assert samples[place]["text"] == scenes[place].caption
        assert np.array_equal(samples[place]["image"], scenes[place].image)


def test_a_thing_that_the_vendor_does_not_draw_is_drawn_by_another(icons):
    scenes = load_worlds(DataArguments(icons=str(icons), num_concepts=8, train_samples=40))[0]
    others = [Subject(s.label, s.drawings[:1], ("nobody",)) for s in scenes.subjects]
    assert WorldSamples(replace(scenes, subjects=others))[0]["text"] == others[0].label


def test_processes_share_the_samples_of_a_step(rehearsal):
    """Two with two each have what one with four has; every step has others."""
    whole = replace(rehearsal, batch_size=4).of_step(3, 0, 1)
    parts = [rehearsal.of_step(3, process, 2)["pixel_values"] for process in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole["pixel_values"])
    assert torch.equal(rehearsal.of_step(3, 0, 2)["pixel_values"], parts[0])
    assert not torch.equal(rehearsal.of_step(4, 0, 2)["pixel_values"], parts[0])


def test_more_samples_than_there_are_come_twice(repo, captions):
    arguments = RehearsalArguments(1.0, 20, str(captions))
    rehearsal = arguments.open(DataArguments(), LibraProcessor.from_pretrained(repo), 0)
    assert rehearsal is not None
    assert len(rehearsal.of_step(0, 0, 1)["input_ids"]) == 20


def test_the_share_that_is_drawn(rehearsal):
    collator = replace(rehearsal.collator, text_to_image_fraction=0.3)
    some = replace(rehearsal, collator=collator, batch_size=20)
    draws = torch.cat([some.of_step(step, 0, 1)["draws"] for step in range(20)])
    assert draws.float().mean().item() == pytest.approx(0.3, abs=0.09)  # four standard deviations


def test_some_codes_are_read_as_those_of_other_images():
    codes = torch.arange(4)[:, None] * 1000 + torch.arange(500)  # image and place can be read off
    mixed = mix_codes(codes, 0.4, np.random.default_rng(0))
    assert torch.equal(mixed % 1000, codes % 1000)
    shares = (mixed != codes).float().mean(dim=1)
    assert (shares > 0).all()
    assert (shares < 0.4).all()
    assert shares.std() > 0.03
    assert torch.equal(mix_codes(codes, 0.0, np.random.default_rng(0)), codes)
    assert torch.equal(mix_codes(codes, 0.4, np.random.default_rng(0)), mixed)


def test_drawn_images_are_read_with_noise_and_without_features(rehearsal):
    processor = rehearsal.collator.processor
    collator = replace(rehearsal.collator, text_to_image_fraction=0.5)
    some = replace(rehearsal, collator=collator, batch_size=8, noise=1.0)
    batch = dict(processor.tokenize_images(some.of_step(0, 0, 1)))
    read, draws = some.as_read(batch, 0, 0), batch["draws"]
    assert 0 < draws.sum() < 8
    changed = read["input_ids"] != batch["input_ids"]
    assert torch.equal(changed.any(dim=1), draws)
    ids = batch["input_ids"][changed]
    assert (ids >= processor.text_vocab_size).all()
    assert not torch.isin(ids, torch.tensor([processor.boi_token_id, processor.eoi_token_id])).any()
    assert torch.equal(read["labels"], batch["labels"])
    features = batch["image_features"].masked_fill(draws[:, None, None], 0)
    assert torch.equal(read["image_features"], features)
    assert torch.equal(replace(some, noise=0.0).as_read(batch, 0, 0)["input_ids"], batch["input_ids"])


def test_the_loss_is_that_of_answers_and_of_what_is_rehearsed(repo, talks, captions, tmp_path):
    """At step 0 the answers' loss is what it is alone, and the other that of pretraining."""
    plain = logged(tune(repo, talks, tmp_path / "plain", max_steps=1), "loss")[0]
    flags = ("--rehearsal_weight", 0.5, "--rehearsal_dataset", captions, "--rehearsal_batch_size", 12)
    out = tune(repo, talks, tmp_path / "out", *flags, "--rehearsal_noise", 0, max_steps=1)
    model, processor = load_libra(repo)
    arguments = RehearsalArguments(1.0, 12, str(captions), rehearsal_noise=0)
    rehearsal = arguments.open(DataArguments(), processor, 42)
    assert rehearsal is not None
    outputs = model.eval()(**rehearsal.as_read(dict(processor.tokenize_images(rehearsal.of_step(0, 0, 1))), 0, 0))
    assert logged(out, "rehearsal_vision_loss")[0] == pytest.approx(outputs.vision_loss.item(), abs=1e-4)
    assert logged(out, "rehearsal_text_loss")[0] == pytest.approx(outputs.text_loss.item(), abs=1e-4)
    assert logged(out, "loss")[0] == pytest.approx(plain + 0.5 * outputs.loss.item(), abs=2e-4)


def test_it_is_learned(repo, talks, captions, tmp_path):
    flags = ("--rehearsal_weight", 1, "--rehearsal_dataset", captions, "--rehearsal_samples", 3)
    out = tune(repo, talks, tmp_path / "out", *flags, "--learning_rate", 3e-3, max_steps=30)
    for name in ("rehearsal_vision_loss", "rehearsal_text_loss"):
        losses = logged(out, name)
        assert losses[-1] < 0.5 * losses[0], name


def test_a_step_of_several_batches_rehearses_once(repo, talks, captions, tmp_path):
    """The same samples as a step of one batch, so the same losses, and the same sum."""
    flags = ("--rehearsal_weight", 1, "--rehearsal_dataset", captions)
    once = tune(repo, talks, tmp_path / "once", *flags, max_steps=1)
    parts = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)
    twice = tune(repo, talks, tmp_path / "twice", *flags, *parts, max_steps=1)
    for name in ("rehearsal_vision_loss", "loss"):
        assert logged(twice, name) == pytest.approx(logged(once, name), abs=2e-4)


@pytest.mark.parametrize("adapter", [(), ("--lora_target", "both", "--lora_rank", "4")], ids=["all weights", "LoRA"])
def test_a_stopped_run_rehearses_on_as_if_it_had_not_stopped(repo, talks, captions, tmp_path, adapter):
    flags = ("--rehearsal_weight", 1, "--rehearsal_dataset", captions, *adapter)
    whole = tune(repo, talks, tmp_path / "whole", *flags, max_steps=4)
    tune(repo, talks, tmp_path / "parts", *flags, max_steps=2)
    resumed = tune(repo, talks, tmp_path / "parts", *flags, max_steps=4)
    assert logged(resumed, "rehearsal_vision_loss") == logged(whole, "rehearsal_vision_loss")
    expected = load_libra(whole)[0].state_dict()
    for name, value in load_libra(resumed)[0].state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_wrong_settings_stop_before_the_model_is_loaded(repo, talks, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tune(repo, talks, tmp_path / "out", "--rehearsal_weight", 1, "--rehearsal_dataset", tmp_path / "nowhere")
    for flags, message in {
        ("--rehearsal_weight", 1): "rehearsal_weight is set: set rehearsal_dataset, where captioned images are",
        ("--rehearsal_weight", -1): "rehearsal_weight must not be negative, found -1",
        ("--rehearsal_batch_size", 0): "rehearsal_batch_size must be at least 1, found 0",
        ("--rehearsal_samples", 0): "rehearsal_samples must be at least 1, found 0",
        ("--rehearsal_draws", 2): "rehearsal_draws is a share, 0 to 1, found 2",
        ("--rehearsal_noise", -1): "rehearsal_noise is a share, 0 to 1, found -1",
    }.items():
        with pytest.raises(ValueError, match=message):
            tune(repo, talks, tmp_path / "out", *flags)
