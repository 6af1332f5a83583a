"""Batches for instruction tuning in which the answers, and nothing else, are supervised.

What is an answer is read from the `{% generation %}` marks of the chat template; each answer ends in the token that ends
a turn. A template without marks, or a sample that is left without an answer, is an error that names the sample: its loss
would be 0, or that of everything else.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import prepare_multimodal_messages

from processing.processing_libra import NO_LENGTH_LIMIT, LibraProcessor

from .conversations import BadSample, Message, answers_of, sample_name, text_of


@dataclass
class AnswerCollator:
    """
    Conversations to batches.

    Args:
        processor ([`LibraProcessor`]): makes ids. It stops at pixels: the trainer tokenizes them on the device.
        max_length (`int`, *optional*): tokens of a row, those of its images included; what is longer is cut off.
    """

    processor: LibraProcessor
    max_length: int | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples (`list` of `dict`):
                `messages`, `images` (`list` of `PIL.Image.Image`, may be empty) and, for messages of errors, `id`.
                Messages have parts, or strings and then the images are before the first question.

        Returns:
            `dict` with `input_ids`, `attention_mask` and `labels` of shape `(batch, length)`, padded on the right, and
            `pixel_values` of shape `(images, 3, height, width)` if there are images. In place of every code is the
            first one, until [`LibraProcessor.tokenize_images`].

        Raises:
            ValueError: naming the sample of which no answer is left, or in which something else is supervised.
        """
        batch = self.processor.apply_chat_template(
            [prepare_multimodal_messages(sample["messages"], sample["images"]) for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "truncation": self.max_length is not None,
                "max_length": self.max_length,
                "add_special_tokens": False,  # the template writes them
                "tokenize_images": False,
            },
        )
        answers = (batch.pop("assistant_masks") == 1) & (batch["attention_mask"] == 1)
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
        for sample, row in zip(samples, batch["labels"]):
            self._check(sample, row)
        return dict(batch)

    def _check(self, sample: dict[str, Any], labels: torch.Tensor) -> None:
        """Refuses labels of one row without an answer, or with images."""
        if not (labels != -100).any():
            raise ValueError(
                f"{sample_name(None, sample)} has no supervised token. Either max_length ({self.max_length}) cuts off "
                "its answers, or the chat template does not mark them with {% generation %}."
            )
        if (labels >= self.processor.text_vocab_size).any():
            raise ValueError(
                f"{sample_name(None, sample)} has image tokens among its answers; the chat template must mark what the "
                "assistant writes with {% generation %}, and nothing else."
            )


def row_length(processor: LibraProcessor, max_length: int | None) -> int | None:
    """
    How long a row may be.

    Args:
        processor ([`LibraProcessor`]): its tokenizer knows the context of the model.
        max_length (`int`, *optional*): what is asked for.

    Returns:
        `int`: that, or the context of the model if it is less; None if neither is known.
    """
    known = [length for length in (max_length, processor.tokenizer.model_max_length) if length is not None]
    return min(known) if min(known) <= NO_LENGTH_LIMIT else None


@dataclass
class ConversationCheck:
    """
    Refuses conversations that would not be learned as they are written.

    - Their texts have special tokens of the tokenizer, such as `</s>`: they would end the answer instead of being read.
    - `max_length` would leave no answer, or would cut into an image. What ends in the first answer and what holds the last
      image must fit, and one token more.

    Args:
        processor ([`LibraProcessor`]): counts tokens.
        max_length (`int`, *optional*): tokens of a row; without it everything fits.
    """

    processor: LibraProcessor
    max_length: int | None = None

    def __post_init__(self) -> None:
        self._special = self.processor.tokenizer.all_special_tokens
        self._frame = len(self._render([{"role": "user", "content": ""}]).encode())

    def __call__(self, messages: list[Message], num_images: int) -> None:
        """
        Args:
            messages (`list` of `dict`): with parts.
            num_images (`int`): their images.

        Raises:
            BadSample: if they are too long, or have special tokens.
        """
        for place, message in enumerate(messages):
            special = next((token for token in self._special if token in text_of(message)), None)
            if special is not None:
                detail = f"has {special!r} in turn {place}, which is not text to the tokenizer; write it in another way"
                raise BadSample("special token", detail)
        if self.max_length is None:
            return
        last_image = max(
            (place for place, message in enumerate(messages) if any(p["type"] == "image" for p in message["content"])),
            default=0,
        )
        first_answer = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
        needed = messages[: max(last_image + 1, first_answer)]
        image_tokens = num_images * self.processor.num_image_tokens
        turns = sum(self._frame + len(text_of(message).encode()) for message in needed)
        if turns + image_tokens < self.max_length:  # a token is a byte at least: most samples need no more than this
            return
        ids = self.processor.tokenizer(self._render(needed), add_special_tokens=False)["input_ids"]
        length = len(ids) + image_tokens - num_images
        if length >= self.max_length:
            detail = (
                f"needs {length + 1} tokens up to its first answer and its last image, but max_length is "
                f"{self.max_length}"
            )
            raise BadSample("too long", detail)

    def _render(self, messages: list[Message]) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_supervision(collator: AnswerCollator, samples: list[dict[str, Any]]) -> None:
    """
    Decodes what is supervised in a few samples and compares it with their answers, before anything is trained.

    Args:
        collator ([`AnswerCollator`]): of the run.
        samples (`list` of `dict`): as it takes them.

    Raises:
        ValueError: if the chat template has no marks, or supervises anything but whole answers, each with the token that
            ends its turn, up to `max_length`; it names the sample, what was found and what was expected.
    """
    processor = collator.processor
    if not has_generation_markers(processor.chat_template):
        raise ValueError(
            "The chat template of the processor has no {% generation %} ... {% endgeneration %} around what the assistant "
            "writes, so answers cannot be told from questions. Leave it out to get Libra's own, or add the marks."
        )
    for sample in samples:
        labels = collator([sample])["labels"][0]
        eos = processor.tokenizer.eos_token
        found = [_compact(text) for text in supervised_texts(processor, labels)]
        expected = [_compact(_as_tokens(processor, answer)) + eos for answer in answers_of(sample["messages"])]
        if len(labels) == collator.max_length:  # cut off
            expected = expected[: len(found)]
            expected[-1] = expected[-1][: len(found[-1])]
        if found != expected:
            raise ValueError(
                f"{sample_name(None, sample)}: the chat template supervises {found}, expected its answers, each with "
                f"the end of its turn: {expected} (spaces left out)."
            )


def supervised_texts(processor: LibraProcessor, labels: torch.Tensor) -> list[str]:
    """
    What is supervised, as text.

    Args:
        processor ([`LibraProcessor`]): decodes.
        labels (`torch.LongTensor` of shape `(length,)`): -100 where nothing is supervised.

    Returns:
        `list` of `str`: one for each run of supervised tokens.
    """
    runs = groupby(labels.tolist(), key=lambda label: label != -100)
    return processor.batch_decode([list(run) for supervised, run in runs if supervised])


def _as_tokens(processor: LibraProcessor, text: str) -> str:
    """A text as the tokenizer keeps it: some know fewer characters than there are."""
    return processor.batch_decode([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])[0]


def _compact(text: str) -> str:
    return re.sub(r"\s", "", text)
