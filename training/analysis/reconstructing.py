"""What the image tokenizer keeps of images (Figures 2 and 5): reconstructions, their errors, and the codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..reconstruction import clip_to_unit, psnr


@dataclass(frozen=True)
class Reconstruction:
    """
    An image through the image tokenizer.

    Args:
        image (`PIL.Image.Image`): as the tokenizer sees it, square.
        reconstruction (`PIL.Image.Image`): decoded from its codes, of the same size.
        error (`torch.FloatTensor` of shape `(height, width)`):
            Absolute difference of pixels, mean of the colours, in `[0, 1]`, where 1 is black for white.
        codes (`torch.LongTensor` of shape `(codebooks, image_grid, image_grid)`): in `[0, codebook_size)`.
        psnr (`float`): in decibels, of all pixels.
        plain_psnr (`float`): that of an image of the image's mean colour.
    """

    image: Image.Image
    reconstruction: Image.Image
    error: torch.Tensor
    codes: torch.Tensor
    psnr: float
    plain_psnr: float


@torch.inference_mode()
def reconstruct_images(processor: Any, images: Sequence[Image.Image]) -> list[Reconstruction]:
    """
    Encodes images and decodes their codes.

    Args:
        processor ([`LibraProcessor`]): whose image tokenizer is used.
        images (`Sequence` of `PIL.Image.Image`): of any size.

    Returns:
        `list` of [`Reconstruction`]
    """
    pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]  # (n, 3, size, size)
    codes = processor.image_tokenizer.encode(pixels).codes  # (n, patches, codebooks)
    decoded = processor.image_tokenizer.decode(codes).float().cpu().clamp(-1, 1)  # (n, 3, size, size)
    target = clip_to_unit(pixels).clamp(-1, 1)
    plain = target.mean(dim=(2, 3), keepdim=True).expand_as(target)
    pictures = (processor.image_processor.postprocess(part) for part in (target, decoded))
    grids = codes.cpu().transpose(1, 2).unflatten(-1, (processor.image_grid, -1))
    errors = (decoded - target).abs().mean(dim=1) / 2
    decibels = psnr(decoded, target).tolist(), psnr(plain, target).tolist()
    return [Reconstruction(*parts) for parts in zip(*pictures, errors, grids, *decibels)]
