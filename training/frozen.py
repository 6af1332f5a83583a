"""Proof that what is frozen stays as it is: checksums of the parameters before and after training."""

import hashlib
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def parameter_checksums(model: nn.Module) -> dict[str, str]:
    """
    Checksums of all parameters that are not trained.

    Args:
        model (`nn.Module`): any model. Of a sharded parameter the shard of this process counts.

    Returns:
        `dict[str, str]`: SHA-256 of the bytes of each parameter without `requires_grad`, by name.
    """
    return {name: _sha256(parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _sha256(parameter: torch.Tensor) -> str:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2: a DTensor
    local = getattr(local, "ds_tensor", local)  # DeepSpeed ZeRO-3
    values: Any = local.detach().reshape(-1).cpu().view(torch.uint8).numpy()
    return hashlib.sha256(values).hexdigest()


STATE = "frozen_parameters"
"""Where `trainer_state.json` has one checksum of each process, under `stateful_callbacks`."""


class FrozenParametersCheck(TrainerCallback):
    """
    Stops a run whose frozen parameters have changed, before its result is saved.

    Weight decay, a wrong parameter group, a tied weight or an engine that casts would change the language model without
    a word. Hashing takes about a second per GB, at the beginning and at the end. A run that goes on compares with its
    very beginning, if as many processes go on.
    """

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """
        Takes the checksums.

        Raises:
            RuntimeError: if the frozen parameters of the checkpoint are not those the run began with.
        """
        self._before = parameter_checksums(model)
        own = hashlib.sha256(repr(sorted(self._before.items())).encode()).hexdigest()
        all_processes = gather_object([own])
        first = state.stateful_callbacks.setdefault(STATE, all_processes)
        if len(first) == len(all_processes) and first != all_processes:
            raise RuntimeError(
                f"The frozen parameters of the checkpoint of step {state.global_step} are not those the run began with. "
                "Its language model has changed: start again, in another output_dir."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """
        Compares them.

        Raises:
            RuntimeError: if a parameter differs or is no longer frozen, naming it.
        """
        after = parameter_checksums(model)
        changed = [name for name, checksum in self._before.items() if after.get(name) != checksum]
        if changed:
            raise RuntimeError(
                f"{len(changed)} of {len(self._before)} frozen parameters changed in training, the first is "
                f"{changed[0]}. The language model must stay as it is; this run is not saved. Look for an optimizer "
                "that is given frozen parameters, or an engine that changes their dtype."
            )
        if args.process_index == 0:
            print(f"The {len(after)} frozen parameters are bit for bit as before training.", flush=True)
