"""The stream of samples: what is skipped and why, that it never ends, and that it goes on where it stopped."""

import io
import zlib
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.utils.data import DataLoader

from tests.training.caption_files import captions_of, encode, write_shards
from training.caption_stream import (
    BadSample,
    CaptionArguments,
    CaptionStream,
    CheckedRows,
    Reading,
    SampleChecks,
    SampleReader,
    StreamProgress,
    describe_skipped,
)
from training.captions import CaptionSource, load_captions

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """`datasets` sleeps for seconds at every end of a parquet file."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def read_row(image, caption="a dog", **checks):
    source = CaptionSource(None, "image", "caption", image_root="")
    reader = SampleReader(source, SampleChecks(**checks), reserved=("<image>", "</s>"))
    return reader({"image": image, "caption": caption}, RNG)


def make_bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 10^10 pixels."""
    content = bytearray(encode("red"))
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("reason", "row", "checks"),
    [
        ("no image", {"image": None}, {}),
        ("no image", {"image": {"bytes": None, "path": None}}, {}),
        ("image file is missing", {"image": "/no/such/file.png"}, {}),
        ("image cannot be decoded", {"image": b"<html>404</html>"}, {}),
        ("image cannot be decoded", {"image": encode("red", (400, 400), "JPEG")[:-600]}, {}),
        ("image has too many pixels", {"image": make_bomb()}, {}),
        ("image has too many pixels", {"image": encode("red", (60, 60))}, {"max_pixels": 3599}),
        ("image is too small", {"image": encode("red", (100, 31))}, {}),
        ("image is too long", {"image": encode("red", (40, 201))}, {}),
        ("no caption", {"image": encode("red"), "caption": None}, {}),
        ("no caption", {"image": encode("red"), "caption": " \n"}, {}),
        ("no caption", {"image": encode("red"), "caption": []}, {}),
        ("caption is too long", {"image": encode("red"), "caption": "a" * 1001}, {}),
        ("caption has a special token", {"image": encode("red"), "caption": "an <image> of a dog"}, {}),
        ("caption is a file name", {"image": encode("red"), "caption": "IMG_1.jpg"}, {"clean_captions": True}),
        ("caption has too few words", {"image": encode("red"), "caption": "http://a.b"}, {"clean_captions": True}),
    ],
)  # fmt: skip
def test_bad_samples_have_a_reason(reason, row, checks):
    with pytest.raises(BadSample) as caught:
        read_row(**row, **checks)
    assert str(caught.value) == reason


def test_limits_are_inclusive():
    for size in ((32, 160), (160, 32)):
        assert read_row(encode("red", size), "a" * 1000)["image"].size == size
    assert read_row(encode("red", (60, 60)), max_pixels=3600)["image"].size == (60, 60)


def test_captions_are_cleaned_only_if_asked_for():
    assert read_row(encode("red"), " IMG_1.jpg ")["text"] == "IMG_1.jpg"
    assert read_row(encode("red"), "a <b>dog</b>")["text"] == "a <b>dog</b>"
    assert read_row(encode("red"), "a <b>dog</b>", clean_captions=True)["text"] == "a dog"


def test_images_are_upright_and_rgb():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("L", (40, 80)).save(buffer, "JPEG", exif=exif)
    image = read_row(buffer.getvalue())["image"]
    assert (image.size, image.mode) == ((80, 40), "RGB")


@pytest.mark.parametrize(
    "wrong",
    [{"max_aspect": 0.5}, {"min_side": 0}, {"min_words": 3, "max_words": 2}, {"max_pixels": 10}, {"max_pixels": 10**9}],
)
def test_limits_that_leave_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"max_aspect|min_side|min_words|max_pixels"):
        CaptionArguments(**wrong)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four tars of six samples."""
    return write_shards(tmp_path_factory.mktemp("shards"))


def make_stream(folder, **options):
    source = load_captions(str(folder))
    return CaptionStream(source.rows, SampleReader(source, SampleChecks()), **{"shuffle_buffer": 5, **options})


def texts(samples, count):
    return [sample["text"] for sample in islice(samples, count)]


def test_each_epoch_has_every_sample_in_another_order(shards):
    found = texts(make_stream(shards), 72)
    epochs = [found[:24], found[24:48], found[48:]]
    assert all(sorted(epoch) == sorted(captions_of()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert texts(make_stream(shards), 72) == found
    assert texts(make_stream(shards, seed=1), 24) != epochs[0]
    assert texts(make_stream(shards, shuffle_buffer=0), 24) == captions_of()


@pytest.fixture(scope="module", params=["tars", "parquet", "folder"])
def layout(request, shards, tmp_path_factory):
    """The same samples in four tars, in one parquet file, and as files."""
    if request.param == "tars":
        return shards
    folder = tmp_path_factory.mktemp(request.param)
    images = [encode(text.split()[1]) for text in captions_of()]
    if request.param == "parquet":
        Dataset.from_dict({"image": images, "caption": captions_of()}).to_parquet(folder / "a.parquet")
    else:
        for number, (image, text) in enumerate(zip(images, captions_of())):
            (folder / f"{number}.png").write_bytes(image)
            (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("processes", [2, 3, 4, 7], ids=lambda n: f"{n} processes")
def test_processes_share_an_epoch(layout, processes):
    """Whether the shards can be dealt out evenly, unevenly, or not at all."""
    found = []
    for process in range(processes):
        stream = iter(make_stream(layout, process=process, num_processes=processes))
        while (sample := next(stream))["place"][2] == 0:
            found.append(sample["text"])
    assert sorted(found) == sorted(captions_of())


def collate(samples):
    reading = Reading.of_batch([sample["reading"] for sample in samples])
    return {
        "texts": [sample["text"] for sample in samples],
        "places": [s["place"] for s in samples],
        "reading": reading,
    }


@pytest.mark.parametrize("workers", [0, 3])
def test_a_restart_changes_nothing(layout, workers):
    """After any number of batches, across epochs, with several workers, whatever they have read ahead."""
    loader = DataLoader(make_stream(layout), batch_size=5, num_workers=workers, collate_fn=collate)
    whole = list(islice(loader, 14))
    progress = StreamProgress([(0, 0)] * max(1, workers))
    for done in range(12):
        if done in (1, 4, 5, 11):
            stream = make_stream(layout)
            restored = StreamProgress([(0, 0)] * max(1, workers))
            restored.load_dict(progress.to_dict())
            stream.start_at(restored.next_stream, restored.starts)
            again = DataLoader(stream, batch_size=5, num_workers=workers, collate_fn=collate)
            for found, expected in zip(islice(again, 3), whole[done:]):
                assert found["texts"] == expected["texts"]
                assert found["places"] == expected["places"]
        progress.add(whole[done]["reading"], 5)


def test_places_are_never_the_same(shards):
    loader = DataLoader(make_stream(shards), batch_size=5, num_workers=2, collate_fn=collate)
    places = [place for batch in islice(loader, 20) for place in batch["places"]]
    assert len(set(places)) == len(places)


def stream_of(captions, **options):
    rows = IterableDataset.from_generator(make_rows, gen_kwargs={"captions": captions})
    read = SampleReader(CaptionSource(rows, "image", "caption", ""), SampleChecks())
    return CaptionStream(rows, read, shuffle_buffer=0, **options)


def make_rows(captions):
    for caption in captions:
        yield {"image": encode("red"), "caption": caption, "fault": None}


def test_bad_samples_are_counted_by_reason():
    bad = ["", "a" * 1001, ""]
    stream = stream_of(["one", *bad, "two", "three", *bad[:1]], max_skipped=0.6)
    readings = [sample["reading"] for sample in islice(stream, 6)]
    batches = [Reading.of_batch(readings[:2]), Reading.of_batch(readings[2:])]
    assert batches[0].skipped == Counter({"no caption": 2, "caption is too long": 1})
    assert batches[1].skipped == Counter({"no caption": 3, "caption is too long": 1})
    assert (batches[1].epoch, batches[1].row) == (1, 6)
    progress = StreamProgress([(0, 0)])
    for batch in batches:
        progress.add(batch, 3)
    assert describe_skipped(progress.skipped) == "5 no caption, 2 caption is too long"


def test_too_many_bad_samples_stop_the_run():
    with pytest.raises(ValueError, match=r"3 of 5 samples are bad, more than max_skipped \(50%\).*3 no caption"):
        list(stream_of(["one", "", "", "", "two"]))
    assert texts(stream_of(["one", "", "", "two"]), 4) == ["one", "two"] * 2


def test_a_long_bad_dataset_stops_early():
    stream = stream_of(["one"] * 100 + [""] * 10_000)
    with pytest.raises(ValueError, match="of 256 samples are bad"):
        list(stream)


def test_only_bad_samples_stop_the_run_whatever_the_limit():
    with pytest.raises(ValueError, match="2 of 2 samples are bad"):
        next(iter(stream_of(["", ""], max_skipped=1.0)))


def test_a_bad_end_of_an_epoch_does_not_stop_a_restart():
    stream = stream_of(["one", "two", "three", "", ""])
    stream.start_at(0, [(0, 3)])
    assert texts(stream, 7) == ["one", "two", "three"] * 2 + ["one"]


def test_a_process_without_rows_is_an_error():
    with pytest.raises(ValueError, match="fewer rows than processes times workers, 3"):
        next(iter(stream_of(["one", "two"], process=2, num_processes=3)))


def test_samples_to_evaluate_on_are_the_first_good_ones():
    stream = stream_of(["one", "", "two", "three"])
    assert [sample["text"] for sample in CheckedRows(stream.rows, stream.read, 2)] == ["one", "two"]
    assert len(CheckedRows(stream.rows, stream.read, 10)) == 3
    with pytest.raises(ValueError, match="no good sample to evaluate on: 1 no caption"):
        CheckedRows(stream_of([""]).rows, stream.read, 2)
