"""Configuration of the Libra image tokenizer: frozen CLIP encoder, lookup-free quantizer, convolutional decoder."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig
from transformers.configuration_utils import PreTrainedConfig

DECODER_NORM_GROUPS = 32
"""Number of groups of every GroupNorm in the decoder; channel counts must be multiples of it."""

CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""The vision encoder of the authors' release."""

RELEASED_SELECT_LAYERS = (2, 10, 18, 22)
"""Hidden states of the 24 layers of that encoder that make up its features."""

RELEASED_CH_MULT = (1, 1, 2, 4, 8)
"""Channel multipliers of the decoder that makes a patch of 14 x 14 pixels in four upsamplings."""


@strict
class LibraImageTokenizerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LibraImageTokenizer`]. The defaults are the tokenizer of the authors' release
    (CLIP-ViT-L/14-336, two codebooks of 512 entries, 24 x 24 patches).

    Args:
        vision_config (`dict` or `CLIPVisionConfig`, *optional*, defaults to CLIP-ViT-L/14-336):
            The frozen CLIP vision encoder. `image_size` and `patch_size` must be single integers.
        select_layers (`list[int]`, *optional*, defaults to `(2, 10, 18, 22)`):
            Indices into CLIP's hidden states (0 = embeddings, k = output of layer k) whose patch rows are concatenated
            into the continuous features. Layers above the deepest selected one are neither built nor run.
        embed_dim (`int`, *optional*, defaults to 1024):
            Width of a patch on both sides of the quantizer.
        num_codebooks (`int`, *optional*, defaults to 2):
            Codes per patch.
        codebook_size (`int`, *optional*, defaults to 512):
            Entries per codebook, a power of two: a code is log2(codebook_size) signs.
        z_channels (`int`, *optional*, defaults to 1024):
            Channels the decoder starts from.
        ch (`int`, *optional*, defaults to 128):
            Base channels of the decoder.
        ch_mult (`list[int]`, *optional*, defaults to `(1, 1, 2, 4, 8)`):
            Channel multipliers of the decoder levels, finest level first.
        num_res_blocks (`int`, *optional*, defaults to 2):
            Residual blocks per decoder level, minus one.
        attn_resolutions (`list[int]`, *optional*, defaults to `(24,)`):
            Resolutions of the decoder levels that have attention after each residual block.
        num_attn_heads (`int`, *optional*, defaults to 8):
            Attention heads in the decoder.
        resolution (`int`, *optional*, defaults to 336):
            Height and width of the decoded image. Every upsampling doubles, but the last one goes to `resolution`
            whatever its factor.
        entropy_loss_weight (`float`, *optional*, defaults to 0.1):
            Weight of the entropy terms of the quantizer loss.
        diversity_gamma (`float`, *optional*, defaults to 2.5):
            Weight of the codebook entropy relative to the per-sample entropy.
        commitment_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the commitment term of the quantizer loss.

    Raises:
        `StrictDataclassClassValidationError`: If the sizes do not fit together; the message names the field, its value
            and what it must be.

    Example:

    ```python
    >>> configuration = LibraImageTokenizerConfig()
    >>> configuration.grid, configuration.num_patches, configuration.feature_size
    (24, 576, 4096)
    ```"""

    model_type = "libra_image_tokenizer"
    sub_configs = {"vision_config": CLIPVisionConfig}

    vision_config: Any = None  # a dict or `CLIPVisionConfig` on the way in, a `CLIPVisionConfig` once initialized
    select_layers: list[int] | tuple[int, ...] = RELEASED_SELECT_LAYERS
    embed_dim: int = 1024
    num_codebooks: int = 2
    codebook_size: int = 512
    z_channels: int = 1024
    ch: int = 128
    ch_mult: list[int] | tuple[int, ...] = RELEASED_CH_MULT
    num_res_blocks: int = 2
    attn_resolutions: list[int] | tuple[int, ...] = (24,)
    num_attn_heads: int = 8
    resolution: int = 336
    entropy_loss_weight: float | int = 0.1
    diversity_gamma: float | int = 2.5
    commitment_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**CLIP_VIT_L_14_336)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)

    @classmethod
    def for_clip(cls, vision_config: dict[str, Any], **fields) -> "LibraImageTokenizerConfig":
        """
        The configuration around any CLIP vision encoder: that of the release, in proportion to the encoder.

        - `select_layers`: the relative depths 2/24, 10/24, 18/24, 22/24, rounded.
        - `ch_mult`: as many decoder levels as it takes doublings from one pixel to a patch, the coarsest ones as in the
          release.
        - `resolution`, `attn_resolutions`: the encoder's image size, its grid.

        Args:
            vision_config (`dict`): The configuration of the encoder.
            fields: Fields of [`LibraImageTokenizerConfig`] other than `vision_config`; they win.

        Returns:
            [`LibraImageTokenizerConfig`]

        Raises:
            `ValueError`: If the images are not a square of whole patches, or the encoder has too few layers for four
                different depths and `select_layers` is not given.
        """
        encoder = CLIPVisionConfig(**vision_config)
        grid = _grid(encoder)
        doublings = (encoder.patch_size - 1).bit_length()
        finer = (RELEASED_CH_MULT[0],) * (doublings + 1 - len(RELEASED_CH_MULT))
        defaults = {
            "ch_mult": finer + RELEASED_CH_MULT[-(doublings + 1) :],
            "resolution": encoder.image_size,
            "attn_resolutions": (grid,),
        }
        if "select_layers" not in fields:
            defaults["select_layers"] = _relative_layers(encoder.num_hidden_layers)
        return cls(vision_config=vision_config, **{**defaults, **fields})

    @property
    def grid(self) -> int:
        """`int`: Patches per side of the image."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """`int`: Patches per image, grid * grid."""
        return self.grid**2

    @property
    def feature_size(self) -> int:
        """`int`: Width of the continuous features of a patch: the selected hidden states side by side."""
        return self.vision_config.hidden_size * len(self.select_layers)

    @property
    def decoder_resolutions(self) -> list[int]:
        """`list[int]`: Resolution of each decoder level in order of execution, from the grid to `resolution`."""
        doublings = [self.grid * 2**level for level in range(len(self.ch_mult) - 1)]
        return [*doublings, self.resolution]

    def validate_architecture(self):
        """Part of `@strict`-powered validation: checks that the sizes of encoder, quantizer and decoder fit."""
        self._validate_encoder()
        self._validate_quantizer()
        self._validate_decoder()

    def _validate_encoder(self):
        _grid(self.vision_config)
        depth = self.vision_config.num_hidden_layers
        if not self.select_layers or not all(0 <= layer <= depth for layer in self.select_layers):
            raise ValueError(
                f"select_layers must name at least one hidden state of CLIP, each between 0 (embeddings) and "
                f"vision_config.num_hidden_layers={depth}, got {list(self.select_layers)}."
            )

    def _validate_quantizer(self):
        size = self.codebook_size
        if size < 2 or size & (size - 1) != 0:
            raise ValueError(f"codebook_size must be a power of two, at least 2, got {size}.")
        for name in ("num_codebooks", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def _validate_decoder(self):
        widths = [self.ch * factor for factor in self.ch_mult]
        if not widths or any(width < 1 or width % DECODER_NORM_GROUPS != 0 for width in widths):
            raise ValueError(
                f"ch times every entry of ch_mult must be a positive multiple of {DECODER_NORM_GROUPS} (group norm), "
                f"got ch={self.ch} and ch_mult={list(self.ch_mult)}."
            )
        attended = [widths[-1]]  # the middle block always attends
        attended += [w for w, r in zip(reversed(widths), self.decoder_resolutions) if r in self.attn_resolutions]
        if self.num_attn_heads < 1 or any(width % self.num_attn_heads != 0 for width in attended):
            raise ValueError(
                f"num_attn_heads must divide the channels of every decoder level with attention ({attended}), "
                f"got {self.num_attn_heads}."
            )
        if len(widths) == 1 and self.resolution != self.grid:
            raise ValueError(
                f"A decoder of one level does not upsample: resolution must be the grid ({self.grid}), got "
                f"{self.resolution}. Add levels to ch_mult."
            )


def _grid(encoder: CLIPVisionConfig) -> int:
    """Patches per side of the square image an encoder reads."""
    image_size, patch_size = encoder.image_size, encoder.patch_size
    if not isinstance(image_size, int) or not isinstance(patch_size, int) or image_size % patch_size != 0:
        raise ValueError(
            f"vision_config.image_size must be an integer multiple of vision_config.patch_size, "
            f"got image_size={image_size} and patch_size={patch_size}."
        )
    return image_size // patch_size


def _relative_layers(depth: int) -> tuple[int, ...]:
    """The layers at the release's relative depths in an encoder of `depth` layers."""
    released_depth = CLIP_VIT_L_14_336["num_hidden_layers"]
    layers = tuple(max(1, round(layer * depth / released_depth)) for layer in RELEASED_SELECT_LAYERS)
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"A CLIP of {depth} layers has no {len(layers)} different ones at the relative depths of the release; name "
            "the hidden states to use with select_layers."
        )
    return layers


__all__ = ["LibraImageTokenizerConfig"]
