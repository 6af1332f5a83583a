"""POPE (Li et al. 2023): does the model see what is not there?

The paper's number is the mean F1 (yes is positive) of the three splits, random, popular and adversarial. An answer is read
as in the official evaluation: it is no if its first sentence has one of the words no and not, and yes otherwise; so `Yes.`
is yes. The share of yes among the answers says which way a model leans; half of the right ones are yes.
"""

import re
from collections.abc import Sequence

import datasets
import evaluate

from training.scores import f1


def reads_as_yes(answer: str) -> bool:
    """
    Whether an answer is yes, in POPE's reading. Unlike there, case does not count.

    Args:
        answer (`str`): of the model.
    """
    first_sentence = answer.split(".")[0].replace(",", "")
    return not {"no", "not"} & set(first_sentence.lower().split())


def pope_scores(
    predictions: Sequence[str], references: Sequence[str], splits: Sequence[str] | None = None
) -> dict[str, float]:
    """
    The scores of answers, of each split and their means.

    Args:
        predictions (`Sequence` of `str`): answers of the model.
        references (`Sequence` of `str`): the right ones, `"yes"` or `"no"`.
        splits (`Sequence` of `str`, *optional*): the split of each; by default there is one.

    Returns:
        `dict`: `f1`, `accuracy`, `precision`, `recall` and `yes_ratio`, means over the splits, and `f1_SPLIT` for each.

    Raises:
        ValueError: for right answers that are neither yes nor no, or lists that differ in length.
    """
    splits = ["all"] * len(references) if splits is None else splits
    wrong = sorted({answer for answer in references if answer.strip().lower() not in ("yes", "no")})
    if wrong:
        raise ValueError(f"The right answers must be yes or no, found {', '.join(map(repr, wrong))}.")
    positive: dict[str, list[bool]] = {}
    true: dict[str, list[bool]] = {}
    for answer, right, split in zip(predictions, references, splits, strict=True):
        positive.setdefault(split, []).append(reads_as_yes(answer))
        true.setdefault(split, []).append(right.strip().lower() == "yes")
    rows = {split: _split_scores(positive[split], true[split]) for split in positive}
    means = {name: sum(row[name] for row in rows.values()) / len(rows) for name in next(iter(rows.values()))}
    named = {f"f1_{re.sub(r'[^a-z0-9]+', '_', split.lower())}": row["f1"] for split, row in rows.items()}
    return means | named


def _split_scores(positive: list[bool], true: list[bool]) -> dict[str, float]:
    both = sum(found and right for found, right in zip(positive, true))
    return {
        "f1": f1(positive, true, resamples=1).value,  # its interval is not shown
        "accuracy": sum(found == right for found, right in zip(positive, true)) / len(true),
        "precision": both / max(sum(positive), 1),
        "recall": both / max(sum(true), 1),
        "yes_ratio": sum(positive) / len(positive),
    }


class PopeF1(evaluate.Metric):
    """`compute(predictions, references, splits=None)`: answers, `"yes"` or `"no"`, and the split of each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Li et al. Evaluating Object Hallucination in Large Vision-Language Models. EMNLP 2023.",
            inputs_description="predictions: str; references: 'yes' or 'no'; splits: list of str, optional.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], splits: Sequence[str] | None = None
    ) -> dict[str, float]:
        return pope_scores(predictions, references, splits)
