"""Convolutional decoder of the Libra image tokenizer: the one of taming-transformers (VQGAN, arXiv 2012.09841).

It differs from the original in two points only: attention has several heads, and the last upsampling goes to the
resolution of the image whatever its factor (24 -> 48 -> 96 -> 192 -> 336 at full size).
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_libra_image_tokenizer import DECODER_NORM_GROUPS, LibraImageTokenizerConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=DECODER_NORM_GROUPS, num_channels=channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a shortcut; (n, in_channels, h, w) to (n, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = self.shortcut(hidden)  # (n, out_channels, h, w)
        hidden = self.conv1(F.silu(self.norm1(hidden)))  # (n, out_channels, h, w)
        hidden = self.conv2(F.silu(self.norm2(hidden)))  # (n, out_channels, h, w)
        return residual + hidden


class AttentionBlock(nn.Module):
    """Full attention over the pixels of a feature map, (n, channels, h, w) to the same shape."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)  # (n, heads, h * w, head_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)  # (n, channels, h, w)
        queries, keys, values = (self._heads(projection(normed)) for projection in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # (n, heads, h * w, head_dim)
        mixed = mixed.transpose(2, 3).reshape(hidden.shape)  # (n, channels, h, w)
        return hidden + self.proj_out(mixed)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling to a fixed size, then a 3x3 convolution."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, size=(self.size, self.size), mode="nearest"))  # (n, c, size, size)


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `num_heads` is set, then an upsampling."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, num_heads: int | None, next_size: int | None
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResidualBlock(before, after) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(
            nn.Identity() if num_heads is None else AttentionBlock(out_channels, num_heads) for _ in self.blocks
        )
        self.upsample = nn.Identity() if next_size is None else Upsample(out_channels, next_size)

    def forward(self, hidden: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions):
            hidden = attention(block(hidden))  # (n, out_channels, h, w)
        return self.upsample(hidden)  # (n, out_channels, next_size, next_size)


class LibraImageDecoder(nn.Module):
    """Decodes a latent map (n, z_channels, grid, grid) to pixels (n, 3, resolution, resolution).

    Args:
        config ([`LibraImageTokenizerConfig`]): Sizes of the decoder.
    """

    def __init__(self, config: LibraImageTokenizerConfig):
        super().__init__()
        widths = [config.ch * factor for factor in reversed(config.ch_mult)]  # coarsest level first
        sizes = config.decoder_resolutions
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], kernel_size=3, padding=1)
        self.mid_block_1 = ResidualBlock(widths[0], widths[0])
        self.mid_attention = AttentionBlock(widths[0], config.num_attn_heads)
        self.mid_block_2 = ResidualBlock(widths[0], widths[0])
        self.levels = nn.ModuleList(
            DecoderLevel(
                in_channels=before,
                out_channels=width,
                num_blocks=config.num_res_blocks + 1,
                num_heads=config.num_attn_heads if size in config.attn_resolutions else None,
                next_size=next_size,
            )
            for before, width, size, next_size in zip([widths[0], *widths], widths, sizes, [*sizes[1:], None])
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, resolution, resolution), nominally in [-1, 1], of latents (n, z_channels, grid, grid)."""
        hidden = self.conv_in(latents)  # (n, widths[0], grid, grid)
        hidden = self.mid_block_2(self.mid_attention(self.mid_block_1(hidden)))  # (n, widths[0], grid, grid)
        for level in self.levels:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))  # (n, 3, resolution, resolution)
