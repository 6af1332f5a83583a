"""The server: transformers' chat handler behind the checks of `requests.py` and the limits of `limits.py`.

`transformers serve` loads whatever model a client names, follows URLs and paths of images wherever they lead, and takes
as long as it takes. Of it only the handler of `/v1/chat/completions` is used, which generates and writes answers in the
form of OpenAI's API, with one model that is loaded before. Clients are served at the same time; their answers are
generated one after the other.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from pathlib import Path
from threading import Event
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

from ..loading import load_libra, to_accelerator
from .images import ImageReader
from .limits import ServeLimits
from .requests import RequestError, check_request

CHAT = "/v1/chat/completions"


def serve(model: str, host: str, port: int, limits: ServeLimits, allowed_hosts: Collection[str]) -> None:
    """
    Serves a model until the process is interrupted.

    Args:
        model (`str`): folder or Hub id, as in [`load_libra`].
        host (`str`): address to listen at.
        port (`int`): of it; 0 takes a free one.
        limits ([`ServeLimits`]): of the clients.
        allowed_hosts (`Collection` of `str`): hosts of images, `name` or `name:port`, that need not be public.

    Raises:
        ValueError, OSError: if the model cannot be loaded, or the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:  # before the model: loading may take minutes
        app = make_app(*to_accelerator(*load_libra(model)), name_of(model), limits, allowed_hosts)
        address = f"[{host}]" if ":" in host else host
        print(f"Serving {name_of(model)} at http://{address}:{listener.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def name_of(model: str | os.PathLike) -> str:
    """The name clients know a model by: a Hub id as it is, of a folder only its own name."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def make_app(
    model: LibraForCausalLM,
    processor: LibraProcessor,
    name: str,
    limits: ServeLimits,
    allowed_hosts: Collection[str] = (),
) -> FastAPI:
    """
    The web application: `POST /v1/chat/completions`, `GET /v1/models` and `GET /health`.

    Args:
        model ([`LibraForCausalLM`]): answers.
        processor ([`LibraProcessor`]): its processor, on its device.
        name (`str`): what clients call the model.
        limits ([`ServeLimits`]): of the clients.
        allowed_hosts (`Collection` of `str`, *optional*, defaults to none): hosts of images that need not be public.

    Returns:
        `FastAPI`: it answers every error in the form of OpenAI's API.
    """
    app = FastAPI(title="Libra", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Gate, limits=limits)
    handler = ChatCompletionHandler(model_manager=_OneModel(name, model, processor), generation_state=_OneGenerator())
    images = ImageReader(limits, allowed_hosts)
    defaults = model.generation_config.to_diff_dict()

    @app.post(CHAT)
    async def chat_completions(request: Request):
        checked = await check_request(await _read_json(request, limits), name, limits, images, defaults)
        response = await _while_connected(handler.handle_request(checked, f"chatcmpl-{os.urandom(12).hex()}"), request)
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_end(response.body_iterator)
        return response

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "libra"}]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.exception_handler(Exception)
    @app.exception_handler(HTTPException)
    @app.exception_handler(ValueError)
    @app.exception_handler(TemplateError)  # the chat template refuses an order of messages
    async def answer_error(request: Request, error: Exception):
        return _error_response(error)

    return app


def _error_response(error: Exception) -> JSONResponse:
    """An error as OpenAI's API has it. What is no fault of the client's is not told to the client."""
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, (ValueError, TemplateError)):
        status, message = getattr(error, "status", 400), str(error)
    else:
        status, message = 500, "Something went wrong in the server; its log says what."
    return JSONResponse(_error_body(message, status, getattr(error, "param", None)), status)


def _error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def _read_json(request: Request, limits: ServeLimits) -> Any:
    try:
        return json.loads(await asyncio.wait_for(_read_body(request, limits.max_body_bytes), limits.image_timeout))
    except asyncio.TimeoutError as error:
        raise RequestError(f"The request was not sent within {limits.image_timeout} seconds.", status=408) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The request is no valid JSON ({error}).") from error


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RequestError(f"The request has more than {max_bytes} bytes, the most this server reads.", status=413)
    return bytes(body)


async def _while_connected(work, request: Request):
    """The result of `work`, which is given up when the client hangs up or this is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with_end(events: Any) -> AsyncIterator[Any]:
    """The events of a stream, and the one that ends OpenAI's streams."""
    async with aclosing(events):
        async for event in events:
            yield event
    yield "data: [DONE]\n\n"


class _Gate:
    """ASGI middleware: chat requests at a time, and seconds for each, from its first byte to the last of the answer."""

    def __init__(self, app, limits: ServeLimits):
        self.app = app
        self.limits = limits
        self.running = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != CHAT:
            await self.app(scope, receive, send)
        elif self.running >= self.limits.max_requests:
            busy = f"The server is busy with {self.running} requests. Try again later."
            await JSONResponse(_error_body(busy, 503), 503, {"Retry-After": "5"})(scope, receive, send)
        else:
            self.running += 1
            try:
                await self._in_time(scope, receive, send)
            finally:
                self.running -= 1

    async def _in_time(self, scope, receive, send):
        has_begun = False

        async def watched_send(message):
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await asyncio.wait_for(self.app(scope, receive, watched_send), self.limits.timeout)
        except asyncio.TimeoutError:
            body = _error_body(f"The answer took longer than {self.limits.timeout} seconds.", 504)
            if has_begun:  # a stream
                await send({"type": "http.response.body", "body": f"data: {json.dumps(body)}\n\n".encode()})
            else:
                await JSONResponse(body, 504)(scope, receive, send)


class _OneModel:
    """What the handler asks of its model manager: here there is one model, and it is loaded."""

    def __init__(self, name: str, model: LibraForCausalLM, processor: LibraProcessor):
        self.force_model = name
        self.loaded = (model, processor)

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str, **kwargs) -> tuple[LibraForCausalLM, LibraProcessor]:
        return self.loaded

    def get_model_modality(self, model, processor=None) -> Modality:
        return Modality.VLM


class _OneGenerator(GenerationState):
    """Hands out one generator, whatever the model is called."""

    def __init__(self):
        super().__init__()
        self.generator = _Generator()

    def get_manager(self, model_id, use_cb=False):
        return self.generator


class _Generator(GenerateManager):
    """transformers' thread that generates answers one after the other; answers end with the model's context."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        _fit(gen_config, model, inputs)
        return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """As transformers', but generation ends when nobody waits for it any more. (Streams do that by themselves.)"""
        _fit(gen_config, model, inputs)
        nobody_waits = Event()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([_StopWhen(nobody_waits)])}
        answer = super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        try:
            return await asyncio.shield(answer)
        finally:
            nobody_waits.set()


def _fit(gen_config, model: LibraForCausalLM, inputs) -> None:
    context, length = model.config.text_config.max_position_embeddings, inputs["input_ids"].shape[-1]
    if length >= context:
        raise RequestError(f"The messages have {length} tokens, but the context of the model is {context}.", "messages")
    gen_config.max_new_tokens = min(gen_config.max_new_tokens, context - length)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full(input_ids.shape[:1], self.event.is_set(), dtype=torch.bool)
