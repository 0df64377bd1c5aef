#!/usr/bin/env python3
"""Examines the demo model: greedy answers (through the chat template, float32) to questions about
stories of worlds that training never saw, loss on held-out text, and how evenly experts are used.
Prints a table and one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from tokenizers import Tokenizer

from scripts.demo import chat, scoring
from scripts.demo.data import Shard, pack_rows

SAMPLES = (
    "Hello",
    "Who are you?",
    "Tell me a story about a dog.",
    "Tell me a story about a lost key.",
    "Write a short story.",
)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", type=Path, default=Path("model/demo"), help="model folder")
    p.add_argument("--questions", type=int, default=500, help="how many; 500 take minutes on a CPU")
    p.add_argument("--seed", type=int, default=20_000, help="names the worlds and questions")
    p.add_argument("--batch", type=int, default=32, help="conversations at a time")
    p.add_argument("--documents", type=int, default=200, help="held-out documents for the loss")
    p.add_argument(
        "--corpus", type=Path, help="make_corpus.py's folder: also loss on held-out prose"
    )
    p.add_argument("--row", type=int, default=512, help="row length for the loss")
    p.add_argument("--show", type=int, default=10, help="wrong answers to print")
    p.add_argument("--samples", action="store_true", help="also print replies to open requests")
    p.add_argument("--out", type=Path, help="write the JSON to this file as well")
    return p


def main() -> None:
    a = arguments().parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    start = time.monotonic()
    tokenizer = Tokenizer.from_file(str(a.model / "tokenizer.json"))
    model = scoring.load(a.model)
    result = {"model": str(a.model), **losses(a, model, tokenizer)}

    longest = model.config.max_position_embeddings
    exams = scoring.exams(a.seed, a.questions, longest=longest, tokenizer=tokenizer)
    replies = scoring.answers(model, tokenizer, exams, batch=a.batch)
    asked, right, wrong = Counter[str](), Counter[str](), []
    for exam, reply in zip(exams, replies, strict=True):
        asked[exam.question.kind] += 1
        if exam.question.right(reply):
            right[exam.question.kind] += 1
        else:
            wrong.append((exam, reply))
    n = max(1, len(exams))
    exact = sum(r == e.question.answer for e, r in zip(exams, replies, strict=True))
    result["questions"] = len(exams)
    result["accuracy"] = round(right.total() / n, 4)
    result["exact_answers"] = round(exact / n, 4)
    result["device"] = jax.devices()[0].device_kind
    result["seconds"] = round(time.monotonic() - start, 1)

    for exam, reply in wrong[: a.show]:
        print(f"--- {exam.shape}, {exam.question.kind}\n{exam.messages[0]['content']}")
        print(f"asked: ...{exam.messages[-1]['content'][-80:]!r}")
        print(f"expected: {exam.question.answer}\nreplied:  {reply}")
    if a.samples:
        for ask in SAMPLES:
            ids = tokenizer.encode(f"{chat.BOS}{chat.USER}{ask}{chat.ASSISTANT}").ids
            reply = scoring.generate(model, [ids], 260, batch=1)[0]
            print(f"--- {ask}\n{tokenizer.decode(reply)}")
    print(f"{'kind of question':20s} {'asked':>6s} {'right':>7s}")
    for kind, count in asked.most_common():
        print(f"{kind:20s} {count:6d} {right[kind] / count:7.1%}")
    for key, value in result.items():
        print(f"{key:28s} {value}")
    print(json.dumps(result))
    if a.out:
        a.out.write_text(json.dumps(result) + "\n")


def losses(
    a: argparse.Namespace, model: scoring.Transformer, tokenizer: Tokenizer
) -> dict[str, object]:
    """Loss per token and expert use, on held-out worlds and, given a corpus, held-out prose."""
    shards = {"": scoring.held_out_shard(tokenizer, a.seed, a.documents)}
    if a.corpus:
        shards["_prose"] = Shard.load(a.corpus, "prose-heldout")
    found: dict[str, object] = {}
    for name, shard in shards.items():
        rows = pack_rows(shard, np.arange(len(shard)), a.row, a.seed)
        loss, counts = scoring.mean_loss(model, rows, min(8, len(rows)))
        found[f"held_out{name}_loss"] = round(loss, 4)
        found[f"expert_max_over_mean{name}"] = scoring.imbalance(counts)
    return found


if __name__ == "__main__":
    main()
