"""An app over a fake engine: in process through ASGI, or behind a real uvicorn on a free port."""

import asyncio
import contextlib
import random
import socket
from pathlib import Path

import httpx
import uvicorn

from serving.config import ServerConfig
from serving.http.app import make_app
from serving.http.bounded import BoundedHttp
from serving.http.state import ServerState
from serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine, connected

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = Tokenizer.from_folder(DATA / "deepseek_v3")


@contextlib.asynccontextmanager
async def serving(engine=None, **changes):
    """(httpx client, state, fake engine) of an app in this loop."""
    engine = engine or FakeEngine()
    async with connected(engine) as client:
        fields = {
            "config": ServerConfig(served_model_name="tiny"),
            "tokenizer": TOKENIZER,
            "engine": client,
            "seeds": random.Random(1),
        }
        state = ServerState(**fields | changes)
        transport = httpx.ASGITransport(app=make_app(state), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http, state, engine


@contextlib.asynccontextmanager
async def listening(engine=None, http=BoundedHttp, **changes):
    """(base url, state, fake engine) of an app behind uvicorn in this loop."""
    async with serving(engine, **changes) as (_, state, fake):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            make_app(state), http=http, lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", state, fake
        finally:
            server.should_exit = server.force_exit = True
            await task


def run(main, seconds=20):
    """Run a test's coroutine, never for ever."""

    async def bounded():
        await asyncio.wait_for(main(), seconds)

    asyncio.run(bounded())


def events_of(text):
    """The JSON texts of an SSE body; each event is one data line."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]
