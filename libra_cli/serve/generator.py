"""The thread that generates answers one after the other, and the text that comes out of it piece by piece."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import InferenceThread
from transformers.generation.streamers import BaseStreamer

from modeling_libra import LibraForCausalLM

from .requests import ChatRequest


@dataclass(frozen=True)
class Ending:
    """
    How an answer ended.

    Args:
        finish_reason (`str`): `"stop"` at the end of the answer or a text to stop at, `"length"` otherwise.
        num_tokens (`int`): of the answer.
    """

    finish_reason: str
    num_tokens: int


class Generator:
    """
    Generates answers.

    Args:
        model ([`LibraForCausalLM`]): answers.
        tokenizer (`PreTrainedTokenizerBase`): makes text of its ids.
    """

    def __init__(self, model: LibraForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.thread = InferenceThread()

    async def generate(self, inputs: dict[str, Any], request: ChatRequest) -> AsyncGenerator[str | Ending, None]:
        """
        The pieces of an answer as they come, and how it ended. Closed before that, it ends generation as well.

        Args:
            inputs (`dict`): of the model; one row.
            request ([`ChatRequest`]): how to answer.

        Raises:
            RuntimeError: if the model fails.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def say(item: str | Ending | Exception) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        speaker = _Speaker(self.tokenizer, request.stop, say)
        self.thread.submit(self._run, inputs, request, speaker, say)
        try:
            while not isinstance(item := await queue.get(), Ending):
                if isinstance(item, Exception):
                    raise RuntimeError("The model failed at an answer.") from item  # no fault of the request
                yield item
            yield item
        finally:
            speaker.nobody_listens.set()

    def _run(self, inputs: dict[str, Any], request: ChatRequest, speaker: "_Speaker", say: Callable) -> None:
        try:
            self._seed(request.seed)
            self.model.generate(
                **inputs,
                generation_config=GenerationConfig(**request.generation_config),
                streamer=speaker,
                stopping_criteria=StoppingCriteriaList([_StopWhen(speaker.has_stopped)]),
            )
            say(Ending(self._finish_reason(speaker), len(speaker.ids)))
        except _NobodyListens:
            pass
        except Exception as error:
            say(error)

    @staticmethod
    def _seed(seed: int | None) -> None:
        """Seeds here, not where a request arrives: answers before this one draw from the same numbers."""
        if seed is None:
            torch.seed()  # or what was asked with a seed before would decide this answer too
        else:
            torch.manual_seed(seed)

    def _finish_reason(self, speaker: "_Speaker") -> str:
        ends = self.model.generation_config.eos_token_id
        is_end = any(last == ends if isinstance(ends, int) else last in (ends or ()) for last in speaker.ids[-1:])
        return "stop" if is_end or speaker.has_stopped.is_set() else "length"


class _NobodyListens(Exception):
    """Gets out of `generate()` when its answer is not wanted any more."""


class _Speaker(BaseStreamer):
    """
    Makes text of ids as they are generated, up to the first text to stop at.

    transformers' own `stop_strings` would index all of the vocabulary for each new text, and leave the text in the answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        stop (`list[str]`): texts to stop at.
        say (`Callable`): gets the pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[str], say: Callable[[str], None]):
        self.tokenizer = tokenizer.backend_tokenizer
        self.decoder = DecodeStream([], skip_special_tokens=True)
        self.stop = stop
        self.say = say
        self.ids: list[int] = []
        self.held = ""  # may turn out to be the beginning of a text to stop at
        self.has_stopped, self.nobody_listens = Event(), Event()
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one id at a time."""
        if self.nobody_listens.is_set():
            raise _NobodyListens
        if self.is_prompt:
            self.is_prompt = False
            return
        for token_id in value.tolist():
            self.ids.append(token_id)
            self._hear(self.decoder.step(self.tokenizer, token_id) or "")

    def end(self) -> None:
        if self.held:
            self.say(self.held)

    def _hear(self, piece: str) -> None:
        text = self.held + piece
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stop if stop in text]
        if found:
            self.has_stopped.set()
            end = min(found)[1]  # of what was complete first, however the text came in pieces
            self.held = ""
        else:
            end = len(text) - self._length_to_hold(text)
            self.held = text[end:]
        if end:
            self.say(text[:end])

    def _length_to_hold(self, text: str) -> int:
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((length for length in lengths if any(stop.startswith(text[-length:]) for stop in self.stop)), 0)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full(input_ids.shape[:1], self.event.is_set(), dtype=torch.bool)
