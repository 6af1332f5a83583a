"""Visual sequential modelling (Section 4.3): text to image, images completed from their first rows, likelihoods of codes."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from .sampling import check_sampling, write_images


def draw_images(
    model: Any, processor: Any, prompts: Sequence[str], samples: int = 1, seed: int = 0, **options: Any
) -> list[list[Image.Image]]:
    """
    Text to image.

    Args:
        model ([`LibraForCausalLM`]): writes.
        processor ([`LibraProcessor`]): of the same repository.
        prompts (`Sequence` of `str`): what to draw.
        samples (`int`, *optional*, defaults to 1): images a prompt.
        seed (`int`, *optional*, defaults to 0): of the samples.
        options: `temperature`, `top_k`, `top_p`, see [`~sampling.sample_codes`].

    Returns:
        `list` of `list` of `PIL.Image.Image`: for each prompt its samples.

    Raises:
        ValueError: for wrong options.
    """
    check_sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    inputs = processor(text=repeated, generation_mode="image", return_tensors="pt")
    return _by_prompt(write_images(model, processor, inputs, seed=seed, **options), samples)


def complete_images(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    rows: int,
    samples: int = 1,
    caption: str | None = None,
    seed: int = 0,
    **options: Any,
) -> list[list[Image.Image]]:
    """
    Completes images of which the first rows of patches are given (Figure 3(a)). An image that is written has no CLIP
    features, also where it is given, so these say nothing about the rest.

    Args:
        model ([`LibraForCausalLM`]): writes.
        processor ([`LibraProcessor`]): of the same repository.
        images (`Sequence` of `PIL.Image.Image`): the whole images.
        rows (`int`): how many rows of patches are given, in `[0, image_grid)`.
        samples (`int`, *optional*, defaults to 1): completions an image.
        caption (`str`, *optional*): text before the image.
        seed (`int`, *optional*, defaults to 0): of the samples.
        options: `temperature`, `top_k`, `top_p`, see [`~sampling.sample_codes`].

    Returns:
        `list` of `list` of `PIL.Image.Image`: for each image its completions, decoded as a whole.

    Raises:
        ValueError: for wrong options.
    """
    check_sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options)
    texts = None if caption is None else [caption] * len(images)
    inputs = processor(text=texts, images=list(images), generation_mode="image", image_rows=rows, return_tensors="pt")
    repeated = {name: inputs[name].repeat_interleave(samples, dim=0) for name in ("input_ids", "attention_mask")}
    return _by_prompt(write_images(model, processor, repeated, seed=seed, **options), samples)


def _by_prompt(images: list[Image.Image], samples: int) -> list[list[Image.Image]]:
    return [images[start : start + samples] for start in range(0, len(images), samples)]


@torch.inference_mode()
def code_likelihood(
    model: Any, processor: Any, images: Sequence[Image.Image], caption: str | None = None
) -> torch.Tensor:
    """
    How likely the model finds each code of images, given the codes before it, as if it wrote them: without features.

    Args:
        model ([`LibraForCausalLM`]): judges.
        processor ([`LibraProcessor`]): of the same repository.
        images (`Sequence` of `PIL.Image.Image`): the images.
        caption (`str`, *optional*): text before the image.

    Returns:
        `torch.FloatTensor` of shape `(n, codebooks, image_grid, image_grid)`: natural logarithms of probabilities, at most
        0; the mean of a codebook is minus its loss. A code drawn by chance has `-log(codebook_size + 2)`.
    """
    text = [(caption or "") + processor.image_token] * len(images)
    inputs = processor(text=text, images=list(images), return_tensors="pt").to(model.device)  # rows end in EOI
    patches = processor.image_grid**2
    codes = processor.ids_to_codes(inputs["input_ids"][:, -patches - 1 : -1])  # (n, patches, codebooks)
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    log_probs = output.vision_logits.float().log_softmax(dim=-1).unflatten(0, (len(images), patches + 2))
    found = log_probs[:, :patches].gather(-1, codes[..., None]).squeeze(-1)  # each token predicts the next
    return found.transpose(1, 2).unflatten(-1, (processor.image_grid, -1)).cpu()
