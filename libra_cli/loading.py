"""Loading a model and its processor with the installed classes, whole or not at all."""

import os
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import cached_file

from modeling_libra import LibraConfig, LibraForCausalLM
from processing.processing_libra import HUB_OPTIONS, LibraProcessor

from .adapters import base_model, dequantized, is_adapter, merge_adapter, quantization_of
from .weights import INDEX, SINGLE, check_fit, check_weight_files, is_finite, read_json, read_shapes, some

MODEL_VARIABLE = "LIBRA_MODEL"
"""Environment variable that names the default model."""

TINY_MODEL = Path(__file__).resolve().parent.parent / "hub_configs" / "libra-tiny"
"""The model that comes with a source checkout."""

KNOWN_TO_TRANSFORMERS = {
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}
"""Fields of a config.json that say how it is loaded, not what the model is."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""What the text tokenizer may be stored in."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that configurations name."""


def default_model() -> str:
    """
    The model used when none is named: `$LIBRA_MODEL`, or the libra-tiny of the source checkout.

    Returns:
        `str`: a folder or Hub id.

    Raises:
        ValueError: if the variable is not set and the package was installed without the checkout.
    """
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return named
    if not (TINY_MODEL / "config.json").is_file():
        raise ValueError(
            f"No model: {TINY_MODEL} does not exist. Pass --model with a folder or a Hub id, or set {MODEL_VARIABLE}."
        )
    return str(TINY_MODEL)


def load_libra(path: str | os.PathLike, **kwargs: Any) -> tuple[LibraForCausalLM, LibraProcessor]:
    """
    Loads a repository with the installed classes; no code of the repository is run.

    An adapter (what `libra train sft` leaves with LoRA) is merged into the model it was trained on; if that was held in
    4 bits, into what the 4 bits stand for, so that the result answers as the tuned model did.

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub; or the folder of an adapter.
        kwargs: passed to `LibraForCausalLM.from_pretrained`, for instance `dtype` or `device_map`.

    Returns:
        `tuple` of [`LibraForCausalLM`] and [`LibraProcessor`]: the model in evaluation mode.

    Raises:
        ValueError: if the folder is not a Libra repository, or its weights do not fit its configuration.
        OSError: if files are missing, or the Hub cannot be reached.
    """
    if is_adapter(path):
        model, processor = _load_adapter(path, **kwargs)
    else:
        model, processor = load_model(path, **kwargs).eval(), load_processor(path)
    check_parts_fit(model.config, processor)
    return model, processor


def load_model(path: str | os.PathLike, **kwargs: Any) -> LibraForCausalLM:
    """
    Loads the model of a repository, as [`load_libra`] does.

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub.
        kwargs: passed to `LibraForCausalLM.from_pretrained`.

    Returns:
        [`LibraForCausalLM`]

    Raises:
        ValueError, OSError: as in [`load_libra`].
    """
    check_path(path)
    try:
        if Path(path).is_dir():
            check_model(Path(path))
        else:
            _check_model_of_hub(str(path), **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})
        model, report = LibraForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except OSError as error:
        raise OSError(f"No model could be loaded from {str(path)!r}: {error}") from error
    except SafetensorError as error:  # of a repository on the Hub; folders have been looked at
        raise ValueError(f"No model could be loaded from {str(path)!r}: {error}") from error
    check_loaded(path, report)
    check_finite(path, model)
    return model


def load_processor(path: str | os.PathLike) -> LibraProcessor:
    """
    Loads the processor of a repository with its image tokenizer.

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub.

    Returns:
        [`LibraProcessor`]

    Raises:
        ValueError: if a part of it is missing, broken or does not fit the others.
        OSError: if the Hub cannot be reached.
    """
    if Path(path).is_dir():
        check_processor_files(Path(path))
    try:
        processor = LibraProcessor.from_pretrained(path)
        _use_once(processor)
    except Exception as error:  # the readers of tokenizer.json and of weights raise errors of their own
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"No processor could be loaded from {str(path)!r}: {error}") from error
    check_finite(f"{path}/image_tokenizer", processor.image_tokenizer)
    return processor


def _use_once(processor: LibraProcessor) -> None:
    """What a processor never uses it does not look at: templates are compiled, and limits compared, when they are used."""
    processor.apply_chat_template([{"role": "user", "content": []}])
    processor(text="A", return_tensors="pt")
    with np.errstate(all="ignore"):  # numpy would print a warning beside the error
        pixels = processor.image_processor(Image.new("RGB", (2, 2)), return_tensors="pt")["pixel_values"]
    if not pixels.isfinite().all():
        raise ValueError("it makes NaN or infinite numbers of an image; see image_mean and image_std.")


def _load_adapter(folder: str | os.PathLike, **kwargs: Any) -> tuple[LibraForCausalLM, LibraProcessor]:
    base, quantization = base_model(folder), quantization_of(folder)
    if quantization is None:
        model = load_model(base, **kwargs)
    else:
        dtype = kwargs.pop("dtype", None) or LibraConfig.from_pretrained(base).dtype or torch.float32
        read_as = quantization.bnb_4bit_compute_dtype  # as for training: other roundings would give other 4 bits
        model = dequantized(load_model(base, quantization_config=quantization, dtype=read_as, **kwargs), dtype)
    return merge_adapter(model, folder).eval(), load_processor(folder)


def check_path(path: str | os.PathLike) -> None:
    """
    Refuses what is neither the folder of a model nor a Hub id.

    Raises:
        ValueError: if there is no such folder and it cannot be a Hub id, or the folder has no config.json.
    """
    folder = Path(path)
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter, not a whole model; merge it first: libra export {folder} NEW_FOLDER")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the repository of a model: it has no config.json.")
    if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) != 2):
        raise ValueError(f"There is no folder {str(path)!r}, and it is no Hub id such as 'organization/name' either.")


def check_configuration(folder: Path) -> LibraConfig:
    """
    Refuses configurations that this version would misread: broken ones, those of other models, those of later versions.

    Args:
        folder (`Path`): holds `config.json`, and `generation_config.json` if there is one.

    Returns:
        [`LibraConfig`]: the configuration of the model.

    Raises:
        ValueError: naming the file, what is wrong in it and what was expected.
    """
    file = folder / "config.json"
    content = read_json(file)
    if content.get("model_type") != LibraConfig.model_type:
        raise ValueError(f"{file} is of a model of type {content.get('model_type')!r}; expected 'libra'.")
    _check_version(file, content.get("transformers_version", transformers_version))
    known = LibraConfig().to_dict().keys() | GenerationConfig().to_dict().keys() | KNOWN_TO_TRANSFORMERS
    unknown = sorted(content.keys() - known)
    if unknown:
        raise ValueError(
            f"{file} has fields this version of Libra does not know: {', '.join(unknown)}. They may change what the model "
            "computes: upgrade, or remove them if they do not."
        )
    with _named(file):
        config = LibraConfig.from_pretrained(folder)
        _check_ranges(config)
    file = folder / "generation_config.json"
    if file.is_file():
        read_json(file)
        with _named(file):
            generation_config = GenerationConfig.from_pretrained(folder)
            generation_config.validate(strict=True)
            _check_ids(generation_config, config.total_vocab_size)
    return config


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Libraries raise anything at all on wrong values of a configuration; here that is one error, which names the file."""
    try:
        yield
    except Exception as error:
        says_all = isinstance(error, (ValueError, StrictDataclassError))
        reason = str(error) if says_all else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} cannot be used: {reason}") from error


def _check_version(file: Path, written_by: object) -> None:
    """Compares the generation of transformers a configuration was written with to the installed one."""
    if not isinstance(written_by, str) or not re.match(r"\d+(\.|$)", written_by):
        raise ValueError(
            f"{file} has transformers_version {written_by!r}; expected one such as {transformers_version}."
        )
    if int(written_by.split(".")[0]) > int(transformers_version.split(".")[0]):
        raise ValueError(
            f"{file} was written with transformers {written_by}, a later generation than the {transformers_version} "
            "installed here, which may misread it. Upgrade transformers and this package."
        )


def _check_ranges(config: LibraConfig) -> None:
    """Refuses numbers a language model is built with, and then computes nonsense."""
    text = config.text_config
    positive = {
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_parameters["rope_theta"],
    }
    for name, value in positive.items():
        if not value > 0:  # nor NaN
            raise ValueError(f"text_config.{name} must be greater than 0, found {value}.")
    _check_ids(text, config.text_vocab_size)


def _check_ids(config: Any, vocab_size: int) -> None:
    """Refuses special ids outside of the vocabulary. -1 is none in configurations of old language models."""
    for name in SPECIAL_IDS:
        value = getattr(config, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not -1 <= one < vocab_size:
                raise ValueError(f"{name} must be an id of the vocabulary, in [0, {vocab_size}), found {one}.")


def check_processor_files(folder: Path) -> None:
    """
    Looks for the parts of a processor, before any of them is loaded.

    Args:
        folder (`Path`): of a repository.

    Raises:
        ValueError: naming files that are missing or broken.
    """
    image_tokenizer = folder / "image_tokenizer"
    configurations = (folder / "processor_config.json", image_tokenizer / "config.json")
    absent = [str(file.relative_to(folder)) for file in configurations if not file.is_file()]
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        absent.append(" or ".join(TOKENIZER_FILES))
    if absent:
        raise ValueError(f"{folder} has no whole processor: it lacks {', '.join(absent)}.")
    for file in configurations:
        read_json(file)
    file = folder / "tokenizer_config.json"
    longest = read_json(file).get("model_max_length", 1) if file.is_file() else 1
    if not isinstance(longest, (int, float)) or longest < 1:
        raise ValueError(f"{file} has model_max_length {longest!r}; expected a number of tokens.")
    check_weight_files(image_tokenizer)


def check_model(folder: Path) -> None:
    """
    Looks at a model before any of its weights is read: its configuration, and the headers of its weights files.

    Args:
        folder (`Path`): of one model.

    Raises:
        ValueError: as [`check_configuration`], or naming weights that are missing, unknown or of a wrong shape.
    """
    config = check_configuration(folder)
    found = check_weight_files(folder)
    model = _build_empty(folder, config, found.keys())
    if getattr(config, "quantization_config", None) is None:  # else what is stored has other names and shapes
        check_fit(folder, model)


def _check_model_of_hub(repo_id: str, **kwargs: Any) -> None:
    """As [`check_model`], of a repository on the Hub; fetches nothing that loading it would not fetch."""
    folder = Path(str(cached_file(repo_id, "config.json", **kwargs))).parent  # of the cache
    find_file(repo_id, "generation_config.json", **kwargs)  # comes to lie beside it
    config = check_configuration(folder)
    if single := find_file(repo_id, SINGLE, **kwargs):  # first, as transformers has it
        _build_empty(folder, config, read_shapes(single).keys())
    elif index := find_file(repo_id, INDEX, **kwargs):
        _build_empty(folder, config, read_json(index).get("weight_map", {}).keys())


def _build_empty(folder: Path, config: LibraConfig, names: Set[str]) -> LibraForCausalLM:
    """The model of a configuration without its weights, whose names are given: a model larger than them is not built."""
    file = folder / "config.json"
    for part, count in (("layers", config.text_config.num_hidden_layers), ("codebooks", config.num_codebooks)):
        if count > len(names):  # a million layers take minutes even without weights
            raise ValueError(f"{file} is of a model with {count} {part}; there are only {len(names)} weights.")
    with _named(file), torch.device("meta"):
        return LibraForCausalLM(config)


def find_file(path: str | os.PathLike, name: str, **kwargs: Any) -> Path | None:
    """
    A file of a repository, wherever that is.

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub.
        name (`str`): of the file.
        kwargs: passed to transformers' `cached_file`, for instance `revision`.

    Returns:
        `Path`: in the folder or in the cache; None if there is no such file, or it is not in the cache and the Hub is out
            of reach.
    """
    try:
        return Path(str(cached_file(path, name, **kwargs)))
    except OSError:
        return None


def check_not_quantized(path: str | os.PathLike) -> None:
    """
    Refuses a model whose numbers are rounded already: neither can it be stored in another dtype, nor rounded again.

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub.

    Raises:
        ValueError: if it is quantized, or no model.
    """
    check_path(path)
    file = find_file(path, "config.json")
    if file is not None and read_json(file).get("quantization_config"):
        raise ValueError(
            f"{path} is quantized already (its config.json has a quantization_config); start from the model it was made of."
        )


def check_loaded(path: str | os.PathLike, report: dict[str, Any], may_hold_more: bool = False) -> None:
    """
    Refuses weights that `from_pretrained` would only have logged: it fills gaps with random numbers.

    Args:
        path (`str` or `os.PathLike`): where the weights are, for the message.
        report (`dict`): what `from_pretrained(..., output_loading_info=True)` returns.
        may_hold_more (`bool`, *optional*, defaults to `False`): whether weights of other parts may lie there too.

    Raises:
        ValueError: naming weights that are missing, unknown or of a wrong shape.
    """
    kinds = ["missing_keys", "mismatched_keys"] + ([] if may_hold_more else ["unexpected_keys"])
    problems = {kind: report[kind] for kind in kinds if report[kind]}
    if problems:
        details = "; ".join(f"{kind.replace('_', ' ')}: {some(keys)}" for kind, keys in problems.items())
        raise ValueError(f"The weights in {path} are not those of its config.json ({details}).")


def check_finite(path: str | os.PathLike, model: PreTrainedModel) -> None:
    """
    Refuses weights that turn every answer into noise. One pass over them; what is offloaded to disk or quantized is not
    read.

    Raises:
        ValueError: naming weights that hold NaN or infinite numbers.
    """
    plain = {name: weight.detach() for name, weight in model.named_parameters() if not weight.is_meta}
    wrong = [name for name, weight in plain.items() if type(weight) is torch.Tensor and not is_finite(weight)]
    if wrong:
        raise ValueError(f"Weights in {path} hold NaN or infinite numbers: {some(wrong)}.")


def check_parts_fit(config: LibraConfig, processor: LibraProcessor) -> None:
    """
    Refuses a processor whose ids, codes or features are not those of the model.

    Args:
        config ([`LibraConfig`]): of the model.
        processor ([`LibraProcessor`]): the processor.

    Raises:
        ValueError: naming what differs.
    """
    tokenizer = processor.image_tokenizer.config
    pairs = {
        "text ids": (config.text_vocab_size, processor.text_vocab_size),
        "codebooks": (config.num_codebooks, tokenizer.num_codebooks),
        "codes of a codebook": (config.codebook_size, tokenizer.codebook_size),
        "patches along a side": (config.image_grid, tokenizer.grid),
        "feature width": (config.feature_size, tokenizer.feature_size),
    }
    differing = [f"{name}: {model} and {own}" for name, (model, own) in pairs.items() if model != own]
    if differing:
        raise ValueError(f"The processor is not that of the model ({'; '.join(differing)}).")


def to_accelerator(model: LibraForCausalLM, processor: LibraProcessor) -> tuple[LibraForCausalLM, LibraProcessor]:
    """
    Moves a model and the image tokenizer of its processor to the GPU, or whatever accelerator torch finds.

    Args:
        model ([`LibraForCausalLM`]): moved in place; stays on the CPU if there is no accelerator.
        processor ([`LibraProcessor`]): likewise.

    Returns:
        `tuple` of both.
    """
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        model.to(device)
        processor.image_tokenizer.to(device)
    return model, processor


def load_generation_config(folder: str | os.PathLike) -> GenerationConfig | None:
    """The generation configuration of a folder, or `None` if it has none."""
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)
