"""The metrics of the benchmarks against the original scorers' results (tests/data/metrics) and by hand."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.benchmarks.metrics.choice_accuracy import option_letter
from training.benchmarks.metrics.cider import cider_d, tokenize
from training.benchmarks.metrics.circular_accuracy import circular_accuracy
from training.benchmarks.metrics.exact_match import is_match
from training.benchmarks.metrics.mme_score import mme_scores, read_answer
from training.benchmarks.metrics.pope_f1 import pope_scores, reads_as_yes
from training.benchmarks.metrics.vqa_accuracy import normalise, vqa_score

DATA = Path(__file__).parents[1] / "data" / "metrics"
MODULES = Path(__file__).parents[2] / "training" / "benchmarks" / "metrics"

VQA = json.loads((DATA / "vqa_official.json").read_text(encoding="utf-8"))
CIDER = json.loads((DATA / "cider_coco_caption.json").read_text(encoding="utf-8"))


def test_vqa_normalisation_is_the_official_one():
    assert len(VQA) == 190
    assert [normalise(row["prediction"]) for row in VQA] == [row["normalised"] for row in VQA]


def test_vqa_scores_are_the_official_ones():
    rows = [row for row in VQA if "answers" in row]
    assert len({row["score"] for row in rows}) >= 4
    scores = [vqa_score(row["prediction"], row["answers"]) for row in rows]
    assert scores == pytest.approx([row["score"] for row in rows], abs=1e-6)


@given(st.integers(0, 10))
def test_vqa_score_of_agreeing_annotators(agreeing):
    answers = ["horse"] * agreeing + [f"other {place}" for place in range(10 - agreeing)]
    by_hand = (agreeing * min(1, (agreeing - 1) / 3) + (10 - agreeing) * min(1, agreeing / 3)) / 10
    assert vqa_score("A horse.", answers) == pytest.approx(by_hand if 0 < agreeing < 10 else 0.0)


def test_unanimous_answers_are_not_normalised():
    assert vqa_score("horse", ["horse"] * 10) == 1.0
    assert vqa_score("a horse", ["horse"] * 10) == 0.0  # an oddity of the official evaluation


def test_vqa_score_needs_answers():
    with pytest.raises(ValueError, match="no answers"):
        vqa_score("yes", [])


@given(st.text(max_size=40))
def test_normalised_text_has_one_line_and_no_articles(text):
    words = normalise(text).split(" ")
    assert "\n" not in normalise(text)
    assert not {"a", "an", "the"} & set(words)


def test_exact_match():
    assert is_match(" Left. ", "left")
    assert not is_match("left side", "left")


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [("Yes", True), ("Yes.", True), ("yes, there is", True), ("No.", False), ("NO", False), ("no, it is not", False),
     ("There is not a horse.", False), ("Yes. There is no cat.", True), ("horse", True)],
)  # fmt: skip
def test_pope_reads_answers(answer, is_yes):
    assert reads_as_yes(answer) is is_yes


def test_pope_means_over_splits():
    #               random: tp, fp, fn, tn      popular: tp, tn
    predictions = ["Yes.", "yes", "no", "No", "yes", "no"]
    references = ["yes", "no", "yes", "no", "yes", "no"]
    splits = ["random"] * 4 + ["popular"] * 2
    scores = pope_scores(predictions, references, splits)
    assert scores["f1_random"] == pytest.approx(0.5)
    assert scores["f1_popular"] == pytest.approx(1.0)
    assert scores["f1"] == pytest.approx(0.75)  # that of all answers together would be 2/3
    assert scores["precision"] == pytest.approx(0.75)
    assert scores["yes_ratio"] == pytest.approx(0.5)


def test_pope_refuses_other_answers():
    with pytest.raises(ValueError, match="'maybe'"):
        pope_scores(["yes"], ["maybe"])


def test_mme_by_hand():
    predictions = ["Yes", "No.", "yes", "yes", "No, it is not", "perhaps"]
    references = ["Yes", "No", "Yes", "No", "No", "Yes"]
    subtasks = ["color"] * 4 + ["code_reasoning"] * 2
    scores = mme_scores(predictions, references, subtasks, ["a", "a", "b", "b", "c", "c"])
    assert scores["color_accuracy"] == 75
    assert scores["color_accuracy_plus"] == 50
    assert scores["perception"] == 125
    assert scores["cognition"] == 50


def test_mme_names_what_is_wrong():
    with pytest.raises(ValueError, match="'a' of color has 1 questions"):
        mme_scores(["yes"], ["yes"], ["color"], ["a"])
    with pytest.raises(ValueError, match="no subtask smell"):
        mme_scores(["yes"] * 2, ["yes"] * 2, ["smell"] * 2, ["a"] * 2)


@given(st.sampled_from(["yes", "no"]), st.sampled_from(["", ".", "!", ", it is"]), st.booleans())
def test_mme_reads_the_beginning(word, rest, upper):
    assert read_answer((word.upper() if upper else word) + rest) == word


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("b.", "B"), ("(C)", "C"), ("D. a horse", "D"), ("(A) a horse", "A"), ("The answer is C.", "C"),
     ("Option B", "B"), ("The answer is b.", "B"), ("Answer: (c) it is", "C"), ("the answer is a mystery", None), ("答案是B。", "B"), ("选B", "B"), ("I choose C", "C"), ("A horse is in the field", None),
     ("horse", None), ("E", None), ("B or C", None), ("", None), ("It is a cat.", None)],
)  # fmt: skip
def test_letters_in_free_text(answer, letter):
    assert option_letter(answer, 4) == letter


def test_letters_by_the_text_of_an_option():
    options = ["horse", "sea horse", "cat"]
    assert option_letter("Horse.", options) == "A"
    assert option_letter("It is a cat", options) == "C"
    assert option_letter("It is a sea horse", options) is None  # horse is in it as well
    assert option_letter("D", options) is None
    assert option_letter("The answer is a horse.", ["dog", "a horse"]) == "B"  # not the option a
    assert option_letter("y", ["x", "y"]) == "B"
    assert option_letter("图中是马。", ["狗", "马"]) == "B"
    assert option_letter("It costs $5 in total", ["$5", "$10"]) == "A"
    assert option_letter("It costs $50", ["$5", "$10"]) is None


@given(st.integers(1, 26), st.data(), st.sampled_from(["{}", "{}.", "({})", "{}. something", "The answer is {}."]))
def test_every_letter_is_found(count, data, form):
    letter = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]))
    assert option_letter(form.format(letter), count) == letter


def test_letters_need_options():
    with pytest.raises(ValueError, match="1 to 26"):
        option_letter("A", 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1))
def test_circular_accuracy_never_exceeds_that_of_the_first_order(answers):
    questions, right = [question for question, _ in answers], [hit for _, hit in answers]
    first = dict(reversed(answers))
    assert circular_accuracy(right, questions) <= sum(first.values()) / len(first)
    assert (circular_accuracy(right, questions) == 1) == all(right)


def test_cider_is_that_of_coco_caption():
    candidates = [image["tokens"] for image in CIDER["images"]]
    references = [image["reference_tokens"] for image in CIDER["images"]]
    scores = cider_d(candidates, references)
    assert scores == pytest.approx([image["score"] for image in CIDER["images"]], abs=1e-9)
    assert scores.mean() == pytest.approx(CIDER["mean"], abs=1e-9)


def test_captions_are_split_as_by_the_tokenizer_of_stanford():
    for image in CIDER["images"]:
        assert tokenize(image["caption"]) == image["tokens"]
        assert [tokenize(text) for text in image["references"]] == image["reference_tokens"]


words = st.lists(st.sampled_from(["a", "horse", "red", "bus", "runs"]), min_size=1, max_size=8).map(" ".join)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5), st.randoms())
def test_cider_stays_in_range_and_does_not_depend_on_order(images, random):
    scores = cider_d([caption for caption, _ in images], [references for _, references in images])
    assert (scores >= 0).all()
    assert (scores <= 10 + 1e-9).all()
    order = random.sample(range(len(images)), len(images))
    again = cider_d([images[i][0] for i in order], [images[i][1] for i in order])
    assert np.allclose(again, scores[order])


def test_cider_refuses_images_without_references():
    with pytest.raises(ValueError, match="Image 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])


def test_modules_load_and_compute_without_a_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric must not open a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)

    def compute(name, **inputs):
        return evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path)).compute(**inputs)

    assert compute("vqa_accuracy", predictions=["two"], references=[["2"] * 9 + ["3"]]) == {"vqa_accuracy": 1.0}
    assert compute("exact_match", predictions=["Left."], references=["left"]) == {"exact_match": 1.0}
    pope = compute("pope_f1", predictions=["Yes.", "no"], references=["yes", "no"], splits=["random", "popular"])
    assert pope["f1_random"] == 1.0
    assert pope["f1"] == 0.5  # no positive in the other one
    mme = {"subtasks": ["color"] * 2, "images": ["1", "1"]}
    assert compute("mme_score", predictions=["Yes", "No"], references=["Yes", "No"], **mme)["perception"] == 200
    assert compute("choice_accuracy", predictions=["B."], references=["B"], options=2)["accuracy"] == 1.0
    asked = {"predictions": ["A", "B", "C"], "references": ["A", "B", "A"]}
    found = compute("circular_accuracy", **asked, questions=[1, 1, 2])
    assert found == {"circular_accuracy": 0.5, "accuracy": pytest.approx(2 / 3)}
    captions = [image["caption"] for image in CIDER["images"]]
    references = [image["references"] for image in CIDER["images"]]
    assert compute("cider", predictions=captions, references=references)["cider"] == pytest.approx(CIDER["mean"])
