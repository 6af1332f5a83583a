"""Adapters: what instruction tuning with LoRA or QLoRA leaves, merged into the model they were trained on."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from modeling_libra import LibraForCausalLM

from .weights import read_json

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's; it names the base model."""

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT stores them in."""

QUANTIZATION_CONFIG = "quantization_config.json"
"""In what form QLoRA held the base model."""


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def base_model(folder: str | os.PathLike) -> str:
    """
    The model an adapter was trained on.

    Args:
        folder (`str` or `os.PathLike`): the adapter's.

    Returns:
        `str`: folder or Hub id.

    Raises:
        ValueError: if the adapter does not say, or says a folder that is not there.
    """
    config = Path(folder) / ADAPTER_CONFIG
    base = read_json(config).get("base_model_name_or_path")
    if not base or (not Path(base).is_dir() and (Path(base).is_absolute() or len(Path(base).parts) != 2)):
        raise ValueError(
            f"The adapter {folder} was trained on the model {base!r}, which is not there. Set base_model_name_or_path "
            f"in {config} to its folder or Hub id."
        )
    return str(base)


def quantization_of(folder: str | os.PathLike) -> BitsAndBytesConfig | None:
    """
    In what form the base model was held while an adapter was trained.

    Args:
        folder (`str` or `os.PathLike`): the adapter's.

    Returns:
        `BitsAndBytesConfig`, or None if it was not quantized.

    Raises:
        ValueError: if it was, and bitsandbytes is not installed.
    """
    file = Path(folder) / QUANTIZATION_CONFIG
    if not file.is_file():
        return None
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"The adapter {folder} was trained on a model in 4 bits; to read it, bitsandbytes is needed. Run: pip install "
            "'libra-vlm[qlora]'"
        )
    return BitsAndBytesConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))


def dequantized(model: LibraForCausalLM, dtype: torch.dtype) -> LibraForCausalLM:
    """
    Turns 4-bit weights back into numbers: those the adapter was trained beside, not the original ones.

    Args:
        model ([`LibraForCausalLM`]): is changed.
        dtype (`torch.dtype`): of all weights.

    Returns:
        [`LibraForCausalLM`]: the model, plain.
    """
    model = model.dequantize(dtype=dtype)
    return model.to(dtype)


def merge_adapter(model: LibraForCausalLM, folder: str | os.PathLike) -> LibraForCausalLM:
    """
    Puts an adapter into the weights of a model.

    Args:
        model ([`LibraForCausalLM`]): the one the adapter was trained on, not quantized; is changed.
        folder (`str` or `os.PathLike`): the adapter's.

    Returns:
        [`LibraForCausalLM`]: the model, with nothing of PEFT in it.

    Raises:
        ValueError: if peft is not installed, or the adapter has no weights.
    """
    if find_spec("peft") is None:
        raise ValueError(f"{folder} is an adapter; to read it, peft is needed. Run: pip install 'libra-vlm[train]'")
    if not any((Path(folder) / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ValueError(
            f"The adapter {folder} has no weights: {ADAPTER_WEIGHTS[0]} is missing. Is the download complete?"
        )
    from peft import PeftModel

    merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    return merged
