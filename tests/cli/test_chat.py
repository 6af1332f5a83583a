"""Conversations: the session that keeps the turns, streaming, and the prompt loop."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from libra_cli.chat import ChatSession, run_chat, stream
from libra_cli.loading import load_libra

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def loaded(repo):
    return load_libra(repo)


@pytest.fixture
def session(loaded) -> ChatSession:
    return ChatSession(*loaded, **GREEDY)


@pytest.fixture
def image(golden) -> str:
    return str(golden / "official_checkpoint" / "image_0.png")


def converse(session: ChatSession, *lines: str) -> list[str]:
    output = io.StringIO()
    run_chat(session, [line + "\n" for line in lines], output)
    return output.getvalue().splitlines()


def test_first_answer_is_that_of_the_release(loaded, image, golden):
    official = json.loads((golden / "official_checkpoint" / "expected.json").read_text(encoding="utf-8"))
    session = ChatSession(*loaded, **{**GREEDY, "max_new_tokens": 16})
    session.add_image(image)
    assert "".join(session.ask(official["questions"][0])).strip() == official["answers"][0]


def test_answer_comes_in_pieces(session, image):
    session.add_image(image)
    assert len(list(session.ask("What is in this image?"))) > 1


def test_turns_are_context(session, image):
    session.add_image(image)
    list(session.ask("What is it?"))
    list(session.ask("Where?"))
    roles = [message["role"] for message in session.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    kinds = [[part["type"] for part in message["content"]] for message in session.messages]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]
    assert session.messages[1]["content"][0]["text"] == session.messages[1]["content"][0]["text"].strip()


def test_images_in_later_turns(session, image):
    list(session.ask("Hello."))
    session.add_image(image)
    session.add_image(Image.open(image))
    list(session.ask("Are they the same?"))
    assert [part["type"] for part in session.messages[2]["content"]] == ["image", "image", "text"]


def test_reset_forgets(session, image):
    session.add_image(image)
    first = list(session.ask("What is it?"))
    session.add_image(image)
    session.reset()
    assert session.messages == []
    session.add_image(image)
    assert list(session.ask("What is it?")) == first


def test_conversation_longer_than_the_context(session, image):
    session.add_image(image)
    with pytest.raises(ValueError, match="context of the model is 256"):
        list(session.ask("word " * 300))
    assert session.messages == []
    assert len(list(session.ask("What is it?"))) > 0  # the image is still there
    assert [part["type"] for part in session.messages[0]["content"]] == ["image", "text"]


def test_failure_while_writing_reaches_the_reader(loaded):
    model, processor = loaded
    inputs = processor(text="Hello", return_tensors="pt")
    with pytest.raises(ValueError, match="nonsense"):
        list(stream(model, processor, **inputs, nonsense=1))


def test_loop_answers_each_line(session, image):
    lines = converse(session, f"/image {image}", "What is in this image?", "", "And now?")
    assert lines[0].startswith("The image goes with")
    assert lines[1].strip() == session.messages[1]["content"][0]["text"]
    assert len(session.messages) == 4


def test_loop_commands(session, image):
    lines = converse(session, "/help", "/reset", "/quit", "never asked")
    assert "/image PATH" in lines[0]
    assert lines[1:] == ["Starting again."]
    assert session.messages == []


@pytest.mark.parametrize("argument", ["", "absent.png", "broken.png"])
def test_loop_survives_images_it_cannot_read(session, tmp_path, argument):
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = str(tmp_path / argument) if argument else ""
    lines = converse(session, f"/image {path}", "Hello")
    assert lines[0].startswith("error: ")
    assert argument in lines[0]
    assert len(session.messages) == 2


def test_home_folder_in_paths(session, image, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(image).parent))
    assert converse(session, "/image ~/image_0.png") == ["The image goes with your next question."]
