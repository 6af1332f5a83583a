"""The table of the ablations: what it says follows from the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.ablation_report import Row, compare, describe, make_orderings, make_table, write_report

SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=5)


def row(title, named, unseen=None, chance=0.05, **kwargs):
    unseen = named if unseen is None else unseen
    numbers = [
        {"train_vendors": a, "unseen_vendor": b, "chance": chance, "text_loss": 1.0 + a, "vision_loss": 2.0 + a}
        for a, b in zip(named, unseen)
    ]
    return Row(title, numbers, **kwargs)


@pytest.mark.parametrize(
    ("full", "variant", "verdict"),
    [
        ([0.50, 0.52, 0.54], [0.30, 0.31, 0.29], "reproduces"),
        ([0.30, 0.31, 0.29], [0.50, 0.52, 0.54], "does not reproduce, the other way round"),
        ([0.50, 0.60, 0.70], [0.55, 0.50, 0.60], "not told apart"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "not told apart"),
        ([0.9], [0.1], "one seed shows nothing"),
        ([0.9, 0.9, 0.9], [0.1], "one seed shows nothing"),
    ],
)
def test_verdicts(full, variant, verdict):
    assert compare(full, variant).verdict == verdict


def test_the_spread_is_that_of_the_difference():
    found = compare([0.1, 0.2, 0.3], [0.5, 0.7])
    assert found.difference == pytest.approx(-0.4)
    assert found.spread == pytest.approx((0.01 + 0.02) ** 0.5)


@given(SHARES, SHARES)
def test_verdicts_are_antisymmetric(full, variant):
    there, back = compare(full, variant), compare(variant, full)
    assert there.difference == pytest.approx(-back.difference)
    assert there.spread == pytest.approx(back.spread)
    shown = {"reproduces", "does not reproduce, the other way round"}
    assert (there.verdict in shown) == (back.verdict in shown)
    assert there.verdict not in shown or there.verdict != back.verdict


def test_numbers_are_described_with_their_spread():
    assert describe([0.40, 0.42, 0.44], percent=True) == "42.0% ± 2.0"
    assert describe([0.40], percent=True) == "40.0%"
    assert describe([1.0, 1.5], percent=False) == "1.250 ± 0.354"


def test_the_table_has_a_line_a_variant_and_leaves_out_what_does_not_compare():
    lines = make_table([row("full model", [0.5, 0.6]), row("(a) x", [0.1, 0.2], predicts_same_codes=False)])
    assert lines[2] == "| full model | 2 | 55.0% ± 7.1 | 55.0% ± 7.1 | 1.550 ± 0.071 | 2.550 ± 0.071 |"
    assert lines[3] == "| (a) x | 2 | 15.0% ± 7.1 | 15.0% ± 7.1 | 1.150 ± 0.071 | – |"
    assert lines[-1].startswith("Chance is 5.0%.")


def test_orderings_are_said_for_both_vendors_apart():
    full = row("full model", [0.5, 0.5], [0.2, 0.2])
    text = "\n".join(make_orderings(full, [row("(d) no expert", [0.3, 0.3], [0.3, 0.3])]))
    assert (
        "(d) no expert; named, training vendors: the full model is +20.0 points away, spread 0.0: **reproduces**"
        in text
    )
    assert "named, unseen vendor: the full model is -10.0 points away, spread 0.0: **does not reproduce" in text
    assert "not above chance" not in text


def test_a_full_model_at_chance_is_said_to_show_nothing():
    text = "\n".join(make_orderings(row("full model", [0.05, 0.06], [0.5, 0.5]), [row("(e) no bridge", [0.05, 0.04])]))
    assert 'In "named, training vendors" the full model is not above chance' in text
    assert 'In "named, unseen vendor"' not in text


def test_the_report_of_some_variants(tmp_path):
    write_report(tmp_path / "without.md", [row("(e) no bridge", [0.1])], "Budget: small.")
    text = (tmp_path / "without.md").read_text()
    assert "Budget: small." in text
    assert "| (e) no bridge | 1 | 10.0% | 10.0% |" in text
    assert "Which orderings" not in text  # nothing to compare with
