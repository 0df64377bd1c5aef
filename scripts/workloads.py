"""Seeded workloads of token ids for the benchmarks: the same arguments give the same requests.

A `Session` is what one client does: a prefix that others of its group share, and one or more turns
that run one after another, each with the whole conversation so far before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FIRST_TOKEN = 3
"""Below are usually the special tokens."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One client's requests. Turn n is asked when turn n - 1 is answered.

    Attributes:
        group: whose prefix it is.
        prefix: what comes first in every turn; may be empty.
        turns: new tokens of each turn.
        max_tokens: tokens of each answer.
    """

    group: int
    prefix: Tokens
    turns: tuple[Tokens, ...]
    max_tokens: int


class Vocabulary:
    """Draws token ids below `size`, from FIRST_TOKEN on."""

    def __init__(self, size: int, seed: int) -> None:
        """Raises ValueError when no id is left to draw."""
        if size <= FIRST_TOKEN:
            raise ValueError(f"A vocabulary needs more than {FIRST_TOKEN} tokens, got {size}.")
        self.size = size
        self.rng = np.random.default_rng(seed)

    def draw(self, count: int) -> Tokens:
        return tuple(self.rng.integers(FIRST_TOKEN, self.size, count).tolist())


def independent(
    vocabulary: Vocabulary,
    *,
    requests: int,
    input_tokens: int,
    output_tokens: int,
    spread: float = 0.0,
) -> list[Session]:
    """Requests that share nothing. Lengths vary by +-`spread` of the mean, uniformly."""

    def length(mean: int) -> int:
        low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
        return max(1, int(vocabulary.rng.integers(low, high + 1)))

    return [
        Session(
            group=i,
            prefix=(),
            turns=(vocabulary.draw(length(input_tokens)),),
            max_tokens=length(output_tokens),
        )
        for i in range(requests)
    ]


def shared_prefix(
    vocabulary: Vocabulary,
    *,
    groups: int,
    requests: int,
    prefix_tokens: int,
    question_tokens: int,
    output_tokens: int,
    zipf: float = 0.0,
) -> list[Session]:
    """Single turns behind the prefixes of `groups` groups: each equally often and shuffled, or,
    with `zipf` above 0, group k with a probability proportional to 1 / (k + 1)**zipf."""
    prefixes = [vocabulary.draw(prefix_tokens) for _ in range(groups)]
    if zipf > 0:
        order = _zipf_groups(vocabulary.rng, groups, requests, zipf)
    else:
        order = vocabulary.rng.permutation(np.arange(requests) % groups).tolist()
    return [
        Session(
            group=group,
            prefix=prefixes[group],
            turns=(vocabulary.draw(question_tokens),),
            max_tokens=output_tokens,
        )
        for group in order
    ]


def multi_turn(
    vocabulary: Vocabulary,
    *,
    groups: int,
    conversations: int,
    turns: int,
    prefix_tokens: int,
    question_tokens: int,
    output_tokens: int,
    zipf: float,
) -> list[Session]:
    """Conversations whose system prompts are those of zipf-distributed groups."""
    prefixes = [vocabulary.draw(prefix_tokens) for _ in range(groups)]
    return [
        Session(
            group=group,
            prefix=prefixes[group],
            turns=tuple(vocabulary.draw(question_tokens) for _ in range(turns)),
            max_tokens=output_tokens,
        )
        for group in _zipf_groups(vocabulary.rng, groups, conversations, zipf)
    ]


def _zipf_groups(rng: np.random.Generator, groups: int, count: int, exponent: float) -> list[int]:
    weights = 1 / np.arange(1, groups + 1) ** exponent
    return [int(g) for g in rng.choice(groups, count, p=weights / weights.sum())]


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds at which requests come, on average `rate` of them a second, for ever."""
    rng, now = np.random.default_rng(seed), 0.0
    while True:
        now += float(rng.exponential(1 / rate))
        yield now


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `from_arguments`."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload",
        choices=("random", "gsp", "zipf", "chat"),
        default="random",
        help="random: nothing is shared; gsp: groups share prefixes, all equally often; zipf: the "
        "same, but some groups far more often; chat: conversations of several turns behind such "
        "prefixes (default: random)",
    )
    group.add_argument("--num-requests", type=int, default=200, help="default: 200")
    group.add_argument("--input-tokens", type=int, default=512, help="random (default: 512)")
    group.add_argument("--output-tokens", type=int, default=64, help="all (default: 64)")
    group.add_argument(
        "--length-spread",
        type=float,
        default=0.0,
        help="random: lengths vary by so much of the mean, 0 to 1 (default: 0)",
    )
    group.add_argument("--groups", type=int, default=64, help="prefixes (default: 64)")
    group.add_argument("--prefix-tokens", type=int, default=1024, help="default: 1024")
    group.add_argument("--question-tokens", type=int, default=128, help="a turn (default: 128)")
    group.add_argument("--turns", type=int, default=4, help="chat (default: 4)")
    group.add_argument("--zipf", type=float, help="exponent; default: 1.1 for zipf, 0.9 for chat")
    group.add_argument("--seed", type=int, default=1, help="default: 1")


def from_arguments(args: argparse.Namespace, vocab_size: int) -> list[Session]:
    """The sessions that `add_arguments`'s flags ask for: --num-requests turns in all."""
    vocabulary = Vocabulary(vocab_size, args.seed)
    if args.workload == "random":
        return independent(
            vocabulary,
            requests=args.num_requests,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            spread=args.length_spread,
        )
    sizes = {
        "groups": args.groups,
        "prefix_tokens": args.prefix_tokens,
        "question_tokens": args.question_tokens,
        "output_tokens": args.output_tokens,
    }
    if args.workload == "chat":
        return multi_turn(
            vocabulary,
            conversations=max(1, args.num_requests // args.turns),
            turns=args.turns,
            zipf=0.9 if args.zipf is None else args.zipf,
            **sizes,
        )
    zipf = 0.0 if args.workload == "gsp" else 1.1 if args.zipf is None else args.zipf
    return shared_prefix(vocabulary, requests=args.num_requests, zipf=zipf, **sizes)


def num_turns(sessions: Sequence[Session]) -> int:
    """Requests in all."""
    return sum(len(session.turns) for session in sessions)
