"""Names that are had in mind: the two forms of a question, how far they are apart, that they come together."""

import json
from dataclasses import replace

import pytest
import torch

from libra_cli.loading import load_libra
from processing.processing_libra import LibraProcessor
from tests.training import tuning
from tests.training.tuning import logged
from training import sft
from training import unspoken as unspoken_names
from training.data import DataArguments
from training.unspoken import (
    MAX_QUESTIONS,
    UnspokenArguments,
    UnspokenNames,
    places_of_letters,
    questions_that_fit,
    states_apart,
)


@pytest.fixture
def unspoken(repo, icons) -> UnspokenNames:
    arguments = UnspokenArguments(unspoken_weight=1.0, unspoken_batch_size=3, unspoken_layers=[1])
    data = DataArguments(icons=str(icons), num_concepts=8, train_samples=20)
    found = arguments.open(data, LibraProcessor.from_pretrained(repo), 0)
    assert found is not None
    return found


def tune(repo, icons, out, *flags, max_steps=2):
    world = {"icons": icons, "num_concepts": 8, "train_samples": 40, "eval_samples": 2, "unspoken_layers": 1}
    return tuning.tune(repo, out, *flags, **world, max_steps=max_steps)


def test_no_names_are_left_out_by_default(repo, icons, tmp_path):
    data = DataArguments(icons=str(icons))
    assert UnspokenArguments().open(data, LibraProcessor.from_pretrained(repo), 0) is None
    assert logged(tune(repo, icons, tmp_path / "out", max_steps=1), "unspoken_distance") == []


def test_both_forms_ask_the_same_and_end_in_the_same_letter(unspoken):
    processor, batch = unspoken.collator.processor, unspoken.of_step(5, 0, 1)
    letters = []
    for rows, columns in places_of_letters(batch["labels"]):
        nexts = [batch["labels"][row, column + 1 : column + 3] for row, column in zip(rows, columns)]
        letters.append([processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in nexts])
        assert len(rows) == 3 * unspoken.questions
    assert letters[0] == letters[1]
    assert set(letters[0]) <= set("ABCD")
    (short, starts), (long, ends) = places_of_letters(batch["labels"])
    assert (batch["labels"][short, starts] == -100).all()  # nothing of the answer yet
    assert (batch["labels"][long, ends] != -100).all()  # the name is there
    assert torch.equal(long, short + 3)
    assert torch.equal(*batch["pixel_values"].chunk(2))
    asked = [
        processor.decode(row[mask == 1]).replace("Name it, then answer", "Answer")
        for row, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    options = [[line for line in text.splitlines() if line[1:3] == ". "] for text in asked]
    assert options[:3] == options[3:]
    assert all(len(lines) == 4 * unspoken.questions for lines in options)


def test_as_many_questions_as_fit_the_context(unspoken):
    """Whatever their options are; the toy's context is short."""
    processor, limit = unspoken.collator.processor, unspoken.collator.processor.tokenizer.model_max_length
    labels = [concept.label for concept in unspoken.concepts]
    assert unspoken.questions == questions_that_fit(processor, labels)
    lengths = [unspoken.of_step(step, 0, 1)["input_ids"].shape[1] for step in range(10)]
    assert max(lengths) <= limit
    processor.tokenizer.model_max_length = 100 * limit
    assert questions_that_fit(processor, labels) == MAX_QUESTIONS
    processor.tokenizer.model_max_length = limit // 4
    assert questions_that_fit(processor, labels) == 0


def test_processes_share_the_scenes_of_a_step(unspoken):
    whole = replace(unspoken, batch_size=4).of_step(3, 0, 1)["pixel_values"][:4]
    two = replace(unspoken, batch_size=2)
    parts = [two.of_step(3, process, 2)["pixel_values"][:2] for process in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)
    assert torch.equal(two.of_step(3, 0, 2)["pixel_values"][:2], parts[0])
    assert not torch.equal(two.of_step(4, 0, 2)["pixel_values"][:2], parts[0])


def test_answers_that_do_not_end_alike_are_refused():
    none = -100
    good = torch.tensor([[none, none, 5, 1, none, 6, 1, none, none], [none, 8, 5, 1, none, 8, 9, 6, 1]])
    (rows, columns), (long_rows, long_columns) = places_of_letters(good)
    assert (rows.tolist(), columns.tolist()) == ([0, 0], [1, 4])
    assert (long_rows.tolist(), long_columns.tolist()) == ([1, 1], [1, 6])
    other_letter, one_less = good.clone(), good.clone()
    other_letter[1, 7] = 5
    one_less[1, 5:] = none
    for labels in (other_letter, one_less):
        with pytest.raises(ValueError, match="in row 1 must end in those of row 0"):
            places_of_letters(labels)


def test_the_distance_is_relative_to_what_was_written():
    labels = torch.tensor([[-100, 5, -100], [-100, 8, 5]])
    states = [torch.zeros(2, 3, 2) for _ in range(3)]
    for layer, (thought, written) in enumerate(
        [([9.0, 9.0], [1.0, 1.0]), ([1.0, 0.0], [3.0, 4.0]), ([0, 2.0], [0, 2.0])]
    ):
        states[layer][0, 0], states[layer][1, 1] = torch.tensor(thought), torch.tensor(written)
        states[layer].requires_grad_()
    distance = states_apart(states, labels, (1, 2))
    assert distance.item() == pytest.approx((20 / 25 + 0) / 2)
    distance.backward()
    gradient = states[1].grad
    assert gradient is not None
    assert gradient[0, 0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0  # what was written is not drawn to what is had in mind


def test_the_loss_is_that_of_all_answers_and_the_distance(repo, icons, tmp_path):
    """At step 0 that of the conversations is what it is alone."""
    plain = logged(tune(repo, icons, tmp_path / "plain", max_steps=1), "loss")[0]
    out = tune(repo, icons, tmp_path / "out", "--unspoken_weight", 0.5, "--unspoken_batch_size", 2, max_steps=1)
    model, processor = load_libra(repo)
    data = DataArguments(icons=str(icons), num_concepts=8, train_samples=40)
    unspoken = UnspokenArguments(0.5, 2, [1]).open(data, processor, 42)
    assert unspoken is not None
    batch = dict(processor.tokenize_images(unspoken.of_step(0, 0, 1)))
    with torch.no_grad():
        outputs = model.eval()(**batch, output_hidden_states=True)
    distance = states_apart(outputs.hidden_states, batch["labels"], [1]).item()
    assert distance > 0.01
    assert logged(out, "unspoken_loss")[0] == pytest.approx(outputs.loss.item(), abs=1e-4)
    assert logged(out, "unspoken_distance")[0] == pytest.approx(distance, abs=1e-4)
    assert logged(out, "loss")[0] == pytest.approx(plain + outputs.loss.item() + 0.5 * distance, abs=2e-4)


def test_the_forms_come_together_and_a_stopped_run_goes_on(repo, icons, tmp_path):
    flags = ("--unspoken_weight", 4, "--unspoken_batch_size", 2, "--learning_rate", 2e-3)
    whole = tune(repo, icons, tmp_path / "whole", *flags, max_steps=12)
    tune(repo, icons, tmp_path / "parts", *flags, max_steps=2)
    resumed = tune(repo, icons, tmp_path / "parts", *flags, max_steps=12)
    distances = logged(whole, "unspoken_distance")
    assert distances[-1] < 0.8 * distances[0]
    assert logged(resumed, "unspoken_distance") == distances
    expected = load_libra(whole)[0].state_dict()
    for name, value in load_libra(resumed)[0].state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_wrong_settings_stop_before_the_model_is_loaded(repo, icons, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    talks = tmp_path / "talks.json"
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}]
    talks.write_text(json.dumps([{"id": "0", "conversations": turns}]))
    for flags, message in {
        ("--unspoken_weight", 1, "--dataset", talks): "only 'world' has questions in both forms",
        ("--unspoken_weight", 1, "--num_concepts", 5): "num_concepts is 5, expected at least 6",
        ("--unspoken_weight", -1): "unspoken_weight must not be negative, found -1",
        ("--unspoken_batch_size", 0): "unspoken_batch_size must be at least 1, found 0",
        ("--unspoken_layers", 0): r"unspoken_layers are counted from 1, one at least, found \[0\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            tune(repo, icons, tmp_path / "out", *flags)
    monkeypatch.setattr(unspoken_names, "questions_that_fit", lambda *_: 0)
    with pytest.raises(ValueError, match="the context of the model is too short"):
        tune(repo, icons, tmp_path / "out", "--unspoken_weight", 1)


def test_layers_that_the_model_lacks_are_refused(repo, icons, tmp_path):
    with pytest.raises(ValueError, match=r"unspoken_layers are \[1, 99\], but the model has only \d+ layers"):
        tune(repo, icons, tmp_path / "out", "--unspoken_weight", 1, "--unspoken_layers", 1, 99)
