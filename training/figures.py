"""Pictures for a model card: the loss curves of runs, and images with captions.

python -m training.figures runs/tiny/pretrain runs/tiny/sft loss_curves.png
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .checkpoints import last_checkpoint

STATE = "trainer_state.json"
TOKENIZER_TERMS = ("l1", "mse", "perceptual", "commitment")
"""Terms of the image tokenizer's loss that do not have "loss" in their names."""


def read_log(run_folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    The history of a run's log.

    Args:
        run_folder (`str` or `os.PathLike`): the run's `output_dir`. A run that is not done has its history in its last
            checkpoint.

    Returns:
        `list` of `dict`: the logs of a Trainer in their order, each with its `step`.

    Raises:
        FileNotFoundError: if neither the folder nor a checkpoint in it has a `trainer_state.json`.
    """
    for folder in (run_folder, last_checkpoint(run_folder)):
        if folder is not None and Path(folder, STATE).is_file():
            return json.loads(Path(folder, STATE).read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(f"{run_folder} has no {STATE} and no checkpoint; give the output_dir of a run.")


def loss_curves(log: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """
    The loss and its terms over the steps.

    Args:
        log (`Sequence` of `dict`): as [`read_log`] gives it.

    Returns:
        `dict`: by name, those of evaluations with the prefix `eval_`, the points `(step, value)`.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            term = name.removeprefix("eval_")
            if name != "train_loss" and ("loss" in term or term in TOKENIZER_TERMS):  # train_loss: of the whole run
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def draw_loss_curves(run_folders: Sequence[str | os.PathLike], path: str | os.PathLike) -> None:
    """
    Draws the loss and its terms, a panel a run: of training as lines, of evaluations dashed in the same colour.

    Args:
        run_folders (`Sequence` of `str` or `os.PathLike`): at least one `output_dir`; its name is the panel's title.
        path (`str` or `os.PathLike`): the PNG file to write.

    Raises:
        FileNotFoundError: if a folder has no history of a log.
        ValueError: if there is no folder, or a history has no loss of training.
    """
    if not run_folders:
        raise ValueError("There is no run to draw; give at least one folder.")
    runs = {str(folder): loss_curves(read_log(folder)) for folder in run_folders}
    for folder, curves in runs.items():
        if "loss" not in curves:
            raise ValueError(f"The log of {folder} has no loss of training yet; let it run for logging_steps steps.")
    columns = min(len(runs), 3)
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), dpi=90, layout="constrained")
    for place, (folder, curves) in enumerate(runs.items(), start=1):
        axes = figure.add_subplot(rows, columns, place, title=Path(folder).resolve().name, xlabel="step")
        terms = sorted({name.removeprefix("eval_") for name in curves}, key=lambda term: (term != "loss", term))
        for number, term in enumerate(terms):
            colour = f"C{number % 10}"
            if term in curves:
                axes.plot(*zip(*curves[term]), color=colour, linewidth=1.2, label=term)
            evaluated = f"eval_{term}"
            if evaluated in curves:
                axes.plot(*zip(*curves[evaluated]), "o--", color=colour, markersize=3, linewidth=0.8, label=evaluated)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, format="png")


def draw_sample_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    path: str | os.PathLike,
    columns: int = 6,
    side: int = 112,
) -> None:
    """
    Draws images side by side, each with its caption below.

    Args:
        images (`Sequence` of `PIL.Image.Image`): at least one, of any size; they are fitted into squares.
        captions (`Sequence` of `str`): a caption an image, in Latin script. Long ones are broken between words.
        path (`str` or `os.PathLike`): the PNG file to write. It has 256 colours, to be small.
        columns (`int`, *optional*, defaults to 6): images in a row.
        side (`int`, *optional*, defaults to 112): pixels along a square.

    Raises:
        ValueError: if there is no image, or not a caption an image.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"Expected images and a caption each, found {len(images)} images, {len(captions)} captions.")
    font = ImageFont.load_default(12)
    texts = [break_lines(caption, font, side) for caption in captions]
    gap, line_height = 8, 15
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height = side + gap + line_height * max(text.count("\n") + 1 for text in texts)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, text) in enumerate(zip(images, texts)):
        left, top = gap + place % columns * (side + gap), gap + place // columns * (height + gap)
        sheet.paste(ImageOps.pad(image.convert("RGB"), (side, side), color="white"), (left, top))
        draw.multiline_text((left, top + side + gap // 2), text, "black", font, spacing=3)
    sheet.quantize(256).save(path, format="png", optimize=True)


def break_lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """
    Breaks a text between words so that its lines fit.

    Args:
        text (`str`): the text; where it has line breaks, they stay.
        font (`ImageFont`): measures it.
        width (`int`): pixels of a line; a longer word has a line of its own.

    Returns:
        `str`: the text with line breaks.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Draws loss curves; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(description="Draws the loss curves of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output_dir of a stage")
    parser.add_argument("out", metavar="OUT.png", help="file to write")
    options = parser.parse_args(arguments)
    draw_loss_curves(options.runs, options.out)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
