"""What a client may ask: the body of a chat request is checked and rebuilt, so that only what was checked goes on.

After this every image is a picture in memory: transformers, which would open a path of the server or any URL, gets
neither.
"""

import json
from dataclasses import dataclass
from typing import Any

from .errors import RequestError
from .images import ImageReader
from .limits import ServeLimits

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of OpenAI's messages, and what the chat template calls them."""

PLAIN_FIELDS = {"model", "messages", "stream", "stream_options"}
"""Fields that are checked for themselves."""

IGNORED_FIELDS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
}  # fmt: skip
"""Fields that have no influence on an answer, here as there."""

NEUTRAL_FIELDS: dict[str, tuple] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that this server does not do, and the values that ask for nothing."""

ANSWER_FIELDS = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "frequency_penalty", "seed", "stop"}

MIN_TEMPERATURE = 0.01
"""Below it the likeliest token is as good as certain, but the scores are soon divided by too little to be numbers."""

MAX_STOPS, MAX_STOP_LENGTH = 4, 1000


@dataclass(frozen=True)
class ServedModel:
    """
    What requests depend on.

    Args:
        name (`str`): what clients call the model.
        context (`int`): tokens of messages and answer together.
        image_tokens (`int`): of them for each image.
        generation_config (`dict`): how the model generates where the client does not say.
    """

    name: str
    context: int
    image_tokens: int
    generation_config: dict[str, Any]


@dataclass(frozen=True)
class ChatRequest:
    """
    A request that was checked.

    Args:
        messages (`list`): for the chat template, images as PIL images.
        generation_config (`dict`): everything about the answer but what follows.
        stop (`list[str]`): texts that end the answer, and are no part of it.
        seed (`int`, *optional*): of sampling.
        stream (`bool`): whether to send the answer in pieces.
        include_usage (`bool`): whether a stream ends with the number of tokens.
    """

    messages: list[dict[str, Any]]
    generation_config: dict[str, Any]
    stop: list[str]
    seed: int | None
    stream: bool
    include_usage: bool


async def check_request(body: Any, model: ServedModel, limits: ServeLimits, images: ImageReader) -> ChatRequest:
    """
    Checks the body of a chat request and gets its images.

    Args:
        body: what the client sent, parsed.
        model ([`ServedModel`]): the model that is served.
        limits ([`ServeLimits`]): of text, images and answers.
        images ([`ImageReader`]): gets them.

    Returns:
        [`ChatRequest`]: what is left to do.

    Raises:
        RequestError: naming the part of the body that cannot be had.
    """
    if not isinstance(body, dict):
        raise RequestError(f"The request must be a JSON object, found {type(body).__name__}.")
    _check_fields(body)
    if body.get("model") not in (None, model.name):
        raise RequestError(f"This server has {model.name!r} only, not {str(body['model'])[:100]!r}.", "model", 404)
    if body.get("stream") not in (None, True, False):
        raise RequestError("stream must be true or false.", "stream")
    options = {
        "generation_config": _answer_options(body, limits, model.generation_config),
        "stop": _stops(body.get("stop")),
        "seed": _number(body, "seed", 0, 2**63 - 1, int),
        "stream": bool(body.get("stream")),
        "include_usage": _wants_usage(body.get("stream_options")),
    }
    return ChatRequest(messages=await _check_messages(body.get("messages"), model, limits, images), **options)


def _check_fields(body: dict[str, Any]) -> None:
    known = PLAIN_FIELDS | IGNORED_FIELDS | NEUTRAL_FIELDS.keys() | ANSWER_FIELDS
    for name, value in body.items():
        if value is None:
            continue
        if name not in known:
            done = ", ".join(sorted(known - NEUTRAL_FIELDS.keys()))
            raise RequestError(f"This server does not do {name[:50]!r}; it knows: {done}.", name[:50])
        if name in NEUTRAL_FIELDS and value not in NEUTRAL_FIELDS[name]:
            neutral = " or ".join(map(json.dumps, NEUTRAL_FIELDS[name]))
            raise RequestError(f"This server does not do {name!r}: leave it out, or send {neutral}.", name)


def _answer_options(body: dict[str, Any], limits: ServeLimits, generation_config: dict[str, Any]) -> dict[str, Any]:
    """The client's wishes as one configuration. Who names a temperature wants sampling; transformers would not sample."""
    config = dict(generation_config)
    longest = [_number(body, name, 1, limits.max_tokens, int) for name in ("max_completion_tokens", "max_tokens")]
    config["max_new_tokens"] = longest[0] or longest[1] or limits.max_tokens
    config["max_time"] = float(limits.timeout)
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    penalty = _number(body, "frequency_penalty", 0, 2)
    if temperature is not None:
        config |= {"do_sample": temperature >= MIN_TEMPERATURE, "temperature": temperature}
    if top_p is not None:
        config["top_p"] = top_p
    if penalty is not None:
        config["repetition_penalty"] = 1 + penalty
    if not config.get("do_sample"):  # transformers warns of options that only sampling reads
        for name in ("temperature", "top_p", "top_k"):
            config.pop(name, None)
    return config


def _number(body: dict[str, Any], name: str, low: float, high: float, kind: type = float) -> Any:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (kind is int and value != int(value)):  # NaN is never between
        noun = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} must be {noun} from {low} to {high}, found {str(value)[:50]}.", name)
    return kind(value)


def _stops(stop: Any) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stops)
    ):
        raise RequestError(
            f"stop must be a text or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters.", "stop"
        )
    for text in stops:
        _check_utf8(text, "stop")
    return stops


def _wants_usage(options: Any) -> bool:
    if options is None:
        return False
    known = {
        "include_usage",
        "include_obfuscation",
    }  # the second pads events on their way; there is nothing to hide here
    if (
        not isinstance(options, dict)
        or not options.keys() <= known
        or options.get("include_usage") not in (None, True, False)
    ):
        raise RequestError('stream_options must be {"include_usage": true} or false.', "stream_options")
    return bool(options.get("include_usage"))


async def _check_messages(
    messages: Any, model: ServedModel, limits: ServeLimits, images: ImageReader
) -> list[dict[str, Any]]:
    """Everything that is wrong without a look at images first: those may have to be downloaded."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message.", "messages")
    count = sum(map(_count_parts, messages))
    if count > limits.max_parts:
        raise RequestError(f"The messages have {count} parts, the most is {limits.max_parts}.", "messages")
    checked = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    parts = [
        (part, f"messages[{m}].content[{p}]")
        for m in range(len(checked))
        for p, part in enumerate(checked[m]["content"])
    ]
    text = sum(len(part["text"]) for part, _ in parts if "text" in part)
    if text > limits.max_text:
        raise RequestError(f"The messages have {text} characters of text, the most is {limits.max_text}.", "messages")
    with_image = [(part, where) for part, where in parts if "image" in part]
    _check_number_of_images(len(with_image), model, limits)
    for part, where in with_image:
        try:
            part["image"] = await images.read(part["image"])
        except ValueError as error:
            raise RequestError(f"{where}: {error}", where) from error
    return checked


def _count_parts(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    return len(content) if isinstance(content, list) else 1


def _check_number_of_images(number: int, model: ServedModel, limits: ServeLimits) -> None:
    if number > limits.max_images:
        raise RequestError(f"The messages have {number} images, the most is {limits.max_images}.", "messages")
    if number * model.image_tokens >= model.context:
        raise RequestError(
            f"The messages have {number} images of {model.image_tokens} tokens each, but the context of the model is "
            f"{model.context}.",
            "messages",
        )


def _check_message(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where} must be an object with a role, one of: {', '.join(ROLES)}.", where)
    if message.get("tool_calls") or message.get("function_call"):
        raise RequestError(f"{where} calls a tool; this server does not do tools.", where)
    content = message.get("content")
    if content is None and role == "assistant":  # OpenAI's clients send an answer back as they got it
        content = ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(f"The content of {where} must be a text or a list of parts.", f"{where}.content")
    parts = [_check_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {"role": ROLES[role], "content": parts}


def _check_part(part: Any, where: str) -> dict[str, Any]:
    """A part as the chat template has it; an image is still its URL."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _check_utf8(part["text"], where)
        return {"type": "text", "text": part["text"]}
    image = part.get("image_url") if kind == "image_url" else None
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str):
        return {"type": "image", "image": url}
    raise RequestError(
        f'{where} must be {{"type": "text", "text": TEXT}} or {{"type": "image_url", "image_url": {{"url": URL}}}}.',
        where,
    )


def _check_utf8(text: str, where: str) -> None:
    """JSON can write half of a surrogate pair, which is no character; tokenizers fail at it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is no valid Unicode: {error.reason} at character {error.start}.", where) from error
