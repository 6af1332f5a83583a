"""`libra quantize`: a repository whose large matrices have 8 or 4 bits, for machines with little memory.

| `to` | weights | computed with |
|---|---|---|
| `int8` | 8-bit integers, a scale for each row | torchao, anywhere torch runs |
| `bnb-int8` | LLM.int8() | bitsandbytes |
| `nf4` | 4 bits, double quantization, as for QLoRA | bitsandbytes |

What is left alone, and why, says [`NOT_QUANTIZED`].
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import BitsAndBytesConfig, TorchAoConfig

from .cards import model_card
from .export import IMAGE_TOKENIZER_FOLDER, card_of, check_destination, new_folder, write_repo_files
from .loading import check_not_quantized, find_file, load_libra
from .weights import INDEX, SINGLE, read_json

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

KEPT_METADATA = ("license", "license_name", "license_link", "language")
"""What of a card's metadata is true of the quantized model as well."""

REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What a model is called on the Hub."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors call them."""

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
        ValueError: as [`quantization_config`], [`load_libra`] and [`check_destination`] do, and if `src` is quantized
            already.
    """
    config = quantization_config(to, kwargs.get("dtype") or torch.float32)
    check_destination(dst)
    check_not_quantized(src)
    card = quantized_card(src, Path(dst).resolve().name, to)
    model, processor = load_libra(src, quantization_config=config, **kwargs)
    with new_folder(dst) as folder:
        model.save_pretrained(folder)
        dtype = stored_dtype(src)
        write_repo_files(folder, model.config, model.generation_config, processor, card, dtype)
    return Path(dst)


def quantized_card(src: str | os.PathLike, name: str, to: str) -> str:
    """
    The card of a quantized model. That of its source is not copied: sizes, numbers and pictures are not those of the result.

    Args:
        src (`str` or `os.PathLike`): folder or Hub id of the source; its card gives name, licence and languages.
        name (`str`): of the result.
        to (`str`): see [`quantization_config`].

    Returns:
        `str`: Markdown with the metadata in front.

    Raises:
        ValueError: if the source's card cannot be read.
    """
    text = card_of(src) or ""
    try:
        card = ModelCard(text)
    except Exception as error:  # whatever the YAML parser raises
        raise ValueError(f"The README.md of {src} cannot be read as a model card ({error}).") from error
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    source = str(src)
    if Path(src).is_dir():  # where it lies on this machine says nothing to others
        source = title[1].strip() if title else Path(src).resolve().name
    kept = {key: card.data[key] for key in KEPT_METADATA if card.data.get(key) is not None}
    description = (
        f"{source} with the weights of its large matrices in {to}, for machines with little memory; the rest is as it was. "
        f"It needs {PACKAGES[to]}. What it can do and cannot, what it learned from and whom to cite stands in the card of "
        f"{source}; the numbers there were measured without quantization."
    )
    base_model = {"base_model": source} if re.fullmatch(REPO_ID, source) else {}
    return model_card(name, description, **base_model, base_model_relation="quantized", **kept)


def stored_dtype(src: str | os.PathLike) -> torch.dtype | None:
    """
    What the image tokenizer's weights are stored in, which is not what they are loaded in.

    Args:
        src (`str` or `os.PathLike`): folder or Hub id of a Libra.

    Returns:
        `torch.dtype`, or None if it is none that all of a file have.
    """
    weights = find_file(src, f"{IMAGE_TOKENIZER_FOLDER}/{SINGLE}")
    if weights is None:  # shards; the first one is as the others
        index = find_file(src, f"{IMAGE_TOKENIZER_FOLDER}/{INDEX}")
        shard = min(read_json(index)["weight_map"].values()) if index else SINGLE
        weights = find_file(src, f"{IMAGE_TOKENIZER_FOLDER}/{shard}")
    if weights is None:
        return None
    with safe_open(weights, framework="pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
