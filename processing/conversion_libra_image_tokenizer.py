"""Reads the image tokenizer of the authors' release: `vision_tokenizer_config.yaml`, its checkpoint, CLIP's folder."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from .configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from .image_processing_libra import LibraImageProcessor
from .modeling_libra_image_tokenizer import LibraImageTokenizer

RELEASED_CONFIG = "vision_tokenizer_config.yaml"
RELEASED_CLIP_PREFIX = "encoder.vision_tower."

DECODER_OPTIONS = {
    "select_layers": "select_layer",
    "z_channels": "z_channels",
    "ch": "ch",
    "ch_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "num_attn_heads": "num_attn_head",
    "resolution": "resolution",
}
"""Our configuration fields and their names in the release's `ddconfig`."""

# ours -> released, applied in order; `{level}` is the released number of a decoder level, counted from the finest
KEY_RULES = [
    (r"^clip\.(vision_model\.)?", RELEASED_CLIP_PREFIX + "vision_model."),
    (r"^pre_quant\.", "quant_conv."),
    (r"^post_quant\.", "post_quant_conv."),
    (r"^quantizer\.", "quantize."),
    (r"^decoder\.mid_block_", "decoder.mid.block_"),
    (r"^decoder\.mid_attention\.", "decoder.mid.attn_1."),
    (r"^decoder\.levels\.\d+\.", "decoder.up.{level}."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.shortcut\.", ".nin_shortcut."),
]

DROPPED_KEYS = re.compile(r"^(loss\..*|quantize\.mask|.*\.position_ids)$")
"""Training losses and buffers of the release that carry no weights."""


def load_released(
    folder: str | os.PathLike, clip: str | os.PathLike | None = None
) -> tuple[LibraImageTokenizer, LibraImageProcessor]:
    """The image tokenizer of a released folder, and the image processor that goes with it.

    Args:
        folder (`str` or `os.PathLike`):
            Holds `vision_tokenizer_config.yaml`, the checkpoint it names, and possibly the CLIP folder it names.
        clip (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of the CLIP vision encoder. Needed only if neither `folder` nor the checkpoint has it;
            CLIP weights in the checkpoint always win.

    Returns:
        `tuple[LibraImageTokenizer, LibraImageProcessor]`: In evaluation mode, in the dtype of the checkpoint.

    Raises:
        `ValueError`: If a file or an option is missing or not understood, or keys are missing, unknown or of a wrong
            shape; the message names them.
    """
    folder = Path(folder)
    released = _read_config(folder)
    clip = _find_clip(folder, released, clip)
    state = _read_checkpoint(folder / released["params"]["ckpt_path"])
    if not any(key.startswith(RELEASED_CLIP_PREFIX) for key in state):
        state.update(_clip_state(folder, clip))
    config = convert_config(released, None if clip is None else CLIPVisionConfig.from_pretrained(clip))
    model = LibraImageTokenizer(config)
    model.load_state_dict(convert_state_dict(state, model))
    if clip is not None:
        return model.eval(), LibraImageProcessor.from_pretrained(clip)
    side = config.vision_config.image_size
    return model.eval(), LibraImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def convert_config(released: dict[str, Any], clip_config: CLIPVisionConfig | None = None) -> LibraImageTokenizerConfig:
    """Our configuration of a released one.

    Args:
        released (`dict`): Content of `vision_tokenizer_config.yaml`.
        clip_config (`CLIPVisionConfig`, *optional*, defaults to CLIP-ViT-L/14-336): The encoder.

    Raises:
        `ValueError`: If an option is missing, or set to something this implementation does not have.
    """
    params = released["params"]
    decoder = params["ddconfig"]
    fixed = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    unlike = {name: decoder[name] for name, value in fixed.items() if decoder.get(name, value) != value}
    if unlike:
        raise ValueError(f"{RELEASED_CONFIG}: ddconfig has {unlike}, but only {fixed} is implemented.")
    missing = [name for name in DECODER_OPTIONS.values() if name not in decoder]
    missing += [name for name in ("embed_dim", "codebook_size", "num_codebook") if name not in params]
    if missing:
        raise ValueError(f"{RELEASED_CONFIG} lacks {', '.join(missing)}.")
    config = LibraImageTokenizerConfig(
        vision_config=None if clip_config is None else clip_config.to_dict(),
        embed_dim=params["embed_dim"],
        codebook_size=params["codebook_size"],
        num_codebooks=params["num_codebook"],
        **{ours: decoder[theirs] for ours, theirs in DECODER_OPTIONS.items()},
    )
    if decoder.get("initial_resolution", config.grid) != config.grid:
        raise ValueError(
            f"{RELEASED_CONFIG}: initial_resolution is {decoder['initial_resolution']}, but CLIP gives {config.grid} "
            f"patches a side."
        )
    return config


def released_key(key: str, num_levels: int) -> str:
    """The released name of one of our weights in a decoder of `num_levels` levels."""
    level = re.match(r"decoder\.levels\.(\d+)\.", key)
    for pattern, replacement in KEY_RULES:
        key = re.sub(pattern, replacement, key)
    return key.format(level=num_levels - 1 - int(level.group(1))) if level else key


def convert_state_dict(state: dict[str, Tensor], model: LibraImageTokenizer) -> dict[str, Tensor]:
    """The weights of `model`, taken from a released state dict.

    Raises:
        `ValueError`: If keys are missing, unknown or of a wrong shape; the message names them.
    """
    ours = model.state_dict()
    names = {key: released_key(key, len(model.config.ch_mult)) for key in ours}
    unused_clip_layer = re.compile(rf"^{re.escape(RELEASED_CLIP_PREFIX)}vision_model\.encoder\.layers\.(\d+)\.")
    depth = max(model.config.select_layers)

    def is_expected(key: str) -> bool:
        layer = unused_clip_layer.match(key)
        return bool(DROPPED_KEYS.match(key)) or (layer is not None and int(layer.group(1)) >= depth)

    missing = sorted(set(names.values()) - state.keys())
    unknown = sorted(key for key in state.keys() - set(names.values()) if not is_expected(key))
    if missing or unknown:
        raise ValueError(f"The image tokenizer checkpoint has missing keys {missing} and unknown keys {unknown}.")
    converted = {}
    for key, name in names.items():
        weight = state[name]
        if key in ("pre_quant.weight", "post_quant.weight"):
            weight = weight.flatten(1)  # (out, in, 1, 1) convolution to (out, in)
        if weight.shape != ours[key].shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected {tuple(ours[key].shape)}.")
        converted[key] = weight
    return converted


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / RELEASED_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no released Libra folder: it has no {RELEASED_CONFIG}.")
    released = yaml.safe_load(path.read_text())
    params = released.get("params") if isinstance(released, dict) else None
    if not isinstance(params, dict) or not isinstance(params.get("ddconfig"), dict) or "ckpt_path" not in params:
        raise ValueError(f"{path} lacks params.ckpt_path or params.ddconfig.")
    return released


def _find_clip(folder: Path, released: dict[str, Any], clip: str | os.PathLike | None) -> str | os.PathLike | None:
    beside = folder / str(released["params"]["ddconfig"].get("encoder_name", ""))
    if clip is None and (beside / "config.json").is_file() and beside != folder:
        return beside
    return clip


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"The image tokenizer checkpoint {path} does not exist.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} has no 'state_dict'.")
    return dict(checkpoint["state_dict"])


def _clip_state(folder: Path, clip: str | os.PathLike | None) -> dict[str, Tensor]:
    if clip is None:
        raise ValueError(
            f"{folder} has no CLIP weights, neither in the checkpoint nor in a folder beside it. "
            f"Pass --clip with a folder or a Hub id, such as openai/clip-vit-large-patch14-336."
        )
    weights = CLIPVisionModel.from_pretrained(clip).state_dict()
    return {f"{RELEASED_CLIP_PREFIX}vision_model.{key.removeprefix('vision_model.')}": w for key, w in weights.items()}


__all__ = ["load_released"]
