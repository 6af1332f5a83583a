"""Conversations for instruction tuning: LLaVA's json as it is published, or any dataset with messages and images.

| what | from | turns | images |
|---|---|---|---|
| LLaVA-665k and its kin | `.json`, `.jsonl` | `conversations`: `from` (human, gpt), `value` | `image`: a path, or a list |
| Hub style | the same, `.parquet`, or a name or folder for `datasets.load_dataset` | `messages`: `role`, `content` | `images`, or `image` |

`<image>` in a user's text marks the place of an image. The only mark of a turn may stand anywhere in it: the image comes
first, as LLaVA's own loader has it and as questions are asked afterwards. Several marks keep their places. Messages may
have parts (`{"type": "image"}`, `{"type": "text", "text": ...}`) instead; messages without marks or parts get their
images before the first question. No `image` or `images`, or none in a sample: text only.

All samples are checked before anything is trained, images are opened when they are read. What is wrong is named with its
sample; `max_skipped` leaves out some of them, and says how many and why.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.compute
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from processing.chat_template_libra import IMAGE_TOKEN
from processing.image_processing_libra import read_image

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""What the roles of either form are called in messages."""

NAMED = 5
"""How many samples an error names."""

Message = dict[str, Any]
Part = dict[str, Any]


class BadSample(ValueError):
    """
    A sample that cannot be used.

    Args:
        reason (`str`): in two or three words, for a count.
        detail (`str`): what is wrong with it, to follow its name.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


MESSAGES = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]
STORED = Features({"id": Value("string"), "messages": MESSAGES, "images": List(Value("string"))})
"""How conversations of a json file are kept."""

STORED_TOGETHER = 10_000


@dataclass
class ConversationArguments:
    """
    How conversations are read.

    Args:
        split (`str`, *optional*, defaults to `"train"`): split of a dataset that has several.
        image_folder (`str`, *optional*):
            Folder that paths of images are relative to; by default that of the file that names them, or else the working
            directory.
        max_skipped (`float`, *optional*, defaults to 0.0):
            Largest share of samples, in [0, 1), that may be left out because they cannot be used. How many and why is
            said; with more the run stops before the training starts.

    Raises:
        ValueError: for a share out of range.
    """

    split: str = field(default="train", metadata={"help": "Split of a dataset that has several."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that paths of images are relative to."})
    max_skipped: float = field(default=0.0, metadata={"help": "Largest share of samples that may be left out."})

    def __post_init__(self):
        if not 0 <= self.max_skipped < 1:
            raise ValueError(f"max_skipped must be in [0, 1), found {self.max_skipped}.")


def read_conversations(
    source: str,
    options: ConversationArguments,
    refuse: Callable[[list[Message], int], None] = lambda *_: None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """
    A dataset of conversations, each sample checked, images opened when a sample is read.

    Args:
        source (`str`): a `.json`, `.jsonl` or `.parquet` file, or what `datasets.load_dataset` takes.
        options ([`ConversationArguments`]): how to read it.
        refuse (`Callable`, *optional*): a further check of each sample; takes its messages and number of images, and
            raises [`BadSample`] if they cannot be used.
        say (`Callable`, *optional*, defaults to `print`): is told what is left out.

    Returns:
        `datasets.Dataset`: `id` (`str`), `messages` (with parts, see [`read_messages`]), `images` (`list` of `Image`).

    Raises:
        ValueError: naming samples that cannot be used, or if there are no samples.
        FileNotFoundError: if there is no such file.
    """
    suffix = Path(source).suffix
    if suffix in (".json", ".jsonl", ".parquet") and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source}; dataset must be one, or the name of a dataset.")
    folder = options.image_folder
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"image_folder is {folder}, which is not a folder.")
    if suffix in (".json", ".jsonl"):
        dataset, problems = _store(_read_json(Path(source)), folder or str(Path(source).parent), refuse)
    else:
        named = {"path": "parquet", "data_files": source} if suffix == ".parquet" else {"path": source}
        dataset, problems = _check_table(load_dataset(**named, split=options.split), source, folder or ".", refuse)
    if problems:
        report = describe_problems(problems, len(dataset) + len(problems), source)
        if len(problems) > options.max_skipped * (len(dataset) + len(problems)):
            advice = f"Mend them, or leave out a larger share with max_skipped (now {options.max_skipped:g})."
            raise ValueError(f"{report} {advice}")
        say(f"{report} They are left out.")
    if not len(dataset):
        raise ValueError(f"{source} has no samples.")
    return dataset


def read_messages(sample: dict[str, Any], num_images: int) -> list[Message]:
    """
    The messages of a sample of either form, with parts.

    Args:
        sample (`dict`): has `conversations` or `messages`.
        num_images (`int`): images that belong to it.

    Returns:
        `list` of `dict`: `role` and `content`, a list of parts: `{"type": "image", "text": None}`, `{"type": "text",
        "text": ...}`. User and assistant take turns, after a system message or none.

    Raises:
        BadSample: for unknown roles, turns that do not alternate, empty answers, and places that are not as many as the
            images; it says which turn, not which sample.
    """
    turns = sample.get("conversations") or sample.get("messages")
    if not turns:
        raise BadSample("no answer", "has no turns")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("unreadable turn", f"has turns that are no list of roles and texts: {turns!r:.50}")
    messages: list[Message] = []
    for place, turn in enumerate(turns):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise BadSample("unknown role", f"has turn {place} by {role!r}, not by one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _parts(content, place)})
    _check_turns(messages)
    written = all(isinstance(turn.get("content"), str) for turn in turns)  # in parts or LLaVA's form, places are marked
    if written and num_images and not any(map(_count_images, messages)):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [_image_part() for _ in range(num_images)] + first["content"]
    places = sum(map(_count_images, messages))
    if places != num_images:
        raise BadSample("images and places differ", f"has {places} places for images, but {num_images} images")
    return messages


def describe_problems(problems: list[tuple[str, BadSample]], total: int, source: str) -> str:
    """
    What is wrong with some samples.

    Args:
        problems (`list` of `tuple`): names of samples and why they cannot be used; at least one.
        total (`int`): number of all samples.
        source (`str`): where they are from.

    Returns:
        `str`: how many, for which reasons, and the first ones by name.
    """
    reasons = Counter(error.reason for _, error in problems)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    examples = "; ".join(f"{name} {error}" for name, error in problems[:NAMED])
    return f"{len(problems)} of the {total} samples of {source} cannot be used ({counts}). {examples}."


def answers_of(messages: Iterable[Message]) -> list[str]:
    """
    What is to be supervised.

    Args:
        messages (`Iterable` of `dict`): with parts, or with strings.

    Returns:
        `list` of `str`: the texts of the assistant.
    """
    return [text_of(message) for message in messages if message["role"] == "assistant"]


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] or "" for part in content)


def sample_name(index: int | None, sample: dict[str, Any]) -> str:
    """What an error calls a sample: its place and its id, as far as known, or else what it begins with."""
    place = "A sample" if index is None else f"Sample {index}"
    if sample.get("id") not in (None, ""):
        return f"{place} (id {str(sample['id'])!r})"
    turns = sample.get("messages")
    return f"{place} ({text_of(turns[0])[:60]!r})" if turns and index is None else place


def _parts(content: Any, place: int) -> list[Part]:
    """The parts of a message, empty texts left out."""
    if isinstance(content, str):
        texts = [text.strip() for text in content.split(IMAGE_TOKEN)] if IMAGE_TOKEN in content else [content]
        if len(texts) == 2:  # a single mark
            texts = ["", "\n".join(filter(None, texts))]
        parts: list[Part] = []
        for number, text in enumerate(texts):
            if number:
                parts.append(_image_part())
            parts += _text_part(text)
        return parts
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        detail = f"has turn {place} whose content is {content!r:.50}, neither text nor a list of parts"
        raise BadSample("unreadable turn", detail)
    parts = []
    for part in content:
        if part.get("type") == "image":
            parts.append(_image_part())
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            if IMAGE_TOKEN in part["text"]:
                detail = f"has {IMAGE_TOKEN} in the text of a part of turn {place}; make it a part of its own"
                raise BadSample("images and places differ", detail)
            parts += _text_part(part["text"])
        else:
            detail = f"has a part of turn {place} that is neither text nor an image: {part!r:.50}"
            raise BadSample("unreadable turn", detail)
    return parts


def _image_part() -> Part:
    return {"type": "image", "text": None}


def _text_part(text: str) -> list[Part]:
    return [{"type": "text", "text": text}] if text else []


def _count_images(message: Message) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _check_turns(messages: list[Message]) -> None:
    """Refuses what cannot be learned from: turns out of order, and answers without text or with images."""
    first = int(messages[0]["role"] == "system")
    if len(messages) - first < 2:
        raise BadSample("no answer", "has no answer")
    for place, message in enumerate(messages[first:], start=first):
        expected = ("user", "assistant")[(place - first) % 2]
        if message["role"] != expected:
            detail = f"has turn {place} by the {message['role']} where the {expected}'s should be"
            raise BadSample("turns out of order", detail)
    if messages[-1]["role"] != "assistant":
        raise BadSample("turns out of order", "ends in a question without an answer")
    for place, message in enumerate(messages):
        if message["role"] != "user" and _count_images(message):
            detail = f"has an image in turn {place}, which is the {message['role']}'s; only users show images"
            raise BadSample("images and places differ", detail)
        if message["role"] == "assistant" and not text_of(message).strip():
            raise BadSample("empty answer", f"has an empty answer in turn {place}")


def _read_json(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        try:
            rows = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file if line.strip()]
        except ValueError as error:  # also what is no UTF-8
            raise ValueError(f"{path} is not valid {path.suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of samples, each with `conversations` or `messages`.")
    if not any({"conversations", "messages"} & row.keys() for row in rows):
        raise ValueError(
            f"The samples of {path} have the fields {sorted(rows[0])}; expected `conversations` (LLaVA's form) or "
            "`messages`, and `image` or `images`."
        )
    return rows


def _store(rows: list[dict[str, Any]], folder: str, refuse: Callable) -> tuple[Dataset, list[tuple[str, BadSample]]]:
    """The good samples of a json file, and what is wrong with the others."""
    tables, good, problems = [], [], []
    files = FileCheck(folder)
    for index in range(len(rows)):
        row, rows[index] = rows[index], {}  # 665k samples take 5 GB as they are read, and 1 GB as they are stored
        paths = listed(row.get("images", row.get("image")))
        try:
            files.check(paths)
            messages = read_messages(row, len(paths))
            refuse(messages, len(paths))
            good.append({"id": str(row.get("id", index)), "messages": messages, "images": paths})
        except BadSample as error:
            problems.append((sample_name(index, row), error))
        if len(good) == STORED_TOGETHER or index == len(rows) - 1:
            columns = {name: [sample[name] for sample in good] for name in STORED}
            tables.append(Dataset.from_dict(columns, features=STORED))
            good = []
    return concatenate_datasets(tables).with_transform(_Reader(folder)), problems


def _check_table(
    table: Dataset, source: str, folder: str, refuse: Callable
) -> tuple[Dataset, list[tuple[str, BadSample]]]:
    """The good samples of a dataset, and what is wrong with the others. No image is decoded."""
    turns = [name for name in ("messages", "conversations") if name in table.column_names]
    if not turns:
        raise ValueError(
            f"The dataset {source} lacks the column `messages`; it has {table.column_names}. Expected: `messages` (or "
            "LLaVA's `conversations`), and `images` (or `image`) unless there is only text."
        )
    table, image_column, counts = with_encoded_images(table)
    names = [*turns[:1], *(["id"] if "id" in table.column_names else [])]
    files = FileCheck(folder)
    has_paths = image_column is not None and "string" in str(table.features[image_column])
    paths: Iterator = iter(table[image_column]) if has_paths else iter(())
    good, problems = [], []
    for index, (row, count) in enumerate(zip(table.select_columns(names), counts)):
        try:
            if has_paths:
                files.check(listed(next(paths)))
            refuse(read_messages(row, count), count)
            good.append(index)
        except BadSample as error:
            problems.append((sample_name(index, row), error))
    if problems:
        table = table.select(good)
    return table.with_transform(_Reader(folder)), problems


def with_encoded_images(table: Dataset) -> tuple[Dataset, str | None, list[int]]:
    """A dataset whose images stay encoded, the column they are in, and the number of images of each sample."""
    column = next((name for name in ("images", "image") if name in table.column_names), None)
    if column is None:
        return table, None, [0] * len(table)
    if isinstance(table.features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    elif isinstance(getattr(table.features[column], "feature", None), ImageFeature):
        table = table.cast_column(column, List(ImageFeature(decode=False)))
    values = table.data.column(column)
    if isinstance(table.features[column], List):
        counts = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(values), 0)
    else:
        counts = pyarrow.compute.cast(pyarrow.compute.is_valid(values), "int64")
    return table, column, counts.to_pylist()


class FileCheck:
    """
    Says whether files of images are there; each is looked for once.

    Args:
        folder (`str`): what paths are relative to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.found: dict[str, bool] = {}

    def check(self, paths: list[str]) -> None:
        """Raises [`BadSample`] for the first of `paths` that is not there."""
        for path in paths:
            if not isinstance(path, str):
                raise BadSample("image missing", f"names an image by {path!r:.50}, which is no path")
            if path not in self.found:
                self.found[path] = os.path.isfile(os.path.join(self.folder, path))
            if not self.found[path]:
                raise BadSample("image missing", f"names the image {path}, which is not in {self.folder}")


def listed(images: Any) -> list:
    """The images of a column `image` or `images`, of which a sample may have none."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


class _Reader:
    """Reads samples of a table: messages with parts, and opened images. Made for `Dataset.with_transform`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        samples = [self._read(row) for row in rows]
        return {name: [sample[name] for sample in samples] for name in STORED}

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        images = listed(row.get("images", row.get("image")))
        messages = read_messages(row, len(images))
        name = sample_name(None, row)
        return {
            "id": str(row.get("id") or ""),
            "messages": messages,
            "images": [open_image(image, self.folder, name) for image in images],
        }


def open_image(image: Any, folder: str, name: str) -> Image.Image:
    """
    An image of a path, or of what `datasets` keeps of one (bytes, or a path), read as the processor reads it: upright,
    transparency on white.

    Args:
        image (`str` or `dict`): it.
        folder (`str`): what a path is relative to.
        name (`str`): of the sample, for errors.

    Raises:
        ValueError: if it cannot be read.
    """
    if isinstance(image, str):
        image = {"bytes": None, "path": os.path.join(folder, image)}
    try:
        content: Any = image["path"] if image["bytes"] is None else BytesIO(image["bytes"])
        with Image.open(content) as opened:
            return read_image(opened, str(image["path"] or "the image"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # PIL.UnidentifiedImageError is an OSError
        raise ValueError(f"{name}: its image {image['path'] or ''} cannot be read: {error}") from error
