"""Turns a folder of the authors' release into a repository of ours.

Weights go shard by shard: one shard of the release is read, renamed and written before the next one is opened, so the
peak of memory is about one shard plus the image tokenizer. Everything is checked from the files' headers before.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlamaTokenizer
from transformers.utils.logging import tqdm

from modeling_libra import LibraConfig, LibraForCausalLM
from modeling_libra.conversion_libra import convert_config, convert_key
from processing.conversion_libra_image_tokenizer import load_released
from processing.processing_libra import LibraProcessor

from .cards import model_card
from .export import check_destination, new_folder, write_repo_files
from .loading import load_generation_config
from .weights import INDEX, SINGLE, broken, promised_weights, read_json, read_shapes, some


class Shard(NamedTuple):
    """One weights file of the release, as far as its header tells.

    Args:
        path (`Path`): the file.
        keys (`dict`): released name -> our name of the weights to keep.
        shapes (`dict`): our name -> shape.
    """

    path: Path
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def convert_release(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    clip: str | os.PathLike | None = None,
    card: str | None = None,
    caption_prompt: str | None = None,
) -> Path:
    """
    Converts a released folder (`libra-11b-base`, `libra-11b-chat`, with the files of `libra-vision-tokenizer` in it).

    Args:
        src (`str` or `os.PathLike`):
            The released folder: `config.json`, safetensors shards, tokenizer, `vision_tokenizer_config.yaml` and the
            checkpoint it names.
        dst (`str` or `os.PathLike`): a folder that does not exist yet, or is empty.
        clip (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of CLIP-ViT-L/14-336. Needed where the release does not hold its weights.
        card (`str`, *optional*): the model card; by default a minimal one.
        caption_prompt (`str`, *optional*):
            What the image-to-text pipeline asks a chat model; without it images are captioned as in pretraining.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if a file is missing or broken, or weights are missing, unknown or of a wrong shape; the message
            names them. Nothing is written then.
    """
    src = Path(src)
    check_destination(dst)
    config = convert_config(_read_json(src / "config.json"))
    shards = read_headers(src)
    with torch.device("meta"):
        model = LibraForCausalLM(config)
    check_weights(shards, {name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    tokenizer = load_tokenizer(src, config)
    image_tokenizer, image_processor = load_released(src, clip)
    processor = LibraProcessor(
        image_processor, tokenizer, image_tokenizer, config.text_vocab_size, caption_prompt=caption_prompt
    )
    config.architectures = [type(model).__name__]
    generation_config = load_generation_config(src) or model.generation_config
    card = card or model_card(Path(dst).resolve().name, license="llama2")
    with new_folder(dst) as folder:
        write_repo_files(folder, config, generation_config, processor, card)
        write_weights(shards, folder)
    return Path(dst)


def read_headers(src: Path) -> list[Shard]:
    """
    The weights of a released folder, without reading them.

    Args:
        src (`Path`): holds `model.safetensors.index.json` and the shards it names, or one `model.safetensors`.

    Returns:
        `list` of [`Shard`]: those with weights to keep, in the order of their names.

    Raises:
        ValueError: if files are missing or broken, lack what the index promises, or hold unknown weights.
    """
    promised = promised_weights(src)
    shards, unknown = [], []
    for name in sorted(promised):
        shapes = read_shapes(src / name, promised[name])
        keys = {}
        for key in shapes:
            try:
                new_key = convert_key(key)
            except ValueError:
                unknown.append(key)
                continue
            if new_key is not None:
                keys[key] = new_key
        shards.append(Shard(src / name, keys, {keys[key]: shapes[key] for key in keys}))
    if unknown:
        raise ValueError(f"{src} holds weights that are not part of the released Libra layout: {some(unknown)}.")
    return [shard for shard in shards if shard.keys]


def check_weights(shards: list[Shard], expected: dict[str, tuple[int, ...]]) -> None:
    """
    Compares the weights of a release with those of the model its configuration describes.

    Args:
        shards (`list` of [`Shard`]): the release.
        expected (`dict`): shape of each weight of the model, by our names.

    Raises:
        ValueError: naming weights that are missing, that the model does not have, that come twice, or of a wrong shape.
    """
    counts = Counter(name for shard in shards for name in shard.shapes)
    found = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    wrong = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in found.keys() & expected.keys()
        if found[name] != expected[name]
    ]
    problems = {
        "missing": expected.keys() - found.keys(),
        "unknown to a model of this config.json": found.keys() - expected.keys(),
        "in more than one shard": [name for name, count in counts.items() if count > 1],
        "of a wrong shape": wrong,
    }
    described = [f"{kind}: {some(names)}" for kind, names in problems.items() if names]
    if described:
        raise ValueError(f"The weights do not fit the released config.json. Weights {'; '.join(described)}.")


def load_tokenizer(src: Path, config: LibraConfig) -> LlamaTokenizer:
    """
    The release's tokenizer, with what it leaves to the code around it: the padding token and the longest context.

    Args:
        src (`Path`): holds `tokenizer.json` or `tokenizer.model`.
        config ([`LibraConfig`]): names them.

    Returns:
        `LlamaTokenizer`

    Raises:
        ValueError: if the folder has no tokenizer, or one with more ids than the model.
    """
    if not any((src / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{src} has no tokenizer: neither tokenizer.json nor tokenizer.model.")
    tokenizer = LlamaTokenizer.from_pretrained(src)
    if len(tokenizer) > config.text_vocab_size:
        raise ValueError(f"The tokenizer in {src} has {len(tokenizer)} ids, the model only {config.text_vocab_size}.")
    text_config = config.text_config
    if text_config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text_config.pad_token_id)
    tokenizer.model_max_length = text_config.max_position_embeddings
    return tokenizer


def write_weights(shards: list[Shard], folder: Path) -> None:
    """
    Writes each shard under our names, one at a time, and the index if there is more than one.

    Args:
        shards (`list` of [`Shard`]): the release.
        folder (`Path`): where to.

    Raises:
        ValueError: if a shard cannot be read.
    """
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(tqdm(shards, desc="Converting shards"), start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = read_weights(shard)
        save_file(weights, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, name)
        total_size += sum(weight.nbytes for weight in weights.values())
        del weights  # before the next shard is read
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_weights(shard: Shard) -> dict[str, torch.Tensor]:
    """The weights of one shard by our names. Raises ValueError if it cannot be read."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            return {name: file.get_tensor(key) for key, name in shard.keys.items()}
    except (SafetensorError, OSError) as error:
        raise broken(shard.path, error) from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no released Libra folder: it has no {path.name}.")
    return read_json(path)
