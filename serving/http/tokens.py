"""Text to token ids and back over HTTP, and the routes of models that this server has none of.

Tokenising runs in threads: a long text takes seconds, and streams must not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from serving.http.completions import MAX_PROMPTS
from serving.http.conversation import chat_prompt
from serving.http.errors import ApiError, json_response
from serving.http.native_protocol import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from serving.http.protocol import ChatBody, read_body, refuse_not_served
from serving.http.state import ServerState
from serving.http.tool_use import tool_use


async def tokenize(state: ServerState, request: Request) -> Response:
    """The token ids of a text, of several, or of a conversation."""
    body = await read_body(request, TokenizeBody)
    return json_response(await asyncio.to_thread(_tokenized, state, body))


async def detokenize(state: ServerState, request: Request) -> Response:
    """The text of token ids, or of several lists of them."""
    body = await read_body(request, DetokenizeBody)
    return json_response(await asyncio.to_thread(_detokenized, state, body))


async def embeddings(state: ServerState, request: Request) -> Response:
    """No model that this server can serve embeds.

    Raises:
        ApiError: always.
    """
    raise _not_of_this_kind("an embedding model")


async def score(state: ServerState, request: Request) -> Response:
    """No model that this server can serve scores texts by a head of its own.

    Raises:
        ApiError: always.
    """
    raise _not_of_this_kind(
        "a scoring model",
        "For log probabilities of given tokens use /v1/completions with echo and logprobs, or "
        "/generate with logprob_start_len.",
    )


async def rerank(state: ServerState, request: Request) -> Response:
    """No model that this server can serve ranks documents.

    Raises:
        ApiError: always.
    """
    raise _not_of_this_kind("a reranker model")


def _not_of_this_kind(kind: str, instead: str = "") -> ApiError:
    message = (
        f"This model does not appear to be {kind} by default: meshserve serves models that "
        f"generate text only. {instead}"
    )
    return ApiError(message.rstrip())


def _tokenized(state: ServerState, body: TokenizeBody) -> Tokenized:
    tokenizer, special = state.tokenizer, body.add_special_tokens is not False
    max_model_len = state.engine.ready.max_context_tokens
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("Exactly one of 'prompt' or 'messages' must be provided.", param="prompt")
    if isinstance(body.prompt, list):
        _check_num(len(body.prompt), "prompt")
        lists = [tokenizer.encode(text, add_special_tokens=special) for text in body.prompt]
        return Tokenized(tokens=lists, count=[len(x) for x in lists], max_model_len=max_model_len)
    if body.prompt is not None:
        ids = tokenizer.encode(body.prompt, add_special_tokens=special)
    else:
        ids = _conversation(state, body)
    return Tokenized(tokens=ids, count=len(ids), max_model_len=max_model_len)


def _conversation(state: ServerState, body: TokenizeBody) -> list[int]:
    chat = ChatBody(
        messages=body.messages, tools=body.tools, chat_template_kwargs=body.chat_template_kwargs
    )
    refuse_not_served(chat)
    use = tool_use(
        chat, parser=state.config.tool_call_parser, chat_template=state.tokenizer.chat_template
    )
    return chat_prompt(chat, use, state.tokenizer, None).ids


def _detokenized(state: ServerState, body: DetokenizeBody) -> Detokenized:
    if body.tokens is None:
        raise ApiError("tokens is missing.", param="tokens")
    skip = body.skip_special_tokens is not False
    ids = [item for item in body.tokens if isinstance(item, int)]
    lists = [item for item in body.tokens if isinstance(item, list)]
    if ids and lists:
        raise ApiError(
            "tokens must be a list of token ids or a list of such lists, not a mixture.",
            param="tokens",
        )
    if not lists:
        return Detokenized(text=_text(state, ids, skip_special_tokens=skip))
    _check_num(len(lists), "tokens")
    return Detokenized(text=[_text(state, one, skip_special_tokens=skip) for one in lists])


def _text(state: ServerState, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """What an answer of these tokens would read."""
    for token_id in ids:
        if not 0 <= token_id < state.tokenizer.vocab_size:
            raise ApiError(
                f"tokens must be in [0, {state.tokenizer.vocab_size - 1}], got {token_id}.",
                param="tokens",
            )
    return state.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def _check_num(num: int, field: str) -> None:
    if num > MAX_PROMPTS:
        raise ApiError(f"{field} may hold {MAX_PROMPTS} entries, got {num}.", param=field)
