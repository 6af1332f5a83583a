"""The VQA score (Antol et al. 2015; VQAv2, OKVQA, VizWiz): how many of the annotators an answer agrees with.

With ten annotators, an answer that three others gave is right. For each annotator the answers of the others are counted,
`min(matches / 3, 1)`, and the mean is taken. Before that both sides are normalised as in the official evaluation
(GT-Vision-Lab/VQA, vqaEval.py), its oddities included: nothing is normalised where all annotators wrote the same.
"""

import re
from collections.abc import Sequence

import datasets
import evaluate

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
NUMBERS["none"] = "0"

CONTRACTED = [
    "'ow's'at",
    "'twas",
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTED for place, letter in enumerate(word) if letter == "'"
}
"""The same word with one apostrophe left out."""
CONTRACTIONS["somebody'd"] = "somebodyd"  # as the official table has it


def normalise(text: str) -> str:
    """
    An answer as the official evaluation compares it.

    Args:
        text (`str`): the answer.

    Returns:
        `str`: lower case, without articles and most punctuation, number words up to ten as digits, apostrophes of
        contractions put back.
    """
    text = _in_one_line(text)
    has_thousands = re.search(r"\d,\d", text) is not None
    found = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or has_thousands else " ")
    found = re.sub(r"\.(?!\d)", "", found, count=32)  # the official code passes a flag as the count
    words = [NUMBERS.get(word, word) for word in found.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """
    The score of one answer.

    Args:
        prediction (`str`): the answer of the model.
        answers (`Sequence` of `str`): those of the annotators, ten as a rule.

    Returns:
        `float` in [0, 1].

    Raises:
        ValueError: if there are no annotators.
    """
    if not answers:
        raise ValueError("There are no answers to compare with; expected those of ten annotators.")
    prediction, answers = _in_one_line(prediction), [_in_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


class VQAAccuracy(evaluate.Metric):
    """`compute(predictions, references)`: strings, and for each the list of its annotators' answers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Antol et al. VQA: Visual Question Answering. ICCV 2015.",
            inputs_description="predictions: str; references: list of str, the answers of the annotators.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [vqa_score(text, answers) for text, answers in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}
