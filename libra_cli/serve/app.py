"""The server: checks of `requests.py`, answers of `answers.py`, and the limits of `limits.py` around both.

`transformers serve` loads whatever model a client names, follows URLs and paths of images wherever they lead, and takes
as long as it takes. Of it only the thread that generates is used, with one model that is loaded before. Clients are
served at the same time; their answers are generated one after the other.
"""

import asyncio
import json
import os
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

from ..loading import load_libra, to_accelerator
from .answers import ChatAnswers
from .errors import RequestError, error_body, error_response
from .images import ImageReader
from .limits import ServeLimits
from .requests import ServedModel, check_request

CHAT = "/v1/chat/completions"

IMAGE_SCALE = 4
"""Sides of the image the model sees that a client's image may have until it is shrunk: enough to lose nothing."""


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
    The web application: `POST /v1/chat/completions`, `GET /v1/models`, `GET /v1/models/ID` and `GET /health`.

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
    worker = ThreadPoolExecutor(1, "prepare")  # images and requests take much memory for a moment: one at a time
    side = IMAGE_SCALE * processor.image_tokenizer.config.vision_config.image_size
    images = ImageReader(limits, side, worker, allowed_hosts)
    answers = ChatAnswers(name, model, processor, worker)
    context = model.config.text_config.max_position_embeddings
    served = ServedModel(name, context, processor.num_image_tokens, model.generation_config.to_diff_dict())
    card = {"id": name, "object": "model", "created": 0, "owned_by": "libra"}

    async def answer(body: Any) -> Response:
        return await answers.answer(await check_request(body, served, limits, images))

    @app.post(CHAT)
    async def chat_completions(request: Request):
        return await _while_connected(answer(await _read_json(request, limits)), request)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_id:path}")  # ids of the Hub have a slash
    async def model_card(model_id: str):
        if model_id != name:
            raise RequestError(f"This server has {name!r} only, not {model_id[:100]!r}.", "model", 404)
        return card

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.exception_handler(Exception)
    @app.exception_handler(HTTPException)
    @app.exception_handler(ValueError)
    @app.exception_handler(TemplateError)  # the chat template refuses an order of messages
    async def answer_error(request: Request, error: Exception):
        return error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(request: Request, error: Exception):
        return Response()

    return app


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
            await JSONResponse(error_body(busy, 503), 503, {"Retry-After": "5"})(scope, receive, send)
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
            body = error_body(f"The answer took longer than {self.limits.timeout} seconds.", 504)
            if has_begun:  # a stream
                await send({"type": "http.response.body", "body": f"data: {json.dumps(body)}\n\n".encode()})
            else:
                await JSONResponse(body, 504)(scope, receive, send)
