"""Checkpoints that are whole or not there: a run may be killed at any moment, also while it writes one.

The Trainer writes a checkpoint file by file into the folder that bears its name. Here the folder has one more file as long
as that lasts, so that a half-written one is never taken for a checkpoint; and older ones are deleted only after that.
"""

import os
import re
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

UNFINISHED = "unfinished"
"""File in the folder of a checkpoint that is being written."""


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest whole checkpoint of a run.

    Args:
        output_dir (`str` or `os.PathLike`): the run's output folder; it need not exist.

    Returns:
        `str` or `None`: the checkpoint's folder, or `None` for a fresh start.
    """
    steps = {int(folder.name.rpartition("-")[2]): str(folder) for folder in _folders(output_dir) if is_whole(folder)}
    return steps[max(steps)] if steps else None


def is_whole(folder: str | os.PathLike) -> bool:
    """
    Args:
        folder (`str` or `os.PathLike`): of a checkpoint.

    Returns:
        `bool`: whether all of it was written. What comes last is `trainer_state.json`, and then the end of `unfinished`.
    """
    return (Path(folder) / TRAINER_STATE_NAME).is_file() and not (Path(folder) / UNFINISHED).exists()


def save_whole_checkpoints(trainer: Trainer) -> None:
    """
    Marks the checkpoints of a run as unfinished until all processes have written their part, and deletes what a killed
    run has left unfinished.

    Args:
        trainer (`Trainer`): changed in place; to be called by all processes, before training.
    """
    args, save = trainer.args, trainer._save_checkpoint
    if args.should_save:
        for folder in _folders(args.output_dir):
            if (folder / UNFINISHED).exists():
                shutil.rmtree(folder)

    def save_checkpoint(*positional, **named) -> None:
        mark = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}" / UNFINISHED
        if args.should_save:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        limit, args.save_total_limit = args.save_total_limit, None  # older ones go when this one is whole
        save(*positional, **named)
        args.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark.unlink()
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)

    trainer._save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def _folders(output_dir: str | os.PathLike) -> list[Path]:
    """Folders of checkpoints; others, such as a user's `checkpoint-100-best`, are not the run's."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [folder for folder in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)]
