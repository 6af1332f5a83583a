"""What libra-tiny knows of its world: training vendors, unseen vendor, chance.

    python -m training.evaluate_tiny --model hub_configs/libra-tiny
    python -m training.evaluate_tiny --model DIR --images 100 --only label cell caption
    python -m training.evaluate_tiny --model DIR --write-card --runs runs/tiny/pretrain runs/tiny/sft

What is asked and how it is counted: [`~training.emoji_evaluation`]. `libra evaluate --tasks emoji` is the same without
the card. The card gets the table, the loss curves of the runs and sheets of pictures.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .card import LOSS_CURVES, write_card
from .emoji_evaluation import NUM_IMAGES, TEMPERATURE, TITLES, evaluate_emoji, format_table
from .emoji_pictures import draw_pictures
from .figures import draw_loss_curves
from .world.icons import install_icons


def evaluate_and_report(
    model: str | Path,
    icons: str | Path | None = None,
    num_images: int = NUM_IMAGES,
    temperature: float = TEMPERATURE,
    only: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """
    Evaluates a Libra, prints the table and writes the numbers.

    Args:
        model (`str` or `Path`): folder or Hub repo.
        icons (`str` or `Path`, *optional*): folder with iconify JSON files; by default they are installed with npm.
        num_images (`int`, *optional*, defaults to 500): images of each source.
        temperature (`float`, *optional*, defaults to 0.2): of the images it draws.
        only (`Sequence` of `str`, *optional*): results that are wanted, of [`~training.emoji_evaluation.TITLES`].
        output (`str` or `Path`, *optional*): JSON file for the numbers.

    Returns:
        `dict`: as [`~training.emoji_evaluation.evaluate_emoji`] gives it.

    Raises:
        ValueError: if an argument is wrong, before anything is computed.
        FileNotFoundError: if there is no folder to write to.
    """
    if output and not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {Path(output).parent} to write {Path(output).name} into.")
    report = evaluate_emoji(model, icons or install_icons(), num_images, temperature=temperature, only=only)
    print(format_table(report["results"]))
    print(f"\n{num_images} images of each source; 95% intervals in brackets; {report['seconds']:.0f} s.")
    if output:
        Path(output).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> None:
    """Evaluates, and writes a card if asked to; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(description="What a Libra knows of the world of emoji.")
    parser.add_argument("--model", default="hub_configs/libra-tiny", help="folder or Hub repo")
    parser.add_argument("--icons", help="folder with iconify JSON files (default: installed with npm)")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="images of each source (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="of the images it draws (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="RESULT", help=f"of: {', '.join(TITLES)}")
    parser.add_argument("--output", metavar="FILE.json", help="file for the numbers")
    parser.add_argument("--write-card", action="store_true", help="write table and pictures into the model's card")
    parser.add_argument("--runs", nargs="+", metavar="RUN_DIR", help="stages whose loss curves go into the card")
    options = parser.parse_args(arguments)
    curves = Path(options.model, LOSS_CURVES)
    if options.write_card and options.only:
        parser.error("the card shows all results; leave out --only")
    if options.runs:
        draw_loss_curves(options.runs, curves)
    elif options.write_card and not curves.is_file():
        parser.error(f"the card shows {curves}, which is not there; pass --runs with the folders of the stages")
    icons = Path(options.icons) if options.icons else install_icons()
    report = evaluate_and_report(
        options.model, icons, options.images, options.temperature, options.only, options.output
    )
    if options.write_card:
        draw_pictures(options.model, icons, options.model, options.temperature)
        write_card(options.model, report)


if __name__ == "__main__":
    main()
