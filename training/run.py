"""What every stage says about its run: what it will do, how far it is, when it will end, where it logs.

A stage's `main` parses its options with [`StageParser`], calls [`announce_run`] before any expensive work and
[`run_training`] on its trainer:

    pretrain: writes to runs/tiny/pretrain
      steps: 550, global batch size 32
      start: from checkpoint-220, step 220
      logs: this output only; add --report_to tensorboard or trackio
    step 250/550 (45%) | loss 2.912, text_loss 1.14, vision_loss 3.086 | ... | 1.8 s/step | ends 14:05, in 9 min
"""

import argparse
import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import strtobool
from trl import TrlParser

from .checkpoints import last_checkpoint, save_whole_checkpoints


class StageParser(TrlParser):
    """
    The options of a stage: fields of dataclasses, as flags and as keys of a YAML file; flags win.

    Args:
        stage (`str`): name of the stage, as in `libra train STAGE`.
        dataclass_types (`Iterable` of dataclasses): whose fields are options, `TrainingArguments` among them.
    """

    def __init__(self, stage: str, dataclass_types: Iterable[type]) -> None:
        super().__init__(
            dataclass_types, prog=f"libra train {stage}", usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        )

    def add_argument(self, *names, **options):
        """Adds an option; one that is a mapping is read as YAML."""
        if options.get("type") is dict:
            options["type"] = _mapping
        return super().add_argument(*names, **options)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        Parses the command line and the YAML file it names.

        Args:
            args (`Iterable` of `str`, *optional*, defaults to `sys.argv[1:]`): the command line.
            kwargs: as in TRL's `TrlParser`.

        Returns:
            `tuple`: an instance of each dataclass.

        Raises:
            ValueError: for options there are not, or a file that is not a YAML mapping.
            OSError: for a file that cannot be read.
        """
        args = list(sys.argv[1:] if args is None else args)
        if args[-1:] == ["--config"]:
            raise ValueError("--config needs the path of a YAML file.")
        try:
            return super().parse_args_and_config(args, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"{args[args.index('--config') + 1]} is not valid YAML: {error}") from error


def _mapping(text: str) -> dict:
    """A mapping on the command line, in YAML as in the file: `{rotation: 8}`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping such as '{{rotation: 8}}', found {text!r}")
    return value


def announce_run(args: TrainingArguments, stage: str) -> None:
    """
    Checks what can be checked before models and data are loaded, and prints on the main process what the run will do.

    Args:
        args (`TrainingArguments`): of the run. Nothing is reported to other services unless `report_to` asks for it.
        stage (`str`): name of the stage, as in `libra train STAGE`.

    Raises:
        ValueError: if no step is to be trained, or `report_to` names what is unknown or not installed.
    """
    check_steps(args)
    check_report_to(args.report_to)
    check_engine(args)
    if args.process_index == 0:
        print(describe_run(args, stage), flush=True)


def check_steps(args: TrainingArguments) -> None:
    """
    Checks how long the run is to be.

    Args:
        args (`TrainingArguments`): of the run.

    Raises:
        ValueError: if `max_steps` is neither -1 nor at least 1, or if `num_train_epochs` counts and is not positive.
    """
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(
            f"max_steps is {args.max_steps}; it must be at least 1, or -1 to train for num_train_epochs epochs."
        )
    if args.max_steps == -1 and args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs is {args.num_train_epochs}; it must be positive, or set max_steps.")


def check_engine(args: TrainingArguments) -> None:
    """
    Refuses settings of FSDP under which a run would do something else than it says.

    Args:
        args (`TrainingArguments`): of the run; accelerate's launcher leaves its settings in the environment.

    Raises:
        ValueError: naming the setting, and what to set instead.
    """
    if not (args.fsdp or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false"))):
        return
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError("FSDP needs accelerators: on CPUs accelerate would run DDP instead. Use ddp.yaml.")
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version is {plugin.fsdp_version}; set 2: frozen and trained weights share layers.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading would leave the image tokenizer without weights in all processes but the "
            "first. Set it to false."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing would checkpoint each layer twice, the language model's and Libra's around "
            "it. Set it to false, and gradient_checkpointing: true in the configuration of the stage."
        )


def check_global_batch(args: TrainingArguments, wanted: int | None) -> None:
    """
    Checks that a recipe keeps its batch on whatever number of devices it runs.

    Args:
        args (`TrainingArguments`): of the run.
        wanted (`int`, *optional*): samples of all devices in a step; None checks nothing.

    Raises:
        ValueError: if a step would have another number, saying what to set.
    """
    part = args.train_batch_size * args.world_size
    found = part * args.gradient_accumulation_steps
    if wanted in (None, found):
        return
    advice = (
        f"set gradient_accumulation_steps to {wanted // part}"
        if wanted % part == 0
        else ("set per_device_train_batch_size so that it divides")
    )
    raise ValueError(
        f"global_batch_size is {wanted}, but {args.train_batch_size} samples a device, {args.world_size} processes and "
        f"gradient_accumulation_steps {args.gradient_accumulation_steps} make {found}; {advice}, or drop "
        "global_batch_size."
    )


def check_report_to(report_to: list[str]) -> None:
    """
    Checks that metrics can be sent where they are to go.

    Args:
        report_to (`list` of `str`): names of transformers' integrations.

    Raises:
        ValueError: for a name there is not, or one whose package is not installed.
    """
    unknown = sorted(set(report_to) - set(INTEGRATION_TO_CALLBACK))
    if unknown:
        raise ValueError(
            f"report_to has {', '.join(unknown)}; choose none, or of {', '.join(INTEGRATION_TO_CALLBACK)}."
        )
    missing = sorted(set(report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise ValueError(
            f"report_to asks for {', '.join(missing)}, which is not installed. For tensorboard and trackio run: pip "
            "install 'libra-vlm[logging]'. Or leave report_to out."
        )


def describe_run(args: TrainingArguments, stage: str) -> str:
    """
    What a run will do, in a few lines.

    Args:
        args (`TrainingArguments`): of the run.
        stage (`str`): name of the stage.

    Returns:
        `str`: stage and folder; steps and global batch size; where the run begins; where it logs.
    """
    steps = str(args.max_steps) if args.max_steps > 0 else f"those of {args.num_train_epochs:g} epochs"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    checkpoint = last_checkpoint(args.output_dir)
    start = "at the beginning"
    if checkpoint is not None:
        name = Path(checkpoint).name
        start = f"from {name}, step {name.rpartition('-')[2]}"
    return (
        f"{stage}: writes to {args.output_dir}\n"
        f"  steps: {steps}, global batch size {batch}\n"
        f"  start: {start}\n"
        f"  logs: {describe_logs(args)}"
    )


def describe_logs(args: TrainingArguments) -> str:
    """
    Where a run logs, and the command that shows it.

    Args:
        args (`TrainingArguments`): of the run.

    Returns:
        `str`
    """
    commands = {
        "tensorboard": f"tensorboard (look at it with: tensorboard --logdir {args.output_dir})",
        "trackio": f"trackio (look at it with: trackio show --project {args.project})",
    }
    if not args.report_to:
        return "this output only; add --report_to tensorboard or trackio"
    return "this output and " + ", ".join(commands.get(name, name) for name in args.report_to)


def run_training(trainer: Trainer) -> None:
    """
    Trains to the end from the last checkpoint, if there is one, and writes `trainer_state.json`, which has the history
    of the log, to `output_dir`. The process leaves its group when it ends.

    Args:
        trainer (`Trainer`): its progress is shown as [`show_progress`] says. A run whose last checkpoint has all steps
            is loaded and not trained.
    """
    # A process that ends while threads of its group still work may be aborted, after everything was saved.
    atexit.register(PartialState().destroy_process_group)
    save_whole_checkpoints(trainer)
    trainer.add_callback(StopBeforeExtraStep)
    show_progress(trainer)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    except AllStepsDone as done:
        trainer.is_in_train = False
        if trainer.is_world_process_zero():
            print(done, flush=True)
    trainer.save_state()


def save_result(trainer: Trainer) -> None:
    """
    Saves the trained model to `output_dir`, whole and in the usual format, whatever form checkpoints have.

    Args:
        trainer (`Trainer`): after [`run_training`]; to be called by all processes.
    """
    if trainer.is_fsdp_enabled:  # with sharded checkpoints, save_model would save nothing
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


class AllStepsDone(Exception):
    """Leaves `Trainer.train` when the checkpoint is loaded and no step is left."""


class StopBeforeExtraStep(TrainerCallback):
    """
    transformers looks for the end of a run after each step, and so trains one too many when a run goes on from its last
    checkpoint: the weights of a run that was killed before it saved its result would differ from those of one that was
    not.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Raises [`AllStepsDone`]; model, engine and state are those of the checkpoint by now."""
        if state.global_step >= state.max_steps:
            raise AllStepsDone(f"All {state.max_steps} steps are done; nothing is left to train.")


def show_progress(trainer: Trainer) -> None:
    """
    Replaces what transformers prints at each log by one line of [`progress_line`]. Its bar stays where the output is a
    terminal and `disable_tqdm` is off.

    Args:
        trainer (`Trainer`): changed in place.
    """
    for printed in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(printed)
    trainer.add_callback(ProgressLines)
    if sys.stderr.isatty() and not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar)


@dataclass
class Pace:
    """
    How fast a run goes. Pauses for evaluations and checkpoints count, as they do for the end of the run.

    Args:
        step (`int`): where the clock starts.
        clock (`Callable`, *optional*, defaults to `time.monotonic`): gives seconds.
    """

    step: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start = self._last = (self.step, self.clock())

    def measure(self, step: int, max_steps: int) -> tuple[float, float]:
        """
        Args:
            step (`int`): steps that are done, more than at the last call.
            max_steps (`int`): steps of the whole run.

        Returns:
            `tuple` of two `float`: seconds a step since the last call, and seconds that remain, at the mean speed since
            the clock was started.
        """
        now = self.clock()
        seconds_per_step = (now - self._last[1]) / (step - self._last[0])
        mean = (now - self._start[1]) / (step - self._start[0])
        self._last = (step, now)
        return seconds_per_step, mean * (max_steps - step)


class ProgressLines(TrainerCallback):
    """Prints [`progress_line`] at each log, on the main process."""

    def __init__(self) -> None:
        self._pace: Pace | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Forgets the pace of an earlier run."""
        self._pace = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Starts the clock at the first step: skipping the data of the steps before a checkpoint is no measure."""
        if self._pace is None:
            self._pace = Pace(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs
    ) -> None:
        """Prints the line; that of a training log has speed and end."""
        if not state.is_world_process_zero:
            return
        line = progress_line(logs, state.global_step, state.max_steps)
        if "loss" in logs and self._pace is not None:
            line += f" | {describe_pace(*self._pace.measure(state.global_step, state.max_steps), datetime.now())}"
        tqdm.write(line)  # around a bar, if there is one
        sys.stdout.flush()


class ProgressBar(ProgressCallback):
    """transformers' bar without its log, and with the speed of this run only when it goes on from a checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Opens the bar where the run begins."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step
            self.training_bar.refresh()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Prints nothing: [`ProgressLines`] does."""


SCHEDULE = ("learning_rate", "grad_norm")
NOT_SHOWN = ("epoch", "total_flos")


def progress_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """
    A log of a Trainer in one line.

    Args:
        logs (`dict`): what the Trainer logs: of training, of an evaluation, or of the whole run.
        step, max_steps (`int`): steps that are done, and all of them.

    Returns:
        `str`: progress, loss with its terms and other metrics, learning rate and gradient norm, time taken.
    """
    shown = {
        name: value
        for name, value in logs.items()
        if name not in NOT_SHOWN and not name.endswith(("samples_per_second", "steps_per_second"))
    }
    runtimes = [shown.pop(name) for name in list(shown) if name.endswith("_runtime")]
    schedule = {name: shown.pop(name) for name in SCHEDULE if name in shown}
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps} ({step / max_steps:.0%})"]
    for values in (shown, schedule):
        if values:
            parts.append(", ".join(f"{name} {_number(value)}" for name, value in values.items()))
    parts += [f"took {describe_duration(seconds)}" for seconds in runtimes]
    return " | ".join(parts)


def describe_pace(seconds_per_step: float, remaining: float, now: datetime) -> str:
    """
    Speed and estimated end.

    Args:
        seconds_per_step (`float`): the speed.
        remaining (`float`): seconds until the end.
        now (`datetime`): the local time.

    Returns:
        `str`: such as `"1.8 s/step | ends 14:05, in 9 min"`; with the date when the end is on another day.
    """
    speed = f"{seconds_per_step:.1f} s/step" if seconds_per_step >= 1 else f"{1 / seconds_per_step:.1f} steps/s"
    end = now + timedelta(seconds=remaining)
    clock = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
    return f"{speed} | ends {clock}, in {describe_duration(remaining)}"


def describe_duration(seconds: float) -> str:
    """
    Args:
        seconds (`float`): a duration, not negative.

    Returns:
        `str`: its two largest units, such as `"2 d 4 h"`, `"3 h 5 min"`, `"12 min"`, `"40 s"`.
    """
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
