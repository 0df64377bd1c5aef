"""What goes wrong, as HTTP: exceptions that carry a status, and the error bodies of the OpenAI API.

Every error that a client can cause is an `ApiError` with a sentence that names the field; anything
else is a bug of ours and becomes a 500 without details.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.engine_client import EngineFailed

logger = logging.getLogger("meshserve.http")

CLIENT_CLOSED_REQUEST = 499
"""What proxies log for a client that hung up; nobody receives it."""


class ErrorBody(msgspec.Struct, kw_only=True):
    """The error object of the OpenAI routes."""

    object: str = "error"
    message: str
    type: str
    param: str | None = None
    code: int | str


class ApiError(Exception):
    """An answer other than 200: a sentence for the user and, where there is one, the field."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        kind: str = "BadRequestError",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=message, type=kind, param=param, code=status)


def to_api_error(error: Exception) -> ApiError:
    """The answer to an exception that may end a request."""
    match error:
        case ApiError():
            return error
        case EngineFailed():
            return ApiError(str(error), status=503, kind="ServiceUnavailableError")
        case _:
            return ApiError("Internal server error.", status=500, kind="InternalServerError")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; structs are encoded as they are declared."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = to_api_error(error)
    return json_response(answer.body, answer.status)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message, kind = f"There is no {request.method} {request.url.path}.", "NotFoundError"
    elif error.status_code == 405:
        message, kind = f"{request.url.path} does not take {request.method}.", "BadRequestError"
    else:
        message, kind = error.detail, "BadRequestError"
    body = ErrorBody(message=message, type=kind, code=error.status_code)
    return json_response(body, error.status_code, dict(error.headers or {}))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


EXCEPTION_HANDLERS: dict[Any, Any] = {
    ApiError: _answer_error,
    EngineFailed: _answer_error,
    HTTPException: _answer_http_exception,
    ClientDisconnect: _answer_nobody,
    Exception: _answer_error,
}
