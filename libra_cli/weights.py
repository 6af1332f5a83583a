"""Weights files in safetensors: what their headers say, checked before anything large is read."""

import json
import os
from collections.abc import Iterator, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def promised_weights(folder: Path) -> dict[str, set[str]]:
    """
    The weights files of a folder, by its index or the one file there is.

    Args:
        folder (`Path`): holds `model.safetensors.index.json` and the shards it names, or one `model.safetensors`.

    Returns:
        `dict`: name of each file -> the weights the index promises in it; nothing is promised of a single file.

    Raises:
        ValueError: if there is neither, if the index is broken, or if a file it names is missing.
    """
    promised: dict[str, set[str]] = {}
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map: which weight lies in which file.")
        for key, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{folder / INDEX} puts {key} into {name!r}; a file beside the index is expected.")
            promised.setdefault(name, set()).add(key)
    elif (folder / SINGLE).is_file():
        promised[SINGLE] = set()
    else:
        raise ValueError(f"{folder} has no weights: neither {INDEX} nor {SINGLE}.")
    absent = sorted(name for name in promised if not (folder / name).is_file())
    if absent:
        raise ValueError(f"{folder} lacks the shards {', '.join(absent)} that {INDEX} names. Is the download complete?")
    return promised


def read_shapes(path: Path, promised: Set[str] = frozenset()) -> dict[str, tuple[int, ...]]:
    """
    The weights of one file, from its header.

    Args:
        path (`Path`): a safetensors file.
        promised (`set` of `str`, *optional*): names that must be in it.

    Returns:
        `dict`: name -> shape.

    Raises:
        ValueError: if it is not a whole safetensors file, or lacks what is promised.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise broken(path, error) from error
    lacking = promised - shapes.keys()
    if lacking:
        raise ValueError(f"{path} lacks weights that {INDEX} promises: {some(lacking)}.")
    return shapes


def check_weight_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """
    Looks at the headers of all weights files of a folder.

    Args:
        folder (`Path`): of one model.

    Returns:
        `dict`: name -> shape of all weights.

    Raises:
        ValueError: if files are missing, cut short or no safetensors, or lack what the index promises.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, keys in promised_weights(folder).items():
        shapes |= read_shapes(folder / name, keys)
    return shapes


def check_fit(folder: Path, model: PreTrainedModel) -> None:
    """
    Compares the weights of a folder, by their headers, with those of a model.

    Args:
        folder (`Path`): of one model.
        model (`PreTrainedModel`): of its configuration; may be on the meta device.

    Raises:
        ValueError: naming weights that are missing, unknown or of a wrong shape; or as [`check_weight_files`].
    """
    found = check_weight_files(folder)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    wrong = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in found.keys() & expected.keys()
        if found[name] != expected[name]
    ]
    problems = {
        "missing keys": expected.keys() - found.keys() - set(model.all_tied_weights_keys),
        "unexpected keys": found.keys() - expected.keys(),
        "mismatched keys": wrong,
    }
    described = [f"{kind}: {some(names)}" for kind, names in problems.items() if names]
    if described:
        raise ValueError(f"The weights in {folder} are not those of its config.json ({'; '.join(described)}).")


def not_finite(folder: Path) -> list[str]:
    """
    Reads all weights of a folder, one at a time.

    Args:
        folder (`Path`): of one model, with whole files.

    Returns:
        `list` of `str`: the names of those that hold NaN or infinite numbers.
    """
    return sorted(name for name, weight in _weights(folder) if not is_finite(weight))


def is_finite(weight: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers; its extremes tell, without a mask of its size."""
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    return bool(torch.stack(weight.aminmax()).isfinite().all())


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name in promised_weights(folder):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)


def read_json(path: str | os.PathLike) -> dict:
    """
    Args:
        path (`str` or `os.PathLike`): a file.

    Returns:
        `dict`: the object in it.

    Raises:
        ValueError: if it is not valid JSON in UTF-8, or no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, found a {type(content).__name__}.")
    return content


def broken(path: Path, error: Exception) -> ValueError:
    """What to raise for a weights file that cannot be read."""
    return ValueError(f"{path} is not a whole safetensors file ({error}). Is the download complete, and not a pointer?")


def some(names) -> str:
    """The first ten names, and how many more there are."""
    names = sorted(map(str, names))
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
