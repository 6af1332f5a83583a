"""Writes repositories in the form the Hugging Face Hub wants: weights, configurations and the code, flat in one folder.

Such a folder loads with `trust_remote_code=True` where this package is not installed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_libra
import processing
from modeling_libra import LibraConfig, LibraForCausalLM
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.processing_libra import LibraProcessor

from .adapters import is_adapter
from .cards import model_card
from .loading import check_not_quantized, find_file, load_libra
from .weights import read_json

MODEL_CLASS = "modeling_libra.LibraForCausalLM"
PIPELINE_CLASS = "pipeline_libra.LibraImageToTextPipeline"

AUTO_MAP = {
    "AutoConfig": "configuration_libra.LibraConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForCausalLM": MODEL_CLASS,
    "AutoModelForImageTextToText": MODEL_CLASS,
    "AutoModelForMultimodalLM": MODEL_CLASS,
    "AutoProcessor": "processing_libra.LibraProcessor",
    "AutoImageProcessor": "image_processing_libra.LibraImageProcessor",
}
"""Which class of which file an Auto class stands for. The tokenizer is one of transformers' own and needs no entry."""

IMAGE_TOKENIZER_AUTO_MAP = {
    "AutoConfig": "configuration_libra_image_tokenizer.LibraImageTokenizerConfig",
    "AutoModel": "modeling_libra_image_tokenizer.LibraImageTokenizer",
}
"""The same for the model in `image_tokenizer/`; its code lies with the rest, at the root of the repository."""

CUSTOM_PIPELINES = {
    "image-to-text": {"impl": PIPELINE_CLASS, "pt": ["AutoModelForImageTextToText"], "type": "multimodal"}
}
"""Makes `pipeline("image-to-text", ...)` work, a task transformers itself no longer has."""

IMAGE_TOKENIZER_FOLDER = "image_tokenizer"

CONFIGURATIONS = (
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
    f"{IMAGE_TOKENIZER_FOLDER}/config.json",
)

AUTO_MAPS: dict[str, dict[str, Any]] = {
    "config.json": {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES},
    f"{IMAGE_TOKENIZER_FOLDER}/config.json": {"auto_map": IMAGE_TOKENIZER_AUTO_MAP},
    "processor_config.json": {
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "image_processor.auto_map": {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]},
    },
}
"""What of the configurations names code, by file and the way to the field."""

SHARD_SIZE = "5GB"
"""Largest weights file, unless the caller says otherwise: quick to send again when a transfer breaks."""


def remote_code_files() -> list[Path]:
    """
    The source files a repository needs: those of the classes named above, and all they import from each other.

    Returns:
        `list` of `Path`: sorted by name; names are unique.
    """
    folders = [Path(package.__path__[0]) for package in (modeling_libra, processing)]
    references = {*AUTO_MAP.values(), *IMAGE_TOKENIZER_AUTO_MAP.values(), PIPELINE_CLASS}
    files = set()
    for module in {reference.split(".")[0] for reference in references}:
        (entry,) = [folder / f"{module}.py" for folder in folders if (folder / f"{module}.py").is_file()]
        files |= {entry, *map(Path, get_relative_import_files(entry))}
    return sorted(files, key=lambda file: file.name)


def code_references(content: Any, way: str = "") -> dict[str, Any]:
    """
    All that names code in a configuration, as deep as it lies.

    Args:
        content: of the configuration's file.
        way (`str`, *optional*): to it, for the keys of the result.

    Returns:
        `dict`: way to the field -> what is in it, as in `AUTO_MAPS`.
    """
    if not isinstance(content, dict):
        return {}
    found = {}
    for name, value in content.items():
        if name in ("auto_map", "custom_pipelines"):
            found[way + name] = value
        else:
            found |= code_references(value, f"{way}{name}.")
    return found


@contextmanager
def new_folder(destination: str | os.PathLike) -> Iterator[Path]:
    """
    A folder that appears whole or not at all: written under a temporary name beside its destination, then renamed. An empty
    folder that is there is filled and stays the same one: a shell may be in it.

    Args:
        destination (`str` or `os.PathLike`): must not exist, or be an empty folder.

    Yields:
        `Path`: the temporary folder to write into. It is removed if the block raises.

    Raises:
        ValueError: if something is at the destination already.
    """
    destination = Path(destination).resolve()  # "." has neither name nor parent
    check_destination(destination)
    staging = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        yield staging
        if destination.exists():
            for path in staging.iterdir():
                shutil.move(path, destination)  # the folder may be a mount, where nothing is renamed to
            staging.rmdir()
        else:
            staging.rename(destination)
    except BaseException:
        shutil.rmtree(staging)
        raise


def check_destination(destination: str | os.PathLike) -> None:
    """
    Refuses a destination that would be overwritten.

    Raises:
        ValueError: if it is a file or a folder with something in it.
    """
    destination = Path(destination)
    if destination.is_dir() and any(destination.iterdir()):
        raise ValueError(f"{destination} exists and is not empty; choose another folder, or remove it first.")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} exists and is not a folder; choose another name.")


def check_shard_size(size: str) -> None:
    """
    Refuses what is no size of a file.

    Raises:
        ValueError: if it is not a number of bytes with a unit, such as `5GB` or `0.5GB`, or is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB)", size.upper())
    if match is None or float(match[1]) * 1000 < 1:  # a byte at least
        raise ValueError(f"The largest weights file is {size!r}; expected a number with KB, MB or GB, such as 5GB.")


def write_repo_files(
    folder: Path,
    config: LibraConfig,
    generation_config: GenerationConfig,
    processor: LibraProcessor,
    card: str,
    weights_dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """
    Writes everything of a repository but the weights of the language model with its vision system.

    Args:
        folder (`Path`): an existing folder.
        config ([`LibraConfig`]): becomes `config.json`, with the map of Auto classes and the pipeline.
        generation_config (`GenerationConfig`): becomes `generation_config.json`.
        processor ([`LibraProcessor`]): is saved with the image tokenizer and its weights.
        card (`str`): becomes `README.md`.
        weights_dtype (`torch.dtype`, *optional*): dtype the image tokenizer's weights are stored in.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): largest file of the image tokenizer's weights.
    """
    config.text_config.use_cache = True  # transformers' Trainer leaves False in a language model it has trained
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    processor.save_pretrained(folder, max_shard_size=max_shard_size)
    if weights_dtype is not None:
        save_weights(processor.image_tokenizer, folder / IMAGE_TOKENIZER_FOLDER, weights_dtype, max_shard_size)
    write_code(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_code(folder: str | os.PathLike) -> list[str]:
    """
    Puts the code, as it is installed, into a repository, and names its classes in the configurations.

    Args:
        folder (`str` or `os.PathLike`): has the configurations of model, processor, tokenizer and image tokenizer. Code
            that is there already is replaced; other source files are kept, the user's own among them.

    Returns:
        `list` of `str`: names of the source files that are not of this version.

    Raises:
        ValueError: if one of the configurations is missing, broken or of another model. Nothing is written then.
    """
    folder = Path(folder)
    _check_configurations(folder)
    _write_auto_maps(folder)
    files = remote_code_files()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return sorted({file.name for file in folder.glob("*.py")} - {file.name for file in files})


def _check_configurations(folder: Path) -> None:
    absent = [name for name in CONFIGURATIONS if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is not a whole Libra repository: it has no {', '.join(absent)}.")
    contents = {name: read_json(folder / name) for name in CONFIGURATIONS}
    for name, config in (("", LibraConfig), (f"{IMAGE_TOKENIZER_FOLDER}/", LibraImageTokenizerConfig)):
        found = contents[f"{name}config.json"].get("model_type")
        if found != config.model_type:
            raise ValueError(
                f"{folder / name}config.json is of a model of type {found!r}; expected {config.model_type!r}."
            )
    if not isinstance(contents["processor_config.json"].get("image_processor"), dict):
        raise ValueError(f"{folder / 'processor_config.json'} has no image_processor.")


def save_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: str = SHARD_SIZE) -> None:
    """
    Saves a model with its weights in another dtype; `config.json` keeps the model's own, which is what loading gives.

    Args:
        model (`PreTrainedModel`): is not changed.
        folder (`Path`): where to.
        dtype (`torch.dtype`): of the stored weights.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): largest file.

    Raises:
        ValueError: naming the weights that do not fit into the dtype.
    """
    stored: dict[int, torch.Tensor] = {}  # by address: tied weights stay one tensor, which is how saving knows them
    state = {}
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in stored:
            stored[weight.data_ptr()] = weight.to(dtype) if weight.is_floating_point() else weight
        state[name] = stored[weight.data_ptr()]
    lost = [name for name, weight in state.items() if not weight.isfinite().all()]
    if lost:
        raise ValueError(
            f"These weights hold numbers too large for {dtype}, or none at all: {', '.join(sorted(lost))}."
        )
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def export_repo(
    model: LibraForCausalLM,
    processor: LibraProcessor,
    dst: str | os.PathLike,
    card: str | None = None,
    weights_dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> Path:
    """
    Writes a complete repository for the Hub.

    Args:
        model ([`LibraForCausalLM`]): the model.
        processor ([`LibraProcessor`]): its processor, with the image tokenizer.
        dst (`str` or `os.PathLike`): a folder that does not exist yet, or is empty.
        card (`str`, *optional*): the model card, Markdown with the Hub's metadata; by default a minimal one.
        weights_dtype (`torch.dtype`, *optional*, defaults to the model's):
            What the weights are stored in. Loading gives the dtype of the configuration, which does not change.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Largest weights file, such as `"500MB"`; more weights go into several files with an index.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if `dst` is in use, or weights do not fit into `weights_dtype`. Nothing is left behind then.
    """
    check_shard_size(max_shard_size)
    with new_folder(dst) as folder:
        if weights_dtype is None:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            save_weights(model, folder, weights_dtype, max_shard_size)
        card = card or model_card(Path(dst).resolve().name)
        write_repo_files(folder, model.config, model.generation_config, processor, card, weights_dtype, max_shard_size)
    return Path(dst)


def export_folder(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    card: str | None = None,
    weights_dtype: torch.dtype | None = None,
    caption_prompt: str | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> Path:
    """
    Writes a complete repository for the Hub from a folder with weights and configurations.

    Args:
        src (`str` or `os.PathLike`):
            What `save_pretrained` of model and processor wrote, or of an adapter and processor; or a Hub id.
        dst, weights_dtype, max_shard_size: as in [`export_repo`].
        card (`str`, *optional*): the model card; by default the `README.md` of `src`, or else a minimal one;
            that of an adapter is not taken, since the result is none.
        caption_prompt (`str`, *optional*, defaults to the processor's):
            What the image-to-text pipeline asks a chat model for a caption.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: as in [`export_repo`], and if `src` is not whole, or is quantized.
    """
    check_destination(dst)
    check_shard_size(max_shard_size)
    if not is_adapter(src):
        check_not_quantized(src)
        card = card_of(src) if card is None else card
    model, processor = load_libra(src)
    if caption_prompt is not None:
        processor.caption_prompt = caption_prompt
    return export_repo(model, processor, dst, card, weights_dtype, max_shard_size)


def card_of(path: str | os.PathLike) -> str | None:
    """
    The model card of a repository.

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub.

    Returns:
        `str`, or None if there is none, as [`find_file`] finds it.

    Raises:
        ValueError: if it is no text in UTF-8.
    """
    file = find_file(path, "README.md")
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from error


def _write_auto_maps(folder: Path) -> None:
    """Names the classes in the configurations, which is how the Auto classes find the code."""
    for name, fields in AUTO_MAPS.items():
        with _edited_json(folder / name) as content:
            for way, value in fields.items():
                *outer, field = way.split(".")
                reduce(getitem, outer, content)[field] = value
    with _edited_json(folder / "tokenizer_config.json") as content:
        for name in ("auto_map", "is_local", "local_files_only"):  # of code elsewhere, of where it was loaded from
            content.pop(name, None)


@contextmanager
def _edited_json(path: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    yield content
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
