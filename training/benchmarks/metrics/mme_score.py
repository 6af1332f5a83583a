"""MME (Fu et al. 2023): yes/no questions in pairs, of 14 subtasks.

A subtask scores 100 times its accuracy plus 100 times its accuracy+, the share of images both of whose questions are
answered right. Perception is the sum of ten subtasks (at most 2000), cognition that of four (at most 800).
"""

from collections.abc import Sequence

import datasets
import evaluate

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_answer(answer: str) -> str | None:
    """
    An answer as MME reads it.

    Args:
        answer (`str`): of the model.

    Returns:
        `str`: `"yes"` or `"no"`, if that is among its first four letters; None if neither is.
    """
    beginning = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), None)


def mme_scores(
    predictions: Sequence[str], references: Sequence[str], subtasks: Sequence[str], images: Sequence[str]
) -> dict[str, float]:
    """
    The scores of answers.

    Args:
        predictions (`Sequence` of `str`): answers of the model.
        references (`Sequence` of `str`): the right ones, `"yes"` or `"no"`.
        subtasks (`Sequence` of `str`): of [`PERCEPTION`] and [`COGNITION`].
        images (`Sequence` of `str`): which image of the subtask each is about; there are two questions about each.

    Returns:
        `dict`: `perception` and `cognition`, sums over the subtasks there are; for each of these `SUBTASK_accuracy` and
        `SUBTASK_accuracy_plus` in [0, 100].

    Raises:
        ValueError: for unknown subtasks, or images without exactly two questions.
    """
    unknown = sorted(set(subtasks) - {*PERCEPTION, *COGNITION})
    if unknown:
        raise ValueError(f"MME has no subtask {', '.join(unknown)}; there are {', '.join(PERCEPTION + COGNITION)}.")
    right: dict[str, dict[str, list[bool]]] = {}
    for answer, wanted, subtask, image in zip(predictions, references, subtasks, images, strict=True):
        found = read_answer(answer) == wanted.strip().lower().removesuffix(".")
        right.setdefault(subtask, {}).setdefault(image, []).append(found)
    scores: dict[str, float] = {"perception": 0.0, "cognition": 0.0}
    for subtask, by_image in right.items():
        lonely = next((image for image, pair in by_image.items() if len(pair) != 2), None)
        if lonely is not None:
            raise ValueError(
                f"Image {lonely!r} of {subtask} has {len(by_image[lonely])} questions; MME asks two about each."
            )
        accuracy = 100 * sum(map(sum, by_image.values())) / (2 * len(by_image))
        accuracy_plus = 100 * sum(map(all, by_image.values())) / len(by_image)
        scores[f"{subtask}_accuracy"], scores[f"{subtask}_accuracy_plus"] = accuracy, accuracy_plus
        scores["perception" if subtask in PERCEPTION else "cognition"] += accuracy + accuracy_plus
    return scores


class MMEScore(evaluate.Metric):
    """`compute(predictions, references, subtasks, images)`: answers, `"yes"` or `"no"`, and what they are about."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Fu et al. MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models. 2023.",
            inputs_description="predictions: str; references: 'yes' or 'no'; subtasks, images: lists of str.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], subtasks: Sequence[str], images: Sequence[str]
    ) -> dict[str, float]:
        return mme_scores(predictions, references, subtasks, images)
