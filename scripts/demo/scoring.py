"""Measures of the demo model: loss and expert use over token shards, and greedy answers to
questions about worlds that training never saw. Whole-sequence forward passes only; no server
needed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from model.checkpoint import SafetensorsFolder, parameter_path, parameter_views, read_padded
from model.config import ModelConfig
from model.reference import forward
from model.transformer import Transformer
from scripts.demo import chat
from scripts.demo.data import Shard

BOS, EOS = 0, 1
ANSWER_ROOM = 40
"""Tokens an answer may have."""


def load(folder: Path) -> Transformer:
    """The shipped folder as a float32 model on one device."""
    config = ModelConfig.from_folder(folder)
    model = Transformer(config, jnp.float32, nnx.Rngs(0))
    views = parameter_views(config, SafetensorsFolder(folder).tensors.__getitem__)
    state = nnx.state(model, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        name = parameter_path(path)
        values = [read_padded(v, (slice(None),) * len(v.shape), v.shape) for v in views[name]]
        array = np.stack(values) if name.startswith("segments") else values[0]
        variable[...] = jnp.asarray(array.astype(np.float32))
    nnx.update(model, state)
    return model


@nnx.jit
def row_losses(model: Transformer, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy f32 [B, T - 1] of rows i32 [B, T], and expert counts i32 [layers, E]."""
    logits, counts = forward(model, rows[:, :-1])
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, rows[:, 1:, None], axis=-1)[..., 0], counts


@nnx.jit
def best_tokens(model: Transformer, rows: jax.Array) -> jax.Array:
    """The likeliest next token after every position: i32 [B, T]."""
    return jnp.argmax(forward(model, rows)[0], axis=-1).astype(jnp.int32)


def mean_loss(model: Transformer, rows: np.ndarray, batch: int) -> tuple[float, np.ndarray]:
    """Mean loss per token over rows u16 [R, T], and expert counts [layers, E]."""
    losses, counts = [], 0
    for i in range(0, len(rows) - batch + 1, batch):
        loss, count = row_losses(model, jnp.asarray(rows[i : i + batch], jnp.int32))
        losses.append(float(loss.mean()))
        counts = counts + np.asarray(count, np.int64)
    return float(np.mean(losses)), np.asarray(counts)


def imbalance(counts: np.ndarray) -> list[float]:
    """Busiest expert over the average one, per layer; 1 is even."""
    return [round(float(c.max() / c.mean()), 3) for c in counts]


def exams(seed: int, n: int, *, longest: int, tokenizer: Tokenizer) -> list[chat.Exam]:
    """Questions about held-out worlds whose conversations fit; the same for the same seed."""
    rng, found = random.Random(f"exam/{seed}"), []
    while len(found) < n:
        exam = chat.exam(rng)
        if len(tokenizer.encode(exam.prompt).ids) + ANSWER_ROOM <= longest:
            found.append(exam)
    return found


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[chat.Exam],
    *,
    batch: int,
    length_step: int = 128,
) -> list[str]:
    """Greedy replies, in order.

    One pass over prompt and expected answer tells which replies are the expected ones; only the
    others are generated token by token.
    """
    prompts = [tokenizer.encode(q.prompt).ids for q in questions]
    gold = [[*tokenizer.encode(q.question.answer).ids, EOS] for q in questions]
    replies = [q.question.answer for q in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    wrong: list[int] = []
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        rows = _rows([prompts[i] + gold[i] for i in chosen], batch, length_step)
        best = np.asarray(best_tokens(model, jnp.asarray(rows)))
        for r, i in enumerate(chosen):
            begin = len(prompts[i]) - 1
            if best[r, begin : begin + len(gold[i])].tolist() != gold[i]:
                wrong.append(i)
    for at in range(0, len(wrong), batch):
        chosen = wrong[at : at + batch]
        texts = generate(
            model, [prompts[i] for i in chosen], ANSWER_ROOM, batch=batch, length_step=length_step
        )
        for i, ids in zip(chosen, texts, strict=True):
            replies[i] = tokenizer.decode(ids)
    return replies


def generate(
    model: Transformer,
    prompts: Sequence[list[int]],
    room: int,
    *,
    batch: int,
    length_step: int = 128,
) -> list[list[int]]:
    """Greedy continuations of at most `batch` prompts, up to EOS, without a cache."""
    longest = max(map(len, prompts)) + room
    rows = _rows([*prompts, [0] * longest], batch + 1, length_step)
    ends = np.array([len(p) for p in prompts])
    each = np.arange(len(prompts))
    done = np.zeros(len(prompts), bool)
    for _ in range(room):
        best = np.asarray(best_tokens(model, jnp.asarray(rows)))[each, ends - 1]
        rows[each[~done], ends[~done]] = best[~done]
        ends += ~done
        done |= best == EOS
        if done.all():
            break
    return [[int(t) for t in rows[i, len(p) : ends[i]] if t != EOS] for i, p in enumerate(prompts)]


def _rows(texts: Sequence[list[int]], batch: int, step: int) -> np.ndarray:
    """i32 [batch, T], padded with token 0 at the right; T is a multiple of `step`."""
    length = -(-max(map(len, texts)) // step) * step
    rows = np.zeros((batch, length), np.int32)
    for row, ids in zip(rows, texts, strict=False):
        row[: len(ids)] = ids
    return rows


def held_out_shard(tokenizer: Tokenizer, seed: int, documents: int) -> Shard:
    """Documents about held-out worlds, without a corpus folder."""
    rng = random.Random(f"held-out/{seed}")
    texts = [chat.document(rng, held_out=True) for _ in range(documents)]
    return Shard.join(np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(texts))
