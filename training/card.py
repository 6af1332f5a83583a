"""The model card of libra-tiny, with the numbers that were measured."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .emoji_evaluation import MAIN, PSNR, SOURCES, format_table
from .emoji_pictures import ANSWERED, DRAWN, NAMED, PICTURES, RECONSTRUCTED

LOSS_CURVES = "loss_curves.png"
"""Picture of the card that shows how the loss fell, in the folder of the repository."""

DATASETS = {
    "train_vendors": ("emoji-train-vendors", "New layouts of the training vendors"),
    "unseen_vendor": ("fluent-emoji-flat", "Fluent Emoji Flat (vendor not trained on)"),
}
"""Type and name of each source in the card's metadata."""

TEMPLATE = Path(__file__).with_name("configs") / "tiny" / "card.md"


def write_card(model: str | os.PathLike, report: dict[str, Any]) -> None:
    """
    Writes `README.md` into a repository, where the pictures it shows must be: the loss curves (see
    [`~training.figures.draw_loss_curves`]) and those of [`~training.emoji_pictures.draw_pictures`].

    Args:
        model (`str` or `os.PathLike`): folder of the exported repository.
        report (`dict`): all results, as [`~training.emoji_evaluation.evaluate_emoji`] gives them.

    Raises:
        KeyError: if a number is missing.
        FileNotFoundError: if a picture is missing.
    """
    model = Path(model)
    missing = [name for name in (LOSS_CURVES, *PICTURES) if not (model / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{model} lacks {', '.join(missing)}; training.evaluate_tiny --write-card draws them.")
    weights, image_tokenizer = model / "model.safetensors", model / "image_tokenizer" / "model.safetensors"
    results = report["results"]
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        results=format_table(results),
        num_images=report["num_images"],
        temperature=report["temperature"],
        loss_curves=LOSS_CURVES,
        named=NAMED,
        answered=ANSWERED,
        drawn=DRAWN,
        reconstructed=RECONSTRUCTED,
        language_millions=f"{count_millions(weights, lambda name: 'vision' not in name):.1f}",
        vision_millions=f"{count_millions(weights, lambda name: 'vision' in name):.1f}",
        tokenizer_millions=f"{count_millions(image_tokenizer, lambda name: True):.1f}",
    )
    metadata = ModelCardData(
        **ModelCard(text).data.to_dict(), model_name="libra-tiny", eval_results=eval_results(results)
    )
    (model / "README.md").write_text(f"---\n{metadata}\n---\n{ModelCard(text).text}", encoding="utf-8")


def eval_results(results: dict[str, dict[str, Any]]) -> list[EvalResult]:
    """
    The main numbers as the Hub reads them.

    Args:
        results (`dict`): of [`~training.emoji_evaluation.evaluate_emoji`].

    Returns:
        `list` of `EvalResult`: for each vendor and each of [`~training.emoji_evaluation.MAIN`].

    Raises:
        KeyError: if one of them is missing.
    """
    return [
        EvalResult(
            task_type="image-to-text",
            task_name="Questions about drawings, and drawings",  # one task a data set: the Hub groups by these two
            dataset_type=DATASETS[source][0],
            dataset_name=DATASETS[source][1],
            metric_type="psnr" if name == PSNR else "f1" if "f1" in name else "accuracy",
            metric_name=results[name]["title"],
            metric_value=round(results[name][source]["value"], 4),
        )
        for source in SOURCES
        for name in MAIN
        if results[name][source] is not None
    ]


def count_millions(file: Path, counts: Callable[[str], bool]) -> float:
    """
    Millions of parameters in a weights file.

    Args:
        file (`Path`): a safetensors file.
        counts (`Callable`): whether the parameter of a name counts.

    Returns:
        `float`
    """
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if counts(name)]  # noqa: SIM118
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names) / 1e6
