"""Captions images with the image-to-text pipeline."""

import os
from collections.abc import Sequence

from modeling_libra.pipeline_libra import LibraImageToTextPipeline

from .loading import load_libra


def caption_images(
    images: Sequence,
    model: str | os.PathLike,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
) -> list[str]:
    """
    Captions images, or asks one question about each of them.

    Args:
        images (`Sequence` of `str` or `PIL.Image.Image`): paths, URLs or images.
        model (`str` or `os.PathLike`): folder or Hub id of a Libra repository.
        prompt (`str`, *optional*): a question; without one the images are captioned.
        max_new_tokens (`int`, *optional*): most tokens to write for each image.
        batch_size (`int`, *optional*, defaults to 8): images per forward pass.

    Returns:
        `list` of `str`: one text per image.

    Raises:
        ValueError: if the model cannot be loaded or an image cannot be read.
    """
    loaded, processor = load_libra(model)
    captioner = LibraImageToTextPipeline(model=loaded, processor=processor)
    options = {"prompt": prompt, "max_new_tokens": max_new_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    paths = [os.fspath(image) if isinstance(image, os.PathLike) else image for image in images]
    return [sequences[0]["generated_text"] for sequences in captioner(paths, batch_size=batch_size, **options)]
