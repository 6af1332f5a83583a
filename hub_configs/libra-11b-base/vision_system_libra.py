"""The vision system apart from its language model: put on a plain LLM, saved on its own, put back.

Libra adds parameters to a language model and changes none of it (Section 3.1), so a Libra whose LLM stayed frozen is its
base LLM's repository and the vision system: 4 of the 11 billion parameters, and one repository of an LLM serves any
number of vision systems. Such a vision system is a folder (or Hub repo) of its own:

| file | holds |
|---|---|
| `vision_system.safetensors`, or shards with an index | the parameters with `vision` in their names |
| `config.json`, `generation_config.json` | those of the whole model |
| `vision_system.json` | the base LLM: its name, the sizes that must fit, a checksum of its weights |
"""

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_libra import LibraConfig
from .modeling_libra import LibraForCausalLM

VISION_WEIGHTS_NAME = "vision_system.safetensors"
VISION_INDEX_NAME = VISION_WEIGHTS_NAME + ".index.json"
DESCRIPTION_NAME = "vision_system.json"

TEXT_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
"""Fields of a language model's configuration that a vision system depends on."""

VISION_FIELDS = (
    "image_grid",
    "num_codebooks",
    "codebook_size",
    "feature_size",
    "expert_down_ratio",
    "bridge_rank",
    "use_bridge",
    "use_expert",
    "use_continuous_features",
    "newline_token_id",
)
"""Fields of a [`LibraConfig`] that a vision system must share with a model it is put into."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fresh_vision_system(language_model: str | os.PathLike, config: LibraConfig, **kwargs) -> LibraForCausalLM:
    """
    Puts a new, untrained vision system on a plain language model.

    The LLM's weights are mapped from their files straight into the model: they are in memory once, and only when used.

    Args:
        language_model (`str` or `os.PathLike`):
            Folder or Hub id of a causal language model in safetensors.
        config ([`LibraConfig`]):
            Of the whole model. `config.dtype` is the dtype of its parameters, by default that of the language model.
        kwargs: passed to `from_pretrained`, for instance `device_map` or `attn_implementation`.

    Returns:
        [`LibraForCausalLM`] in evaluation mode. The vision system is drawn from torch's global random state.

    Raises:
        ValueError: if weights of the language model are missing, unknown, of a wrong shape, or in a broken file.
        OSError: if it has no safetensors, or the Hub cannot be reached.
    """
    weights = read_language_model(language_model, config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or transformers lists the whole vision system as missing
    try:
        model = _assemble(config, weights, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    model.generation_config = _generation_config(language_model, model)
    return model


def save_vision_system(
    model: LibraForCausalLM, folder: str | os.PathLike, base_llm: str | os.PathLike, max_shard_size: str = "5GB"
) -> None:
    """
    Saves the vision system of a model without its language model.

    Args:
        model ([`LibraForCausalLM`]):
            A model whose language model is that of `base_llm`, unchanged: one after pretraining, not after instruction
            tuning of all parameters.
        folder (`str` or `os.PathLike`):
            Where to; created if it does not exist. The processor may be saved into the same folder.
        base_llm (`str` or `os.PathLike`):
            Folder or Hub id of the plain LLM in safetensors. It is compared with the model's, and named in the folder.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Largest weights file.

    Raises:
        ValueError: if the language model is not that of `base_llm`, weight by weight, or the model has parameters of
            several dtypes or of an adapter. Nothing is written then.
        OSError: if `base_llm` has no safetensors, or the Hub cannot be reached.

    Example:

    ```python
    >>> save_vision_system(model, "my-vision-system", base_llm="Qwen/Qwen3-8B")
    >>> model = load_vision_system("my-vision-system")
    ```"""
    config = _config_to_save(model)
    weights = model.state_dict()
    _check_weights("The model", weights, _expected(config))
    language = {name: weight for name, weight in weights.items() if not is_vision(name)}
    _check_same_language_model(language, base_llm, config)
    description = {
        "base_llm": str(base_llm),
        "sizes": _text_sizes(config.text_config),
        "checksum": _checksum(language, config),
    }

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights({name: weight for name, weight in weights.items() if is_vision(name)}, folder, max_shard_size)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_vision_system(
    vision_system: str | os.PathLike, base_llm: str | os.PathLike | None = None, **kwargs
) -> LibraForCausalLM:
    """
    A whole model of a saved vision system and its base LLM: bit for bit the one that was saved, in the same dtype.

    Args:
        vision_system (`str` or `os.PathLike`): folder or Hub id of what [`save_vision_system`] wrote.
        base_llm (`str` or `os.PathLike`, *optional*, defaults to the one `vision_system` names):
            Another place of the same language model: a folder or Hub id.
        kwargs: passed to `from_pretrained`, for instance `device_map` or `attn_implementation`.

    Returns:
        [`LibraForCausalLM`] in evaluation mode.

    Raises:
        ValueError: if `vision_system` is not one, its weights do not fit its configuration, or the language model is of
            other sizes or has other weights than the one it was saved with.
        OSError: if the base LLM is not where it should be.
    """
    config, description = _read_description(vision_system)
    place = description["base_llm"] if base_llm is None else base_llm
    try:
        text_config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The base LLM {str(place)!r} of the vision system {vision_system} cannot be read: {error} Pass base_llm "
            "with a folder or Hub id that has it."
        ) from error
    _check_sizes(place, _text_sizes(text_config), description["sizes"])
    vision = _read_vision_weights(vision_system, config)
    language = read_language_model(place, config)
    if _checksum(language, config) != description["checksum"]:
        raise ValueError(
            f"The weights of {place} are not those of the language model that the vision system {vision_system} was "
            f"saved with, {description['base_llm']!r}. Pass base_llm with a copy of that one. (To try the vision system "
            "on another LLM of these sizes, load a Libra with that LLM and use replace_vision_system.)"
        )
    model = _assemble(config, language | vision, **kwargs)
    model.generation_config = _generation_config(vision_system, model)
    return model


def replace_vision_system(model: LibraForCausalLM, vision_system: str | os.PathLike) -> None:
    """
    Puts a saved vision system into a model, in place of the one it has. The language model stays as it is; it must have
    the sizes of the one the vision system was saved with, but may have other weights.

    Args:
        model ([`LibraForCausalLM`]): changed in place; keeps its dtype and device.
        vision_system (`str` or `os.PathLike`): folder or Hub id of what [`save_vision_system`] wrote.

    Raises:
        ValueError: if `vision_system` is not one, or does not fit the model. The model is not changed then.
    """
    config, description = _read_description(vision_system)
    _check_sizes("this model", _text_sizes(model.config.text_config), description["sizes"])
    found, expected = ({name: getattr(c, name) for name in VISION_FIELDS} for c in (model.config, config))
    _check_sizes("this model", found, expected)
    model.load_state_dict(_read_vision_weights(vision_system, model.config), strict=False)


def is_vision(name: str) -> bool:
    """Whether a parameter, by its name in the state dict, is part of the vision system."""
    return "vision" in name


def read_language_model(language_model: str | os.PathLike, config: LibraConfig) -> dict[str, torch.Tensor]:
    """
    The weights of a plain causal language model by the names they have in [`LibraForCausalLM`].

    Args:
        language_model (`str` or `os.PathLike`): folder or Hub id, in safetensors.
        config ([`LibraConfig`]): what they must fit.

    Returns:
        `dict` of `torch.Tensor`: mapped from the files, which are read when a weight is used.

    Raises:
        ValueError: if weights are missing, unknown, of a wrong shape, or in a broken file.
        OSError: if there are no safetensors, or the Hub cannot be reached.
    """
    files = _weights_files(language_model, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not files:
        raise OSError(
            f"{language_model} has neither {SAFE_WEIGHTS_INDEX_NAME} nor {SAFE_WEIGHTS_NAME}. A language model in "
            "safetensors is expected; AutoModelForCausalLM's save_pretrained writes it so."
        )
    weights = {}
    for name, weight in _read(files).items():
        if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold this buffer; it follows from the config
            is_in_decoder = name.startswith("model.")
            weights["model.language_model." + name.removeprefix("model.") if is_in_decoder else name] = weight
    expected = {name: shape for name, shape in _expected(config).items() if not is_vision(name)}
    if config.tie_word_embeddings and "lm_head.weight" not in weights:
        del expected["lm_head.weight"]
    _check_weights(str(language_model), weights, expected)
    return weights


def _assemble(config: LibraConfig, weights: dict[str, torch.Tensor], **kwargs) -> LibraForCausalLM:
    """A model of weights; those of the vision system may be absent, and are then initialised."""
    return LibraForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype="auto", **kwargs)


def _config_to_save(model: LibraForCausalLM) -> LibraConfig:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"The model has parameters in {', '.join(sorted(map(str, dtypes)))}; from_pretrained would load all in one. "
            "Bring it to one dtype first, for instance with model.float(), which loses nothing."
        )
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    for name in ("auto_map", "custom_pipelines"):  # they name code that this folder does not carry
        config.__dict__.pop(name, None)
    return config


def _check_same_language_model(language: dict[str, torch.Tensor], base_llm: str | os.PathLike, config: LibraConfig):
    """Refuses a language model that was trained: its base LLM would not give it back."""
    base = read_language_model(base_llm, config)
    changed = [
        name for name, weight in base.items() if not torch.equal(weight.to(config.dtype), language[name].detach().cpu())
    ]
    if changed:
        raise ValueError(
            f"The language model is not {base_llm}: {_some(changed)} differ from it. Was it trained? Then the vision "
            "system alone does not give this model back; save the whole model with save_pretrained."
        )


def _read_description(vision_system: str | os.PathLike) -> tuple[LibraConfig, dict]:
    path = cached_file(vision_system, DESCRIPTION_NAME, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ValueError(
            f"{vision_system} is no vision system: it has no {DESCRIPTION_NAME}. save_vision_system writes one."
        )
    return LibraConfig.from_pretrained(vision_system), json.loads(Path(path).read_text(encoding="utf-8"))


def _read_vision_weights(vision_system: str | os.PathLike, config: LibraConfig) -> dict[str, torch.Tensor]:
    files = _weights_files(vision_system, VISION_WEIGHTS_NAME, VISION_INDEX_NAME)
    if not files:
        raise ValueError(f"{vision_system} has neither {VISION_INDEX_NAME} nor {VISION_WEIGHTS_NAME}.")
    weights = _read(files)
    expected = {name: shape for name, shape in _expected(config).items() if is_vision(name)}
    _check_weights(str(vision_system), weights, expected)
    return weights


def _write_weights(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: str):
    for stale in folder.glob(VISION_WEIGHTS_NAME.replace(".", "*.") + "*"):
        stale.unlink()
    pattern = VISION_WEIGHTS_NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        shard = {key: weights[key].detach().cpu().contiguous() for key in keys}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / VISION_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weights_files(place: str | os.PathLike, single: str, index: str) -> list[str]:
    """Paths of the weights of a folder or Hub repo; downloads them. Empty if it has none."""
    listed = cached_file(place, index, _raise_exceptions_for_missing_entries=False)
    if listed is not None:
        return get_checkpoint_shard_files(str(place), listed)[0]
    file = cached_file(place, single, _raise_exceptions_for_missing_entries=False)
    return [] if file is None else [file]


def _read(files: list[str]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}). Is the download complete, and not a pointer?"
            ) from error
    return weights


def _expected(config: LibraConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a model."""
    with torch.device("meta"):
        model = LibraForCausalLM(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _check_weights(place: str, weights: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]):
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - expected.keys()),
        "of a wrong shape": wrong,
    }
    described = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if described:
        raise ValueError(f"{place} does not have the weights of its configuration. Weights {'; '.join(described)}.")


def _text_sizes(text_config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(text_config, name, None) for name in TEXT_SIZES}


def _check_sizes(place: str | os.PathLike, found: dict, expected: dict):
    wrong = [
        f"{name} {found.get(name)} (expected {size})" for name, size in expected.items() if found.get(name) != size
    ]
    if wrong:
        raise ValueError(f"The vision system does not fit {place}, which has {', '.join(wrong)}.")


def _checksum(language: dict[str, torch.Tensor], config: LibraConfig) -> str:
    """Of the sums of the weights' bits, which any training changes and which cost no more than reading them once."""
    digest = hashlib.sha256()
    for name in sorted(language):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = language[name].detach().to(config.dtype)
        bits = weight.contiguous().view(INTEGERS[weight.element_size()])
        digest.update(f"{name} {tuple(weight.shape)} {bits.sum(dtype=torch.int64).item()}\n".encode())
    return digest.hexdigest()


def _generation_config(place: str | os.PathLike, model: LibraForCausalLM) -> GenerationConfig:
    """Of a folder or Hub repo; the model's own if it has none."""
    if cached_file(place, "generation_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return model.generation_config
    return GenerationConfig.from_pretrained(place)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


__all__ = ["fresh_vision_system", "load_vision_system", "replace_vision_system", "save_vision_system"]
