"""The pipelines of transformers on a repository: image-text-to-text, text-generation, any-to-any."""

import pytest
from transformers import TextStreamer, pipeline

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def images(golden) -> list[str]:
    return [str(golden / "official_checkpoint" / f"image_{i}.png") for i in range(2)]


@pytest.fixture(scope="module")
def chat(repo):
    return pipeline("image-text-to-text", model=str(repo), trust_remote_code=True)


@pytest.fixture(scope="module")
def writer(repo):
    return pipeline("text-generation", model=str(repo), trust_remote_code=True)


class Collected(TextStreamer):
    """Keeps the pieces it is given."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.pieces.append(text)


def ask(image: str) -> list:
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": QUESTION}]}]


def test_chats_one_by_one_and_in_batches(chat, images):
    chats = [ask(image) for image in images] + [ask(images[0])]
    one_by_one = [chat(text=single, return_full_text=False, generate_kwargs=GREEDY) for single in chats]
    for size in (2, 3):
        batched = chat(text=chats, batch_size=size, return_full_text=False, generate_kwargs=GREEDY)
        assert [answers[0]["generated_text"] for answers in batched] == [a[0]["generated_text"] for a in one_by_one]


def test_chat_streams(chat, images):
    streamer = Collected(chat.processor.tokenizer)
    (answer,) = chat(text=ask(images[0]), return_full_text=False, generate_kwargs=GREEDY | {"streamer": streamer})
    assert "".join(streamer.pieces) == answer["generated_text"]


def test_text_alone(writer):
    (plain,) = writer("A", **GREEDY, return_full_text=False)
    batched = writer(["A", "A longer text"], batch_size=2, **GREEDY, return_full_text=False)
    assert batched[0][0] == plain
    streamer = Collected(writer.tokenizer)
    (streamed,) = writer("A", **GREEDY, streamer=streamer, return_full_text=False)
    assert "".join(streamer.pieces) == streamed["generated_text"] == plain["generated_text"]
    (several,) = [writer("A", max_new_tokens=3, num_beams=3, num_return_sequences=2, eos_token_id=None)]
    assert len(several) == 2


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"text": ask("absent.png")}, (ValueError, OSError), r"absent\.png"),
        ({"text": "<image>\nA"}, ValueError, "1 places for images|1 places"),
        ({"text": "A", "images": ["absent.png"]}, (ValueError, OSError), r"absent\.png"),
    ],
    ids=["absent image", "place without an image", "image without a place"],
)
def test_wrong_chats(chat, inputs, error, message):
    with pytest.raises(error, match=message):
        chat(**inputs, generate_kwargs=GREEDY)


def test_any_to_any(repo, chat, images):
    anything = pipeline("any-to-any", model=str(repo), trust_remote_code=True)
    expected = chat(text=ask(images[0]), return_full_text=False, generate_kwargs=GREEDY)
    assert anything(text=ask(images[0]), return_full_text=False, generate_kwargs=GREEDY) == expected
