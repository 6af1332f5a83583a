"""Finding where a run left off."""

import os

from transformers.trainer_utils import get_last_checkpoint


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest checkpoint of a run.

    Args:
        output_dir (`str` or `os.PathLike`): the run's output folder; it need not exist.

    Returns:
        `str` or `None`: the checkpoint's folder, or `None` for a fresh start.
    """
    return get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None
