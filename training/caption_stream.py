"""An endless stream of checked captioned images, the same after a restart as without one.

Every process and every worker of its DataLoader reads a stream of its own, shuffled anew in each epoch by a generator
that is made of the seed and the epoch. Where a stream is takes two numbers, epoch and row. They travel with each batch,
so the trainer knows how far the streams are that it has trained on, whatever the workers have read ahead.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import get_worker_info

from processing.image_processing_libra import read_image

from .captions import CaptionSource, load_captions
from .clean_captions import caption_fault, clean_caption

CHECK_SKIPPED_AFTER = 256
"""Rows of a stream after which the share of skipped ones counts."""


class BadSample(Exception):
    """A sample that cannot be trained on. Its argument is the reason, one of a few."""


@dataclass
class SampleChecks:
    """
    What a sample must be like; the limits on images guard against decompression bombs, icons and banners.

    Args:
        max_pixels (`int`, *optional*, defaults to 89478485): most pixels, checked before decoding (PIL's own limit).
        min_side (`int`, *optional*, defaults to 32): least width and height, in pixels.
        max_aspect (`float`, *optional*, defaults to 5.0): most the longer side may be over the shorter.
        max_caption_characters (`int`, *optional*, defaults to 1000): longest caption.
        clean_captions (`bool`, *optional*, defaults to `False`):
            Clean captions as [`~training.clean_captions.clean_caption`] does, and skip those with a
            [`~training.clean_captions.caption_fault`].
        min_words, max_words (`int`, *optional*, default to 2 and 100): bounds for cleaned captions.

    Raises:
        ValueError: for limits that leave nothing.
    """

    max_pixels: int = field(default=89_478_485, metadata={"help": "Most pixels of an image."})
    min_side: int = field(default=32, metadata={"help": "Least width and height of an image, in pixels."})
    max_aspect: float = field(default=5.0, metadata={"help": "Most the longer side may be over the shorter."})
    max_caption_characters: int = field(default=1000, metadata={"help": "Longest caption, in characters."})
    clean_captions: bool = field(default=False, metadata={"help": "Clean captions and skip those that say nothing."})
    min_words: int = field(default=2, metadata={"help": "Fewest words of a cleaned caption."})
    max_words: int = field(default=100, metadata={"help": "Most words of a cleaned caption."})

    def __post_init__(self):
        if self.min_side < 1 or self.max_pixels < self.min_side**2:
            raise ValueError(f"min_side {self.min_side} and max_pixels {self.max_pixels} leave no image.")
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}; PIL refuses more than {Image.MAX_IMAGE_PIXELS}.")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, found {self.max_aspect}.")
        if self.max_caption_characters < 1 or not 0 <= self.min_words <= self.max_words:
            raise ValueError("max_caption_characters must be at least 1, and 0 <= min_words <= max_words.")


@dataclass
class SampleReader:
    """
    Makes samples of rows.

    Args:
        source ([`CaptionSource`]): names the columns.
        checks ([`SampleChecks`]): what a sample must be like.
        reserved (`Sequence[str]`, *optional*): texts that mean something else to the model, such as `<image>`.
    """

    source: CaptionSource
    checks: SampleChecks
    reserved: Sequence[str] = ()

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """
        Args:
            row (`dict`): of the source.
            rng (`np.random.Generator`): chooses one of several captions.

        Returns:
            `dict`: `image` (`PIL.Image.Image`, RGB) and `text` (`str`).

        Raises:
            BadSample: with the reason.
        """
        if row.get("fault"):
            raise BadSample(row["fault"])
        text = self.read_caption(row.get(self.source.caption_column), rng)  # first: it is cheap
        return {"image": self.read_image(row.get(self.source.image_column)), "text": text}

    def read_caption(self, value: Any, rng: np.random.Generator) -> str:
        """The caption of a row; see [`~SampleReader.__call__`]."""
        if isinstance(value, list) and value:
            value = value[rng.integers(len(value))]
        if not isinstance(value, str) or not value.strip():
            raise BadSample("no caption")
        text = clean_caption(value) if self.checks.clean_captions else value.strip()
        if len(text) > self.checks.max_caption_characters:
            raise BadSample("caption is too long")
        if any(token in text for token in self.reserved):
            raise BadSample("caption has a special token")
        if self.checks.clean_captions:
            fault = caption_fault(text, self.checks.min_words, self.checks.max_words)
            if fault is not None:
                raise BadSample(fault)
        return text

    def read_image(self, value: Any) -> Image.Image:
        """The image of a row, upright and RGB; see [`~SampleReader.__call__`]."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(BytesIO(self._read_bytes(value)))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise BadSample("image has too many pixels") from None
        except BadSample:
            raise
        except Exception as error:  # decoders raise whatever they like on a broken file
            raise BadSample("image cannot be decoded") from error
        short, long = sorted(image.size)
        if short * long > self.checks.max_pixels:
            raise BadSample("image has too many pixels")
        if short < self.checks.min_side:
            raise BadSample("image is too small")
        if long > self.checks.max_aspect * short:
            raise BadSample("image is too long")
        try:
            return read_image(image)
        except ValueError as error:
            raise BadSample("image cannot be decoded") from error

    def _read_bytes(self, value: Any) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise BadSample("no image")
        if isinstance(value, bytes):
            return value
        path = value if "://" in value else str(Path(self.source.image_root) / value)
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise BadSample("image file is missing") from None


@dataclass
class Reading:
    """
    What reading the samples of a batch took.

    Args:
        stream (`int`): which stream of its process it comes from.
        epoch, row (`int`): where that stream goes on: rows of the epoch that are read.
        skipped (`Counter`): bad samples on the way, by reason.
    """

    stream: int
    epoch: int
    row: int
    skipped: Counter[str]

    @classmethod
    def of_batch(cls, readings: Sequence["Reading"]) -> "Reading":
        """That of a batch, from those of its samples, in order."""
        last = readings[-1]
        return cls(last.stream, last.epoch, last.row, sum((part.skipped for part in readings), Counter()))


class CaptionStream(torch.utils.data.IterableDataset):
    """
    Samples `{"image", "text", "place", "reading"}` without end. `place` is different for any two readings of a run;
    `reading` is a [`Reading`].

    Bad samples are skipped and counted.

    Args:
        rows (`datasets.IterableDataset`): all of them; the stream takes the share of its process and worker.
        read (`Callable`): from a row and a `np.random.Generator` to a sample, see [`SampleReader`].
        seed (`int`, *optional*, defaults to 0): of shuffling and choosing.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Rows among which the next one is chosen; shards are shuffled too. 0 keeps the order of the files.
        max_skipped (`float`, *optional*, defaults to 0.5): largest share of bad samples.
        process, num_processes (`int`, *optional*, default to 0 and 1): which process this is, of how many.
    """

    def __init__(
        self,
        rows: IterableDataset,
        read: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]],
        seed: int = 0,
        shuffle_buffer: int = 1000,
        max_skipped: float = 0.5,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.rows, self.read, self.seed = rows, read, seed
        self.shuffle_buffer, self.max_skipped = shuffle_buffer, max_skipped
        self.process, self.num_processes = process, num_processes
        self._first_stream = 0
        self._starts: list[tuple[int, int]] | None = None

    def start_at(self, first_stream: int, starts: Sequence[tuple[int, int]]) -> None:
        """
        Sets where the next iteration begins.

        Args:
            first_stream (`int`): the stream that gives the first batch.
            starts (`Sequence` of two `int`): epoch and row of each stream.
        """
        self._first_stream, self._starts = first_stream, [(epoch, row) for epoch, row in starts]

    def describe(self, num_workers: int) -> str:
        """
        How the rows are shared out.

        Args:
            num_workers (`int`): of the DataLoader of each process.

        Returns:
            `str`: such as `"1243 shards for 64 x 8 streams"`; what it costs if there are too few.
        """
        num_streams = self.num_processes * max(1, num_workers)
        text = f"{self.rows.num_shards} shards for {self.num_processes} x {max(1, num_workers)} streams"
        if self.rows.num_shards < num_streams:
            text += "; fewer than streams, so each of them reads all rows and decodes its share"
        return text

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        num_streams = worker.num_workers if worker else 1
        # Batches come from the workers in turn, beginning with worker 0.
        stream = ((worker.id if worker else 0) + self._first_stream) % num_streams
        epoch, start = (0, 0) if self._starts is None else self._starts[stream]
        node, num_nodes = self.process * num_streams + stream, self.num_processes * num_streams
        tally = _Tally(self.max_skipped)
        while True:
            found = 0
            for row, values in enumerate(self._epoch(epoch, node, num_nodes)):
                found += 1
                if row < start:
                    continue
                place = (self.process, stream, epoch, row)
                try:
                    sample = self.read(values, np.random.default_rng([self.seed, *place]))
                except BadSample as error:
                    tally.skip(str(error))
                    continue
                yield {**sample, "place": place, "reading": Reading(stream, epoch, row + 1, tally.take())}
            if found == 0:
                raise ValueError(
                    f"There are fewer rows than processes times workers, {num_nodes}: one of them has nothing to read. "
                    "Lower dataloader_num_workers."
                )
            tally.end_epoch(whole=start == 0)
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int, node: int, num_nodes: int) -> Iterator[dict[str, Any]]:
        """The rows of one node in one epoch."""
        rows = self.rows
        if rows.num_shards >= num_nodes:
            rows = rows.shard(num_nodes, node)
        else:  # all nodes read all rows, and decode their own
            rows = split_dataset_by_node(rows, node, num_nodes)
        if self.shuffle_buffer:
            generator = np.random.default_rng([self.seed, epoch])
            rows = rows.shuffle(generator=generator, buffer_size=self.shuffle_buffer)
        for batch in rows.iter(1):  # `iter(rows)` would divide the rows among the workers once more
            yield {name: values[0] for name, values in batch.items()}


class _Tally:
    """Counts of one stream: in the running epoch, and those since the last good sample."""

    def __init__(self, max_skipped: float) -> None:
        self._max_skipped = max_skipped
        self._good = 0
        self._skipped: Counter[str] = Counter()
        self._new: Counter[str] = Counter()

    def skip(self, reason: str) -> None:
        self._skipped[reason] += 1
        self._new[reason] += 1
        if self._good + self._skipped.total() >= CHECK_SKIPPED_AFTER:
            self._check()

    def take(self) -> Counter[str]:
        """At a good sample: what was skipped before it."""
        self._good += 1
        new, self._new = self._new, Counter()
        return new

    def end_epoch(self, whole: bool) -> None:
        """Starts anew. The end of an epoch alone, after a restart, says little of the data."""
        if whole:
            self._check()
        self._good, self._skipped = 0, Counter()

    def _check(self) -> None:
        skipped = self._skipped.total()
        seen = self._good + skipped
        if skipped and (self._good == 0 or skipped > self._max_skipped * seen):
            raise ValueError(
                f"{skipped} of {seen} samples are bad, more than max_skipped ({self._max_skipped:.0%}) allows: "
                f"{describe_skipped(self._skipped)}. Are dataset_format, image_column and caption_column right?"
            )


def describe_skipped(skipped: Counter[str]) -> str:
    """
    Args:
        skipped (`Counter`): bad samples by reason.

    Returns:
        `str`: such as `"7 no caption, 2 image is too small"`, the most frequent reason first.
    """
    return ", ".join(
        f"{count} {reason}" for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    )


@dataclass
class StreamProgress:
    """
    How far the streams of one process are that were trained on.

    Args:
        starts (`list` of two `int`): epoch and row of each stream.
        next_stream (`int`, *optional*, defaults to 0): the stream that gives the next batch.
        samples (`int`, *optional*, defaults to 0): good ones so far.
        skipped (`Counter`, *optional*): bad ones so far, by reason.
    """

    starts: list[tuple[int, int]]
    next_stream: int = 0
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, reading: Reading, samples: int) -> None:
        """
        Notes a batch that is trained on.

        Args:
            reading ([`Reading`]): of the batch.
            samples (`int`): in it.
        """
        self.starts[reading.stream] = (reading.epoch, reading.row)
        self.next_stream = (reading.stream + 1) % len(self.starts)
        self.samples += samples
        self.skipped += reading.skipped

    def to_dict(self) -> dict[str, Any]:
        """All of it, for a json file."""
        return {**vars(self), "starts": [list(start) for start in self.starts], "skipped": dict(self.skipped)}

    def load_dict(self, values: dict[str, Any]) -> None:
        """
        Takes what [`~StreamProgress.to_dict`] gave.

        Args:
            values (`dict`): of as many streams.
        """
        self.starts = [(epoch, row) for epoch, row in values["starts"]]
        self.next_stream, self.samples = values["next_stream"], values["samples"]
        self.skipped = Counter(values["skipped"])


@dataclass
class CaptionArguments(SampleChecks):
    """
    How a dataset of one's own is read, and what its samples must be like (see [`SampleChecks`]).

    Args:
        dataset_format, split, image_column, caption_column, image_root (`str`, *optional*):
            As in [`~training.captions.load_captions`].
        eval_dataset (`str`, *optional*): location of samples to evaluate on; by default that of the training samples.
        eval_split (`str`, *optional*): their split. Nothing is evaluated without one of the two.
        shuffle_buffer (`int`, *optional*, defaults to 1000): see [`CaptionStream`].
        max_skipped (`float`, *optional*, defaults to 0.5): share of bad samples above which the run stops.
    """

    dataset_format: str | None = field(default=None, metadata={"help": "webdataset, parquet, folder, coco or hub."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    image_column: str | None = field(default=None, metadata={"help": "Column with the images."})
    caption_column: str | None = field(default=None, metadata={"help": "Column, or key of the json, with captions."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that relative image paths start from."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Where to evaluate (default: dataset)."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Samples the next one is chosen from; 0: no shuffling."}
    )
    max_skipped: float = field(default=0.5, metadata={"help": "Share of bad samples above which the run stops."})

    def __post_init__(self):
        super().__post_init__()
        if self.shuffle_buffer < 0 or not 0 <= self.max_skipped <= 1:
            raise ValueError(
                f"shuffle_buffer must not be negative and max_skipped be in [0, 1], found {self.shuffle_buffer} and "
                f"{self.max_skipped}."
            )

    def open(self, location: str, split: str) -> CaptionSource:
        """The rows at a location, in the format these options give."""
        return load_captions(
            location, self.dataset_format, split, self.image_column, self.caption_column, self.image_root
        )

    def open_eval(self, dataset: str) -> CaptionSource | None:
        """The rows to evaluate on, if there are to be any; `dataset` is the location of the training samples."""
        if self.eval_dataset is None and self.eval_split is None:
            return None
        return self.open(self.eval_dataset or dataset, self.eval_split or "train")


class CheckedRows(torch.utils.data.Dataset):
    """
    The first good samples of a source, the same in every process. They are kept encoded.

    Args:
        rows (`datasets.IterableDataset`): where from.
        read (`Callable`): from a row and a `np.random.Generator` to a sample, see [`SampleReader`].
        count (`int`): how many; all if there are fewer.

    Raises:
        ValueError: if none is good.
    """

    def __init__(
        self, rows: IterableDataset, read: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]], count: int
    ) -> None:
        self.read = read
        self._rows: list[dict[str, Any]] = []
        skipped: Counter[str] = Counter()
        for row in rows:
            try:
                read(row, np.random.default_rng(len(self._rows)))
            except BadSample as error:
                skipped[str(error)] += 1
                continue
            self._rows.append(row)
            if len(self._rows) >= count:
                break
        if not self._rows:
            raise ValueError(f"There is no good sample to evaluate on: {describe_skipped(skipped) or 'no row at all'}.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`."""
        return {**self.read(self._rows[index], np.random.default_rng(index)), "place": (index,)}
