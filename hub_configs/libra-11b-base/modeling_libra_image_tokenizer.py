"""The Libra image tokenizer: pixels to discrete codes and continuous features, and codes back to pixels.

A frozen CLIP encoder gives the features of each patch (several hidden states side by side), a linear map and the
lookup-free quantizer turn them into codes, and a convolutional decoder reconstructs the image from the codes alone.
"Libra", section 3.1.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from .decoder_libra_image_tokenizer import LibraImageDecoder
from .lookup_free_quantization import LookupFreeQuantizer, QuantizerLosses

ENCODE_BATCH_SIZE = 16
"""Images that run through CLIP at a time, by default."""
DECODE_BATCH_SIZE = 4
"""Images decoded at a time, by default; fewer, as the decoder works on maps as large as the image, many channels each."""


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
    Any number of images can be encoded or decoded: memory holds the result and the activations of one batch.

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

    def clip_hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The hidden states of CLIP one after the other: each is computed when it is asked for, and none is kept.

        Gradients flow back to the pixels unless they are turned off.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`):
                Preprocessed pixels, at least one image; moved to the device and dtype of the model.

        Yields:
            `torch.Tensor` of shape `(n, 1 + num_patches, width)`, class token first: the embeddings, then the output of
            each layer up to the deepest selected one.
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        hidden = self.clip.pre_layrnorm(self.clip.embeddings(pixel_values))  # (n, 1 + patches, width)
        yield hidden
        for layer in self.clip.encoder.layers:
            hidden = layer(hidden, attention_mask=None)  # (n, 1 + patches, width)
            yield hidden

    @torch.no_grad()
    def features(self, pixel_values: Tensor, batch_size: int = ENCODE_BATCH_SIZE) -> Tensor:
        """Continuous features of images: the patch rows of the selected CLIP layers, side by side.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`):
                Preprocessed pixels; each batch is moved to the device and dtype of the model.
            batch_size (`int`, *optional*, defaults to 16): Images that run through CLIP at a time.

        Returns:
            `torch.Tensor` of shape `(n, num_patches, feature_size)`, in the dtype of the model.

        Raises:
            `ValueError`: If the pixels have another shape, are not floating point, or are not finite, or if `batch_size`
                is below 1.
        """
        self._check_pixels(pixel_values)
        batches = _batches(len(pixel_values), batch_size)
        shape = (len(pixel_values), self.config.num_patches, self.config.feature_size)
        features = torch.empty(shape, device=self.device, dtype=self.dtype)
        for batch in batches:
            self._write_features(pixel_values[batch], features[batch])
        return features

    def _write_features(self, pixel_values: Tensor, features: Tensor):
        """Fills `features` (n, patches, feature_size) for one batch of pixels."""
        selected = self.config.select_layers
        slots = features.unflatten(-1, (len(selected), -1))  # (n, patches, selected, width)
        for depth, hidden in enumerate(self.clip_hidden_states(pixel_values)):
            for slot, layer in enumerate(selected):
                if layer == depth:
                    slots[:, :, slot] = hidden[:, 1:]  # class token dropped

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, batch_size: int = ENCODE_BATCH_SIZE) -> LibraImageEncoding:
        """Codes and continuous features of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`): Preprocessed pixels.
            batch_size (`int`, *optional*, defaults to 16): Images that run through CLIP at a time.

        Returns:
            [`LibraImageEncoding`]: codes (n, num_patches, num_codebooks) and features (n, num_patches, feature_size).

        Raises:
            `ValueError`: If the pixels have another shape, are not floating point, or are not finite, or if `batch_size`
                is below 1.
        """
        features = self.features(pixel_values, batch_size)  # (n, patches, feature_size)
        shape = (len(features), self.config.num_patches, self.config.num_codebooks)
        codes = torch.empty(shape, device=features.device, dtype=torch.long)
        for batch in _batches(len(features), batch_size):
            codes[batch] = self.quantizer(self.pre_quant(features[batch]), return_losses=False).codes
        return LibraImageEncoding(codes, features)

    @torch.no_grad()
    def decode(self, codes: Tensor, batch_size: int = DECODE_BATCH_SIZE) -> Tensor:
        """Images of codes.

        Args:
            codes (`torch.Tensor` of shape `(n, num_patches, num_codebooks)`): Codes, patches row by row.
            batch_size (`int`, *optional*, defaults to 4): Images decoded at a time.

        Returns:
            `torch.Tensor` of shape `(n, 3, resolution, resolution)`, in the dtype of the model: Decoder output as is:
            nominally in [-1, 1], where -1 is black and 1 is white, but not clamped.

        Raises:
            `ValueError`: If the shape does not fit, a code is outside [0, codebook_size), or `batch_size` is below 1.
        """
        expected = (self.config.num_patches, self.config.num_codebooks)
        if codes.ndim != 3 or tuple(codes.shape[1:]) != expected:
            raise ValueError(f"Codes must have shape (n, {expected[0]}, {expected[1]}), got {tuple(codes.shape)}.")
        self.quantizer.check_codes(codes)
        batches = _batches(len(codes), batch_size)
        shape = (len(codes), 3, self.config.resolution, self.config.resolution)
        pixels = torch.empty(shape, device=self.device, dtype=self.dtype)
        for batch in batches:
            quantized = self.quantizer.codes_to_quantized(codes[batch].to(self.device))  # (batch, patches, embed_dim)
            pixels[batch] = self._decode_quantized(quantized)
        return pixels

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
        # The extremes of an image are not finite if any of its pixels is not; unlike `isfinite` of all pixels they take
        # no memory as large as the images.
        finite = pixel_values.amin(dim=(1, 2, 3)).isfinite() & pixel_values.amax(dim=(1, 2, 3)).isfinite()  # (n,)
        if not finite.all():
            broken = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"pixel_values of images {broken} contain NaN or infinite numbers.")


def _batches(count: int, batch_size: int) -> list[slice]:
    """Cuts `count` images into batches."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]


__all__ = ["LibraImageTokenizer"]
