"""The Space through its API, as `gradio_client` and forged requests use it."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.space.conftest import NO_WARNINGS, REPOSITORY, free_port

pytestmark = NO_WARNINGS

SAMPLES = REPOSITORY / "samples"


@pytest.fixture(scope="module")
def client(space):
    return Client(space, verbose=False)


def visitor(space) -> Client:
    return Client(space, verbose=False)


def message(text, *images):
    return {"text": text, "files": [handle_file(str(image)) for image in images]}


def post(space, name, data, session="forged"):
    """Joins the queue with whatever `data` is, as no honest client would, and returns the last event."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{space}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{space}/gradio_api/call/{name}/{event}") as stream:
        return stream.read().decode()


def test_answers_and_remembers(space):
    me = visitor(space)
    assert me.predict(message("What is in the image?", SAMPLES / "airplane.png"), api_name="/chat") == "airplane"
    assert me.predict(message("How many objects are there?"), api_name="/chat") == "1"


def test_conversations_do_not_mix(space, monkeypatch):
    import conversation

    seen = []
    prepare = conversation.prepare
    monkeypatch.setattr(conversation, "prepare", lambda turns: seen.append(turns) or prepare(turns))
    one, other = visitor(space), visitor(space)
    one.predict(message("What is in the image?", SAMPLES / "airplane.png"), api_name="/chat")
    other.predict(message("What is in the image?", SAMPLES / "key.png"), api_name="/chat")
    one.predict(message("How many objects are there?"), api_name="/chat")
    said = [[part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"] for turns in seen]
    files = [[part["path"] for turn in turns for part in turn["content"] if part["type"] == "image"] for turns in seen]
    # Every visitor begins with the worked example, which is about the airplane.
    own = [[path.rsplit("/", 1)[-1] for path in paths][1:] for paths in files]
    assert own == [["airplane.png"], ["key.png"], ["airplane.png"]]
    assert len(said[2]) == len(said[0]) + 2


@pytest.mark.parametrize("mark", ["<image>", "</s>"])
def test_marks_cannot_be_typed(client, mark):
    answer = client.predict(message(f"What is in {mark}?"), api_name="/chat")
    assert "Not sent to the model" in str(answer)
    assert mark in str(answer)


@pytest.mark.parametrize("text", ["a" * 30_000, "caf\ud800"], ids=["long", "half a letter"])
def test_text_that_cannot_be_read_is_explained(space, text):
    assert "Not sent to the model" in post(space, "chat", [{"text": text, "files": []}, True, 0, 1, 8])


def test_the_lowest_temperatures_are_likeliest_words(space):
    assert "event: complete" in post(space, "chat", [{"text": "What?", "files": []}, True, 1e-40, 1, 8])


def test_too_long_a_conversation_is_explained(client):
    images = [SAMPLES / "airplane.png"] * 7
    answer = str(client.predict(message("What is in the image?", *images), api_name="/chat"))
    assert "libra-tiny can read 512" in answer


def test_a_wrong_file_is_explained(client, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    answer = str(client.predict(message("What is it?", tmp_path / "note.png"), api_name="/chat"))
    assert "note.png is not an image" in answer
    with pytest.raises(AppError, match="not an image"):
        client.predict(handle_file(str(tmp_path / "note.png")), 0, api_name="/tokenize")


def test_too_many_pixels_are_explained(client, tmp_path):
    Image.new("1", (7000, 7000)).save(tmp_path / "large.png")
    with pytest.raises(AppError, match=r"large\.png has 7000 x 7000 pixels"):
        client.predict(handle_file(str(tmp_path / "large.png")), 0, api_name="/tokenize")


def test_too_large_a_file_is_refused(client, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(11 * 2**20))
    with pytest.raises(ValueError, match=r"size|large"):
        client.predict(handle_file(str(tmp_path / "large.png")), 0, api_name="/tokenize")


@pytest.mark.parametrize("path", ["/etc/passwd", str(REPOSITORY / "samples" / "airplane.png"), "../../etc/passwd"])
@pytest.mark.parametrize("kind", [{"meta": {"_type": "gradio.FileData"}}, {}], ids=["file", "bare"])
def test_no_path_from_outside_opens_a_file(space, path, kind):
    file = {"path": path, **kind}
    for name, data in (
        ("tokenize", [file, 0]),
        ("look", [file, "What is in the image?"]),
        ("complete", [file, 7, "", 0]),
        ("chat", [{"text": "What is it?", "files": [file]}, True, 0, 1, 8]),
    ):
        told = post(space, name, data)
        assert "event: error" in told, name
        assert "no longer here" not in told  # nor does it say whether there is such a file


@pytest.mark.parametrize("path", ["/etc/passwd", str(REPOSITORY / "spaces_demo" / "app.py"), "/proc/self/environ"])
def test_no_file_is_served(space, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{space}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)


def test_codes_of_an_image(client):
    whole = client.predict(handle_file(str(SAMPLES / "horse.png")), 0, api_name="/tokenize")
    hidden = client.predict(handle_file(str(SAMPLES / "horse.png")), 40, api_name="/tokenize")
    assert whole.count("<title>row") == 2 * 64
    assert whole.count("<img alt=") == 2
    assert "40 of 64 patches hidden" in hidden
    assert whole.split("<svg")[1] != hidden.split("<svg")[1]


def test_completion_comes_row_by_row(client):
    job = client.submit(handle_file(str(SAMPLES / "strawberry.png")), 6, "strawberry", 0, api_name="/complete")
    job.result()
    told = [f"6 of 8 rows given, {rows} written" for rows in range(3)]
    assert len(job.outputs()) == 3
    assert all(words in html for words, html in zip(told, job.outputs()))


def test_where_an_answer_looks(client):
    said, words, maps, curves = client.predict(
        handle_file(str(SAMPLES / "airplane.png")), "What is in the image?", api_name="/look"
    )
    assert "airplane" in said
    assert [name for name, _ in words["choices"]] == ["whole answer", "airplane"]
    assert maps.count("<img") == 6
    assert curves.count("<img") == 2
    with pytest.raises(AppError, match="Type a question"):
        client.predict(handle_file(str(SAMPLES / "airplane.png")), " ", api_name="/look")


def test_who_leaves_stops_the_model(space, monkeypatch):
    import libra_model

    steps, ended = [], threading.Event()
    stream = libra_model.StepCriteria.__call__
    monkeypatch.setattr(
        libra_model.StepCriteria,
        "__call__",
        lambda self, *args, **kwargs: steps.append(1) or stream(self, *args, **kwargs),
    )
    generate = libra_model.load().model.generate

    def watched(**kwargs):
        try:
            return generate(**kwargs)
        finally:
            ended.set()

    monkeypatch.setattr(libra_model.load().model, "generate", watched)
    body = json.dumps({"data": ["horse", 4, 1.0]}).encode()
    request = urllib.request.Request(f"{space}/gradio_api/call/draw", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    stream_of_rows = urllib.request.urlopen(f"{space}/gradio_api/call/draw/{event}")
    assert b"event: generating" in stream_of_rows.readline()
    stream_of_rows.close()
    assert ended.wait(timeout=300)
    assert len(steps) < 63


def test_uploads_are_deleted_when_they_are_old(space, uploads_folder, tmp_path, monkeypatch):
    import page

    Image.new("RGB", (31, 17), "teal").save(tmp_path / "mine.png")  # like no other: same files share a place
    monkeypatch.setattr(page, "KEEP_FILES", (1, 2))  # seconds, in place of an hour
    short_lived = page.build_page()
    try:
        _, address, _ = short_lived.launch(
            **page.launch_options(), server_port=free_port(), prevent_thread_lock=True, quiet=True
        )
        visitor(address).predict(message("What is in the image?", tmp_path / "mine.png"), api_name="/chat")
        uploaded = list(uploads_folder.rglob("mine.png"))
        deadline = time.monotonic() + 60
        while any(path.exists() for path in uploaded) and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        short_lived.close()
    assert uploaded
    assert not any(path.exists() for path in uploaded)
