"""Row (g) of the paper's Table 3: an image tokenizer whose encoder is trained from scratch, as VQGAN's is."""

import torch
from torch import Tensor

from processing.modeling_libra_image_tokenizer import ENCODE_BATCH_SIZE, LibraImageTokenizer


class FreshEncoderTokenizer(LibraImageTokenizer):
    """
    A [`LibraImageTokenizer`] while its encoder is trained, together with quantizer and decoder: a CLIP by its
    architecture alone.

    Args:
        config ([`LibraImageTokenizerConfig`]): Sizes of the tokenizer.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.clip.requires_grad_(True)

    def features(self, pixel_values: Tensor, batch_size: int = ENCODE_BATCH_SIZE) -> Tensor:
        """As [`LibraImageTokenizer.features`], with gradients unless they are turned off, and in one batch."""
        self._check_pixels(pixel_values)
        hidden_states = list(self.clip_hidden_states(pixel_values))  # (n, 1 + patches, width) each
        return torch.cat([hidden_states[layer][:, 1:] for layer in self.config.select_layers], dim=-1)


def freeze_encoder(model: FreshEncoderTokenizer) -> None:
    """
    Makes it, after training, a tokenizer as any other: one with a frozen encoder.

    Args:
        model ([`FreshEncoderTokenizer`]): Changed in place, to a [`LibraImageTokenizer`] of the same weights.
    """
    model.clip.requires_grad_(False)
    model.__class__ = LibraImageTokenizer  # type: ignore[assignment]
