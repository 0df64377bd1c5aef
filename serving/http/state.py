"""What the front process owns while it serves: the engine connection, tokenizer, live request ids.

One `ServerState` belongs to one app. Clock, random numbers and ids are handed in, so that a test
can fix them.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.config import ServerConfig
from serving.engine_client import EngineClient
from serving.grammar import GrammarCompiler
from serving.http.errors import ApiError
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
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    stopping: bool = False
    started: float = 0.0
    _live: set[str] = field(default_factory=set)
    _serial: int = 0

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
        self._live.add(answer_id)
        try:
            yield answer_id, f"{answer_id}#{self._serial}"
        finally:
            self._live.remove(answer_id)
