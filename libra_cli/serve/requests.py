"""What a client may ask: the body of a chat request is checked and rebuilt, so that only what was checked goes on.

After this every image is a data URI that was seen to be an image: transformers, which would open a path of the server or
any URL, gets neither.
"""

import json
from typing import Any

from .images import ImageReader
from .limits import ServeLimits

ROLES = ("system", "user", "assistant")

PLAIN_FIELDS = {"model", "messages", "stream", "n", "logprobs", "user", "metadata", "store", "service_tier"}
"""Fields that are checked for themselves, or have no influence on an answer here."""

ANSWER_FIELDS = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "frequency_penalty", "seed"}


class RequestError(ValueError):
    """
    A request that is refused.

    Args:
        message (`str`): what was wrong, what was expected.
        param (`str`, *optional*): where in the request.
        status (`int`, *optional*, defaults to 400): of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


async def check_request(
    body: Any, model_name: str, limits: ServeLimits, images: ImageReader, generation_config: dict[str, Any]
) -> dict[str, Any]:
    """
    Checks the body of a chat request and gets its images.

    Args:
        body: what the client sent, parsed.
        model_name (`str`): the model that is served.
        limits ([`ServeLimits`]): of text, images and answers.
        images ([`ImageReader`]): gets them.
        generation_config (`dict`): how the model generates where the client does not say.

    Returns:
        `dict`: the body for transformers: `messages` with images as data URIs, `stream`, `seed`, and everything about
        the answer in `generation_config`.

    Raises:
        RequestError: naming the part of the body that cannot be had.
    """
    if not isinstance(body, dict):
        raise RequestError(f"The request must be a JSON object, found {type(body).__name__}.")
    known = sorted(PLAIN_FIELDS | ANSWER_FIELDS)
    for name, value in body.items():
        if name not in known and value is not None:
            raise RequestError(f"This server does not do {name[:50]!r}; it knows: {', '.join(known)}.", name[:50])
    if body.get("model") not in (None, model_name):
        raise RequestError(f"This server has {model_name!r} only, not {str(body['model'])[:100]!r}.", "model", 404)
    if body.get("n") not in (None, 1) or body.get("logprobs"):
        raise RequestError("This server gives one answer and no log-probabilities: n is 1, logprobs is false.", "n")
    if body.get("stream") not in (None, True, False):
        raise RequestError("stream must be true or false.", "stream")
    config = _answer_options(body, limits, generation_config)
    checked = {
        "model": model_name,
        "messages": await _check_messages(body.get("messages"), limits, images),
        "stream": bool(body.get("stream")),
        "generation_config": json.dumps(config),
    }
    seed = _number(body, "seed", 0, 2**63 - 1, int)
    return checked if seed is None else checked | {"seed": seed}


def _answer_options(body: dict[str, Any], limits: ServeLimits, generation_config: dict[str, Any]) -> dict[str, Any]:
    """The client's wishes as one configuration. Who names a temperature wants sampling; transformers would not sample."""
    config = dict(generation_config)
    longest = [_number(body, name, 1, limits.max_tokens, int) for name in ("max_completion_tokens", "max_tokens")]
    config["max_new_tokens"] = longest[0] or longest[1] or limits.max_tokens
    config["max_time"] = float(limits.timeout)
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    penalty = _number(body, "frequency_penalty", 0, 2)
    if temperature is not None:
        config |= {"do_sample": temperature > 0, "temperature": temperature}
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
    if not is_number or not low <= value <= high or (kind is int and value != int(value)):
        noun = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} must be {noun} from {low} to {high}, found {str(value)[:50]}.", name)
    return kind(value)


async def _check_messages(messages: Any, limits: ServeLimits, images: ImageReader) -> list[dict[str, Any]]:
    """Everything that is wrong without a look at images first: those may have to be downloaded."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message.", "messages")
    checked = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    parts = [
        (part, f"messages[{m}].content[{p}]")
        for m in range(len(checked))
        for p, part in enumerate(checked[m]["content"])
    ]
    text = sum(len(part["text"]) for part, _ in parts if "text" in part)
    if text > limits.max_text:
        raise RequestError(f"The messages have {text} characters of text, the most is {limits.max_text}.", "messages")
    with_image = [(part["image_url"], where) for part, where in parts if "image_url" in part]
    if len(with_image) > limits.max_images:
        raise RequestError(f"The messages have {len(with_image)} images, the most is {limits.max_images}.", "messages")
    for image, where in with_image:
        try:
            image["url"] = await images.read(image["url"])
        except ValueError as error:
            raise RequestError(f"{where}: {error}", where) from error
    return checked


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{where} must be an object with a role, one of: {', '.join(ROLES)}.", where)
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(f"The content of {where} must be a text or a list of parts.", f"{where}.content")
    parts = [_check_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {"role": message["role"], "content": parts}


def _check_part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    image = part.get("image_url") if kind == "image_url" else None
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str):
        return {"type": "image_url", "image_url": {"url": url}}
    raise RequestError(
        f'{where} must be {{"type": "text", "text": TEXT}} or {{"type": "image_url", "image_url": {{"url": URL}}}}.',
        where,
    )
