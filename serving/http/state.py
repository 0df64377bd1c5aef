"""What the front process owns while it serves: engine connection, tokenizer, live ids, metrics.

One `ServerState` belongs to one app. Clocks, random numbers and ids are handed in, so that a test
can fix them.
"""

from __future__ import annotations

import importlib.metadata
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.config import ServerConfig
from serving.engine_client import EngineClient
from serving.grammar import GrammarCompiler
from serving.http.errors import ApiError
from serving.http.loads import LoadWatch
from serving.http.metrics import FrontMetrics
from serving.http.offload import slow_lane
from serving.http.sampling import SamplingDefaults
from serving.tokenizer import Tokenizer

MAX_RID_LENGTH = 256
WEIGHT_VERSION = "default"
"""What SGLang calls weights that were never updated while serving."""


@dataclass(slots=True, kw_only=True)
class ServerState:
    """Everything a handler needs.

    Attributes:
        grammars: checks the grammars of requests; None refuses such requests.
        defaults: sampling parameters of requests that bring none.
        seeds: draws the seed of every request without one.
        timer: seconds of a clock that does not jump, for durations.
        slow_lane: reads large bodies, one at a time.
        started: when the server began to serve, by `clock`.
        stopping: the server answers what it has begun and is no longer healthy.
    """

    config: ServerConfig
    tokenizer: Tokenizer
    engine: EngineClient
    grammars: GrammarCompiler | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    seeds: random.Random = field(default_factory=random.Random)
    clock: Callable[[], float] = time.time
    timer: Callable[[], float] = time.perf_counter
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    stopping: bool = False
    started: float = 0.0
    slow_lane: ThreadPoolExecutor = field(default_factory=slow_lane)
    metrics: FrontMetrics = field(init=False)
    loads: LoadWatch = field(init=False)
    _live: dict[str, str] = field(default_factory=dict)
    _serial: int = 0

    def __post_init__(self) -> None:
        self.metrics = FrontMetrics(self.config.model_name)
        self.loads = LoadWatch(self.engine, self.timer)

    @property
    def version(self) -> str:
        """Of the installed distribution; a checkout that runs uninstalled has none."""
        try:
            return importlib.metadata.version("meshserve")
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    @property
    def healthy(self) -> bool:
        return self.engine.alive and not self.stopping

    @contextmanager
    def claim(self, prefix: str, rid: str | None, header: str | None) -> Iterator[tuple[str, str]]:
        """Hold the id of an answer while it is live; yields it and its name in the engine.

        The id is the body's `rid`, else the x-request-id header, else a fresh one. The name never
        comes back: a retry under the same id must not get the last events of the attempt that was
        aborted a moment ago.

        Raises:
            ApiError: a running request has the same `rid`. (The header is a trace id that several
                requests may share; the second one gets a fresh id instead.)
        """
        if rid is not None:
            if not 0 < len(rid) <= MAX_RID_LENGTH:
                raise ApiError(f"rid must have 1 to {MAX_RID_LENGTH} characters.", param="rid")
            if rid in self._live:
                raise ApiError(f"rid '{rid}' belongs to a request that is running.", param="rid")
            answer_id = rid
        elif header and len(header) <= MAX_RID_LENGTH and header not in self._live:
            answer_id = header
        else:
            answer_id = f"{prefix}-{self.new_id()}"
        self._serial += 1
        # The serial number stands first, so that no name is the beginning of another.
        self._live[answer_id] = name = f"{self._serial}#{answer_id}"
        try:
            yield answer_id, name
        finally:
            del self._live[answer_id]

    def abort(self, answer_id: str) -> None:
        """End a running answer; nothing happens if there is none of this id."""
        name = self._live.get(answer_id)
        if name is not None:
            self.engine.cancel(f"{name}.")

    def abort_all(self) -> None:
        """End every running answer."""
        for name in list(self._live.values()):
            self.engine.cancel(f"{name}.")
