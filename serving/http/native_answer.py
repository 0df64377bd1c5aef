"""One answer of /generate while it grows: its text, tokens and log probabilities so far."""

from __future__ import annotations

from serving.http.calls import Call
from serving.http.errors import ApiError
from serving.http.generation import Delta
from serving.http.native_protocol import Generated, LogprobEntry, MetaInfo, NativeFinish
from serving.http.state import WEIGHT_VERSION, ServerState
from serving.messages import FirstToken


class GrowingAnswer:
    """Takes deltas and tells the answer. What it told must be encoded before it grows on.

    Args:
        start: first prompt token whose log probability is told, None for none.
        with_text: tell the text of tokens beside their log probabilities.
        incremental: tell each piece once, not the whole answer every time.
    """

    def __init__(
        self,
        state: ServerState,
        call: Call,
        answer_id: str,
        *,
        start: int | None,
        with_text: bool,
        incremental: bool = False,
    ) -> None:
        self._state, self._call, self._id = state, call, answer_id
        self._start, self._with_text, self._incremental = start, with_text, incremental
        self._prompt = call.jobs[0].prompt
        self._first: FirstToken | None = None
        self._finish: NativeFinish | None = None
        self._num_tokens = 0
        self._told = False
        self._forget()

    def _forget(self) -> None:
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[LogprobEntry] = []
        self._tops: list[list[LogprobEntry]] = []
        self._input_logprobs: list[LogprobEntry] = []
        self._input_tops: list[list[LogprobEntry] | None] = []

    def add(self, delta: Delta) -> None:
        """Put the next piece behind; one that its reader has already is not told alone.

        Raises:
            ApiError: the engine did not score what it was asked to score.
        """
        if self._incremental and (self._told or delta.replayed):
            self._forget()
        self._told = False
        self._num_tokens += len(delta.tokens)
        if self._incremental and delta.replayed:
            return
        self._text += delta.text
        for token in delta.tokens:
            event = token.event
            if event.token_id is not None:
                self._ids.append(event.token_id)
                self._logprobs.append(self._entry(event.logprob, event.token_id))
                self._tops.append([self._entry(p, i) for i, p in event.top_logprobs or ()])
        if delta.first is not None:
            self._first = delta.first
            if self._start is not None:
                self._add_prompt(delta.first, self._start)
        self._finish = _finish(delta, self._num_tokens)

    def _add_prompt(self, first: FirstToken, start: int) -> None:
        scores = first.prompt_scores
        if scores is None or len(scores) != len(self._prompt) - 1:
            raise ApiError(
                "The engine did not score the prompt.", status=500, kind="InternalServerError"
            )
        if start == 0:
            self._input_logprobs.append(self._entry(None, self._prompt[0]))
            self._input_tops.append(None)
        for score in scores[max(0, start - 1) :]:
            self._input_logprobs.append(self._entry(score.logprob, score.token_id))
            self._input_tops.append([self._entry(p, i) for i, p in score.top_logprobs])

    def _entry(self, logprob: float | None, token_id: int) -> LogprobEntry:
        text = None
        if self._with_text:
            text = self._state.tokenizer.token_bytes(token_id).decode(errors="replace")
        return logprob, token_id, text

    def told(self) -> Generated:
        """The answer so far (or since it was told last)."""
        self._told = True
        call, first, num_prompt = self._call, self._first, len(self._prompt)
        meta = MetaInfo(
            id=self._id,
            finish_reason=self._finish,
            prompt_tokens=num_prompt,
            completion_tokens=self._num_tokens,
            # Of an answer that goes on, the engine finds tokens behind the prompt's too.
            cached_tokens=0 if first is None else min(first.cached_tokens, num_prompt),
            weight_version=WEIGHT_VERSION,
            dp_rank=None if first is None else first.dp_rank,
        )
        if self._finish is not None:
            meta.e2e_latency = self._state.timer() - call.began
        if call.logprobs is not None:
            meta.input_token_logprobs = self._input_logprobs
            meta.output_token_logprobs = self._logprobs
        if call.logprobs:
            meta.input_top_logprobs = self._input_tops
            meta.output_top_logprobs = self._tops
        return Generated(text=self._text, output_ids=self._ids, meta_info=meta)


def _finish(delta: Delta, num_tokens: int) -> NativeFinish | None:
    match delta.finish_reason:
        case None:
            return None
        case "stop":
            return NativeFinish(type="stop", matched=delta.matched_stop)
        case "length":
            return NativeFinish(type="length", length=num_tokens)
        case reason:
            return NativeFinish(type=reason, message="Aborted")
