"""
What the bits of the image tokenizer say about pixels, found before its decoder is trained.

A bit is the sign of a linear function of a patch's features. Trained through the whole decoder, these functions stay near
where they began for as many steps as a small machine can afford. Here they begin and end well, in minutes:

1. The features predict pixels by ridge regression; the principal components of the prediction are rotated so that taking
   signs loses least (iterative quantization, Gong and Lazebnik, CVPR 2011).
2. They are trained with a small decoder on the grid of patches in place of the real one, on features that are computed
   once. For a third of the steps hyperbolic tangents, ever steeper, stand in place of signs; then there are signs, with the
   gradient of such a tangent.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .reconstruction import clip_to_unit

if TYPE_CHECKING:  # that module imports this one
    from .train_image_tokenizer import PixelSamples

NUM_IMAGES = 8192
"""Images that the bits are fitted on; all their features are in memory, in half precision."""
NUM_REGRESSED = 1024
"""The first of them, on which regression, components and rotation are computed."""
BATCH_SIZE = 24
RIDGE = 100.0
ROTATIONS = 60
"""Rounds of iterative quantization."""
SOFT_SHARE = 1 / 3
"""Share of the steps with hyperbolic tangents in place of signs."""
STEEPEST = 10.0
"""Slope of these at the end; 1 at the beginning."""
PASSED_SLOPE = 3.0
"""Slope of the hyperbolic tangent whose gradient signs have."""
LEARNING_RATES = (5e-4, 2e-3)
"""Of the bits and of the small decoder, at the beginning; they follow a cosine to 0."""
PROXY_WIDTH = 192


class ProxyDecoder(nn.Module):
    """
    Pixels of patches from the bits around them: a linear 3x3 convolution beside two layers that are not.

    Args:
        bits (`int`): Bits a patch.
        grid (`int`): Patches a side.
        pixels (`int`): Numbers of a patch: three colours of each pixel.
    """

    def __init__(self, bits: int, grid: int, pixels: int) -> None:
        super().__init__()
        self.grid = grid
        self.conv_in = nn.Conv2d(bits, PROXY_WIDTH, kernel_size=3, padding=1)
        self.conv_mid = nn.Conv2d(PROXY_WIDTH, PROXY_WIDTH, kernel_size=3, padding=1)
        self.conv_out = nn.Conv2d(PROXY_WIDTH, pixels, kernel_size=3, padding=1)
        self.linear = nn.Conv2d(bits, pixels, kernel_size=3, padding=1)

    def forward(self, signs: Tensor) -> Tensor:
        """Patches `(n, patches, pixels)` of signs `(n, patches, bits)`."""
        signs = signs.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (n, bits, grid, grid)
        hidden = F.relu(self.conv_in(signs))  # (n, PROXY_WIDTH, grid, grid)
        hidden = hidden + F.relu(self.conv_mid(hidden))  # (n, PROXY_WIDTH, grid, grid)
        return (self.conv_out(hidden) + self.linear(signs)).flatten(2).transpose(1, 2)  # (n, patches, pixels)


def cut_patches(images: Tensor, grid: int) -> Tensor:
    """Images `(n, 3, h, w)` as `(n, grid * grid, 3 * h / grid * w / grid)`, patches row by row."""
    side = images.shape[-1] // grid
    return F.unfold(images, kernel_size=side, stride=side).transpose(1, 2)


@torch.no_grad()
def collect(model: LibraImageTokenizer, images: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """
    Features and pixels of images, in half precision.

    Args:
        model ([`LibraImageTokenizer`]): Whose CLIP is used.
        images (`Dataset`): Of `pixel_values`, see [`~training.train_image_tokenizer.PixelSamples`].
        count (`int`): How many of them.

    Returns:
        `tuple` of two `torch.Tensor`, of shape `(count, patches, feature_size)` and `(count, patches, pixels)`; pixels are
        in [-1, 1].
    """
    config = model.config
    features = torch.empty(count, config.num_patches, config.feature_size, dtype=torch.bfloat16)
    patches: list[Tensor] = []
    for start in range(0, count, BATCH_SIZE):
        pixels = torch.stack([images[i]["pixel_values"] for i in range(start, min(start + BATCH_SIZE, count))])
        features[start : start + len(pixels)] = model.features(pixels)
        patches.append(cut_patches(clip_to_unit(pixels), config.grid).bfloat16())
    return features, torch.cat(patches)


def principal_bits(features: Tensor, patches: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """
    Linear functions of features whose signs keep most of the pixels.

    Args:
        features (`torch.Tensor` of shape `(rows, feature_size)`): Of patches, float32, each column of unit variance.
        patches (`torch.Tensor` of shape `(rows, pixels)`): Their pixels, float32.
        bits (`int`): How many functions; at most `pixels`.

    Returns:
        `tuple`: their weights, `(bits, feature_size)`, and biases, `(bits,)`.
    """
    bias = torch.ones(len(features), 1)
    inputs = torch.cat([features, bias], dim=1)  # (rows, feature_size + 1)
    gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1])
    regression = torch.linalg.solve(gram, inputs.T @ patches)  # (feature_size + 1, pixels)
    predicted = inputs @ regression  # (rows, pixels)
    mean = predicted.mean(dim=0)
    components = torch.linalg.eigh(torch.cov((predicted - mean).T))[1][:, -bits:]  # (pixels, bits)
    values = (predicted - mean) @ components  # (rows, bits)
    scale = values.std(dim=0).sqrt()  # halfway between all alike and as they are
    values = values / scale
    rotation = torch.linalg.qr(torch.randn(bits, bits))[0]
    for _ in range(ROTATIONS):
        left, _, right = torch.linalg.svd(torch.sign(values @ rotation).T @ values)
        rotation = (left @ right).T
    functions = regression @ (components / scale @ rotation)  # (feature_size + 1, bits)
    offset = mean @ (components / scale @ rotation)  # (bits,)
    size = (values @ rotation).std()
    return functions[:-1].T / size, (functions[-1] - offset) / size


def fit_bits(model: LibraImageTokenizer, images: "PixelSamples", steps: int) -> None:
    """
    Fits the bits of an image tokenizer to pixels.

    Args:
        model ([`LibraImageTokenizer`]): Changed in place: `pre_quant` and the quantizer. Its decoder is not used.
        images ([`~training.train_image_tokenizer.PixelSamples`]): Images of the training set.
        steps (`int`): Steps of training, at least 1.

    Raises:
        ValueError: If a patch has more bits than pixels, or `embed_dim` is below the number of bits.
    """
    config = model.config
    bits = model.quantizer.num_codebooks * model.quantizer.bits
    pixels = 3 * (config.resolution // config.grid) ** 2
    if bits > min(config.embed_dim, pixels):
        raise ValueError(
            f"{bits} bits a patch cannot be fitted: they must be no more than embed_dim, {config.embed_dim}, and the "
            f"{pixels} numbers of a patch's pixels."
        )
    features, patches = collect(model, images, min(NUM_IMAGES, len(images)))
    some = features[:NUM_REGRESSED].flatten(0, 1).float()  # (rows, feature_size)
    mean, deviation = some.mean(dim=0), some.std(dim=0) + 1e-6
    features.sub_(mean).div_(deviation)
    functions = nn.Linear(config.feature_size, bits)
    regressed, predicted = (part[:NUM_REGRESSED].flatten(0, 1).float() for part in (features, patches))
    functions.weight.data, functions.bias.data = principal_bits(regressed, predicted, bits)
    _train(functions, ProxyDecoder(bits, config.grid, pixels), features, patches, steps)
    weight = functions.weight.data / deviation
    _write(model, weight, functions.bias.data - weight @ mean)


def _train(functions: nn.Linear, decoder: ProxyDecoder, features: Tensor, patches: Tensor, steps: int) -> None:
    """Trains functions of features `(images, patches, feature_size)` and small decoder for the PSNR of images."""
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip((functions, decoder), LEARNING_RATES)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.randint(len(features), (BATCH_SIZE,))
        signs = trained_signs(functions(features[chosen].float()), step / steps)  # (n, patches, bits)
        error = (decoder(signs) - patches[chosen].float()).square().mean(dim=(1, 2))  # (n,)
        loss = error.clamp(min=1e-6).log10().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            decibels = 10 * (math.log10(4) - loss.item())
            print(f"fitting bits: step {step + 1}/{steps}, PSNR {decibels:.2f} dB", flush=True)


def trained_signs(values: Tensor, progress: float) -> Tensor:
    """
    What stands for the signs of values, so that there is a gradient.

    Args:
        values (`torch.Tensor`): Of any shape.
        progress (`float`): Time of the training, in [0, 1).

    Returns:
        `torch.Tensor` of the same shape: in [-1, 1] at first, later -1 or 1.
    """
    if progress < SOFT_SHARE:
        return torch.tanh((1 + (STEEPEST - 1) * progress / SOFT_SHARE) * values)
    soft = torch.tanh(PASSED_SLOPE * values)
    return soft + (torch.where(values > 0, 1.0, -1.0) - soft).detach()


def _write(model: LibraImageTokenizer, weight: Tensor, bias: Tensor) -> None:
    """Makes `(bits, feature_size)` and `(bits,)` the bits of a model: the first rows of `pre_quant`, passed on as they are."""
    bits = len(bias)
    with torch.no_grad():
        for part, values in ((model.pre_quant.weight, weight), (model.pre_quant.bias, bias)):
            part.zero_()
            part[:bits] = values
        model.quantizer.project_in.weight.copy_(torch.eye(bits, model.config.embed_dim))
        model.quantizer.project_in.bias.zero_()
