"""A Trainer that reads a [`~training.caption_stream.CaptionStream`] and goes on exactly where it stopped.

The Trainer's own way to go on is to read, decode and throw away all batches of the steps that are done. Here the
checkpoint has the place of every stream, so nothing is decoded twice; the rows of the running epoch are passed over
encoded.
"""

from collections import Counter
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .caption_stream import CaptionStream, Reading, StreamProgress, describe_skipped
from .loss_terms import LossTermsTrainer

STATE = "CaptionStream"
"""Where `trainer_state.json` has the progress of all processes, under `stateful_callbacks`."""


class StreamTrainer(LossTermsTrainer):
    """
    Reads its training data through one or more workers of each process, each a stream of its own, and counts skipped
    samples by reason: in the log, so far and over all processes, and at the end. Other training data are read as
    transformers' Trainer reads them.

    The collator passes [`Reading.of_batch`] on as `reading`.

    Args:
        args, kwargs: as in [`LossTermsTrainer`].
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._progress: StreamProgress | None = None
        if isinstance(self.train_dataset, CaptionStream):
            self._progress = StreamProgress([(0, 0)] * max(1, self.args.dataloader_num_workers))
            self.args.ignore_data_skip = True  # the streams begin where they are to go on
            self.add_callback(_Restart(self.train_dataset, self._progress))

    def get_train_dataloader(self) -> DataLoader:
        """Every process reads for itself: accelerate would read all of a stream in one of them, or in each."""
        if self._progress is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            generator=torch.Generator(),  # else making workers would draw from that of the model
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        reading: Reading | None = inputs.pop("reading", None)
        if reading is not None:
            assert self._progress is not None
            self._progress.add(reading, len(inputs["input_ids"]))
        return inputs

    def _save_checkpoint(self, *args, **kwargs) -> None:
        if self._progress is not None:
            self.state.stateful_callbacks[STATE] = gather_object([self._progress.to_dict()])
        super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the counts of skipped samples to the log of training."""
        if "loss" in logs and self._progress is not None:
            _, skipped = gather_counts(self._progress)
            logs |= {f"skipped_{reason.replace(' ', '_')}": count for reason, count in sorted(skipped.items())}
        super().log(logs, start_time)


def gather_counts(progress: StreamProgress) -> tuple[int, Counter[str]]:
    """
    Sums up the processes; to be called by all of them.

    Args:
        progress ([`StreamProgress`]): of this process.

    Returns:
        `tuple`: number of good samples, and of bad ones by reason.
    """
    parts = gather_object([(progress.samples, progress.skipped)])
    return sum(samples for samples, _ in parts), sum((skipped for _, skipped in parts), Counter())


class _Restart(TrainerCallback):
    """Puts the streams where the checkpoint left them, before they are read, and says at the end what was skipped."""

    def __init__(self, stream: CaptionStream, progress: StreamProgress) -> None:
        self._stream, self._progress = stream, progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step > 0:
            saved = state.stateful_callbacks.get(STATE, [])
            found = [len(part["starts"]) for part in saved]
            wanted = [len(self._progress.starts)] * args.world_size
            if found != wanted:
                raise ValueError(
                    f"The checkpoint of step {state.global_step} was made by {len(found)} processes with "
                    f"{found[0] if found else 0} streams each, this run has {len(wanted)} with {wanted[0]}. Go on with "
                    "the same number of processes and the same dataloader_num_workers."
                )
            self._progress.load_dict(saved[args.process_index])
        self._stream.start_at(self._progress.next_stream, self._progress.starts)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        samples, skipped = gather_counts(self._progress)
        if args.process_index == 0:
            bad = f": {describe_skipped(skipped)}" if skipped else ""
            print(f"Trained on {samples:,} samples and skipped {skipped.total():,}{bad}.", flush=True)
