"""`libra quantize`: a repository whose large matrices have 8 or 4 bits, for machines with little memory.

| `to` | weights | computed with |
|---|---|---|
| `int8` | 8-bit integers, a scale for each row | torchao, anywhere torch runs |
| `bnb-int8` | LLM.int8() | bitsandbytes |
| `nf4` | 4 bits, double quantization, as for QLoRA | bitsandbytes |

What is left alone, and why, says [`NOT_QUANTIZED`].
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from processing.processing_libra import LibraProcessor

from .cards import model_card
from .export import check_destination, new_folder, write_code
from .loading import load_model

NOT_QUANTIZED = ["lm_head", "vision_lm_head", r"model\.vision_model\.embedding", r".*_bridge_on_(vision|language)"]
"""
What keeps its dtype, as regular expressions; together 0.18 B of 11 B parameters.

- The heads: rounding a head moves the logits themselves; TRL multiplies by the weight of the language head, which must
  be numbers and not packed bits.
- The hybrid embedding: tables, and the projection of CLIP's features, whose errors every layer would see. QLoRA trains it
  whole.
- The bridges: one side of each map is 8 wide, less than the 64 numbers of a block and less than kernels take; a scale for
  each row of 8 would save little. QLoRA trains them whole.

The expert's low-rank pairs are two matrices of a quarter of the width (1024 at full size) and are quantized as any other.
"""

PACKAGES = {"int8": "torchao", "bnb-int8": "bitsandbytes", "nf4": "bitsandbytes"}
"""What each of the forms needs."""


def quantization_config(to: str, compute_dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig | TorchAoConfig:
    """
    The `quantization_config` of `from_pretrained`.

    Args:
        to (`str`): `"int8"`, `"bnb-int8"` or `"nf4"`.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): what `nf4` is turned into for a product.

    Returns:
        `TorchAoConfig` or `BitsAndBytesConfig`

    Raises:
        ValueError: for a form there is not, or if its package is not installed.
    """
    if to not in PACKAGES:
        raise ValueError(f"There is no form {to!r}; choose of {', '.join(PACKAGES)}.")
    if find_spec(PACKAGES[to]) is None:
        raise ValueError(f"{to} needs {PACKAGES[to]}, which is not installed. Run: pip install 'libra-vlm[quantize]'")
    if to == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=NOT_QUANTIZED)
    if to == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,  # of 4 bits as well, whatever its name
    )


def quantize_repo(src: str | os.PathLike, dst: str | os.PathLike, to: str, **kwargs: Any) -> Path:
    """
    Writes a complete repository with quantized weights. It loads as any other, where the package of its form is.

    Args:
        src (`str` or `os.PathLike`): folder or Hub id of a Libra.
        dst (`str` or `os.PathLike`): folder to write; must not exist, or be empty.
        to (`str`): see [`quantization_config`].
        kwargs: passed to `from_pretrained`, for instance `dtype`, which is that of all that is not quantized.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: as [`quantization_config`], [`load_model`] and [`check_destination`] do.
    """
    config = quantization_config(to, kwargs.get("dtype") or torch.float32)
    check_destination(dst)
    model = load_model(src, quantization_config=config, **kwargs)
    processor = LibraProcessor.from_pretrained(src)
    with new_folder(dst) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_code(folder)
        card = Path(src, "README.md")
        text = card.read_text(encoding="utf-8") if card.is_file() else model_card(Path(dst).name)
        (folder / "README.md").write_text(f"{text}\n\nThe weights are those of {src} in {to}.\n", encoding="utf-8")
    return Path(dst)
