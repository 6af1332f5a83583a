"""Pictures for the page, as HTML: figures side by side, maps of codes, heat over an image.

HTML holds its images itself, so nothing is left on the server's disk.
"""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

LARGEST_NUMBERED_GRID = 12
"""Most patches a side whose codes are written into the cells; beyond that they can be pointed at."""


CURVE_INK = "#7b8794"
"""Grey that can be read on white and on black."""


def figures(pictures: Sequence[tuple[str, str]], label: str, small: bool = False) -> str:
    """
    Pictures side by side, under each other on a phone.

    Args:
        pictures (`Sequence` of `(str, str)`): HTML of a picture, and its caption as plain text.
        label (`str`): what they are together, for screen readers.
        small (`bool`, *optional*, defaults to `False`): whether many go in a row.

    Returns:
        `str`: HTML.
    """
    parts = [f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" for picture, caption in pictures]
    kind = "figures small" if small else "figures"
    return f'<div class="{kind}" role="group" aria-label="{escape(label)}">{"".join(parts)}</div>'


def picture(image: Image.Image, alt: str) -> str:
    """
    An image as HTML.

    Args:
        image (`PIL.Image.Image`): any mode that PNG can hold.
        alt (`str`): what it shows.

    Returns:
        `str`: an `<img>` that carries the image.
    """
    buffer = BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def code_color(code: int, codebook_size: int) -> tuple[int, int, int]:
    """
    A colour for a code: its highest bits are the red, the middle ones the green, the lowest the blue. Codes that share
    bits look alike.

    Args:
        code (`int`): in [0, codebook_size).
        codebook_size (`int`): a power of two.

    Returns:
        `tuple` of three `int` in [0, 255].
    """
    bits = codebook_size.bit_length() - 1
    cuts = [0, bits // 3, 2 * bits // 3, bits]  # counted from the lowest bit
    channels = []
    for low, high in pairwise(cuts):
        levels = 1 << (high - low)
        channels.append(round(255 * (code >> low & levels - 1) / max(1, levels - 1)))
    blue, green, red = channels
    return red, green, blue


def code_map(codes: Sequence[int], codebook_size: int, label: str) -> str:
    """
    The codes of an image as a grid of colours, numbered where there is room.

    Args:
        codes (`Sequence` of `int`): one a patch, row by row; as many as make a square.
        codebook_size (`int`): entries of the codebook.
        label (`str`): what it is, for screen readers.

    Returns:
        `str`: an `<svg>`.
    """
    grid = round(len(codes) ** 0.5)
    cells = []
    for patch, code in enumerate(codes):
        row, column = divmod(patch, grid)
        color = code_color(code, codebook_size)
        name = f"<title>row {row + 1}, column {column + 1}: code {code}</title>"
        cells.append(f'<rect x="{10 * column}" y="{10 * row}" width="10" height="10" fill="rgb{color}">{name}</rect>')
        if grid <= LARGEST_NUMBERED_GRID:
            ink = "#000" if np.dot(color, (0.299, 0.587, 0.114)) > 128 else "#fff"
            cells.append(f'<text x="{10 * column + 5}" y="{10 * row + 6.2}" fill="{ink}">{code}</text>')
    size = 10 * grid
    return (
        f'<svg class="codes" role="img" aria-label="{escape(label)}" viewBox="0 0 {size} {size}">{"".join(cells)}</svg>'
    )


def heat(image: Image.Image, weights: np.ndarray, strongest: float) -> Image.Image:
    """
    An image dimmed where nothing looks at it, and tinted where much does.

    Args:
        image (`PIL.Image.Image`): RGB, square.
        weights (`np.ndarray` of shape `(patches,)`): not negative, row by row.
        strongest (`float`): the weight that gets the full tint.

    Returns:
        `PIL.Image.Image`: RGB, of the same size.
    """
    grid = round(len(weights) ** 0.5)
    share = np.clip(weights.reshape(grid, grid) / max(strongest, 1e-12), 0, 1)
    mask = Image.fromarray((255 * share).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    share = np.asarray(mask, dtype=np.float32)[..., None] / 255  # (height, width, 1)
    dimmed = 0.45 * np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    tinted = 0.35 * np.asarray(image, dtype=np.float32) + 0.65 * np.array([255, 150, 0], dtype=np.float32)
    return Image.fromarray((dimmed * (1 - share) + tinted * share).astype(np.uint8))


def hide_patches(image: Image.Image, hidden: np.ndarray) -> Image.Image:
    """
    An image with grey hatching over some of its patches.

    Args:
        image (`PIL.Image.Image`): RGB, square.
        hidden (`np.ndarray` of shape `(patches,)`): whether a patch is hidden, row by row.

    Returns:
        `PIL.Image.Image`: RGB, of the same size.
    """
    grid = round(len(hidden) ** 0.5)
    mask = Image.fromarray(np.where(hidden, 255, 0).astype(np.uint8).reshape(grid, grid))
    mask = mask.resize(image.size, Image.Resampling.NEAREST)
    rows, columns = np.indices((image.height, image.width))
    stripes = np.where((rows + columns) // 3 % 2, 190, 170).astype(np.uint8)
    hatching = Image.fromarray(stripes).convert("RGB")
    return Image.composite(hatching, image, mask)


def curve(values: Sequence[float], places: Sequence[str], axis: str, alt: str) -> str:
    """
    A curve over the layers, readable on light and on dark ground.

    Args:
        values (`Sequence` of `float`): in [0, 1].
        places (`Sequence` of `str`): what each value belongs to.
        axis (`str`): what the places are.
        alt (`str`): what the curve shows; the values are added.

    Returns:
        `str`: an `<img>`.
    """
    figure = Figure(figsize=(4.2, 2.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(values)), values, marker="o", color="#0d9488", linewidth=2)
    axes.set_ylim(0, 1)
    step = max(1, len(places) // 8)
    axes.set_xticks(range(0, len(places), step), places[::step])
    axes.set_xlabel(axis, color=CURVE_INK)
    axes.tick_params(colors=CURVE_INK)
    axes.grid(axis="y", color=CURVE_INK, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(CURVE_INK)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    said = ", ".join(f"{place}: {value:.2f}" for place, value in zip(places, values))
    with Image.open(buffer) as image:
        return picture(image, f"{alt} {said}.")
