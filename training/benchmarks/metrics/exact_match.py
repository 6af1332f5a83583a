"""Exact match, as for GQA (Hudson and Manning 2019): case, space around an answer and its last period do not count."""

import datasets
import evaluate


def is_match(prediction: str, reference: str) -> bool:
    """
    Whether two answers are the same.

    Args:
        prediction (`str`): the answer of the model.
        reference (`str`): the right one.
    """
    return _plain(prediction) == _plain(reference)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


class ExactMatch(evaluate.Metric):
    """`compute(predictions, references)`: strings."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Hudson and Manning. GQA: A New Dataset for Real-World Visual Reasoning. CVPR 2019.",
            inputs_description="predictions: str; references: str.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        matches = [is_match(*pair) for pair in zip(predictions, references, strict=True)]
        return {"exact_match": sum(matches) / len(matches)}
