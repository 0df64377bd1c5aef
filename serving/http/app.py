"""The routes: which path answers with what. Handlers are functions of a `ServerState`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from serving.config import ServerConfig
from serving.http.chat import create_chat_completion
from serving.http.completions import create_completion
from serving.http.control import abort_request, flush_cache, health, health_generate
from serving.http.docs_page import page
from serving.http.engine_metrics import metrics
from serving.http.errors import EXCEPTION_HANDLERS, json_response
from serving.http.field_docs import Limits
from serving.http.info import list_models, model_info, server_info, show_model, weight_version
from serving.http.loads import get_load, loads
from serving.http.metrics import CountRequests
from serving.http.native import generate
from serving.http.openapi import document
from serving.http.responses import create_response
from serving.http.security import RequireKey, opened_by
from serving.http.state import ServerState
from serving.http.tokens import detokenize, embeddings, rerank, score, tokenize

Handler = Callable[[ServerState, Request], Awaitable[Response]]


def make_app(state: ServerState) -> Starlette:
    """The ASGI application over one engine."""

    config = state.config
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
    return Starlette(
        routes=routes,
        middleware=[*_cors(config), counting, *_keys(config)],
        exception_handlers=EXCEPTION_HANDLERS,
    )


def _cors(config: ServerConfig) -> list[Middleware]:
    """Outermost, so that a page can read why it was refused."""
    if not config.cors_allow_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.cors_allow_origins,
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["*"],
        )
    ]


def _keys(config: ServerConfig) -> list[Middleware]:
    if config.api_key is None and config.admin_api_key is None:
        return []
    return [Middleware(RequireKey, api_key=config.api_key, admin_key=config.admin_api_key)]


async def openapi(state: ServerState, request: Request) -> Response:
    return json_response(_document(state))


async def docs(state: ServerState, request: Request) -> Response:
    return HTMLResponse(page(_document(state)))


def _document(state: ServerState) -> dict[str, Any]:
    ready, config = state.engine.ready, state.config

    def protected(path: str) -> bool:
        return bool(opened_by(path, api_key=config.api_key, admin_key=config.admin_api_key))

    return document(
        ((methods, path) for methods, path, _ in ROUTES),
        version=state.version,
        limits=Limits(
            vocab_size=state.tokenizer.vocab_size,
            context=ready.max_context_tokens,
            num_slices=ready.num_slices,
        ),
        protected=protected,
    )


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/completions", create_completion),
    ("POST", "/v1/chat/completions", create_chat_completion),
    ("POST", "/v1/responses", create_response),
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
    ("GET", "/openapi.json", openapi),
    ("GET", "/docs", docs),
)
"""(methods, path, handler) of every route."""

QUIET_PATHS = frozenset({"/health", "/health_generate", "/ping", "/metrics"})
"""Asked by machines every few seconds, and left out of the counts of requests."""
