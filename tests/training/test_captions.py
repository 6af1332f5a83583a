"""Where captioned images come from: every layout gives the same samples, and a wrong location says what is wrong."""

import csv
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from tests.training.caption_files import COLOURS, encode, write_tar
from training.caption_stream import BadSample, SampleChecks, SampleReader
from training.captions import BROKEN_ARCHIVE, infer_format, load_captions, read_tars

CAPTIONS = [f"a {colour} square" for colour in COLOURS[:5]]


def write_webdataset(folder):
    for shard, rows in enumerate(((0, 1, 2), (3, 4))):
        members = {}
        for row in rows:
            members[f"{row:05}.png"] = encode(COLOURS[row])
            members[f"{row:05}.txt"] = CAPTIONS[row].encode()
        write_tar(folder / f"{shard:05}.tar", members)
    (folder / "00000.parquet").write_bytes(b"img2dataset writes the metadata of a shard beside it")
    return folder


def write_webdataset_with_json(folder):
    members = {}
    for row, caption in enumerate(CAPTIONS):
        members[f"part/{row}.jpg"] = encode(COLOURS[row], kind="JPEG")
        members[f"part/{row}.json"] = json.dumps({"url": "x", "caption": caption}).encode()
    return write_tar(folder / "all.tar", members)


def write_parquet(folder):
    rows = {"image": [{"bytes": encode(colour), "path": None} for colour in COLOURS[:5]], "text": CAPTIONS}
    Dataset.from_dict(rows, Features({"image": Image(), "text": Value("string")})).to_parquet(folder / "a.parquet")
    return folder / "*.parquet"


def write_parquet_with_bytes(folder):
    rows = {"jpg": [encode(colour, kind="JPEG") for colour in COLOURS[:5]], "caption": CAPTIONS, "width": [48] * 5}
    Dataset.from_dict(rows).to_parquet(folder / "a.parquet")
    return folder


def write_images(folder):
    folder.mkdir(exist_ok=True)
    for colour in COLOURS[:5]:
        (folder / f"{colour}.png").write_bytes(encode(colour))


def write_folder_with_jsonl(folder):
    write_images(folder / "images")
    rows = [{"file_name": f"images/{colour}.png", "text": text} for colour, text in zip(COLOURS, CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_folder_with_csv(folder):
    write_images(folder / "train")
    with (folder / "train" / "metadata.csv").open("w") as file:
        csv.writer(file).writerows(
            [("file_name", "caption"), *((f"{name}.png", text) for name, text in zip(COLOURS, CAPTIONS))]
        )
    return folder


def write_folder_with_texts(folder):
    write_images(folder)
    for colour, text in zip(COLOURS, CAPTIONS):
        (folder / f"{colour}.txt").write_text(text + "\n")
    return folder


def write_coco(folder, split="train"):
    write_images(folder / "train2014")
    images = [
        {
            "filepath": "train2014",
            "filename": f"{colour}.png",
            "split": split,
            "sentences": [{"raw": text, "tokens": []}],
        }
        for colour, text in zip(COLOURS, CAPTIONS)
    ]
    images.append({**images[0], "split": "test"})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder / "dataset_coco.json"


LAYOUTS = {
    "webdataset": [write_webdataset, write_webdataset_with_json],
    "parquet": [write_parquet, write_parquet_with_bytes],
    "folder": [write_folder_with_jsonl, write_folder_with_csv, write_folder_with_texts],
    "coco": [write_coco],
}


def read_all(source) -> dict[str, tuple]:
    """The colour of the first pixel by caption, rounded: JPEG changes it a little."""
    read = SampleReader(source, SampleChecks())
    samples = [read(row, np.random.default_rng(0)) for row in source.rows]
    return {sample["text"]: tuple(round(c / 16) for c in sample["image"].getpixel((0, 0))) for sample in samples}


def expected():
    from PIL import ImageColor

    return {text: tuple(round(c / 16) for c in ImageColor.getrgb(name)) for name, text in zip(COLOURS, CAPTIONS)}


@pytest.mark.parametrize(
    ("layout", "write"), [pair for name, writers in LAYOUTS.items() for pair in ((name, write) for write in writers)]
)
def test_every_layout_gives_the_same_samples(layout, write, tmp_path):
    location = str(write(tmp_path))
    assert infer_format(location) == layout
    assert read_all(load_captions(location)) == expected()
    assert read_all(load_captions(location, dataset_format=layout)) == expected()


def test_a_key_of_the_json_wins_over_the_text(tmp_path):
    members = {"a.png": encode("red"), "a.txt": b"alt text", "a.json": b'{"top_caption": "a red square"}'}
    path = write_tar(tmp_path / "a.tar", members)
    assert list(read_all(load_captions(str(path), caption_column="top_caption"))) == ["a red square"]
    assert list(read_all(load_captions(str(path), caption_column="txt"))) == ["alt text"]


def test_splits_of_karpathys_json(tmp_path):
    path = str(write_coco(tmp_path, split="restval"))
    assert len(read_all(load_captions(path, split="restval+train"))) == 5
    assert len(read_all(load_captions(path, split="test"))) == 1
    with pytest.raises(ValueError, match="no images of the split 'train'; it has restval, test"):
        load_captions(path)


def test_several_captions_take_turns(tmp_path):
    (tmp_path / "a.png").write_bytes(encode("red"))
    image = {"filename": "a.png", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]}
    (tmp_path / "d.json").write_text(json.dumps({"images": [image]}))
    source = load_captions(str(tmp_path / "d.json"))
    read, (row,) = SampleReader(source, SampleChecks()), source.rows
    assert {read(row, np.random.default_rng(seed))["text"] for seed in range(20)} == {"one", "two"}


def test_a_dataset_of_the_hub_is_read_by_its_columns(tmp_path, monkeypatch):
    rows = {"image": [encode("red")], "caption": ["a red square"]}
    features = Features({"image": Image(), "caption": Value("string")})
    (tmp_path / "org" / "name").mkdir(parents=True)
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "org" / "name" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert read_all(load_captions("org/name", dataset_format="hub")) == {"a red square": (16, 0, 0)}


@pytest.mark.parametrize("end", [2048, 2060, 2600, 3072], ids=["between files", "header", "content", "between samples"])
def test_a_tar_that_was_cut_is_counted(end, tmp_path):
    whole = write_webdataset(tmp_path) / "00000.tar"
    assert BROKEN_ARCHIVE not in read_tars([str(whole)])
    whole.write_bytes(whole.read_bytes()[:end])
    rows = list(read_tars([str(whole), str(tmp_path / "00001.tar")]))
    assert rows[0]["caption"] == CAPTIONS[0]
    assert rows.count(BROKEN_ARCHIVE) == 1
    assert [row["caption"] for row in rows[-2:]] == CAPTIONS[3:]


def test_what_is_wrong_in_a_tar_is_counted(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"a.png": encode("red"), "b.txt": b"no image", "c.png": encode("red"), "c.txt": b"\xff\xfe", "d.png": b"",
         "d.txt": b"a dog", "e.png": encode("blue"), "e.json": b"{", "f.jpg": encode("pink", kind="JPEG"), "f.txt": b"f"},
    )  # fmt: skip
    source = load_captions(str(tmp_path))
    read, reasons = SampleReader(source, SampleChecks()), []
    for row in source.rows:
        try:
            reasons.append(read(row, np.random.default_rng(0))["text"])
        except BadSample as error:
            reasons.append(str(error))
    assert reasons == ["no caption", "no image", "caption file is broken", "no image", "caption file is broken", "f"]


@pytest.mark.parametrize("location", ["/no/such/folder", "no/such/*.tar", "a/b/c"])
def test_a_missing_location_is_named(location):
    with pytest.raises(FileNotFoundError, match="There are no captioned images at"):
        load_captions(location)


def test_a_name_that_is_not_on_the_hub_either(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no captioned images at my/pictures.* On the Hub"):
        load_captions("my/pictures")


def test_wrong_options_are_named(tmp_path):
    write_parquet_with_bytes(tmp_path)
    with pytest.raises(ValueError, match="dataset_format is 'tar'; choose of webdataset"):
        load_captions(str(tmp_path), dataset_format="tar")
    with pytest.raises(ValueError, match=r"no column alt; it has jpg, caption, width. Set caption_column"):
        load_captions(str(tmp_path), caption_column="alt")
    with pytest.raises(ValueError, match="There is no split 'test'"):
        load_captions(str(tmp_path), split="test")


def test_a_table_of_urls_says_what_to_do(tmp_path):
    Dataset.from_dict({"url": ["http://a"], "text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Set image_column. Tables of URLs must be downloaded first.*img2dataset"):
        load_captions(str(tmp_path))


def test_a_folder_without_captions(tmp_path):
    write_images(tmp_path)
    with pytest.raises(ValueError, match=r"have no captions: expected a metadata.jsonl.*or a .txt beside each image"):
        load_captions(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"Row 1 of .*metadata.jsonl has no file_name; it has \['text'\]"):
        load_captions(str(tmp_path))


def test_a_json_of_another_layout(tmp_path):
    (tmp_path / "captions.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="not in the layout of Karpathy's COCO"):
        load_captions(str(tmp_path / "captions.json"))


def test_lines_and_fields_of_metadata_are_whole(tmp_path):
    """A line separator in a JSON string is no end of a line, and a quoted field of a table may have several lines."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encode("red"))
    text = "a red\u2028ball"
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "caption": text}, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "metadata.csv").write_text('file_name,caption\nb.png,"a blue\nball"\n')
    assert {text for row in load_captions(str(tmp_path)).rows for text in row["caption"]} == {text, "a blue\nball"}


def test_a_broken_line_of_metadata_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a"}\n{bad\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*metadata.jsonl is not valid JSON"):
        load_captions(str(tmp_path))


def test_tars_in_folders_are_found(tmp_path):
    (tmp_path / "part0").mkdir()
    location = write_webdataset(tmp_path / "part0")
    assert read_all(load_captions(str(tmp_path))) == read_all(load_captions(str(location)))
