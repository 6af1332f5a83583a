"""Runs stages one after the other, in the processes of a launcher: `-m tests.training.run_stages ENGINE JOBS.json`.

The file lists a stage, its flags and variables of the environment each. With the engine `fsdp2`, FSDP2 runs on CPUs, over gloo. accelerate takes FSDP
for accelerators alone: on CPUs it makes DDP of it without a word. Told that its processes are of the kind with
accelerators, it does what it does there, with tensors on the CPU: the same wrapping, sharding, clipping, saving, loading.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback

from training import run

_init = PartialState.__init__


def init_as_accelerator(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


class HeldBytes(TrainerCallback):
    """Writes what a process holds of parameters, gradients and moments to `held-PROCESS.json` of the run."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.held |= {"weights": local_bytes(model.parameters()), "gradients": local_bytes(gradients)}

    def on_train_end(self, args, state, control, optimizer, **kwargs) -> None:
        moments = [m for values in optimizer.state.values() for name, m in values.items() if name.startswith("exp_avg")]
        self.held["moments"] = local_bytes(moments)
        (Path(args.output_dir) / f"held-{args.process_index}.json").write_text(json.dumps(self.held))


def local_bytes(tensors) -> int:
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def show_progress_and_held_bytes(trainer) -> None:
    show_progress(trainer)
    trainer.add_callback(HeldBytes)


show_progress = run.show_progress

if __name__ == "__main__":
    run.show_progress = show_progress_and_held_bytes
    engine, jobs = sys.argv[1:]
    if engine == "fsdp2":
        PartialState.__init__ = init_as_accelerator
    for stage, flags, variables in json.loads(Path(jobs).read_text()):
        os.environ |= variables
        importlib.import_module(f"training.{stage}").main(flags)
