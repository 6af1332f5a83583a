"""Images the model writes, while it writes them."""

from collections.abc import Iterator

import torch
from conversation import sampling
from libra_model import TURNS, IdStreamer, load, stream
from pictures import hide_patches
from PIL import Image


def paint(
    caption: str, pixels: torch.Tensor | None, rows: int, samples: int, temperature: float
) -> Iterator[tuple[list[Image.Image], int]]:
    """
    Lets the model write images, row by row.

    Args:
        caption (`str`): text before the image; may be empty.
        pixels (`torch.Tensor` of shape `(1, 3, size, size)`, *optional*): an image whose first rows are given.
        rows (`int`): how many rows of patches are given, in [0, grid).
        samples (`int`): how many images to write.
        temperature (`float`): 0 for the likeliest codes.

    Yields:
        `tuple` of the images so far, what is missing hatched, and the number of rows that are there. The first time comes
        before the model has written anything.
    """
    processor, model = load().processor, load().model
    grid = processor.image_grid
    with TURNS:
        prompt = processor(text=caption, generation_mode="image", return_tensors="pt")["input_ids"]
        codes = blank_codes().repeat(samples, 1, 1)  # (samples, patches, 2)
        if pixels is not None:
            codes[:, : rows * grid] = processor.image_tokenizer.encode(pixels).codes.cpu()[:, : rows * grid]
    given = processor.codes_to_ids(codes[:, : rows * grid])  # (samples, given patches)
    input_ids = torch.cat([prompt.expand(samples, -1), given], dim=1).to(model.device)
    yield _show(codes, rows), rows
    done = rows * grid
    wanted = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "max_new_tokens": grid**2 - done}
    for ids in stream(IdStreamer(), **wanted, **sampling(temperature)):
        codes[:, done] = processor.ids_to_codes(ids.reshape(samples))
        done += 1
        if done % grid == 0:
            yield _show(codes, done // grid), done // grid


def blank_codes() -> torch.Tensor:
    """Codes `(1, patches, 2)` of an image of the mean colour: what stands for patches that are not there yet."""
    processor = load().processor
    size = processor.image_processor.crop_size["height"]
    return processor.image_tokenizer.encode(torch.zeros(1, 3, size, size)).codes.cpu()


def _show(codes, rows):
    processor = load().processor
    grid = processor.image_grid
    with TURNS:
        pixels = processor.image_tokenizer.decode(codes)
    missing = torch.arange(grid**2).numpy() >= rows * grid
    return [hide_patches(image, missing) for image in processor.image_processor.postprocess(pixels)]
