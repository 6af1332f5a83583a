"""Preference tuning: what is compared is the answer and nothing else, and the better one becomes more likely."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from libra_cli.loading import load_libra
from training import dpo
from training.answers import ConversationCheck
from training.conversations import ConversationArguments
from training.data import DataArguments, load_world_preferences
from training.preferences import PreferenceCollator, conversations, last_run, read_preferences

QUICK = """
max_steps: 6
per_device_train_batch_size: 2
learning_rate: 1.0e-3
lr_scheduler_type: constant
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
bf16: false
disable_tqdm: true
gradient_checkpointing: false
"""
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def preference(name: str, wrong: str, **fields) -> dict:
    part = [{"type": "image", "text": None}, {"type": "text", "text": "What colour?"}]
    return {
        "id": name,
        "images": [f"{name}.png"],
        "prompt": [{"role": "user", "content": part}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": name}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": wrong}]}],
    } | fields


@pytest.fixture
def write(tmp_path):
    """Writes preferences to a file beside their images."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")

    def run(*rows: dict):
        (tmp_path / "pairs.json").write_text(json.dumps(rows))
        return str(tmp_path / "pairs.json")

    return run


@pytest.fixture
def pairs(write) -> str:
    return write(preference("red", "blue"), preference("blue", "dark red"))


def test_the_answer_and_nothing_else_is_compared(repo, pairs):
    _, processor = load_libra(repo)
    data = read_preferences(pairs, ConversationArguments())
    batch = PreferenceCollator(processor)([data[0], data[1]])
    texts = [
        processor.batch_decode([row[mask.bool()]])[0].strip()
        for row, mask in zip(batch["input_ids"], batch["completion_mask"])
    ]
    eos = processor.tokenizer.eos_token
    assert [text.removesuffix(eos).strip() for text in texts] == ["red", "blue", "blue", "dark red"]
    assert all(text.endswith(eos) for text in texts)
    assert len(batch["pixel_values"]) == 4
    # the ids are those of the whole conversation, as it is asked later
    for side, rows in zip(("chosen", "rejected"), batch["input_ids"].chunk(2)):
        for sample, row in zip(conversations([data[0], data[1]], side), rows):
            text = processor.apply_chat_template(sample["messages"], tokenize=False)
            whole = processor(text=text, images=sample["images"], add_special_tokens=False)["input_ids"][0]
            kept = [id for id in row.tolist() if id < processor.text_vocab_size]
            expected = [id for id in whole if id < processor.text_vocab_size]
            assert kept[: len(expected)] == expected
            assert set(kept[len(expected) :]) <= {processor.tokenizer.pad_token_id}


def test_earlier_answers_are_part_of_the_question(repo, write):
    talk = preference("red", "blue")
    talk["prompt"] += [
        {"role": "assistant", "content": [{"type": "text", "text": "dark"}]},
        {"role": "user", "content": [{"type": "text", "text": "Which one?"}]},
    ]
    _, processor = load_libra(repo)
    data = read_preferences(write(talk), ConversationArguments())
    batch = PreferenceCollator(processor)([data[0]])
    found = processor.batch_decode([batch["input_ids"][0][batch["completion_mask"][0].bool()]])[0]
    assert "dark" not in found
    assert "red" in found


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_last_run(rows):
    found = last_run(torch.tensor(rows))
    for row, kept in zip(rows, found.tolist()):
        text = "".join("x" if marked else " " for marked in row).rstrip()
        expected = " " * (len(text) - len(text.split(" ")[-1])) + text.split(" ")[-1]
        assert "".join("x" if marked else " " for marked in kept).rstrip() == expected.rstrip()


def test_trls_log_probabilities_are_the_models_own(repo, pairs, tmp_path):
    """Of the text head over the whole joint row; the log-probability of each answer, summed."""
    trainer = make_trainer(repo, pairs, tmp_path)
    data = trainer.train_dataset
    inputs = trainer._prepare_inputs(trainer.data_collator([data[0], data[1]]))
    mask = inputs["completion_mask"]
    ref_chosen, ref_rejected = trainer.compute_ref_log_probs(trainer.ref_model, dict(inputs))
    with torch.no_grad():
        given = {name: value for name, value in inputs.items() if name != "completion_mask"}
        logits = load_libra(repo)[0](**given).logits[:, :-1]
    ids = inputs["input_ids"][:, 1:]
    supervised = mask[:, 1:].bool()
    assert (ids[supervised] < logits.shape[-1]).all()
    chosen = logits.log_softmax(-1).gather(-1, ids.clamp(max=logits.shape[-1] - 1)[..., None])[..., 0]
    expected = chosen.masked_fill(~supervised, 0).sum(dim=1)
    torch.testing.assert_close(torch.cat([ref_chosen, ref_rejected]), expected, rtol=1e-4, atol=1e-4)


def make_trainer(repo, pairs, tmp_path):
    model, processor = load_libra(repo)
    args = dpo.DPOConfig(
        str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, bf16=False, remove_unused_columns=False,
        per_device_train_batch_size=2,
    )  # fmt: skip
    data = read_preferences(pairs, ConversationArguments())
    return dpo.LibraDPOTrainer(
        model, processor, ref_model=load_libra(repo)[0], args=args, train_dataset=data,
        data_collator=PreferenceCollator(processor),
    )  # fmt: skip


@pytest.mark.parametrize("adapter", [(), ("--lora_target", "both", "--lora_rank", "4")], ids=["all weights", "LoRA"])
def test_the_better_answer_becomes_more_likely(repo, pairs, tmp_path, adapter):
    (tmp_path / "dpo.yaml").write_text(QUICK)
    out = tmp_path / "out"
    dpo.main(
        [
            "--config",
            str(tmp_path / "dpo.yaml"),
            "--model",
            str(repo),
            "--dataset",
            pairs,
            "--output_dir",
            str(out),
            *adapter,
        ]
    )
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "rewards/margins" in entry]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the model before is what it is compared with
    assert steps[-1]["rewards/margins"] > 0.05
    assert steps[-1]["rewards/accuracies"] == 1
    assert np.isfinite([entry["loss"] for entry in steps]).all()
    gained = [answer_log_probs(load_libra(folder), pairs) for folder in (repo, out)]
    assert (gained[1][0] - gained[1][1] > gained[0][0] - gained[0][1]).all()


def answer_log_probs(loaded, pairs) -> torch.Tensor:
    """Log-probabilities of the chosen and of the rejected answers (2, pairs)."""
    model, processor = loaded
    data = read_preferences(pairs, ConversationArguments())
    batch = processor.tokenize_images(PreferenceCollator(processor)([data[0], data[1]]))
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)[:, 1:]
    with torch.no_grad():
        log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    return picked.sum(dim=1).view(2, -1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rejected": [{"role": "assistant", "content": [{"type": "text", "text": "red "}]}]}, "same answer"),
        ({"images": ["absent.png"]}, r"names the image absent\.png"),
        ({"images": []}, "1 places for images, but 0 images"),
        ({"chosen": [{"role": "user", "content": [{"type": "text", "text": "red"}]}]}, "ends in|should be"),
        ({"chosen": []}, "no answer|ends in"),
    ],
)
def test_bad_samples_are_named(write, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        read_preferences(write(preference("red", "blue", **fields)), ConversationArguments())
    assert "Sample 0 (id 'red')" in str(error.value)


def test_missing_columns_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        read_preferences(str(tmp_path / "absent.json"), ConversationArguments())
    Dataset.from_dict({"messages": ["x"]}).to_json(tmp_path / "talks.json")
    with pytest.raises(ValueError, match="lacks the columns"):
        read_preferences(str(tmp_path / "talks.json"), ConversationArguments())


def test_answers_that_max_length_makes_the_same(repo, write):
    long = "word " * 12
    data = read_preferences(write(preference("red", long + "a", chosen=long + "b")), ConversationArguments())
    _, processor = load_libra(repo)
    whole = PreferenceCollator(processor)([data[0]])["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"\(id 'red'\): both answers are the same"):
        PreferenceCollator(processor, whole - 4)([data[0]])


def test_preferences_of_the_world(icons):
    data = DataArguments(icons=str(icons), num_concepts=8, train_samples=12, eval_samples=2)
    train, _ = load_world_preferences(data)
    for sample in (train[i] for i in range(12)):
        question = sample["prompt"][0]["content"][1]["text"]
        right, wrong = (sample[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
        assert right != wrong
        assert question.startswith("What is in the image?") != question.startswith("Where is the")
        assert (" " in right) == (" " in wrong) or question.startswith("What")


def test_special_tokens_in_answers_are_refused(write, repo):
    check = ConversationCheck(load_libra(repo)[1])
    with pytest.raises(ValueError, match="has '</s>' in turn 1"):
        read_preferences(write(preference("red", "blue</s>")), ConversationArguments(), check)
