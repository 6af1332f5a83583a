"""All of libra-tiny, from nothing: drawings, CLIP, image tokenizer, language model, pretraining, instruction tuning.

    python -m training.tiny                 # or: make tiny
    python -m training.tiny --until clip    # only the first stages

Each stage is a script of its own (the command that is run is printed), shows its progress and writes to
`runs/tiny/<stage>`. A stage that is done is not run again, one that was interrupted goes on from its last checkpoint;
delete a stage's folder to run it anew. The result is exported to `runs/tiny/libra-tiny` and measured; it is what
`hub_configs/libra-tiny` holds.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs" / "tiny"


@dataclass(frozen=True)
class Stage:
    """
    One step of the recipe.

    Args:
        name (`str`): name of the stage and of its output folder in `runs/tiny`.
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
    return Stage(name, command, Path("runs/tiny") / name / done)


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
STAGES = (
    *TRAINING,
    Stage(
        "export",
        ("libra_cli.main", "export", "runs/tiny/answers", "runs/tiny/libra-tiny", "--weights-dtype", "float16"),
        Path("runs/tiny/libra-tiny/model.safetensors"),
    ),
    Stage(
        "evaluate",
        (
            *("training.evaluate_tiny", "--model", "runs/tiny/libra-tiny", "--write-card"),
            *("--output", "runs/tiny/evaluation.json", "--runs"),
            *(f"runs/tiny/{stage.name}" for stage in TRAINING),
        ),
        Path("runs/tiny/evaluation.json"),
    ),
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
    parser.add_argument("--until", choices=[stage.name for stage in STAGES], help="last stage to run")
    until = parser.parse_args(arguments).until
    for number, stage in enumerate(STAGES, start=1):
        title = f"[{number}/{len(STAGES)}] {stage.name}"
        if (ROOT / stage.result).is_file():
            print(f"{title}: done ({stage.result} exists)", flush=True)
        else:
            print(f"{title}: python -m {' '.join(stage.command)}", flush=True)
            code = subprocess.run([sys.executable, "-m", *stage.command], cwd=ROOT).returncode
            if code:
                raise SystemExit(
                    f"{title} failed with exit code {code}; run the same command again to go on from there."
                )
        if stage.name == until:
            return


if __name__ == "__main__":
    main()
