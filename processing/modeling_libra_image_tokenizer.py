"""The Libra image tokenizer: pixels to discrete codes and continuous features, and codes back to pixels.

A frozen CLIP encoder gives the features of each patch (several hidden states side by side), a linear map and the
lookup-free quantizer turn them into codes, and a convolutional decoder reconstructs the image from the codes alone.
"Libra", section 3.1.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from .decoder_libra_image_tokenizer import LibraImageDecoder
from .lookup_free_quantization import LookupFreeQuantizer, QuantizerLosses


class LibraImageEncoding(NamedTuple):
    """What [`LibraImageTokenizer.encode`] returns, in this order.

    Attributes:
        codes: (n, num_patches, num_codebooks), int64 in [0, codebook_size), patches row by row.
        features: (n, num_patches, feature_size), the frozen CLIP features in the dtype of the model.
    """

    codes: Tensor
    features: Tensor


@dataclass
class LibraImageTokenizerOutput(ModelOutput):
    """
    Output of [`LibraImageTokenizer`]'s forward pass.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, in training or with `return_losses=True`):
            Weighted quantizer loss, float32: `entropy_loss_weight * (per_sample_entropy - diversity_gamma *
            codebook_entropy) + commitment_loss_weight * commitment`. Reconstruction terms are the trainer's.
        reconstruction (`torch.Tensor` of shape `(n, 3, resolution, resolution)`):
            Decoded pixels, nominally in [-1, 1], not clamped.
        codes (`torch.Tensor` of shape `(n, num_patches, num_codebooks)`):
            Codes of the patches, int64.
        per_sample_entropy (`torch.Tensor` of shape `()`, *optional*): See [`QuantizerLosses`].
        codebook_entropy (`torch.Tensor` of shape `()`, *optional*): See [`QuantizerLosses`].
        commitment (`torch.Tensor` of shape `()`, *optional*): See [`QuantizerLosses`].
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    per_sample_entropy: Tensor | None = None
    codebook_entropy: Tensor | None = None
    commitment: Tensor | None = None


class LibraImageTokenizer(PreTrainedModel):
    """Image tokenizer of Libra: frozen CLIP, lookup-free quantizer, convolutional decoder.

    CLIP never gets a gradient and stays in evaluation mode; it is built no deeper than the deepest selected layer.

    Args:
        config ([`LibraImageTokenizerConfig`]): Sizes of the tokenizer.

    Example:

    ```python
    >>> codes, features = tokenizer.encode(pixel_values)  # (n, 576, 2), (n, 576, 4096)
    >>> pixels = tokenizer.decode(codes)  # (n, 3, 336, 336)
    ```
    """

    config_class = LibraImageTokenizerConfig
    config: LibraImageTokenizerConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["CLIPEncoderLayer", "ResidualBlock", "AttentionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: LibraImageTokenizerConfig):
        super().__init__(config)
        self.clip = CLIPVisionModel(self._clip_config(config)).requires_grad_(False)
        self.pre_quant = nn.Linear(config.feature_size, config.embed_dim)  # the paper's 1x1 convolution
        self.quantizer = LookupFreeQuantizer(config.embed_dim, config.num_codebooks, config.codebook_size)
        self.post_quant = nn.Linear(config.embed_dim, config.z_channels)  # 1x1 convolution
        self.decoder = LibraImageDecoder(config)
        self.post_init()

    @staticmethod
    def _clip_config(config: LibraImageTokenizerConfig):
        values = {**config.vision_config.to_dict(), "num_hidden_layers": max(config.select_layers)}
        clip_config = type(config.vision_config)(**values)
        clip_config._attn_implementation = config._attn_implementation
        return clip_config

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # PyTorch's own initialization trains the decoder well; CLIP initializes itself
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads a tokenizer as `PreTrainedModel.from_pretrained` does, with CLIP frozen."""
        loaded = super().from_pretrained(*args, **kwargs)  # loading makes every parameter trainable
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.clip.requires_grad_(False)
        return loaded

    @classmethod
    def from_clip(cls, clip: str | os.PathLike | CLIPVisionModel, **config_kwargs) -> "LibraImageTokenizer":
        """A fresh tokenizer (untrained quantizer and decoder) around a pretrained CLIP vision encoder.

        Args:
            clip (`str`, `os.PathLike` or `CLIPVisionModel`): The encoder, or where `from_pretrained` finds it.
            config_kwargs: Fields of [`LibraImageTokenizerConfig`] other than `vision_config`; the others are the
                release's, in proportion to the encoder (see [`~LibraImageTokenizerConfig.for_clip`]).

        Raises:
            `ValueError`: If the sizes in `config_kwargs` do not fit the encoder.
        """
        if isinstance(clip, (str, os.PathLike)):
            clip = CLIPVisionModel.from_pretrained(clip)
        model = cls(LibraImageTokenizerConfig.for_clip(clip.config.to_dict(), **config_kwargs))
        model.load_clip(clip.state_dict())
        return nn.Module.to(model, dtype=clip.dtype)

    def load_clip(self, state_dict: dict[str, Tensor]):
        """Copies the weights of a `CLIPVisionModel` into the frozen encoder; layers that are not run are left out.

        Raises:
            `ValueError`: If a weight of the encoder is missing from `state_dict`.
        """
        wanted = self.clip.state_dict().keys()
        missing = sorted(wanted - state_dict.keys())
        if missing:
            raise ValueError(f"The CLIP weights lack {len(missing)} of {len(wanted)} keys: {', '.join(missing[:10])}.")
        self.clip.load_state_dict({key: state_dict[key] for key in wanted})

    def train(self, mode: bool = True) -> "LibraImageTokenizer":
        """Sets training mode for everything but the frozen CLIP encoder."""
        super().train(mode)
        self.clip.eval()
        return self

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Continuous features of images: the patch rows of the selected CLIP layers, side by side.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`):
                Preprocessed pixels; moved to the device and dtype of the model.

        Returns:
            `torch.Tensor` of shape `(n, num_patches, feature_size)`.

        Raises:
            `ValueError`: If the pixels have another shape, are not floating point, or are not finite.
        """
        self._check_pixels(pixel_values)
        outputs = self.clip(pixel_values.to(self.device, self.dtype), output_hidden_states=True)
        selected = [outputs.hidden_states[layer] for layer in self.config.select_layers]  # each (n, 1 + patches, width)
        return torch.cat(selected, dim=-1)[:, 1:]  # (n, patches, feature_size), class token dropped

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> LibraImageEncoding:
        """Codes and continuous features of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`): Preprocessed pixels.

        Returns:
            [`LibraImageEncoding`]: codes (n, num_patches, num_codebooks) and features (n, num_patches, feature_size).

        Raises:
            `ValueError`: If the pixels have another shape, are not floating point, or are not finite.
        """
        features = self.features(pixel_values)  # (n, patches, feature_size)
        codes = self.quantizer(self.pre_quant(features), return_losses=False).codes  # (n, patches, codebooks)
        return LibraImageEncoding(codes, features)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes.

        Args:
            codes (`torch.Tensor` of shape `(n, num_patches, num_codebooks)`): Codes, patches row by row.

        Returns:
            `torch.Tensor` of shape `(n, 3, resolution, resolution)`: Decoder output as is: nominally in [-1, 1], where
            -1 is black and 1 is white, but not clamped.

        Raises:
            `ValueError`: If the shape does not fit, or a code is outside [0, codebook_size).
        """
        expected = (self.config.num_patches, self.config.num_codebooks)
        if codes.ndim != 3 or tuple(codes.shape[1:]) != expected:
            raise ValueError(f"Codes must have shape (n, {expected[0]}, {expected[1]}), got {tuple(codes.shape)}.")
        return self._decode_quantized(self.quantizer.codes_to_quantized(codes.to(self.device)))

    def forward(self, pixel_values: Tensor, return_losses: bool | None = None, **kwargs) -> LibraImageTokenizerOutput:
        """Reconstructs images through the quantizer, for training.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`): Preprocessed pixels.
            return_losses (`bool`, *optional*, defaults to `self.training`): Whether to compute the quantizer loss.

        Returns:
            [`LibraImageTokenizerOutput`]

        Raises:
            `ValueError`: If the pixels have another shape, are not floating point, or are not finite.
        """
        quantized, codes, losses = self.quantizer(self.pre_quant(self.features(pixel_values)), return_losses)
        terms = {} if losses is None else {"loss": self._weighted_loss(losses), **losses._asdict()}
        return LibraImageTokenizerOutput(reconstruction=self._decode_quantized(quantized), codes=codes, **terms)

    def _weighted_loss(self, losses: QuantizerLosses) -> Tensor:
        entropy = losses.per_sample_entropy - self.config.diversity_gamma * losses.codebook_entropy
        return self.config.entropy_loss_weight * entropy + self.config.commitment_loss_weight * losses.commitment

    def _decode_quantized(self, quantized: Tensor) -> Tensor:
        grid = self.config.grid
        latents = self.post_quant(quantized).transpose(1, 2)  # (n, z_channels, patches)
        return self.decoder(latents.unflatten(2, (grid, grid)))  # (n, 3, resolution, resolution)

    def _check_pixels(self, pixel_values: Tensor):
        size = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values must have shape (n, 3, {size}, {size}), got {tuple(pixel_values.shape)}. "
                f"Prepare the images with the LibraImageProcessor of this model."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be normalized floating point numbers, got {pixel_values.dtype}.")
        finite = pixel_values.isfinite().all(dim=(1, 2, 3))  # (n,)
        if not finite.all():
            broken = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"pixel_values of images {broken} contain NaN or infinite numbers.")


__all__ = ["LibraImageTokenizer"]
