"""Preferences about images: a question, the answer that is better and one that is worse.

| column | holds |
|---|---|
| `prompt` | messages that end in the user's; or a text |
| `chosen`, `rejected` | the assistant's message after them, in a list; or a text |
| `images`, or `image` | of the prompt; paths in a `.json` or `.jsonl` |

from a `.json`, `.jsonl` or `.parquet` file, or what `datasets.load_dataset` takes. Places of images are marked as in
[`~training.conversations`].

TRL's collator makes ids of prompt and answer apart and puts them one after the other. Tokenizers of the Llama family
write a space at the beginning of every text, so the ids are not those of the whole conversation, which is what the model
is asked later. Here conversations are made whole, and the last answer is what is marked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset

from processing.processing_libra import LibraProcessor

from .answers import AnswerCollator
from .conversations import (
    BadSample,
    ConversationArguments,
    FileCheck,
    Message,
    describe_problems,
    listed,
    open_image,
    read_messages,
    sample_name,
    text_of,
    with_encoded_images,
)

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class PreferenceCollator:
    """
    Preferences to batches of TRL's `DPOTrainer`.

    Args:
        processor ([`LibraProcessor`]): makes ids. It stops at pixels: the trainer tokenizes them on the device.
        max_length (`int`, *optional*): tokens of a row, those of its images included; what is longer is cut off.
    """

    processor: LibraProcessor
    max_length: int | None = None

    def __post_init__(self) -> None:
        self.answers = AnswerCollator(self.processor, self.max_length)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples (`list` of `dict`): `prompt`, `chosen`, `rejected` (messages with parts), `images`.

        Returns:
            `dict` with `input_ids`, `attention_mask`, `completion_mask` of shape `(2 * samples, length)`, the chosen
            ones first, and `pixel_values` of shape `(2 * images, 3, height, width)` if there are images.

        Raises:
            ValueError: naming the sample of which `max_length` leaves no difference, or no answer.
        """
        batch = self.answers([c for side in ("chosen", "rejected") for c in conversations(samples, side)])
        batch["completion_mask"] = last_run(batch.pop("labels") != -100).long()
        for sample, chosen, rejected in zip(samples, *batch["input_ids"].chunk(2)):
            if torch.equal(chosen, rejected):
                raise ValueError(
                    f"{_name(None, sample)}: both answers are the same to the model. They have the same tokens, or "
                    f"differ only in what max_length ({self.max_length}) cuts off."
                )
        return batch


def conversations(samples: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """
    Whole conversations, as [`AnswerCollator`] takes them.

    Args:
        samples (`list` of `dict`): preferences.
        side (`str`): `"chosen"` or `"rejected"`, how they end.

    Returns:
        `list` of `dict`: `id`, `messages` and `images`.
    """
    return [
        {"id": sample.get("id"), "messages": sample["prompt"] + sample[side], "images": sample["images"]}
        for sample in samples
    ]


def last_run(marked: torch.Tensor) -> torch.Tensor:
    """
    The last answer of each row: earlier ones are part of the question.

    Args:
        marked (`torch.BoolTensor` of shape `(batch, length)`): tokens of answers.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`: the last run of marked tokens.
    """
    places = torch.arange(1, marked.shape[1] + 1)
    last = (places * marked).amax(dim=1, keepdim=True)
    gap = (places * (~marked & (places < last))).amax(dim=1, keepdim=True)
    return marked & (places > gap)


def read_preferences(
    source: str, options: ConversationArguments, refuse: Callable[[list[Message], int], None] = lambda *_: None
) -> Dataset:
    """
    A dataset of preferences, each sample checked, images opened when a sample is read.

    Args:
        source (`str`): a `.json`, `.jsonl` or `.parquet` file, or what `datasets.load_dataset` takes.
        options ([`ConversationArguments`]): how to read it.
        refuse (`Callable`, *optional*): a further check of each conversation, as in
            [`~training.conversations.read_conversations`].

    Returns:
        `datasets.Dataset`: `id`, `prompt`, `chosen`, `rejected` (messages with parts), `images` (`list` of `Image`).

    Raises:
        ValueError: naming samples that cannot be used, or columns that are missing.
        FileNotFoundError: if there is no such file.
    """
    suffix = Path(source).suffix
    builder = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(suffix)
    if builder and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source}; dataset must be one, or the name of a dataset.")
    named = {"path": builder, "data_files": source} if builder else {"path": source}
    table = load_dataset(**named, split=options.split)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"The dataset {source} lacks the columns {missing}; it has {table.column_names}. Expected: prompt, chosen, "
            "rejected, and images (or image) unless there is only text."
        )
    folder = options.image_folder or (str(Path(source).parent) if builder else ".")
    table, column, counts = with_encoded_images(table)
    files, good, problems = FileCheck(folder), [], []
    for index, count in enumerate(counts):
        row = table[index]
        try:
            files.check([image for image in listed(row[column]) if isinstance(image, str)] if column else [])
            pair = read_pair(row, count)
            for side in ("chosen", "rejected"):
                refuse(pair["prompt"] + pair[side], count)
            good.append(index)
        except BadSample as error:
            problems.append((_name(index, row), error))
    if problems:
        report = describe_problems(problems, len(table), source)
        if len(problems) > options.max_skipped * len(table):
            raise ValueError(f"{report} Mend them, or leave out a larger share with max_skipped.")
        print(f"{report} They are left out.")
    return table.select(good).with_transform(_Reader(folder))


def read_pair(row: dict[str, Any], num_images: int) -> dict[str, list[Message]]:
    """
    The messages of a preference, with parts.

    Args:
        row (`dict`): has `prompt`, `chosen` and `rejected`, each a list of messages or a text.
        num_images (`int`): images that belong to it.

    Returns:
        `dict`: `prompt`, `chosen` and `rejected`.

    Raises:
        BadSample: if they are no conversations, or both answers are the same.
    """
    prompt = _as_messages(row["prompt"], "user")
    pair = {}
    for side in ("chosen", "rejected"):
        messages = read_messages({"messages": prompt + _as_messages(row[side], "assistant")}, num_images)
        if len(messages) != len(prompt) + 1:
            raise BadSample("answer of several turns", f"has {len(messages) - len(prompt)} messages in {side}, not one")
        pair["prompt"], pair[side] = messages[:-1], messages[-1:]
    if text_of(pair["chosen"][0]).strip() == text_of(pair["rejected"][0]).strip():
        raise BadSample("no preference", "has the same answer chosen and rejected")
    return pair


def _as_messages(content: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not all(isinstance(message, dict) for message in content):
        raise BadSample("unreadable turn", f"has messages that are neither text nor a list: {content!r:.50}")
    return content


def _name(index: int | None, sample: dict[str, Any]) -> str:
    place = "A sample" if index is None else f"Sample {index}"
    if sample.get("id"):
        return f"{place} (id {str(sample['id'])!r})"
    return f"{place} ({str(sample['prompt'])[:80]})"


class _Reader:
    """Reads samples of a table. Made for `Dataset.with_transform`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        samples = [self._read(dict(zip(columns, values))) for values in zip(*columns.values())]
        return {name: [sample[name] for sample in samples] for name in ("id", *COLUMNS, "images")}

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        images = listed(row.get("images", row.get("image")))
        opened = [open_image(image, self.folder, sample_name(None, row)) for image in images]
        return {"id": str(row.get("id") or ""), **read_pair(row, len(images)), "images": opened}
