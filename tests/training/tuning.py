"""Instruction tuning of a few steps, as the command line does it, and its log."""

import json
from pathlib import Path
from typing import Any

from training import sft

QUICK = {
    "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "gradient_checkpointing": False, "lr_scheduler_type": "constant", "save_strategy": "steps",
    "save_steps": 2,
}  # fmt: skip


def tune(model: Path, out: Path, *flags: Any, **options: Any) -> Path:
    """Tunes into `out`, which is returned; flags come last, and win."""
    options = {"model": model, "output_dir": out, **QUICK, **options}
    sft.main([*(str(part) for name, value in options.items() for part in (f"--{name}", value)), *map(str, flags)])
    return out


def logged(out: Path, name: str) -> list[float]:
    """A term of the loss, or another number, as often as it was logged."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]
