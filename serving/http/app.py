"""The routes: which path answers with what. Handlers are functions of a `ServerState`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.http.chat import create_chat_completion
from serving.http.completions import create_completion
from serving.http.control import abort_request, flush_cache, health, health_generate
from serving.http.engine_metrics import metrics
from serving.http.errors import EXCEPTION_HANDLERS, json_response
from serving.http.loads import get_load, loads, memory_usage
from serving.http.metrics import CountRequests
from serving.http.native import generate
from serving.http.state import WEIGHT_VERSION, ServerState
from serving.http.tokens import detokenize, embeddings, rerank, score, tokenize
from serving.tokenizer import read_json

Handler = Callable[[ServerState, Request], Awaitable[Response]]


def make_app(state: ServerState) -> Starlette:
    """The ASGI application over one engine."""

    routes = [
        Route(path, partial(handler, state), methods=methods.split())
        for methods, path, handler in ROUTES
    ]
    counting = Middleware(
        CountRequests,
        metrics=state.metrics,
        paths=frozenset(path for _, path, _ in ROUTES),
        quiet=QUIET_PATHS,
    )
    return Starlette(routes=routes, middleware=[counting], exception_handlers=EXCEPTION_HANDLERS)


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


async def model_info(state: ServerState, request: Request) -> Response:
    """What the model is; type and architectures are null where no config.json tells them."""
    config = state.config
    told = await asyncio.to_thread(read_json, Path(config.model_path) / "config.json")
    return json_response(
        {
            "model_path": config.model_path,
            "tokenizer_path": config.tokenizer_path or config.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": WEIGHT_VERSION,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": told.get("model_type"),
            "architectures": told.get("architectures"),
        }
    )


async def weight_version(state: ServerState, request: Request) -> Response:
    return json_response({"weight_version": WEIGHT_VERSION})


async def server_info(state: ServerState, request: Request) -> Response:
    """The flags, what the engine said of itself when it was ready, and its load now."""
    ready = state.engine.ready
    status = await state.loads.sample()
    return json_response(
        {
            **asdict(state.config),
            # What the flags became: without layout flags they follow the devices.
            **ready.details.get("resolved", {}),
            "version": state.version,
            "status": "ready" if state.healthy else "stopping",
            "topology": ready.topology,
            "max_total_num_tokens": ready.max_total_tokens,
            "max_req_input_len": ready.max_context_tokens - 1,
            "max_context_tokens": ready.max_context_tokens,
            "num_slices": ready.num_slices,
            "engine": ready.details,
            "waiting": status.waiting,
            "steps": status.steps,
            "recompilations": status.recompilations,
            "internal_states": [
                {
                    **msgspec.to_builtins(part),
                    "last_gen_throughput": state.loads.rates(part.dp_rank).generated_per_s,
                    "memory_usage": memory_usage(state, part),
                    "effective_max_running_requests_per_dp": part.max_running,
                }
                for part in status.slices
            ],
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


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/completions", create_completion),
    ("POST", "/v1/chat/completions", create_chat_completion),
    ("POST PUT", "/generate", generate),
    ("POST", "/tokenize", tokenize),
    ("POST", "/v1/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("POST", "/v1/detokenize", detokenize),
    ("POST", "/v1/embeddings", embeddings),
    ("POST", "/v1/score", score),
    ("POST", "/v1/rerank", rerank),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{model:path}", show_model),
    ("GET", "/health", health),
    ("GET", "/health_generate", health_generate),
    ("GET", "/ping", health),
    ("GET", "/metrics", metrics),
    ("GET", "/v1/loads", loads),
    ("GET", "/get_loads", loads),
    ("GET", "/get_load", get_load),
    ("GET", "/get_model_info", model_info),
    ("GET", "/model_info", model_info),
    ("GET", "/get_weight_version", weight_version),
    ("GET", "/get_server_info", server_info),
    ("GET", "/server_info", server_info),
    ("GET POST", "/flush_cache", flush_cache),
    ("POST", "/abort_request", abort_request),
)
"""(methods, path, handler) of every route."""

QUIET_PATHS = frozenset({"/health", "/health_generate", "/ping", "/metrics"})
"""Asked by machines every few seconds, and left out of the counts of requests."""
