"""All of libra-tiny, from nothing: drawings, CLIP, image tokenizer, language model, pretraining, instruction tuning.

    python -m training.tiny                 # or: make tiny
    python -m training.tiny --until clip    # only the first stages
    python -m training.tiny --hour          # what an hour is enough for; or: make tiny-hour

Each stage is a script of its own (the command that is run is printed), shows its progress and writes to
`runs/tiny/<stage>`. A stage that is done is not run again, one that was interrupted goes on from its last checkpoint;
delete a stage's folder to run it anew. The result is exported to `runs/tiny/libra-tiny` and measured. How the weights in
`hub_configs/libra-tiny` came about otherwise stands in `training/LOG.md`. With `--hour` only five of the stages are run,
with fewer steps, and write to `runs/tiny-hour`.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs" / "tiny"
FULL = Path("runs/tiny")
HOUR = Path("runs/tiny-hour")


@dataclass(frozen=True)
class Stage:
    """
    One step of the recipe.

    Args:
        name (`str`): name of the stage and of its output folder.
        command (`tuple` of `str`): what is run, after `python -m`.
        result (`Path`): the file that is there, relative to the repository, when the stage is done.
    """

    name: str
    command: tuple[str, ...]
    result: Path


def _training(name: str, script: str, config: str, done: str, processes: int = 1) -> Stage:
    command: tuple[str, ...] = (f"training.{script}", "--config", str(CONFIGS / f"{config}.yaml"))
    if processes > 1:
        command = ("torch.distributed.run", "--nproc-per-node", str(processes), "-m", *command)
    return Stage(name, command, FULL / name / done)


TRAINING = (
    _training("clip", "train_clip", "clip", "metrics.json"),
    _training("tokenizer", "train_image_tokenizer", "image_tokenizer", "metrics.json"),
    _training("llm", "train_llm", "llm", "metrics.json"),
    _training("pretrain", "pretrain", "pretrain", "model.safetensors", processes=2),
    _training("lines", "sft", "lines", "model.safetensors", processes=2),
    _training("sft", "sft", "sft", "model.safetensors", processes=2),
    _training("letters", "sft", "letters", "model.safetensors", processes=2),
    _training("look", "sft", "look", "model.safetensors", processes=2),
    _training("answers", "sft", "answers", "model.safetensors", processes=2),
)

HOUR_SETTINGS: dict[str, dict[str, object]] = {
    "clip": {"max_steps": 2400},
    "tokenizer": {"clip": HOUR / "clip" / "vision", "fit_bits_steps": 1500, "max_steps": 500},
    "llm": {"max_steps": 1800, "train_documents": 65000},
    "pretrain": {"language_model": HOUR / "llm", "image_tokenizer": HOUR / "tokenizer", "max_steps": 600},
    "sft": {"model": HOUR / "pretrain", "max_steps": 2300, "text_share": 0.0, "bf16": True},
}
"""Of the stages of an hour, what differs from their configurations."""


def hour_training() -> tuple[Stage, ...]:
    """
    Returns:
        `tuple` of [`Stage`]: those of `TRAINING` that an hour has time for, with fewer steps.
    """
    stages = []
    for stage in TRAINING:
        if stage.name in HOUR_SETTINGS:
            settings = HOUR_SETTINGS[stage.name] | {"output_dir": HOUR / stage.name}
            flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
            stages.append(Stage(stage.name, (*stage.command, *flags), HOUR / stage.result.relative_to(FULL)))
    return tuple(stages)


def with_result(training: Sequence[Stage], folder: Path) -> tuple[Stage, ...]:
    """
    Args:
        training (`Sequence` of [`Stage`]): the last of them trains the result.
        folder (`Path`): of their outputs.

    Returns:
        `tuple` of [`Stage`]: these, and those that export and measure the result.
    """
    exported = folder / "libra-tiny"
    report = folder / "evaluation.json"
    runs = [str(folder / stage.name) for stage in training]
    export = ("libra_cli.main", "export", runs[-1], str(exported), "--weights-dtype", "float16")
    evaluate = ("training.evaluate_tiny", "--model", str(exported), "--write-card", "--output", str(report))
    return (
        *training,
        Stage("export", export, exported / "model.safetensors"),
        Stage("evaluate", (*evaluate, "--runs", *runs), report),
    )


def main(arguments: list[str] | None = None) -> None:
    """
    Runs the stages that are not done yet.

    Args:
        arguments (`list` of `str`, *optional*): command line; by default that of the process.

    Raises:
        SystemExit: when a stage fails, with its name and its exit code.
    """
    parser = argparse.ArgumentParser(description="Trains libra-tiny, stage by stage.")
    parser.add_argument("--hour", action="store_true", help="only what an hour is enough for")
    parser.add_argument("--until", metavar="STAGE", help="last stage to run")
    options = parser.parse_args(arguments)
    stages = with_result(hour_training(), HOUR) if options.hour else with_result(TRAINING, FULL)
    names = [stage.name for stage in stages]
    if options.until not in (None, *names):
        parser.error(f"--until is a stage, one of {', '.join(names)}; found {options.until!r}")
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if (ROOT / stage.result).is_file():
            print(f"{title}: done ({stage.result} exists)", flush=True)
        else:
            print(f"{title}: python -m {' '.join(stage.command)}", flush=True)
            code = subprocess.run([sys.executable, "-m", *stage.command], cwd=ROOT).returncode
            if code:
                raise SystemExit(
                    f"{title} failed with exit code {code}; run the same command again to go on from there."
                )
        if stage.name == options.until:
            return


if __name__ == "__main__":
    main()
