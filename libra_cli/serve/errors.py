"""Errors as clients get them: in the form of OpenAI's API, and nothing in them that is not theirs to know."""

from typing import Any

from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

SERVER_FAULT = "Something went wrong in the server; its log says what."


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


def error_response(error: Exception) -> JSONResponse:
    """An error as OpenAI's API has it. What is no fault of the client's is not told to the client."""
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, (ValueError, TemplateError)):
        status, message = getattr(error, "status", 400), str(error)
    else:
        status, message = 500, SERVER_FAULT
    return JSONResponse(error_body(message, status, getattr(error, "param", None)), status)


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error; what a client sent that is no UTF-8 is escaped in it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": _as_utf8(message), "type": kind, "param": param and _as_utf8(param), "code": None}}


def _as_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
