"""The model card of libra-tiny, with the numbers that were measured."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from string import Template

from safetensors import safe_open

LOSS_CURVES = "loss_curves.png"
SAMPLES = "samples.png"
"""Pictures of the card, in the folder of the repository."""

TEMPLATE = Path(__file__).with_name("configs") / "tiny" / "card.md"


def write_card(model: str | os.PathLike, results: dict[str, float]) -> None:
    """
    Writes `README.md` into a repository, where the pictures it shows must be: `loss_curves.png` and `samples.png`.

    Args:
        model (`str` or `os.PathLike`): folder of the exported repository.
        results (`dict` of `float`): `train_vendors` and `unseen_vendor`, as
            [`~training.evaluate_tiny.evaluate_singles`] gives them.

    Raises:
        KeyError: if a number is missing.
        FileNotFoundError: if a picture is missing.
    """
    model = Path(model)
    missing = [name for name in (LOSS_CURVES, SAMPLES) if not (model / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{model} lacks {', '.join(missing)}; draw them with training.figures first.")
    weights, image_tokenizer = model / "model.safetensors", model / "image_tokenizer" / "model.safetensors"
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        train_vendors=results["train_vendors"],
        unseen_vendor=results["unseen_vendor"],
        loss_curves=LOSS_CURVES,
        samples=SAMPLES,
        train_percent=f"{results['train_vendors']:.0%}",
        unseen_percent=f"{results['unseen_vendor']:.0%}",
        language_millions=f"{count_millions(weights, lambda name: 'vision' not in name):.1f}",
        vision_millions=f"{count_millions(weights, lambda name: 'vision' in name):.1f}",
        tokenizer_millions=f"{count_millions(image_tokenizer, lambda name: True):.1f}",
    )
    (model / "README.md").write_text(text, encoding="utf-8")


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
