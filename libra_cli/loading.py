"""Loading a model and its processor with the installed classes, whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

MODEL_VARIABLE = "LIBRA_MODEL"
"""Environment variable that names the default model."""

TINY_MODEL = Path(__file__).resolve().parent.parent / "hub_configs" / "libra-tiny"
"""The model that comes with a source checkout."""


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

    Args:
        path (`str` or `os.PathLike`): a folder, or the id of a repository on the Hub.
        kwargs: passed to `LibraForCausalLM.from_pretrained`, for instance `dtype` or `device_map`.

    Returns:
        `tuple` of [`LibraForCausalLM`] and [`LibraProcessor`]: the model in evaluation mode.

    Raises:
        ValueError: if the folder is not a Libra repository, or its weights do not fit its configuration.
        OSError: if files are missing, or the Hub cannot be reached.
    """
    check_path(path)
    try:
        model, report = LibraForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except OSError as error:
        raise OSError(f"No model could be loaded from {str(path)!r}: {error}") from error
    check_loaded(path, report)
    return model.eval(), LibraProcessor.from_pretrained(path)


def check_path(path: str | os.PathLike) -> None:
    """
    Refuses what is neither the folder of a model nor a Hub id.

    Raises:
        ValueError: if there is no such folder and it cannot be a Hub id, or the folder has no config.json.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the repository of a model: it has no config.json.")
    if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) != 2):
        raise ValueError(f"There is no folder {str(path)!r}, and it is no Hub id such as 'organization/name' either.")


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
        details = "; ".join(f"{kind.replace('_', ' ')}: {_some(keys)}" for kind, keys in problems.items())
        raise ValueError(f"The weights in {path} are not those of its config.json ({details}).")


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


def _some(keys) -> str:
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
