"""Scores and their intervals, against known values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.scores import accuracy, f1, mean, wilson_interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # as R's prop.test(right, count, correct = FALSE) has them
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25527, 0.36621),  # Newcombe (1998), method 3: 0.2553 to 0.3662
        (15, 148, 0.06237, 0.16055),  # Newcombe (1998): 0.0624 to 0.1605
    ],
)
def test_wilson_intervals_are_the_published_ones(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_a_share_is_in_its_interval(pair):
    right, count = pair
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count <= high <= 1
    mirrored = wilson_interval(count - right, count)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_counts_that_are_none(right, count):
    with pytest.raises(ValueError, match=f"right={right}, count={count}"):
        wilson_interval(right, count)


def test_accuracy():
    score = accuracy([True, False, True, True])
    assert (score.value, score.count) == (0.75, 4)
    assert (score.low, score.high) == wilson_interval(3, 4)
    with pytest.raises(ValueError, match="count=0"):
        accuracy([])


def test_f1_counts_positives():
    wanted = [True, True, True, False, False, False]
    predicted = [True, True, False, True, False, False]  # TP 2, FN 1, FP 1
    score = f1(predicted, wanted)
    assert score.value == pytest.approx(4 / 6)
    assert score.low < score.value < score.high
    assert f1(predicted, wanted) == score  # the bootstrap has a seed
    assert f1(wanted, wanted).value == 1
    assert f1([False] * 6, wanted).value == 0
    assert f1([True] * 6, wanted).value == pytest.approx(2 / 3)  # what always yes scores at balance
    many = f1(predicted * 50, wanted * 50)
    assert many.high - many.low < (score.high - score.low) / 3
    for few in ([], [True]):
        with pytest.raises(ValueError, match=f"found {len(few)} and"):
            f1(few, [True, False] if few else [])


def test_mean_with_its_interval():
    score = mean([20.0, 22.0, 24.0])
    assert (score.value, score.count) == (22, 3)
    assert score.high - score.value == pytest.approx(1.959964 * 2 / 3**0.5)
    assert mean([20.0]).low == 20
