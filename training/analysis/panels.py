"""Figures of pictures, maps and curves that can be read in colour and in grey, as PNG or SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

FORMATS = (".png", ".svg")
STYLES = (("C0", "-", "o"), ("C1", "--", "s"), ("C2", ":", "^"), ("C3", "-.", "D"), ("C4", (0, (5, 1)), "v"))
"""Colour, dashes and marker of each curve: any one of the three tells them apart."""


@dataclass(frozen=True)
class Panel:
    """
    A picture, or a map with its scale.

    Args:
        title (`str`): above it.
        image (`PIL.Image.Image`, *optional*): the picture; below the map, in grey, if there is one.
        values (`np.ndarray` of shape `(height, width)`, *optional*): the map.
        unit (`str`, *optional*, defaults to `""`): of the map's values.
        limits (`tuple` of two `float`, *optional*): ends of the map's scale; by default 0 and its largest value.
    """

    title: str
    image: Image.Image | None = None
    values: np.ndarray | None = None
    unit: str = ""
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """
    A line with intervals.

    Args:
        label (`str`): in the legend.
        values (`Sequence` of `float`): at 1, 2, 3, ...
        half_widths (`Sequence` of `float`, *optional*): of the intervals.
    """

    label: str
    values: Sequence[float]
    half_widths: Sequence[float] | None = None


def check_output(path: str | Path, formats: Sequence[str] = FORMATS) -> None:
    """
    Refuses a file that could not be written, before anything is computed.

    Args:
        path (`str` or `Path`): the file.
        formats (`Sequence` of `str`, *optional*, defaults to `(".png", ".svg")`): endings that can be written.

    Raises:
        ValueError: for another ending.
        FileNotFoundError: if there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path} cannot be written: the name of a figure ends in {' or '.join(formats)}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into.")


def draw_panels(
    rows: Sequence[tuple[str, Sequence[Panel]]], path: str | Path, title: str = "", side: float = 1.5
) -> None:
    """
    Draws rows of panels. Maps are in viridis, whose lightness rises with the value.

    Args:
        rows (`Sequence` of `tuple` of `str` and `Sequence` of [`Panel`]): the label of each row and its panels.
        path (`str` or `Path`): the PNG or SVG file to write.
        title (`str`, *optional*, defaults to `""`): above all.
        side (`float`, *optional*, defaults to 1.5): of a panel, in inches.
    """
    columns = max(len(panels) for _, panels in rows)
    figure = Figure(figsize=(side * columns * 1.12 + 0.3, side * len(rows) * 1.1 + 0.4), dpi=110, layout="constrained")
    place_panels(figure, rows, columns)
    if title:
        figure.suptitle(title, fontsize="small")
    save_figure(figure, path)


def place_panels(figure, rows: Sequence[tuple[str, Sequence[Panel]]], columns: int) -> None:
    """Puts rows of panels into a figure or a part of one, see [`draw_panels`]."""
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, (label, panels) in zip(grid, rows):
        for axes in axes_of_row[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(axes_of_row, panels):
            _draw_panel(figure, axes, panel)
        axes_of_row[0].set_ylabel(label, fontsize="small")


def _draw_panel(figure, axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize="x-small")
    axes.set_xticks([])
    axes.set_yticks([])
    overlaid = panel.image is not None and panel.values is not None
    if panel.image is not None:
        axes.imshow(panel.image.convert("L" if overlaid else "RGB"), cmap="gray", vmin=0, vmax=255)
    if panel.values is None:
        return
    low, high = panel.limits or (0.0, float(panel.values.max()))
    extent = (-0.5, panel.image.width - 0.5, panel.image.height - 0.5, -0.5) if panel.image is not None else None
    alpha = 0.65 if overlaid else 1.0
    drawn = axes.imshow(panel.values, cmap="viridis", vmin=low, vmax=high, extent=extent, alpha=alpha)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=5)
    bar.set_label(panel.unit, fontsize=5)


def place_curves(axes, curves: Sequence[Curve], title: str, xlabel: str, ylabel: str) -> None:
    """
    Draws curves that differ in colour, dashes and marker.

    Args:
        axes (`Axes`): where to.
        curves (`Sequence` of [`Curve`]): at most as many as there are [`STYLES`].
        title, xlabel, ylabel (`str`): what is shown, and in which unit.
    """
    for place, (curve, (colour, dashes, marker)) in enumerate(zip(curves, STYLES, strict=False)):
        at = (
            np.arange(1, len(curve.values) + 1) + 0.03 * place
        )  # a little apart, so that intervals do not hide each other
        axes.errorbar(
            at, curve.values, curve.half_widths, color=colour, linestyle=dashes, marker=marker, markersize=4,
            linewidth=1.3, capsize=2, label=curve.label,
        )  # fmt: skip
    longest = max(len(curve.values) for curve in curves)
    axes.set_xticks(range(1, longest + 1, math.ceil(longest / 16)))
    axes.set_title(title, fontsize="small")
    axes.set_xlabel(xlabel, fontsize="small")
    axes.set_ylabel(ylabel, fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the name of the file ends in."""
    figure.savefig(path, format=Path(path).suffix[1:].lower())
