"""The routes: which path answers with what. Handlers are functions of a `ServerState`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.http.chat import create_chat_completion
from serving.http.completions import create_completion
from serving.http.errors import EXCEPTION_HANDLERS, json_response
from serving.http.state import WEIGHT_VERSION, ServerState

Handler = Callable[[ServerState, Request], Awaitable[Response]]


def make_app(state: ServerState) -> Starlette:
    """The ASGI application over one engine."""

    def route(method: str, path: str, handler: Handler) -> Route:
        return Route(path, partial(handler, state), methods=[method])

    return Starlette(
        routes=[
            route("POST", "/v1/completions", create_completion),
            route("POST", "/v1/chat/completions", create_chat_completion),
            route("GET", "/v1/models", list_models),
            route("GET", "/v1/models/{model:path}", show_model),
            route("GET", "/health", health),
            route("GET", "/get_model_info", model_info),
            route("GET", "/get_server_info", server_info),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )


async def list_models(state: ServerState, request: Request) -> Response:
    return json_response({"object": "list", "data": [_model_card(state)]})


async def show_model(state: ServerState, request: Request) -> Response:
    model = request.path_params["model"]
    if model == state.config.model_name:
        return json_response(_model_card(state))
    error = {
        "message": f"The model '{model}' does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    return json_response({"error": error}, 404)


async def health(state: ServerState, request: Request) -> Response:
    """200 while the engine process lives and the server is not stopping, else 503."""
    if state.healthy:
        return json_response({"status": "ok"})
    reason = state.engine.failure or "The server is shutting down."
    return json_response({"status": "unhealthy", "message": reason}, 503)


async def model_info(state: ServerState, request: Request) -> Response:
    config = state.config
    return json_response(
        {
            "model_path": config.model_path,
            "tokenizer_path": config.tokenizer_path or config.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": WEIGHT_VERSION,
        }
    )


async def server_info(state: ServerState, request: Request) -> Response:
    """The flags, what the engine said of itself when it was ready, and its load now."""
    ready = state.engine.ready
    status = await state.engine.status()
    return json_response(
        {
            **asdict(state.config),
            # What the flags became: without layout flags they follow the devices.
            **ready.details.get("resolved", {}),
            "version": _version(),
            "status": "ready" if state.healthy else "stopping",
            "topology": ready.topology,
            "max_total_num_tokens": ready.max_total_tokens,
            "max_context_tokens": ready.max_context_tokens,
            "num_slices": ready.num_slices,
            "engine": ready.details,
            "waiting": status.waiting,
            "steps": status.steps,
            "recompilations": status.recompilations,
            "internal_states": [msgspec.to_builtins(part) for part in status.slices],
        }
    )


def _model_card(state: ServerState) -> dict[str, Any]:
    name = state.config.model_name
    return {
        "id": name,
        "object": "model",
        "created": int(state.started),
        "owned_by": "meshserve",
        "root": name,
        "parent": None,
        "max_model_len": state.engine.ready.max_context_tokens,
    }


def _version() -> str:
    """Of the installed distribution; a checkout that runs uninstalled has none."""
    try:
        return importlib.metadata.version("meshserve")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
