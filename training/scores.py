"""Scores with what sampling alone makes uncertain about them: 95% intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""Half the width of a 95% interval of a normal distribution, in standard deviations."""


@dataclass(frozen=True)
class Score:
    """
    A measured number.

    Args:
        value (`float`): the number.
        low (`float`): lower end of its 95% interval.
        high (`float`): upper end.
        count (`int`): answers or images it was measured on.
    """

    value: float
    low: float
    high: float
    count: int


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """
    The 95% Wilson interval of a share (Wilson 1927), which holds for small counts and shares near 0 and 1 too.

    Args:
        right (`int`): how many are right, in [0, count].
        count (`int`): of how many, at least 1.

    Returns:
        `tuple` of two `float` in [0, 1].

    Raises:
        ValueError: if the counts are none.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"Expected 0 <= right <= count and count >= 1, found right={right}, count={count}.")
    share, squared = right / count, Z_95**2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + squared / (4 * count**2)) / (1 + squared / count)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # at 0 and 1 despite rounding


def accuracy(right: Sequence[bool]) -> Score:
    """
    The share of right answers with its Wilson interval.

    Args:
        right (`Sequence` of `bool`): at least one answer.

    Raises:
        ValueError: if there is no answer.
    """
    hits = sum(map(bool, right))
    low, high = wilson_interval(hits, len(right))
    return Score(hits / len(right), low, high, len(right))


def f1(predicted: Sequence[bool], wanted: Sequence[bool], resamples: int = 1000, seed: int = 0) -> Score:
    """
    F1 of the positive class (POPE, Li et al. 2023), 2 TP / (2 TP + FP + FN), with the percentile interval of a bootstrap.

    Args:
        predicted (`Sequence` of `bool`): whether the answer is positive. One that is neither yes nor no is not.
        wanted (`Sequence` of `bool`): whether the right one is.
        resamples (`int`, *optional*, defaults to 1000): of the bootstrap.
        seed (`int`, *optional*, defaults to 0): of the bootstrap.

    Raises:
        ValueError: if there is no answer, or the two are not as many.
    """
    if len(predicted) != len(wanted) or not len(wanted):
        raise ValueError(f"Expected as many answers as questions, found {len(predicted)} and {len(wanted)}.")
    positive, true = np.asarray(predicted, dtype=bool), np.asarray(wanted, dtype=bool)

    def compute(places: np.ndarray) -> np.ndarray:
        both = (positive[places] & true[places]).sum(axis=-1)
        either = positive[places].sum(axis=-1) + true[places].sum(axis=-1)  # 2 TP + FP + FN
        return 2 * both / np.maximum(either, 1)

    places = np.random.default_rng(seed).integers(len(true), size=(resamples, len(true)))
    low, high = np.quantile(compute(places), (0.025, 0.975))
    return Score(float(compute(np.arange(len(true)))), float(low), float(high), len(true))


def mean(values: Sequence[float]) -> Score:
    """
    A mean with its normal 95% interval.

    Args:
        values (`Sequence` of `float`): at least one; with one the interval is that value.
    """
    numbers = np.asarray(values, dtype=float)
    spread = numbers.std(ddof=1) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    centre = float(numbers.mean())
    return Score(centre, centre - Z_95 * float(spread), centre + Z_95 * float(spread), len(numbers))
