"""From what the chat shows to what the model reads, and its answer while it is written."""

from collections.abc import Iterator
from typing import Any

from libra_model import TURNS, load, stream
from transformers import TextIteratorStreamer
from uploads import VisitorError, open_image

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What models of this kind are tuned to read after a question that wants a short answer (the paper's Table 6)."""

REFUSED = "Not sent to the model"
"""Title of explanations; the model never reads them, nor what they explain."""

MAX_TEXT = 20_000
"""Most characters of a text, more than any context holds: longer ones are not worth tokenizing."""

LOWEST_TEMPERATURE = 0.05
"""Below it, differences of scores would exceed what numbers can hold."""

MAX_IMAGES = 8
"""Most images of one message."""


def read_history(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The turns of a chat as the chat template takes them.

    Args:
        history (`list[dict]`): messages of `gr.ChatInterface`: `role`, `content`, `metadata`.

    Returns:
        `list[dict]`: `role` and `content`, images as paths. What was refused, and questions without an answer, are
        left out.
    """
    turns: list[dict[str, Any]] = []
    for message in history:
        if (message.get("metadata") or {}).get("title") == REFUSED:
            continue
        parts = [_read_part(part) for part in _as_list(message["content"])]
        if turns and turns[-1]["role"] == message["role"] == "user":
            turns.pop()  # never answered: refused, or stopped at once
        turns.append({"role": message["role"], "content": parts})
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    return turns


def ask(
    text: str, files: list[str], history: list[dict[str, Any]], temperature: float, top_p: float, max_new_tokens: int
) -> Iterator[str]:
    """
    The answer to a message, growing.

    Args:
        text (`str`): the question. With images and no text, a caption is asked for.
        files (`list[str]`): paths of the images that come with it.
        history (`list[dict]`): messages before it.
        temperature (`float`): 0 for the likeliest words.
        top_p (`float`): in (0, 1], the share of the probability to sample from.
        max_new_tokens (`int`): longest answer.

    Yields:
        `str`: the answer so far.

    Raises:
        VisitorError: if an image cannot be read, the text has marks of its own, or the model has no room for all this.
    """
    if not text.strip() and not files:
        raise VisitorError("Type a question, or add an image.")
    check_text(text)
    if len(files) > MAX_IMAGES:
        raise VisitorError(f"That is {len(files)} images at once. Please send at most {MAX_IMAGES}.")
    images = [{"type": "image", "path": path} for path in files]
    question = text if text.strip() else load().processor.caption_prompt or ""
    turn = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
    inputs = prepare([*read_history(history), turn])
    room = room_for(inputs["input_ids"].shape[1])
    processor = load().processor
    streamer = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True)
    answer = ""
    options = sampling(temperature, top_p)
    for piece in stream(streamer, **inputs, **options, max_new_tokens=min(int(max_new_tokens), room)):
        answer += piece
        yield answer.strip()


def sampling(temperature: float, top_p: float = 1.0) -> dict[str, Any]:
    """
    Options of `generate()`.

    Args:
        temperature (`float`): 0 for the likeliest.
        top_p (`float`, *optional*, defaults to 1): in (0, 1]; 1 leaves nothing out.

    Returns:
        `dict`: `do_sample` and what goes with it.
    """
    if temperature <= 0:
        return {"do_sample": False}
    options = {"do_sample": True, "temperature": max(LOWEST_TEMPERATURE, float(temperature)), "top_k": 0}
    return options if top_p >= 1 else {**options, "top_p": float(top_p)}


def prepare(turns: list[dict[str, Any]]) -> Any:
    """
    What `generate()` takes.

    Args:
        turns (`list[dict]`): as [`read_history`] gives them.

    Returns:
        `BatchFeature`: `input_ids`, `attention_mask` and, with images, `image_features`, on the device of the model.

    Raises:
        VisitorError: if an image cannot be read.
    """
    messages = [{**turn, "content": [_with_pixels(part) for part in turn["content"]]} for turn in turns]
    libra = load()
    with TURNS:
        inputs = libra.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    return inputs.to(libra.model.device)


def _with_pixels(part):
    return {"type": "image", "image": open_image(part["path"])} if part["type"] == "image" else part


def check_text(text: str) -> None:
    """
    Refuses text that would be read as more than text, or not at all.

    Args:
        text (`str`): what a visitor typed.

    Raises:
        VisitorError: if it is too long, no Unicode, or holds a mark of the tokenizer, `<image>` among them.
    """
    if len(text) > MAX_TEXT:
        raise VisitorError(f"The text has {len(text)} characters. Please keep to {MAX_TEXT}.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # halves of letters; no browser sends them
        raise VisitorError("The text holds halves of letters, which no model can read. Please type it again.")
    processor = load().processor
    for mark in [processor.image_token, *processor.tokenizer.all_special_tokens]:
        if mark in text:
            raise VisitorError(
                f"The text holds {mark}, a mark the model uses for itself. Leave it out"
                + (", and add images with the button or by pasting." if mark == processor.image_token else ".")
            )


def room_for(length: int) -> int:
    """
    How many tokens fit after a prompt.

    Raises:
        VisitorError: if none do.
    """
    libra = load()
    limit = libra.model.config.text_config.max_position_embeddings
    if length >= limit:
        raise VisitorError(
            f"This conversation is {length} tokens long, and {libra.name} can read {limit} (an image takes "
            f"{libra.processor.num_image_tokens}). Clear the conversation, or send fewer images or a shorter text."
        )
    return limit - length


def _as_list(content):
    return content if isinstance(content, list) else [content]


def _read_part(part):
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.get("type") == "text":
        return {"type": "text", "text": part["text"]}
    return {"type": "image", "path": part["file"]["path"] if "file" in part else part["path"]}
