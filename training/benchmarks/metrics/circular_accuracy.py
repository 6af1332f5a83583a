"""Circular accuracy (CircularEval of MMBench, Liu et al. 2023): a question is asked once for each turn of its options.

It counts as right only if the model is right every time. Plain accuracy over all that was asked is given beside it.
"""

from collections.abc import Hashable, Sequence

import datasets
import evaluate

from training.benchmarks.metrics.choice_accuracy import option_letter


def circular_accuracy(right: Sequence[bool], questions: Sequence[Hashable]) -> float:
    """
    The share of questions that are right in every order.

    Args:
        right (`Sequence` of `bool`): of each time a question was asked.
        questions (`Sequence`): which question it was. MMBench numbers the turns of one `index`, `index + 1000000`, ...

    Returns:
        `float` in [0, 1].

    Raises:
        ValueError: if there are none, or the two differ in length.
    """
    if not len(right) or len(right) != len(questions):
        raise ValueError(f"Expected as many answers as questions, found {len(right)} and {len(questions)}.")
    always: dict[Hashable, bool] = {}
    for hit, question in zip(right, questions):
        always[question] = always.get(question, True) and bool(hit)
    return sum(always.values()) / len(always)


class CircularAccuracy(evaluate.Metric):
    """`compute(predictions, references, questions, options=4)`: answers, letters, and which question each answers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Liu et al. MMBench: Is Your Multi-modal Model an All-around Player? ECCV 2024.",
            inputs_description="predictions: str; references: a letter; questions: ids; options: int, or lists of str.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        questions: Sequence[Hashable],
        options: int | Sequence[Sequence[str]] = 4,
    ) -> dict[str, float]:
        offered: Sequence[int | Sequence[str]]
        offered = [options] * len(references) if isinstance(options, int) else options
        right = [
            option_letter(text, of) == wanted.strip().upper()
            for text, wanted, of in zip(predictions, references, offered, strict=True)
        ]
        return {"circular_accuracy": circular_accuracy(right, questions), "accuracy": sum(right) / len(right)}
