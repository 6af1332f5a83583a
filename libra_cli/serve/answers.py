"""Answers in the form of OpenAI's API: a request is prepared for the model, and what the model says is put into JSON.

Nothing here holds up the event loop: requests are prepared by a worker and answered by the thread of [`Generator`].
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

from .errors import SERVER_FAULT, RequestError, error_body
from .generator import Ending, Generator
from .requests import ChatRequest

logger = logging.getLogger(__name__)


class ChatAnswers:
    """
    Answers requests with one model.

    Args:
        name (`str`): what clients call the model.
        model ([`LibraForCausalLM`]): answers.
        processor ([`LibraProcessor`]): its processor, on its device.
        worker (`Executor`): renders, tokenizes and encodes, one request at a time.
    """

    def __init__(self, name: str, model: LibraForCausalLM, processor: LibraProcessor, worker: Executor):
        self.name = name
        self.model = model
        self.processor = processor
        self.worker = worker
        self.generator = Generator(model, processor.tokenizer)

    async def answer(self, request: ChatRequest) -> JSONResponse | StreamingResponse:
        """
        The answer to a request, whole or as a stream of events.

        Raises:
            ValueError: if the messages do not fit the chat template or the context of the model.
        """
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self.worker, self._prepare, request.messages)
        prompt_tokens = inputs["input_ids"].shape[-1]
        left = self.model.config.text_config.max_position_embeddings - prompt_tokens
        config = request.generation_config
        fitting = config | {"max_new_tokens": min(config["max_new_tokens"], left)}
        pieces = self.generator.generate(inputs, replace(request, generation_config=fitting))
        if request.stream:
            events = self._events(pieces, prompt_tokens, request.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(await self._completion(pieces, prompt_tokens))

    def _prepare(self, messages: list[dict[str, Any]]) -> Any:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        context, length = self.model.config.text_config.max_position_embeddings, inputs["input_ids"].shape[-1]
        if length >= context:
            raise RequestError(
                f"The messages have {length} tokens, but the context of the model is {context}.", "messages"
            )
        return inputs.to(self.model.device)

    async def _completion(self, pieces: AsyncGenerator[str | Ending, None], prompt_tokens: int) -> dict[str, Any]:
        text, reason, usage = "", "", {}
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Ending):
                    reason, usage = piece.finish_reason, _usage(prompt_tokens, piece)
                else:
                    text += piece
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    async def _events(
        self, pieces: AsyncGenerator[str | Ending, None], prompt_tokens: int, include_usage: bool
    ) -> AsyncIterator[str]:
        head = self._head("chat.completion.chunk")

        def chunk(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _event({**head, "choices": [choice]} | ({"usage": None} if include_usage else {}))

        try:
            yield chunk({"role": "assistant", "content": ""})
            async with aclosing(pieces):
                async for piece in pieces:
                    if not isinstance(piece, Ending):
                        yield chunk({"content": piece})
                        continue
                    yield chunk({}, piece.finish_reason)
                    if include_usage:
                        yield _event({**head, "choices": [], "usage": _usage(prompt_tokens, piece)})
            yield "data: [DONE]\n\n"
        except Exception:
            logger.exception("An answer failed in the middle of its stream.")
            yield _event(error_body(SERVER_FAULT, 500))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{os.urandom(12).hex()}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


def _usage(prompt_tokens: int, ending: Ending) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": ending.num_tokens,
        "total_tokens": prompt_tokens + ending.num_tokens,
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
