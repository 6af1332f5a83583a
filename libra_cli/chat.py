"""A conversation about images: a session that keeps the turns, and the prompt loop of `libra chat`."""

import os
from collections.abc import Iterable, Iterator
from threading import Thread
from typing import Any, TextIO

from transformers import TextIteratorStreamer

from modeling_libra import LibraForCausalLM
from processing.image_processing_libra import read_image
from processing.processing_libra import LibraProcessor

HELP = "/image PATH adds an image, /reset starts again, /help shows this, /quit or end of input leaves."


class ChatSession:
    """
    The turns of one conversation.

    Args:
        model ([`LibraForCausalLM`]): the model.
        processor ([`LibraProcessor`]): its processor.
        generate_kwargs: passed to `generate()`, for instance `max_new_tokens`.
    """

    def __init__(self, model: LibraForCausalLM, processor: LibraProcessor, **generate_kwargs: Any):
        self.model = model
        self.processor = processor
        self.generate_kwargs = generate_kwargs
        self.messages: list[dict[str, Any]] = []
        self._pending_images: list[Any] = []

    def add_image(self, image: Any) -> None:
        """
        Puts an image in front of the next question.

        Args:
            image (`str`, `os.PathLike` or `PIL.Image.Image`): a path, a URL or an image.

        Raises:
            ValueError: if it cannot be read.
        """
        self._pending_images.append(read_image(image))

    def reset(self) -> None:
        """Forgets all turns and images."""
        self.messages, self._pending_images = [], []

    def ask(self, question: str) -> Iterator[str]:
        """
        Asks a question, with all turns before it as context.

        Args:
            question (`str`): the user's text.

        Yields:
            `str`: pieces of the answer, as they are written.

        Raises:
            ValueError: if the conversation is too long for the model. It is then as before the question.
        """
        images = [{"type": "image", "image": image} for image in self._pending_images]
        turn = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
        inputs = self.processor.apply_chat_template(
            [*self.messages, turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        pieces = []
        for piece in stream(self.model, self.processor, **inputs, **self.generate_kwargs):
            pieces.append(piece)
            yield piece
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces).strip()}]}
        self.messages += [turn, answer]
        self._pending_images = []


def stream(model: LibraForCausalLM, processor: LibraProcessor, **kwargs: Any) -> Iterator[str]:
    """
    The text of `model.generate(**kwargs)` while it is written.

    Args:
        model ([`LibraForCausalLM`]): the model.
        processor ([`LibraProcessor`]): decodes; an image the model writes reads as `<image>`.
        kwargs: inputs and options of `generate()`.

    Yields:
        `str`: pieces of text.

    Raises:
        Exception: whatever `generate()` raises.
    """
    streamer = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(**kwargs, streamer=streamer)
        except BaseException as error:  # handed to the thread that reads
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def run_chat(session: ChatSession, lines: Iterable[str], output: TextIO) -> None:
    """
    Answers lines of input until there are no more.

    Args:
        session ([`ChatSession`]): the conversation.
        lines (`Iterable` of `str`): what the user types: questions, and the commands of `/help`.
        output (`TextIO`): gets the answers, and one line for each mistake of the user.
    """
    for line in lines:
        line = line.strip()
        if line == "/quit":
            return
        if not line:
            continue
        try:
            _answer(session, line, output)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=output, flush=True)


def _answer(session: ChatSession, line: str, output: TextIO) -> None:
    command, _, argument = line.partition(" ")
    if command == "/image":
        session.add_image(os.path.expanduser(argument.strip()))
        print("The image goes with your next question.", file=output, flush=True)
    elif command == "/reset":
        session.reset()
        print("Starting again.", file=output, flush=True)
    elif command.startswith("/"):
        print(HELP, file=output, flush=True)
    else:
        for piece in session.ask(line):
            print(piece, end="", file=output, flush=True)
        print(file=output, flush=True)


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """Lines typed at the terminal, each after a prompt, until end of input."""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()  # the terminal goes on in a new line
            return
