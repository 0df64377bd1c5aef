"""What the server says of itself: its model, its flags, its engine, and its load now."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.http.errors import json_response
from serving.http.loads import memory_usage
from serving.http.state import WEIGHT_VERSION, ServerState
from serving.tokenizer import read_json


class ModelCard(msgspec.Struct, kw_only=True):
    """An entry of /v1/models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "meshserve"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class ModelInfo(msgspec.Struct, kw_only=True):
    """The answer of /get_model_info; type and architectures are null without a config.json."""

    model_path: str
    tokenizer_path: str
    is_generation: bool = True
    preferred_sampling_params: None = None
    weight_version: str = WEIGHT_VERSION
    has_image_understanding: bool = False
    has_audio_understanding: bool = False
    continue_from: bool = True
    """A broken stream can go on here: what routers look for."""
    model_type: str | None
    architectures: list[str] | None


class WeightVersion(msgspec.Struct, kw_only=True):
    """The answer of /get_weight_version."""

    weight_version: str = WEIGHT_VERSION


async def list_models(state: ServerState, request: Request) -> Response:
    return json_response(ModelList(data=[_model_card(state)]))


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
    config = state.config
    told = await asyncio.to_thread(read_json, Path(config.model_path) / "config.json")
    return json_response(
        ModelInfo(
            model_path=config.model_path,
            tokenizer_path=config.tokenizer_path or config.model_path,
            model_type=told.get("model_type"),
            architectures=told.get("architectures"),
        )
    )


async def weight_version(state: ServerState, request: Request) -> Response:
    return json_response(WeightVersion())


async def server_info(state: ServerState, request: Request) -> Response:
    """The flags, what the engine said of itself when it was ready, and its load now."""
    ready = state.engine.ready
    status = await state.loads.sample()
    return json_response(
        {
            **state.config.told(),
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


def _model_card(state: ServerState) -> ModelCard:
    name = state.config.model_name
    return ModelCard(
        id=name,
        created=int(state.started),
        root=name,
        max_model_len=state.engine.ready.max_context_tokens,
    )
