"""The loss terms of the image tokenizer that are not the quantizer's: how far reconstructions are from their images,
and how much the adversary weighs beside that (VQGAN, arXiv 2012.09841, section 3.1)."""

from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .reconstruction import unit_to_clip

PERCEPTUAL_TERMS = ("lpips", "encoder", "none")
"""Perceptual distances there are: LPIPS, that of the frozen encoder's features, and no such term."""

LARGEST_ADAPTIVE_WEIGHT = 1e4
"""The adaptive weight is clamped here, as in taming-transformers."""


def load_lpips() -> nn.Module:
    """
    LPIPS (arXiv 1801.03924) on VGG, frozen: `distance(a, b)` of pixels in [-1, 1] is `(n, 1, 1, 1)`.

    Returns:
        `nn.Module`: In evaluation mode, without gradients to its own weights.

    Raises:
        ValueError: If the package `lpips`, or torchvision that it needs, is not installed.
        OSError: If torchvision cannot load the weights of VGG.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ValueError(
            f"perceptual: lpips cannot be had here ({error}). Install it: pip install 'libra-vlm[lpips]', or use the "
            "features of the frozen encoder instead: perceptual: encoder"
        ) from error
    try:
        distance = LPIPS(net="vgg", verbose=False)
    except OSError as error:
        raise OSError(
            f"perceptual: lpips needs the weights of VGG-16 that torchvision downloads, and they cannot be had ({error}). "
            "Put them into the cache of torch.hub, or use the features of the frozen encoder: perceptual: encoder"
        ) from error
    return distance.requires_grad_(False).eval()


def early_features(model: LibraImageTokenizer, pixels: Tensor, layer: int) -> Tensor:
    """
    Hidden states of the frozen CLIP, with gradients to the pixels, running no deeper than needed.

    Args:
        model ([`LibraImageTokenizer`]): Whose CLIP is used.
        pixels (`torch.Tensor` of shape `(n, 3, h, w)`): As CLIP reads them.
        layer (`int`): Index of the hidden state, from 1 to the deepest selected layer of the model.

    Returns:
        `torch.Tensor` of shape `(n, patches, width)`, each patch of zero mean and unit variance.
    """
    hidden = next(islice(model.clip_hidden_states(pixels), layer, None))  # (n, 1 + patches, width)
    return F.layer_norm(hidden[:, 1:], hidden.shape[-1:])


def encoder_distance(model: LibraImageTokenizer, reconstruction: Tensor, pixels: Tensor, layer: int) -> Tensor:
    """
    A perceptual distance that needs no further network: the squared error of early features of the frozen CLIP.

    Args:
        model ([`LibraImageTokenizer`]): Whose CLIP is used.
        reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): In [-1, 1].
        pixels (`torch.Tensor` of shape `(n, 3, h, w)`): The images, as CLIP reads them.
        layer (`int`): See [`early_features`].

    Returns:
        `torch.Tensor` of shape `()`.
    """
    with torch.no_grad():
        wanted = early_features(model, pixels, layer)
    return F.mse_loss(early_features(model, unit_to_clip(reconstruction), layer), wanted)


def adaptive_weight(reconstruction_gradient: Tensor, generator_gradient: Tensor) -> Tensor:
    """
    The weight at which the adversary pulls as hard on the decoder as the reconstruction does (equation 7 of VQGAN).

    Args:
        reconstruction_gradient, generator_gradient (`torch.Tensor` of one shape): Gradients of the weighted reconstruction
            terms and of the generator loss at the weights of the decoder's last layer.

    Returns:
        `torch.Tensor` of shape `()`: The ratio of their norms, in [0, 10000], without gradient.
    """
    ratio = reconstruction_gradient.float().norm() / (generator_gradient.float().norm() + 1e-4)
    return ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT).detach()
