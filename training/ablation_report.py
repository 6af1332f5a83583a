"""The table of the ablations: means and spreads over seeds, and which orderings they show. All of it is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

INTRODUCTION = """\
# Ablations at tiny size

Written by `make ablations` (`python -m training.ablations`); do not edit.

What Table 3 of the paper asks at full size, asked of a model that trains in minutes on two CPU cores: single drawings are to
be named, of the vendors trained on (new layouts) and of one never seen. Means over seeds, ± their standard deviation. The
seed is that of the fresh parameters and of the order of the data; the scenes that are measured are always the same.

The paper's own numbers, of benchmarks with photographs, are not beside ours: the body of its Table 3 could not be had when
this was written, and numbers from memory are none. Compared is the ordering it argues for, the full model above each
variant. An ordering counts as shown when the means differ by more than their spread, which is the root of the sum of both
variances. Three seeds of a tiny model are weak evidence either way: what does not reproduce here may well hold at full size.
"""

ACCURACIES = {"train_vendors": "named, training vendors", "unseen_vendor": "named, unseen vendor"}
LOSSES = {"text_loss": "text loss", "vision_loss": "image loss"}


@dataclass(frozen=True)
class Row:
    """
    What was measured of a variant.

    Args:
        title (`str`): what it is.
        numbers (`list` of `dict[str, float]`): of each seed, as [`~training.ablations.evaluate`] returns them.
        predicts_same_codes (`bool`): whether its loss over images means the same as the full model's.
    """

    title: str
    numbers: Sequence[Mapping[str, float]]
    predicts_same_codes: bool = True

    def values(self, name: str) -> list[float]:
        """A number of all seeds."""
        return [numbers[name] for numbers in self.numbers]


@dataclass(frozen=True)
class Comparison:
    """
    An ordering of two variants by an accuracy.

    Args:
        difference (`float`): mean of the full model less that of the variant.
        spread (`float`, *optional*): root of the sum of both variances; `None` if one of them has a single seed.
    """

    difference: float
    spread: float | None

    @property
    def verdict(self) -> str:
        """`str`: what the numbers say of "the full model is better"."""
        if self.spread is None:
            return "one seed shows nothing"
        if abs(self.difference) <= self.spread:
            return "not told apart"
        return "reproduces" if self.difference > 0 else "does not reproduce, the other way round"


def compare(full: Sequence[float], variant: Sequence[float]) -> Comparison:
    """
    Compares an accuracy of two variants.

    Args:
        full, variant (`Sequence` of `float`): of each seed.

    Returns:
        [`Comparison`]
    """
    difference = mean(full) - mean(variant)
    if min(len(full), len(variant)) < 2:
        return Comparison(difference, None)
    return Comparison(difference, (stdev(full) ** 2 + stdev(variant) ** 2) ** 0.5)


def describe(values: Sequence[float], percent: bool) -> str:
    """
    Mean and spread.

    Args:
        values (`Sequence` of `float`): of each seed.
        percent (`bool`): whether they are shares.

    Returns:
        `str`: such as `"41.3% ± 2.1"` or `"0.712 ± 0.030"`; without a spread for a single seed.
    """
    factor, digits, unit = (100, 1, "%") if percent else (1, 3, "")
    text = f"{mean(values) * factor:.{digits}f}{unit}"
    return text if len(values) < 2 else f"{text} ± {stdev(values) * factor:.{digits}f}"


def make_table(rows: Sequence[Row]) -> list[str]:
    """
    The table, in Markdown.

    Args:
        rows (`Sequence` of [`Row`]): the variants.

    Returns:
        `list` of `str`: its lines. The loss over images is left out where it does not compare.
    """
    names = ["variant", "seeds", *ACCURACIES.values(), *LOSSES.values()]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row.title, str(len(row.numbers))]
        cells += [describe(row.values(name), percent=True) for name in ACCURACIES]
        cells.append(describe(row.values("text_loss"), percent=False))
        cells.append(describe(row.values("vision_loss"), percent=False) if row.predicts_same_codes else "–")
        lines.append(f"| {' | '.join(cells)} |")
    chance = rows[0].numbers[0]["chance"]
    return [*lines, "", f"Chance is {chance:.1%}. Losses in nats a token, on the images of the training vendors."]


def make_orderings(full: Row, variants: Sequence[Row]) -> list[str]:
    """
    The orderings in words.

    Args:
        full ([`Row`]): of the full model.
        variants (`Sequence` of [`Row`]): the others.

    Returns:
        `list` of `str`: lines in Markdown.
    """
    lines = ["## Which orderings reproduce", ""]
    for name, title in ACCURACIES.items():
        above = compare(full.values(name), [numbers["chance"] for numbers in full.numbers])
        if above.spread is not None and above.difference <= above.spread:
            lines += [f'In "{title}" the full model is not above chance: this budget shows nothing there.', ""]
    for row in variants:
        for name, title in ACCURACIES.items():
            found = compare(full.values(name), row.values(name))
            spread = "" if found.spread is None else f", spread {found.spread * 100:.1f}"
            lines.append(
                f"- {row.title}; {title}: the full model is {found.difference * 100:+.1f} points away{spread}: "
                f"**{found.verdict}**."
            )
    return lines


def write_report(path: Path, rows: Sequence[Row], budget: str) -> None:
    """
    Writes what has been measured so far.

    Args:
        path (`Path`): the Markdown file.
        rows (`Sequence` of [`Row`]): the variants, the full model first if it is among them.
        budget (`str`): how they were trained.
    """
    lines = [INTRODUCTION, budget, "", *make_table(rows)]
    full, *variants = rows
    if full.title == "full model" and variants:
        lines += ["", *make_orderings(full, variants)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
