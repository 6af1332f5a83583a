"""Captioned images at scale, read through `datasets`: where they are and in which layout.

[`load_captions`] knows webdataset tars (as img2dataset writes LAION, COYO and CC12M), parquet files, folders of images,
COCO in Karpathy's json, and datasets of the Hub. All of them give a stream of rows whose images are still encoded;
[`training.caption_stream`] decodes, checks and counts them.
"""

import csv
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, Image, IterableDataset, load_dataset

FORMATS = ("webdataset", "parquet", "folder", "coco", "hub")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
CAPTION_COLUMNS = ("caption", "text", "captions", "txt")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
BROKEN_ARCHIVE = {"image": None, "caption": None, "fault": "archive is broken or cut short"}
MOST_SHARDS = 1024
"""Parts that lists of files are divided into; processes times workers that read apart from each other."""


@dataclass
class CaptionSource:
    """
    A stream of rows, and which columns hold image and caption.

    Args:
        rows (`datasets.IterableDataset`): encoded images. A row may have `fault`, why there is no sample in it.
        image_column (`str`): bytes, `{"bytes", "path"}`, or a path.
        caption_column (`str`): a text, or a list of texts one of which is to be chosen.
        image_root (`str`): folder that relative paths start from.
    """

    rows: IterableDataset
    image_column: str
    caption_column: str
    image_root: str


def load_captions(
    location: str,
    dataset_format: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | None = None,
) -> CaptionSource:
    """
    Opens captioned images. Nothing is decoded, and of archives and tables nothing but the first rows is read.

    | layout | location | images | captions |
    |---|---|---|---|
    | `webdataset` | tars: a file, a pattern, a folder | `KEY.jpg`, `.png`, ... | `KEY.txt`, or a key of `KEY.json` |
    | `parquet` | a file, a pattern, a folder | bytes, `{"bytes", "path"}` or paths | a column |
    | `folder` | a folder of images | files, in folders too | `metadata.jsonl` or `.csv`, or `.txt` beside |
    | `coco` | a `.json` in Karpathy's layout | `filepath`/`filename` | `sentences`: one is chosen at each reading |
    | `hub` | the name of a dataset | a column | a column |

    Args:
        location (`str`): path, pattern with `*`, URL that `fsspec` reads (`hf://`, `s3://`), or name on the Hub.
        dataset_format (`str`, *optional*): one of the layouts; by default what the location looks like.
        split (`str`, *optional*, defaults to `"train"`):
            Split on the Hub; `split` of Karpathy's json (`train+restval` is both); elsewhere a folder of that name in
            `location`, and `location` itself for `"train"`.
        image_column, caption_column (`str`, *optional*):
            Columns, or the key of a webdataset's json; by default the first there is of `IMAGE_COLUMNS` and of
            `CAPTION_COLUMNS`.
        image_root (`str`, *optional*): folder that relative paths start from; by default that of the file.

    Returns:
        [`CaptionSource`]

    Raises:
        FileNotFoundError: if there is nothing at `location`.
        ValueError: for a layout, split or column there is not.
    """
    if dataset_format not in (None, *FORMATS):
        raise ValueError(f"dataset_format is {dataset_format!r}; choose of {', '.join(FORMATS)}.")
    location = location.rstrip("/")
    layout = dataset_format or infer_format(location)
    if layout == "hub":
        return _load_hub(location, split, image_column, caption_column, image_root)
    if layout == "coco":
        return _load_coco(location, split, image_root)
    folder = _split_folder(location, split)
    if layout == "folder":
        return _load_folder(folder, caption_column)
    files = find_files(folder, {"webdataset": "*.tar*", "parquet": "*.parquet"}[layout])
    if layout == "parquet":
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        return _from_table(rows, location, image_column, caption_column, image_root or files[0].rpartition("/")[0])
    rows = IterableDataset.from_generator(read_tars, gen_kwargs={"paths": files, "caption_column": caption_column})
    return CaptionSource(rows, "image", "caption", image_root="")


def infer_format(location: str) -> str:
    """
    The layout a location looks like. A folder with tars is a webdataset, whatever else img2dataset wrote beside them.

    Args:
        location (`str`): as in [`load_captions`].

    Returns:
        `str`: one of `FORMATS`.

    Raises:
        FileNotFoundError: for what is neither there nor may be a name on the Hub.
    """
    name = location.rpartition("/")[2]
    if re.search(r"\.(tar|tar\.gz|tgz)$", name):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".json"):
        return "coco"
    filesystem, path = fsspec.core.url_to_fs(location)
    if filesystem.isdir(path):
        names = [entry.rpartition("/")[2] for entry in (*filesystem.glob(f"{path}/*"), *filesystem.glob(f"{path}/*/*"))]
        for layout, pattern in (("webdataset", r"\.(tar|tar\.gz|tgz)$"), ("parquet", r"\.parquet$")):
            if any(re.search(pattern, entry) for entry in names):
                return layout
        return "folder"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location):
        return "hub"
    raise FileNotFoundError(_not_found(location))


def find_files(location: str, pattern: str) -> list[str]:
    """
    Files of a path, a pattern or a folder.

    Args:
        location (`str`): path, pattern or URL.
        pattern (`str`): which files of a folder, or else of the folders in it.

    Returns:
        `list` of `str`: sorted, so that all processes see the same order.

    Raises:
        FileNotFoundError: if there are none.
    """
    filesystem, path = fsspec.core.url_to_fs(location)
    patterns = [f"{path}/{pattern}", f"{path}/*/{pattern}"] if filesystem.isdir(path) else [path]
    found = next(filter(None, (sorted(filesystem.glob(each)) for each in patterns)), None)
    if not found:
        raise FileNotFoundError(_not_found(location if "*" in location else f"{location} ({pattern})"))
    return [filesystem.unstrip_protocol(file) if "://" in location else file for file in found]


def _not_found(location: str) -> str:
    return (
        f"There are no captioned images at {location}. Give 'world'; tars, parquet files or a folder of images (a path, "
        "a pattern with *, or a URL such as hf://...); a json of Karpathy's COCO; or the name of a dataset on the Hub."
    )


def _split_folder(location: str, split: str) -> str:
    """The folder of a split in a local folder; the location itself where splits are not told apart."""
    if Path(location).is_dir() and (Path(location) / split).is_dir():
        return str(Path(location) / split)
    if split != "train":
        raise ValueError(f"There is no split {split!r} at {location}: expected a folder of that name in it.")
    return location


def read_tars(paths: list[str], caption_column: str | None = None) -> Iterator[dict[str, Any]]:
    """
    The samples of webdataset tars: files that stand together and agree up to the first dot of their names.

    The webdataset reader of `datasets` stops at samples that lack a file, mix formats, or are broken; here each of them
    is a row with its `fault`.

    Args:
        paths (`list` of `str`): paths or URLs of the tars.
        caption_column (`str`, *optional*): key of the json that has the caption. By default the caption is the `.txt`,
            and without one the first there is of `CAPTION_COLUMNS` in the `.json`.

    Returns:
        `Iterator` of `dict`: `image` (`bytes` or `None`), `caption` and `fault` (`str` or `None`).
    """
    for path in paths:
        try:
            with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                for members in _group_members(tar):
                    yield _tar_row(members, caption_column)
                # tarfile takes a cut between two files for the end; the true one is two empty blocks, of which it has
                # read the first.
                if len(tar.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                    yield BROKEN_ARCHIVE
        except (tarfile.ReadError, EOFError):
            yield BROKEN_ARCHIVE


def _group_members(tar: tarfile.TarFile) -> Iterator[dict[str, bytes]]:
    """Contents by extension, of one sample after the other."""
    key: tuple[str, str] | None = None
    members: dict[str, bytes] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if (folder, stem) != key and members:
            yield members
            members = {}
        key = (folder, stem)
        file = tar.extractfile(member)
        assert file is not None  # it is a regular file
        members[extension.lower()] = file.read()
    if members:
        yield members


def _tar_row(members: dict[str, bytes], caption_column: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"image": None, "caption": None, "fault": None}
    row["image"] = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    try:
        if caption_column in (None, "txt") and "txt" in members:
            row["caption"] = members["txt"].decode()
        elif "json" in members:
            fields = json.loads(members["json"])
            names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
            row["caption"] = next((fields[name] for name in names if fields.get(name)), None)
    except (ValueError, AttributeError):  # not UTF-8, not json, not an object
        row["fault"] = "caption file is broken"
    return row


def _load_folder(folder: str, caption_column: str | None) -> CaptionSource:
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(_not_found(folder))
    rows = list(_read_metadata(root, caption_column)) or list(_read_texts_beside(root))
    if not any(caption is not None for _, caption in rows):
        raise ValueError(
            f"The images of {folder} have no captions: expected a metadata.jsonl or metadata.csv with the columns "
            f"file_name and {caption_column or 'caption or text'}, or a .txt beside each image."
        )
    return _from_list(rows)


def _read_metadata(root: Path, caption_column: str | None) -> Iterator[tuple[str, Any]]:
    """Images and captions of the metadata files of a folder and the folders in it, as `datasets` names them."""
    for file in sorted([*root.rglob("metadata.jsonl"), *root.rglob("metadata.csv")]):
        for number, row in enumerate(_read_rows(file), start=1):
            if "file_name" not in row:
                raise ValueError(f"Row {number} of {file} has no file_name; it has {sorted(row)}.")
            names = (caption_column,) if caption_column else CAPTION_COLUMNS
            caption = next((row[name] for name in names if row.get(name)), None)
            yield str(file.parent / row["file_name"]), caption


def _read_rows(file: Path) -> list[dict[str, Any]]:
    text = _read_text(file)
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold other line ends, which splitlines() knows
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {file} is not valid JSON: {error}") from error
    return rows


def _read_texts_beside(root: Path) -> Iterator[tuple[str, str | None]]:
    for file in sorted(root.rglob("*")):
        if file.suffix[1:].lower() in IMAGE_EXTENSIONS:
            text = file.with_suffix(".txt")
            yield str(file), _read_text(text) if text.exists() else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}. Convert it: iconv -f latin1 -t utf-8 FILE") from error


def _load_coco(location: str, split: str, image_root: str | None) -> CaptionSource:
    if not Path(location).is_file():
        raise FileNotFoundError(_not_found(location))
    try:
        content = json.loads(_read_text(Path(location)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{location} is not valid JSON: {error}") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not images or not all("sentences" in image and "filename" in image for image in images):
        raise ValueError(
            f"{location} is not in the layout of Karpathy's COCO: expected an object with 'images', each with "
            "'filename', 'sentences' and 'split'."
        )
    chosen = [image for image in images if image.get("split") in split.split("+")]
    if not chosen:
        found = sorted({str(image.get("split")) for image in images})
        raise ValueError(f"{location} has no images of the split {split!r}; it has {', '.join(found)}.")
    root = Path(image_root or Path(location).parent)
    return _from_list(
        [
            (str(root / image.get("filepath", "") / image["filename"]), [text["raw"] for text in image["sentences"]])
            for image in chosen
        ]
    )


def _from_list(rows: list[tuple[str, Any]]) -> CaptionSource:
    images, captions = zip(*rows)
    lists = [caption if isinstance(caption, list) else [caption or ""] for caption in captions]
    table = Dataset.from_dict({"image": list(images), "caption": lists})
    return CaptionSource(table.to_iterable_dataset(min(len(table), MOST_SHARDS)), "image", "caption", image_root="")


def _load_hub(name: str, split: str, image_column, caption_column, image_root) -> CaptionSource:
    try:
        rows = load_dataset(name, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{_not_found(name)} On the Hub: {error}") from error
    return _from_table(rows, name, image_column, caption_column, image_root or "")


def _from_table(rows: IterableDataset, location: str, image_column, caption_column, image_root: str) -> CaptionSource:
    columns = rows.column_names or list(next(iter(rows.take(1)), {}))
    image_column = _choose_column("image", image_column, IMAGE_COLUMNS, columns, location)
    caption_column = _choose_column("caption", caption_column, CAPTION_COLUMNS, columns, location)
    if rows.features and isinstance(rows.features[image_column], Image):
        rows = rows.cast_column(image_column, Image(decode=False))
    return CaptionSource(rows.select_columns([image_column, caption_column]), image_column, caption_column, image_root)


def _choose_column(what: str, wanted: str | None, usual: tuple[str, ...], columns: list[str], location: str) -> str:
    found = next((name for name in ([wanted] if wanted else usual) if name in columns), None)
    if found is None:
        hint = " Tables of URLs must be downloaded first, for example with img2dataset." if "url" in columns else ""
        raise ValueError(
            f"{location} has no column {wanted or ' or '.join(usual)}; it has {', '.join(columns)}. Set {what}_column."
            + hint
        )
    return found
