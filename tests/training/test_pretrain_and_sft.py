"""Stages 1 and 2: what is supervised, what is trained, that a killed run goes on, that the result loads."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from libra_cli.init import init_libra
from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor
from tests.training.libra_parts import make_parts
from training import pretrain, sft
from training.data import (
    DataArguments,
    load_caption_data,
    load_world_conversations,
    load_world_preferences,
    load_worlds,
    to_conversation,
)
from training.pretrain import LibraPretrainer, PretrainCollator, freeze_language_model
from training.world.concepts import load_concepts
from training.world.questions import BARE_CAPTION, PROMPT_CAPTION, PROMPT_CHOICE, PROMPT_CHOICE_NAMED, PROMPT_SHORT

SHORT = """
dataset: world
train_samples: 40
eval_samples: 4
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
eval_strategy: steps
eval_steps: 2
report_to: none
use_cpu: true
disable_tqdm: true
seed: 0
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of an untrained language model and an untrained image tokenizer."""
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def data(icons) -> DataArguments:
    return DataArguments(icons=str(icons), train_samples=40, eval_samples=4)


@pytest.fixture
def libra(parts):
    torch.manual_seed(0)
    return init_libra(parts / "llm", parts / "image_tokenizer")


def run_pretraining(parts, icons, out, *flags):
    config = out.parent / "pretrain.yaml"
    config.write_text(SHORT)
    pretrain.main(
        ["--config", str(config), "--language_model", str(parts / "llm"), "--icons", str(icons),
         "--image_tokenizer", str(parts / "image_tokenizer"), "--output_dir", str(out), *flags]
    )  # fmt: skip
    return out


def test_libra_starts_as_its_language_model(libra, parts):
    model, processor = libra
    text_model = AutoModelForCausalLM.from_pretrained(parts / "llm").eval()
    ids = processor(text="a horse is an animal.", return_tensors="pt")["input_ids"]
    assert torch.equal(model.eval()(ids).logits, text_model(ids).logits)


@pytest.mark.parametrize("draw", [False, True], ids=["image to text", "text to image"])
def test_pretraining_supervises_codes_and_captions(libra, data, draw):
    model, processor = libra
    train, _ = load_caption_data(data)
    samples = [train[i] for i in range(3)]
    batch = PretrainCollator(processor, text_to_image_fraction=float(draw))(samples)
    batch.pop("draws")
    batch = processor.tokenize_images(batch)
    for ids, labels, sample in zip(batch["input_ids"], batch["labels"], samples):
        is_vision = ids >= processor.text_vocab_size
        is_boi = ids == processor.boi_token_id
        assert torch.equal(labels[is_vision & ~is_boi], ids[is_vision & ~is_boi])
        assert (labels[is_boi] == -100).all()
        supervised = processor.decode(labels[(labels >= 0) & ~is_vision]).replace(processor.tokenizer.bos_token, "")
        assert supervised.strip() == ("" if draw else sample["text"] + processor.tokenizer.eos_token)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "image_features", "labels")}
    loss = model(**inputs).loss
    assert loss.isfinite()
    # The Trainer divides by the number of labels, so these must be exactly what the loss is a sum over.
    torch.testing.assert_close(model(**inputs, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss, loss)


def test_text_to_image_samples_lose_their_features(libra, data, tmp_path):
    model, processor = libra
    train, _ = load_caption_data(data)
    trainer = LibraPretrainer(model, processor, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    for fraction in (0.0, 1.0):
        batch = PretrainCollator(processor, fraction)([train[i] for i in range(3)])
        features = trainer._prepare_inputs(batch)["image_features"]
        assert (features == 0).all() == (fraction == 1.0)


def test_which_samples_are_drawn_depends_on_their_place_alone(libra, data):
    """Not on the batch or on what was drawn before, so that a restart changes nothing; the share is right."""
    collator = PretrainCollator(libra[1], text_to_image_fraction=0.3, seed=1)
    places = [{"place": (0, worker, 2, row)} for worker in range(2) for row in range(1000)]
    draws = [collator._draws(sample) for sample in places]
    assert [collator._draws(sample) for sample in reversed(places)] == draws[::-1]
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=0.04)  # four standard deviations
    other = PretrainCollator(libra[1], text_to_image_fraction=0.3, seed=2)
    assert [other._draws(sample) for sample in places] != draws
    samples = [load_caption_data(data)[0][i] for i in range(8)]
    batch = collator(samples)
    assert batch["draws"].tolist() == [collator._draws(sample) for sample in samples]
    assert 0 < batch["draws"].sum() < 8


def test_images_are_tokenized_by_the_trainer_in_batches(libra, data, tmp_path, monkeypatch):
    """Workers stop at pixels; a batch is one call, without gradients."""
    model, processor = libra
    calls, encode = [], processor.image_tokenizer.encode
    monkeypatch.setattr(
        processor.image_tokenizer, "encode", lambda pixels: calls.append(pixels.shape[0]) or encode(pixels)
    )
    batch = PretrainCollator(processor)([load_caption_data(data)[0][i] for i in range(4)])
    assert (calls, "image_features" in batch, batch["pixel_values"].shape[0]) == ([], False, 4)
    trainer = LibraPretrainer(model, processor, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    inputs = trainer._prepare_inputs(batch)
    assert calls == [4]
    assert not inputs["image_features"].requires_grad


def test_an_empty_caption_is_refused(libra, data):
    sample = load_caption_data(data)[0][0]
    with pytest.raises(ValueError, match="Sample 1 of the batch has an empty caption"):
        PretrainCollator(libra[1])([sample, {**sample, "text": " "}])


def test_pretraining_leaves_the_language_model_untouched(parts, icons, tmp_path):
    out = run_pretraining(parts, icons, tmp_path / "out", "--max_steps", "2", "--text_to_image_fraction", "0.3")
    torch.manual_seed(0)
    before, _ = init_libra(parts / "llm", parts / "image_tokenizer")
    after = LibraForCausalLM.from_pretrained(out).state_dict()
    for name, value in before.state_dict().items():
        if "vision" not in name:
            assert torch.equal(value, after[name]), name
    moved = [name for name, p in before.named_parameters() if "vision" in name and not torch.equal(p, after[name])]
    assert any("bridge" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
    assert LibraProcessor.from_pretrained(out).text_vocab_size == before.config.text_vocab_size


def test_a_stopped_pretraining_goes_on_as_if_it_had_not_stopped(parts, icons, tmp_path):
    constant = ("--lr_scheduler_type", "constant")  # else the schedule would depend on max_steps
    whole = run_pretraining(parts, icons, tmp_path / "whole", "--max_steps", "4", *constant)
    run_pretraining(parts, icons, tmp_path / "parts", "--max_steps", "2", *constant)
    resumed = run_pretraining(parts, icons, tmp_path / "parts", "--max_steps", "4", *constant)
    expected = LibraForCausalLM.from_pretrained(whole).state_dict()
    for name, value in LibraForCausalLM.from_pretrained(resumed).state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_only_the_vision_system_is_trainable(libra):
    model, _ = libra
    trainable, frozen = freeze_language_model(model)
    assert trainable == sum(p.numel() for n, p in model.named_parameters() if "vision" in n)
    assert frozen == sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()


def test_the_frozen_language_model_has_no_optimizer_state(libra, data, tmp_path):
    model, processor = libra
    freeze_language_model(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, remove_unused_columns=False,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = LibraPretrainer(
        model, processor, args=args, data_collator=PretrainCollator(processor), train_dataset=load_caption_data(data)[0]
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["codebook_1_loss"] + log["codebook_2_loss"]) / 2 == pytest.approx(log["vision_loss"], abs=1e-4)
    assert log["codebook_1_loss"] != log["codebook_2_loss"]
    assert {"text_loss", "tokens_per_second", "peak_memory_gb"} <= log.keys()
    vision = {name for name in before if "vision" in name}
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = trainer.optimizer.state_dict()["state"]
    assert len(state) == len(vision)
    given = {names[parameter] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert given == vision
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in vision), name


def test_the_world_asks_the_same_at_every_run(data):
    first, second = (load_world_conversations(data)[0] for _ in range(2))
    assert first[3]["messages"] == second[3]["messages"]
    assert np.array_equal(np.asarray(first[3]["images"][0]), np.asarray(second[3]["images"][0]))


@pytest.mark.parametrize("naming_first", [True, False])
def test_conversations_about_the_world(data, naming_first):
    """As many questions as asked for, none twice; the first one names what is there only where it is to."""
    asked = replace(data, max_turns=3, naming_first=naming_first)
    conversations = [row["messages"] for row in load_world_conversations(asked)[0]]
    questions = [[turn["content"] for turn in messages[::2]] for messages in conversations]
    assert {len(turns) for turns in questions} == {1, 2, 3}
    assert all(len(set(turns)) == len(turns) for turns in questions)
    names = [PROMPT_CAPTION in turns[0] or turns[0].startswith("What is in the image?\nAnswer") for turns in questions]
    assert all(names) == naming_first
    assert any(names)


def test_kinds_of_questions_as_often_as_they_are_named(data):
    asked = replace(data, max_turns=100, naming_first=False, kinds=["exists", "exists", "exists", "label", "place"])
    conversations = [row["messages"] for row in load_world_conversations(asked)[0]]
    counts = {
        (len(turns), sum(turn.startswith("Is there a") for turn in turns)) for turns in map(_asked, conversations)
    }
    assert (4, 3) in counts  # all there is to ask, if not fewer are asked
    assert max(counts) == (4, 3)
    assert all(
        turn.startswith(("Is there a", "What is in the image?", "Where is"))
        for turns in conversations
        for turn in _asked(turns)
    )


def test_questions_without_their_prompts(data):
    asked = replace(data, max_turns=100, naming_first=False, bare_share=1.0)
    turns = [turn for row in load_world_conversations(asked)[0] for turn in _asked(row["messages"])]
    assert {"What is in the image?", "How many objects are there?", BARE_CAPTION} <= set(turns)
    assert not any(turn.endswith((PROMPT_SHORT, PROMPT_CHOICE_NAMED, PROMPT_CAPTION)) for turn in turns)
    messages = [turn for row in load_world_conversations(asked)[0] for turn in row["messages"]]
    choices = [
        (turn["content"].endswith(PROMPT_CHOICE), len(answer["content"]) == 1)
        for turn, answer in zip(messages[::2], messages[1::2], strict=True)
        if turn["content"].startswith("What is in the image?\nA. ")
    ]
    assert set(choices) == {(True, True), (False, False)}  # a letter alone only if it is asked for


def test_things_are_named_once(data):
    """So that no question can be answered from those before it: all of a conversation name something else, or nothing."""
    kinds = ["exists", "exists_zh", "place", "place", "place", "caption", "count"]
    asked = replace(data, train_samples=200, max_turns=100, naming_first=False, named_once=True, kinds=kinds)
    several, telling = 0, 0
    for sample in load_world_conversations(asked)[0]:
        turns = _asked(sample["messages"])
        naming = {turn.startswith(("Is there", "Where is", "图中有")) for turn in turns}
        assert len(naming) == 1
        things = [re.search(r"(?:Is there an?|Where is the) (.+?)(?: in the image)?\?", turn) for turn in turns]
        names = [thing[1] for thing in things if thing]
        assert len(names) == len(set(names))
        several += sum(turn.startswith("Where is") for turn in turns) > 1
        telling += naming == {False}
    assert several
    assert 0 < telling < 150  # of 200


@pytest.mark.parametrize("single", [0.0, 1.0], ids=["grids", "singles"])
@pytest.mark.parametrize("once", [True, False], ids=["named once", "any"])
def test_yes_and_no_are_balanced_wherever_they_are_asked(data, single, once):
    """What is there can be asked for once, what is not by many names. Most users ask one question, the first."""
    kinds = ["exists"] * 6 + ["exists_zh"] * 3 + ["place"] * 4 + ["count"]
    asked = replace(
        data, train_samples=1200, max_turns=8, naming_first=False, named_once=once, kinds=kinds,
        single_fraction=[single, single],
    )  # fmt: skip
    world, concepts, rng = load_worlds(asked)[0], load_concepts(), np.random.default_rng(1)
    layouts = [world.layout(index, rng) for index in range(len(world))]
    conversations = [to_conversation(layout, rng, concepts, asked)["messages"] for layout in layouts]
    for place in range(2):
        answers = Counter(messages[2 * place + 1]["content"] for messages in conversations if len(messages) > 2 * place)
        for yes, no in ("yes", "no"), ("有", "没有"):
            count = answers[yes] + answers[no]
            assert count > 50
            assert abs(answers[yes] / count - 0.5) < 3.5 * 0.5 / count**0.5, (place, answers)


def _asked(messages):
    return [turn["content"] for turn in messages[::2]]


def test_no_questions_are_refused():
    with pytest.raises(ValueError, match="max_turns must be at least 1, found 0"):
        DataArguments(max_turns=0)
    with pytest.raises(ValueError, match=r"kinds are of \['caption', .*\], found \['exist'\]"):
        DataArguments(kinds=["exist"])
    with pytest.raises(ValueError, match=r"kinds must have one of \['caption', .*\] to ask about grids, found"):
        DataArguments(kinds=["label"], naming_first=False)
    with pytest.raises(ValueError, match="similar is a share, 0 to 1, found 30"):
        DataArguments(similar=30)
    for load in (load_world_conversations, load_world_preferences):
        with pytest.raises(ValueError, match="num_concepts is 5, expected at least 6"):
            load(DataArguments(num_concepts=5))
    with pytest.raises(ValueError, match="naming_first and named_once are opposites"):
        DataArguments(named_once=True)
    with pytest.raises(ValueError, match="With naming_first kinds must have 'caption'"):
        DataArguments(kinds=["exists"])


def test_instruction_tuning_trains_everything_but_clip(parts, icons, tmp_path):
    start = run_pretraining(parts, icons, tmp_path / "pretrain", "--max_steps", "1")
    (tmp_path / "sft.yaml").write_text(SHORT + "bf16: false\ngradient_checkpointing: false\nmax_length: 512\n")
    sft.main(
        ["--config", str(tmp_path / "sft.yaml"), "--model", str(start), "--icons", str(icons), "--max_steps", "2",
         "--output_dir", str(tmp_path / "sft")]
    )  # fmt: skip
    before, after = (LibraForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("pretrain", "sft"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model.layers.0" in name for name in moved)
    assert any("vision_model.layers.0" in name for name in moved)
    tokenizers = [LibraProcessor.from_pretrained(tmp_path / name).image_tokenizer for name in ("pretrain", "sft")]
    weights = [tokenizer.state_dict() for tokenizer in tokenizers]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_share_of_the_conversations_is_about_lines_of_text(data):
    samples = load_world_conversations(replace(data, text_share=0.5))[0]
    texts = [sample for sample in samples if not sample["images"]]
    assert 10 <= len(texts) <= 30
    lines = [sample["messages"][0]["content"].split("\n")[0] for sample in texts]
    assert all(line.startswith("image: ") for line in lines)
    assert not any("image: " in message["content"] for sample in texts for message in sample["messages"][1:])
    assert not any("image: " in m["content"] for sample in samples if sample["images"] for m in sample["messages"])


def test_a_share_of_the_conversations_is_about_letters_of_options(data):
    samples = load_world_conversations(replace(data, letters_share=0.5))[0]
    texts = [sample for sample in samples if not sample["images"]]
    assert 10 <= len(texts) <= 30
    for sample in texts:
        question, answer = sample["messages"]
        assert question["content"].startswith("A. ")
        assert re.fullmatch(r"(.+: [A-H], ){7}.+: [A-H]", answer["content"])


def test_no_question_comes_twice(data):
    asked = replace(data, max_turns=100, naming_first=False, kinds=["count", "count", "exists", "exists", "exists"])
    for sample in load_world_conversations(asked)[0]:
        questions = [message["content"] for message in sample["messages"][::2]]
        assert len(questions) == len(set(questions))
