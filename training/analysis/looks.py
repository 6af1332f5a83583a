"""The figures of `libra complete`, `libra draw`, `libra reconstruct` and `libra attention`, from files to a file.

What can be wrong with the arguments is found before a model is loaded.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.image_utils import load_image

from libra_cli.adapters import base_model, is_adapter
from libra_cli.loading import check_path, load_libra, to_accelerator
from modeling_libra import LibraConfig

from ..figures import draw_sample_sheet
from .attention import Look, draw_attention, head_rows, look_at_image
from .panels import STYLES, Panel, check_output, draw_panels
from .reconstructing import Reconstruction, reconstruct_images
from .sampling import check_sampling
from .writing import code_likelihood, complete_images, draw_images


def read_images(paths: Sequence[str]) -> list[Image.Image]:
    """
    Reads images.

    Args:
        paths (`Sequence` of `str`): paths or URLs.

    Returns:
        `list` of `PIL.Image.Image`: RGB.

    Raises:
        ValueError: naming what is no image.
        FileNotFoundError: naming the file that is not there.
    """
    images = []
    for path in paths:
        if not path.startswith(("http://", "https://")) and not Path(path).is_file():
            raise FileNotFoundError(f"There is no image {path}.")
        try:
            images.append(load_image(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return images


def label_models(labelled: Sequence[str]) -> dict[str, str]:
    """
    The models of one figure.

    Args:
        labelled (`Sequence` of `str`): `LABEL=MODEL` each.

    Returns:
        `dict`: folder or Hub id by label.

    Raises:
        ValueError: for another form, a label twice, too many of them, or a folder that holds no model.
    """
    models: dict[str, str] = {}
    for argument in labelled:
        label, _, path = argument.partition("=")
        if not label or not path:
            raise ValueError(f"Expected LABEL=MODEL, such as no-bridge=runs/no-bridge; got {argument!r}.")
        if label in models:
            raise ValueError(f"There are two models of the label {label!r}; a label names one.")
        if not is_adapter(path):
            check_path(path)
        models[label] = path
    if len(models) > len(STYLES):
        raise ValueError(f"There are {len(models)} models; a figure has at most {len(STYLES)}.")
    return models


def _with_others(model: str, beside: Sequence[str]) -> dict[str, str]:
    """A model by the last part of its name, and those beside it."""
    return label_models([f"{Path(model).resolve().name}={model}", *beside])


def complete_to_file(
    image: str,
    rows: int,
    output: str | Path,
    model: str,
    beside: Sequence[str] = (),
    samples: int = 3,
    caption: str | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """
    Draws completions of an image, a row a model: what is given, samples, and how likely each true code is.

    Args:
        image (`str`): path or URL.
        rows (`int`): how many rows of patches are given.
        output (`str` or `Path`): the PNG or SVG file to write.
        model (`str`): folder or Hub id.
        beside (`Sequence` of `str`, *optional*): further models, `LABEL=MODEL`, each with the image in its own codes.
        samples, caption, seed, options: as in [`~writing.complete_images`].

    Raises:
        ValueError, OSError: for wrong arguments, before a model is loaded.
    """
    check_output(output)
    check_sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options)
    (picture,) = read_images([image])
    models = _with_others(model, beside)
    for path in models.values():
        grid = LibraConfig.from_pretrained(base_model(path) if is_adapter(path) else path).image_grid
        if not 1 <= rows < grid:
            raise ValueError(f"--rows is {rows}, but an image of {path} has {grid} rows: give 1 to {grid - 1}.")
    drawn: list[tuple[str, list[Panel]]] = []
    for label, path in models.items():
        libra, processor = to_accelerator(*load_libra(path))
        (completed,) = complete_images(libra, processor, [picture], rows, samples, caption, seed, **options)
        likelihood = code_likelihood(libra, processor, [picture], caption)[0]
        (reconstruction,) = reconstruct_images(processor, [picture])
        given = _first_rows(reconstruction.reconstruction, rows / processor.image_grid)
        panels = [Panel("input", reconstruction.image), Panel(f"given: {rows} of {processor.image_grid} rows", given)]
        panels += [Panel(f"sample {i}", sample) for i, sample in enumerate(completed, start=1)]
        lowest = math.floor(float(likelihood.min()))
        panels += [
            Panel(f"true codes, codebook {i}", values=of.numpy(), unit="log-likelihood, nats", limits=(lowest, 0))
            for i, of in enumerate(likelihood, start=1)
        ]
        drawn.append((label, panels))
        print(f"{label}: mean log-likelihood of the image's codes {likelihood.mean():.3f} nats")
    draw_panels(drawn, output, title=caption or "")


def _first_rows(image: Image.Image, share: float) -> Image.Image:
    """The upper part of an image on grey."""
    given = Image.new("RGB", image.size, (128, 128, 128))
    given.paste(image.crop((0, 0, image.width, round(image.height * share))), (0, 0))
    return given


def draw_to_file(
    prompts: Sequence[str], output: str | Path, model: str, samples: int = 4, seed: int = 0, **options: Any
) -> None:
    """
    Draws texts, a row a prompt.

    Args:
        prompts (`Sequence` of `str`): what to draw.
        output (`str` or `Path`): the PNG file to write.
        model (`str`): folder or Hub id.
        samples, seed, options: as in [`~writing.draw_images`].

    Raises:
        ValueError, OSError: for wrong arguments, before a model is loaded.
    """
    check_output(output, (".png",))
    check_sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options)
    libra, processor = to_accelerator(*load_libra(model))
    drawn = draw_images(libra, processor, prompts, samples, seed, **options)
    captions = [prompt for prompt in prompts for _ in range(samples)]
    draw_sample_sheet([image for of_prompt in drawn for image in of_prompt], captions, output, columns=samples)


def reconstruct_to_file(images: Sequence[str], output: str | Path, model: str) -> list[Reconstruction]:
    """
    Draws images, their reconstructions, the errors and the codes, a row an image.

    Args:
        images (`Sequence` of `str`): paths or URLs.
        output (`str` or `Path`): the PNG or SVG file to write.
        model (`str`): folder or Hub id.

    Returns:
        `list` of [`Reconstruction`]

    Raises:
        ValueError, OSError: for wrong arguments, before a model is loaded.
    """
    check_output(output)
    pictures = read_images(images)
    _, processor = to_accelerator(*load_libra(model))
    found = reconstruct_images(processor, pictures)
    worst = max(float(one.error.max()) for one in found)
    rows = []
    for path, one in zip(images, found):
        panels = [Panel("input", one.image), Panel(f"reconstruction, {one.psnr:.1f} dB", one.reconstruction)]
        panels.append(Panel("error", values=one.error.numpy(), unit="share of black to white", limits=(0, worst)))
        last = processor.codebook_size - 1
        panels += [
            Panel(f"codebook {i}", values=codes.numpy(), unit="code", limits=(0, last))
            for i, codes in enumerate(one.codes, start=1)
        ]
        rows.append((Path(path).name, panels))
    draw_panels(rows, output)
    return found


def attention_to_file(
    image: str,
    question: str | None,
    output: str | Path,
    model: str,
    beside: Sequence[str] = (),
    answer: str | None = None,
    heads: bool = False,
) -> dict[str, Look]:
    """
    Draws where answers look: the overlay of each layer, a row a model, and the curves of Figure 7.

    Args:
        image (`str`): path or URL.
        question (`str`, *optional*): without it the image is captioned.
        output (`str` or `Path`): the PNG or SVG file to write.
        model (`str`): folder or Hub id.
        beside (`Sequence` of `str`, *optional*): further models, `LABEL=MODEL`.
        answer (`str`, *optional*): for all of them instead of their own.
        heads (`bool`, *optional*, defaults to `False`): draw every head of one model instead.

    Returns:
        `dict` of [`Look`] by label.

    Raises:
        ValueError, OSError: for wrong arguments, before a model is loaded.
    """
    check_output(output)
    if heads and beside:
        raise ValueError("--heads shows one model; leave out --beside.")
    (picture,) = read_images([image])
    looks, grids = {}, {}
    for label, path in _with_others(model, beside).items():
        libra, processor = to_accelerator(*load_libra(path))
        looks[label] = look_at_image(libra, processor, picture, question, answer)
        grids[label] = processor.image_grid
    title = f"{Path(image).name}: {question or 'caption'}"
    if heads:
        ((label, look),) = looks.items()
        draw_panels(head_rows(look, grids[label]), output, f"{title} “{look.answer}”")
    else:
        draw_attention(looks, grids, output, title)
    return looks
