"""Deterministic inference: a sequence's logits are the same bits whatever else runs, and wherever.

One sequence is computed alone, and then with other pages, on other slices, in other rows, cut into
other chunks, beside other sequences. As in the engine, one program prefills and one decodes:
programs of other sizes may round differently.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from sharding import expert_exchange
from sharding.layout import make_layout
from tests.fixtures import DATA
from tests.harness import NUM_PAGES, PAGE_SIZE, MeshModel, SliceRows
from tests.sharding.test_expert_exchange import EXPERTS, WIDTH, K, exchanger, random

PROMPT, STEPS, DECODE_ROWS = 150, 3, 8
CASES = [
    ("deepseek_v3", (1, 1, 1), "none"),
    ("deepseek_v3", (4, 4, 4), "all_to_all"),
    ("deepseek_v3", (8, 4, 4), "none"),
    ("deepseek_v3", (8, 8, 8), "all_to_all"),
    ("qwen3_moe", (4, 2, 4), "none"),
    ("qwen3_moe", (4, 2, 4), "all_to_all"),
    ("llama", (4, 2, 1), "none"),
]


@dataclass(frozen=True, kw_only=True)
class Company:
    """How the sequence is computed; `seed` draws its pages and the other sequences."""

    seed: int
    slice: int = 0
    cuts: tuple[int, ...] = ()
    decode_row: int = 0
    others: bool = False


class Computer:
    """One prefill and one decode program over one KV pool."""

    def __init__(self, name, layout, exchange):
        def model(**sizes):
            return MeshModel(
                DATA / name, layout, exchange, deterministic=True, optimised=True, **sizes
            )

        self.prefill = model(decode_rows=2, prefill_rows=192, chunks=3)
        self.decode = model(decode_rows=DECODE_ROWS, prefill_rows=0, chunks=0)
        self.slices = self.prefill.layout.num_slices
        self.vocab = self.prefill.config.vocab_size

    def logits(self, prompt, company):
        """[PROMPT + STEPS, V]: of every position of the prompt, then of greedy tokens."""
        rng = np.random.default_rng(company.seed)
        pages = rng.permutation(np.arange(1, NUM_PAGES))
        own, pages = np.split(pages, [-(-(PROMPT + STEPS) // PAGE_SIZE)])
        edges = [0, *company.cuts, PROMPT]
        rows = []
        for start, end in itertools.pairwise(edges):
            mine = (prompt[start:end], start, own)
            rows.append(self._prefill_step(mine, company, pages, rng))
        tokens = [*prompt, int(rows[-1][-1].argmax())]
        self.decode.kv = self.prefill.kv
        for _ in range(STEPS):
            mine = (tokens[-1], len(tokens) - 1, own)
            rows.append(self._decode_step(mine, company, pages, rng))
            tokens.append(int(rows[-1][-1].argmax()))
        self.prefill.kv = self.decode.kv
        return np.concatenate(rows)

    def _prefill_step(self, mine, company, pages, rng):
        slices = []
        for s in range(self.slices):
            room = 192 - (len(mine[0]) if s == company.slice else 0)
            sizes = rng.integers(0, [room // 2 + 1, room - room // 2 + 1])
            # The second stands in the middle of a sequence whose pages hold anything.
            chunks = [
                (rng.integers(0, self.vocab, n), start, part)
                for n, start, part in zip(sizes, (0, 30), np.split(pages[:112], 2), strict=True)
                if n and company.others
            ]
            if s == company.slice:
                at = min(len(chunks), int(rng.integers(0, 2)) + 1) if company.others else 0
                chunks.insert(at, mine)
            slices.append(SliceRows(chunks=chunks))
        return self.prefill.step(slices)[0][company.slice][1][
            next(i for i, c in enumerate(slices[company.slice].chunks) if c is mine)
        ]

    def _decode_step(self, mine, company, pages, rng):
        slices = []
        for s in range(self.slices):
            full = s == company.slice and company.others
            others = DECODE_ROWS - 1 if full else int(rng.integers(0, DECODE_ROWS))
            decode = [
                (
                    int(rng.integers(0, self.vocab)),
                    int(rng.integers(0, 160)),
                    rng.permutation(pages),
                )
                for _ in range(others if company.others else 0)
            ]
            if s == company.slice:
                decode.insert(company.decode_row, mine)
            slices.append(SliceRows(decode=[(t, p, list(ids)[:54]) for t, p, ids in decode]))
        return self.decode.step(slices)[0][company.slice][0][[company.decode_row]]


@pytest.mark.parametrize(("name", "layout", "exchange"), CASES)
def test_a_sequence_gets_the_same_bits_in_any_company(name, layout, exchange, monkeypatch):
    # The widest layout takes several rounds for its prompts.
    monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda tokens, *_: min(tokens, 8))
    computer = Computer(name, layout, exchange)
    last = computer.slices - 1
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, computer.vocab, PROMPT)]
    alone = computer.logits(prompt, Company(seed=1))
    assert np.abs(alone).max() > 0.01
    companies = [
        Company(seed=2, slice=last),
        Company(seed=3, cuts=(1, 2, 77)),
        Company(seed=4, cuts=(128,)),
        Company(seed=5, others=True),
        *(
            Company(
                seed=6 + i,
                slice=i % computer.slices,
                cuts=(20 + 9 * i, 90),
                decode_row=(3 * i + 7) % DECODE_ROWS,
                others=True,
            )
            for i in range(4)
        ),
    ]
    for company in companies:
        got = computer.logits(prompt, company)
        differing = np.flatnonzero((got != alone).any(axis=1))
        assert not len(differing), (company, differing)


@pytest.mark.parametrize("exchange", ["none", "all_to_all"])
def test_a_token_gets_the_same_bits_from_its_experts_in_any_round(exchange, monkeypatch):
    """In the exchange alone, and close to what comes without the order."""
    monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda *_: 4)
    layout, tokens = make_layout(8, 8, 8), 48
    slices = layout.num_slices
    shared = np.zeros((slices, tokens, WIDTH), np.float32)
    token, weights = random(1, WIDTH), np.array([0.3, 0.5, 0.7], np.float32)
    ids = np.array([1, 6, 14], np.int32)  # of the first, a middle and the last device
    batches = []
    for seed, place in [(1, (0, 0)), (2, (0, 47)), (3, (7, 20)), (4, (3, 46)), (5, (5, 40))]:
        rng = np.random.default_rng(seed)
        # Everybody wants expert 0, whose queue takes more rounds than the others'.
        others = rng.integers(2, EXPERTS, (slices, tokens, K)).astype(np.int32)
        others[:, :, 0] = 0
        batch = (
            random(seed, slices, tokens, WIDTH),
            others,
            np.abs(random(seed + 9, *others.shape)),
        )
        for array, value in zip(batch, (token, ids, weights), strict=True):
            array[place] = value
        batches.append((place, batch))

    def outcomes(*, in_order):
        exchange_of = exchanger(layout, exchange, in_order=in_order)
        return np.stack([exchange_of(*batch, shared)[place] for place, batch in batches])

    ordered = outcomes(in_order=True)
    assert (ordered == ordered[0]).all()
    if exchange == "all_to_all":
        loose = outcomes(in_order=False)
        # Its bits depend on the rounds on some processors and not on others.
        np.testing.assert_allclose(loose, ordered, atol=1e-5)
