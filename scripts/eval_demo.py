"""Examine the demo model: loss on held-out text, answers about worlds it has never seen, experts.

Questions go through the chat template and the engine (greedy), and a program judges the answers: an
answer is right if it has the words that decide and names nobody else.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import reference
from scripts.demo import chat
from scripts.demo.data import Shard, pack_rows
from serving.config import ServerConfig, default_compilation_cache_dir
from serving.engine.engine import Engine, configure_jax, make_engine
from serving.request import Request, SamplingParams
from serving.tokenizer import Tokenizer

LOSS_ROWS = 64
SHOWN_MISTAKES = 12


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model-path", default=ServerConfig().model_path)
    p.add_argument("--exams", type=int, default=1000, help="questions to ask")
    p.add_argument("--seed", type=int, default=12345, help="names the held-out worlds")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return p


def answer_all(engine: Engine, prompts: list[list[int]], eos: tuple[int, ...]) -> list[list[int]]:
    """Greedy answers, the end-of-sequence token left out."""
    params = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=eos)
    for i, prompt in enumerate(prompts):
        engine.add(Request(rid=str(i), prompt=tuple(prompt), sampling=params))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for outcome in engine.step():
            if outcome.token_id not in eos:
                answers[int(outcome.rid)].append(outcome.token_id)
    return answers


def examine(engine: Engine, tokenizer: Tokenizer, exams: int, seed: int) -> dict[str, Any]:
    """Share of right answers, by story shape and kind of question too."""
    rng = random.Random(f"exam/{seed}")
    limit = engine.runner.max_context - 40
    asked: list[tuple[chat.Exam, list[int]]] = []
    while len(asked) < exams:
        exam = chat.exam(rng)
        prompt = tokenizer.encode_chat([dict(m) for m in exam.messages])
        if len(prompt) <= limit:
            asked.append((exam, list(prompt)))
    answers = answer_all(engine, [prompt for _, prompt in asked], tokenizer.eos_token_ids)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    shown = 0
    for (exam, _), ids in zip(asked, answers, strict=True):
        reply = tokenizer.decode(ids)
        verdict = exam.question.right(reply)
        for group in ("all", f"kind {exam.question.kind}", f"shape {exam.shape}"):
            right[group].append(verdict)
        if not verdict and shown < SHOWN_MISTAKES:
            shown += 1
            print(f"wrong: {exam.question.ask} -> {reply!r} instead of {exam.question.answer!r}")
    return {
        "exams": exams,
        "accuracy": float(np.mean(right.pop("all"))),
        "by_group": {name: round(float(np.mean(v)), 3) for name, v in sorted(right.items())},
    }


def held_out_loss(engine: Engine, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Loss (nats per token, float32) on held-out documents, and each layer's expert use."""
    rng = random.Random(f"loss/{seed}")
    length = engine.runner.model.max_position_embeddings
    documents: list[np.ndarray] = []
    while sum(map(len, documents)) < 2 * LOSS_ROWS * length:
        text = chat.document(rng, held_out=True).removeprefix(chat.BOS)
        documents.append(np.array(tokenizer.encode(text), np.uint16))
    rows = pack_rows(Shard.join(documents), np.arange(len(documents)), length + 1, seed)[:LOSS_ROWS]
    weights = [w.astype(jnp.float32) for w in engine.runner.weights]
    graph, state = nnx.split(engine.runner.spec.merge(weights))

    @jax.jit
    def forward(state: nnx.State, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, counts = reference.forward(nnx.merge(graph, state), rows[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=2)
        return -picked.mean(), counts

    losses, total = [], 0
    for i in range(0, len(rows), 4):
        loss, counts = forward(state, rows[i : i + 4].astype(np.int32))
        losses.append(float(loss))
        total = total + np.asarray(counts)
    balance = total.max(axis=1) / total.mean(axis=1)
    return {
        "held_out_loss": float(np.mean(losses)),
        "held_out_tokens": int(rows.size),
        "expert_max_over_mean": [round(float(b), 3) for b in balance],
    }


def main() -> None:
    args = arguments().parse_args()
    config = ServerConfig(
        model_path=args.model_path,
        dtype=args.dtype,
        max_total_tokens=1 << 17,
        compilation_cache_dir=default_compilation_cache_dir(),
    )
    configure_jax(config)
    engine = make_engine(config)
    tokenizer = Tokenizer.from_folder(args.model_path)
    results = examine(engine, tokenizer, args.exams, args.seed)
    results |= held_out_loss(engine, tokenizer, args.seed)
    print(json.dumps(results.pop("by_group"), indent=1))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
