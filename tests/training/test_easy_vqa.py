"""easy-VQA: the training data, and the evaluation on real images of the test split."""

import json
from collections import Counter
from pathlib import Path

import pytest

from libra_cli.loading import load_libra
from training.benchmarks.easy_vqa import (
    EasyQuestion,
    evaluate_easy_vqa,
    format_results,
    image_files,
    load_questions,
    main,
    score_answers,
    write_training_data,
)
from training.conversations import ConversationArguments, answers_of, read_conversations

TINY = Path(__file__).parents[2] / "hub_configs" / "libra-tiny"


@pytest.mark.parametrize(("split", "questions", "images"), [("train", 38575, 4000), ("test", 9673, 1000)])
def test_splits_are_the_official_ones(split, questions, images):
    assert len(load_questions(split)) == questions
    assert len(image_files(split)) == images
    assert {question.image for question in load_questions(split)} <= set(image_files(split))


def test_there_are_two_splits():
    with pytest.raises(ValueError, match="not 'validation'"):
        load_questions("validation")


@pytest.mark.parametrize(
    ("text", "answer", "kind"),
    [("what color is the circle?", "red", "colour"), ("what is the blue shape?", "circle", "shape"),
     ("is there a red shape?", "yes", "yes/no"), ("is there not a red shape?", "no", "yes/no, negated"),
     ("is no circle present?", "yes", "yes/no, negated")],
)  # fmt: skip
def test_kinds(text, answer, kind):
    assert EasyQuestion(0, text, answer).kind == kind


def test_kinds_of_all_questions_fit_their_answers():
    answers = {}
    for question in load_questions("train"):
        answers.setdefault(question.kind, set()).add(question.answer)
    assert answers["yes/no"] == answers["yes/no, negated"] == {"yes", "no"}
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert len(answers["colour"]) == 8


def test_training_data_asks_every_question_once(tmp_path):
    path = write_training_data(tmp_path, max_turns=8)
    samples = json.loads(path.read_text())
    asked = Counter()
    for sample in samples:
        turns = sample["messages"]
        assert 1 <= len(turns) // 2 <= 8
        image = int(Path(sample["images"][0]).stem)
        texts = [turn["content"].split("\n")[0] for turn in turns]
        asked.update((image, *pair) for pair in zip(texts[::2], texts[1::2]))
    assert asked == Counter(
        (question.image, question.question, question.answer) for question in load_questions("train")
    )

    small = tmp_path / "small.json"
    small.write_text(json.dumps(samples[:5]))
    conversations = read_conversations(str(small), ConversationArguments())
    assert answers_of(conversations[0]["messages"]) == [turn["content"] for turn in samples[0]["messages"][1::2]]
    assert conversations[0]["images"][0].size == (64, 64)


def test_training_data_needs_turns(tmp_path):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        write_training_data(tmp_path, max_turns=0)


def test_scores_by_hand():
    training = [EasyQuestion(0, "is there a red shape?", "no")] * 3 + [EasyQuestion(0, "what shape?", "circle")] * 2
    questions = [EasyQuestion(0, "is there a red shape?", "yes"), EasyQuestion(0, "what shape?", "circle")]
    results = score_answers(questions, ["yes", "circles"], training)
    assert results["all"]["value"] == 0.5
    assert results["all"]["count"] == 2
    assert results["all"]["low"] < 0.5 < results["all"]["high"]
    assert (results["all"]["majority"], results["all"]["by_words"]) == (0, 0.5)
    assert (results["yes/no"]["value"], results["shape"]["value"], results["shape"]["by_words"]) == (1, 0, 1)
    assert "| all | 2 | 50.0% (" in format_results(results)


def test_answers_are_those_of_generate(monkeypatch):
    """Two images whose questions are asked in one batch; each answer as the model gives it alone."""
    seen = {}
    monkeypatch.setattr(
        "training.benchmarks.easy_vqa.score_answers", lambda questions, answers, _: seen.update(zip(questions, answers))
    )
    report = evaluate_easy_vqa(TINY, num_images=2, batch_size=2)
    assert report["num_images"] == 2
    assert len(seen) > 5
    model, processor = load_libra(TINY)
    for question, answer in list(seen.items())[::4]:
        parts = [
            {"type": "image", "path": str(image_files("test")[question.image])},
            {"type": "text", "text": question.prompt},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        alone = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert alone.startswith(answer)  # the evaluation stops a token after the longest right answer


def test_number_of_images_is_checked_before_the_model_is_loaded():
    with pytest.raises(ValueError, match=r"\[1, 1000\], found 1001"):
        evaluate_easy_vqa("nowhere", num_images=1001)


def test_command_checks_its_output(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "nowhere", "--output", str(tmp_path / "none" / "out.json")])
    assert "no folder" in capsys.readouterr().err
