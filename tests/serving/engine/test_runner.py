"""The runner under plans made by hand: samplers set up and reset, scores, overlap, compilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.engine.batch_builder import Column
from serving.engine.engine import CompileCounter
from serving.engine.programs import _sample_full, _set_up
from serving.engine.sampling_state import (
    PIECE_TOKENS,
    SETUP_WIDTH,
    SamplingState,
    abstract_state,
    pieces,
)
from serving.engine.sampling_state import set_up as set_up_slot
from serving.request import MAX_LOGIT_BIAS, SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, StepPlan
from tests.fixtures import LOGIT_TOLERANCE, load_fixture
from tests.serving.engine.engines import fixture_engine

PAGES_EACH = 50
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}


@pytest.fixture(scope="module")
def runner():
    return fixture_engine(decode_buckets=(1, 4), extend_buckets=(16, 64)).runner


@pytest.fixture(scope="module")
def prompts():
    return [tuple(p["prompt"]) for p in load_fixture("deepseek_v3").prompts]


def params(max_tokens=32, **fields):
    fields.setdefault("temperature", 0.0)
    return SamplingParams(max_tokens=max_tokens, **fields)


def pages(slot):
    return tuple(range(1 + slot * PAGES_EACH, 1 + (slot + 1) * PAGES_EACH))


def chunk(slot, prompt, sampling, *, answer=(), start=0, end=None, **fields):
    """Tokens start to end of a context; the last piece samples."""
    context = prompt + tuple(answer)
    end = len(context) if end is None else end
    samples = end == len(context)
    if samples and sampling.needs_setup:
        fields.update(prompt=prompt, answer=tuple(answer))
    return PrefillChunk(
        f"r{slot}", slot, context[start:end], start, pages(slot), samples, sampling, **fields
    )


def decode_row(slot, position, sampling):
    return DecodeRow(f"r{slot}", slot, position, pages(slot), sampling)


def step(*slices):
    """Each slice: a list of decode rows and chunks."""
    return StepPlan(
        slices=tuple(
            SlicePlan(
                decode=tuple(r for r in rows if isinstance(r, DecodeRow)),
                prefill=tuple(r for r in rows if isinstance(r, PrefillChunk)),
            )
            for rows in slices
        )
    )


def run(runner, plan, masks=None):
    launched = runner.launch(plan)
    launched.sample(masks)
    return launched.result()


def generate(runner, slot, prompt, sampling, *, answer=(), steps=8):
    """The next tokens of a context, alone on a runner of one slice."""
    answer = list(answer)
    size = runner.buckets.prefill_tokens
    context = len(prompt) + len(answer)
    for start in range(0, context, size):
        end = min(start + size, context)
        piece = chunk(slot, prompt, sampling, answer=answer, start=start, end=end)
        result = run(runner, step([piece]))
    new = [result.tokens[0][0].token_id]
    while len(new) < steps:
        row = decode_row(slot, context + len(new) - 1, sampling)
        new.append(run(runner, step([row])).tokens[0][0].token_id)
    return new


def counts_of(runner, slot):
    return np.asarray(runner._state.counts)[0, slot]


def counted(prompt, answer, stops=(), vocab=512):
    want = 4 * np.bincount(np.array(answer, int), minlength=vocab)
    want[list(prompt)] |= 1
    want[list(stops)] |= 2
    return want


# ---- setting up -----------------------------------------------------------------------------


def test_counts_are_the_prompt_and_every_sampled_token(runner, prompts):
    tokens = generate(runner, 1, prompts[5], params(**PENALTIES, stop_token_ids=(9, 11)))
    np.testing.assert_array_equal(counts_of(runner, 1), counted(prompts[5], tokens, (9, 11)))
    assert not counts_of(runner, 4).any()  # the slot that stands for none


def test_frequency_penalty_keeps_tokens_from_repeating(runner, prompts):
    plain = generate(runner, 0, prompts[2], params(), steps=30)
    heavy = generate(runner, 0, prompts[2], params(frequency_penalty=100.0), steps=30)
    assert len(set(plain)) < 30
    assert len(set(heavy)) == 30


def test_penalised_tokens_are_the_same_after_retraction(runner, prompts):
    """Prefilled again from prompt and answer, in another slot, with something in it."""
    sampling = params(**PENALTIES, min_tokens=6, stop_token_ids=(3,))
    whole = generate(runner, 0, prompts[4], sampling, steps=12)
    generate(runner, 2, prompts[1], params(**PENALTIES))
    rest = generate(runner, 2, prompts[4], sampling, answer=whole[:5], steps=7)
    assert whole[5:] == rest
    np.testing.assert_array_equal(counts_of(runner, 0), counts_of(runner, 2))
    assert np.asarray(runner._state.stops_from)[0, 2] == len(prompts[4]) + 6


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_slot_keeps_nothing_of_the_request_before(runner, prompts, temperature):
    """Whatever that was, and whether or not the next one is set up itself."""
    first = load_fixture("deepseek_v3").prompts[3]["tokens"][0]
    heavy = params(
        **PENALTIES, logit_bias=((first, -100.0), (7, 30.0)), min_tokens=9, stop_token_ids=(8,)
    )
    simple = params(temperature=temperature, seed=4, logprobs=2)
    biased = params(temperature=temperature, seed=4, logit_bias=((first, 0.5),))
    wanted = [generate(runner, 3, prompts[3], s) for s in (simple, biased)]
    for sampling, want in zip((simple, biased), wanted, strict=True):
        assert generate(runner, 3, prompts[3], heavy) != want
        assert generate(runner, 3, prompts[3], sampling) == want


def test_logit_bias_decides(runner, prompts):
    assert generate(runner, 0, prompts[2], params(logit_bias=((77, 100.0),))) == [77] * 8
    best = generate(runner, 0, prompts[2], params(), steps=1)[0]
    assert generate(runner, 0, prompts[2], params(logit_bias=((best, -100.0),)))[0] != best
    many = tuple((token, -100.0) for token in range(MAX_LOGIT_BIAS) if token not in (5, 6))
    assert set(generate(runner, 0, prompts[2], params(logit_bias=many))) <= {5, 6}


def test_stop_tokens_wait_for_min_tokens(runner, prompts):
    want = generate(runner, 0, prompts[2], params())
    stops = tuple(sorted(set(want)))
    sampling = params(min_tokens=3, stop_token_ids=stops, logit_bias=tuple((s, 50) for s in stops))
    got = generate(runner, 0, prompts[2], sampling, steps=5)
    assert not set(got[:3]) & set(stops)
    assert set(got[3:]) <= set(stops)
    # Two were generated before a retraction: one more must come.
    got = generate(runner, 1, prompts[2], sampling, answer=got[:2], steps=3)
    assert got[0] not in stops
    assert got[1] in stops


def test_a_long_context_is_set_up_in_pieces():
    """Prompt and answer longer than a piece, the border between them inside one."""
    rng = np.random.default_rng(0)
    vocab, slot = 300, 1
    prompt = tuple(rng.integers(0, vocab // 2, PIECE_TOKENS + 300).tolist())
    answer = tuple(rng.integers(0, vocab, 2 * PIECE_TOKENS).tolist())
    sampling = params(presence_penalty=1.0, stop_token_ids=(4,), min_tokens=2)
    rows = list(pieces(chunk(slot, prompt, sampling, answer=answer)))
    assert len(rows) == 4
    shapes = abstract_state(2, vocab)
    state = SamplingState(*(jnp.full(s.shape, 5, s.dtype) for s in shapes))
    for row in rows:
        state = jax.jit(set_up_slot)(state, row)
    np.testing.assert_array_equal(state.counts[slot], counted(prompt, answer, (4,), vocab))
    assert state.stops_from.tolist() == [5, len(prompt) + 2, 5]
    assert not state.bias_values[slot].any()
    assert (state.counts[jnp.array([0, 2])] == 5).all()


def test_set_up_needs_the_context(runner, prompts):
    piece = chunk(0, prompts[1], params(presence_penalty=1.0))._replace(prompt=None)
    with pytest.raises(ValueError, match="prompt is missing"):
        runner.launch(step([piece]))
    many = tuple((token, 1.0) for token in range(MAX_LOGIT_BIAS + 1))
    with pytest.raises(ValueError, match="can bias 512 tokens"):
        runner.launch(step([chunk(0, prompts[1], params(logit_bias=many))]))


# ---- masks, overlap, compilation ------------------------------------------------------------


def test_masks_bind_their_rows_alone(runner, prompts):
    want = [generate(runner, slot, prompts[slot + 1], params(), steps=2) for slot in (0, 1)]
    run(runner, step([chunk(0, prompts[1], params())]))
    plan = step([decode_row(0, len(prompts[1]), params()), chunk(1, prompts[2], params())])
    launched = runner.launch(plan)
    masks = launched.open_masks()
    assert [launched.mask_row(0, i) for i in range(2)] == [0, 4]
    masks[0, launched.mask_row(0, 1)] = 0
    masks[0, launched.mask_row(0, 1), 3] = 1 << 7
    launched.sample(masks.view(np.uint32))
    tokens = [t.token_id for t in launched.result().tokens[0]]
    assert tokens == [want[0][1], 3 * 32 + 7]
    launched = runner.launch(plan)
    with pytest.raises(ValueError, match="Masks must be int32"):
        launched.sample(masks[:, 1:])
    launched.sample()
    assert launched.result().tokens[0][1].token_id == want[1][0]


def test_two_steps_in_flight_give_the_same_tokens(runner, prompts):
    sampling = params(temperature=0.9, seed=3, **PENALTIES)
    want = generate(runner, 0, prompts[2], sampling, steps=10)
    launched = runner.launch(step([chunk(1, prompts[2], sampling)]))
    launched.sample()
    got = []
    for i in range(9):
        ahead = runner.launch(step([decode_row(1, len(prompts[2]) + i, sampling)]))
        got.append(launched.result().tokens[0][0].token_id)
        ahead.sample()
        launched = ahead
    assert [*got, launched.result().tokens[0][0].token_id] == want


def test_the_order_of_calls_is_kept(runner, prompts):
    launched = runner.launch(step([chunk(0, prompts[1], params())]))
    with pytest.raises(RuntimeError, match="must be sampled before its result"):
        launched.result()
    with pytest.raises(RuntimeError, match="must be sampled before the next"):
        runner.launch(step([chunk(0, prompts[1], params())]))
    launched.sample()
    with pytest.raises(RuntimeError, match="sampled once"):
        launched.sample()
    assert launched._logits is None  # nothing keeps [R, V] numbers alive


def test_a_step_that_samples_nothing_has_no_tokens(runner, prompts):
    result = run(runner, step([chunk(0, prompts[5], params(), end=50)]))
    assert result.tokens == [[None]]
    assert result.scores == {}


def test_no_variant_compiles_after_warm_up(runner, prompts):
    counter = CompileCounter()
    kinds = [params(), params(temperature=1.0, logprobs=3), params(**PENALTIES)]
    for sampling in kinds:
        for prompt in (prompts[1], prompts[5]):  # both extend programs, both decode programs
            generate(runner, 0, prompt, sampling, steps=2)
        run(runner, step([decode_row(0, 5, sampling), decode_row(1, 5, sampling)]))
        launched = runner.launch(step([chunk(0, prompts[1], sampling), decode_row(1, 5, sampling)]))
        launched.sample(launched.open_masks())
        launched.result()
    scored = chunk(0, prompts[2], params(), targets=prompts[2][1:], num_alternatives=3)
    run(runner, step([scored]))
    assert counter.count == 0


def test_programs_update_their_state_in_place(runner):
    """With many slots a copy of the state would be the largest temporary by far."""

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    rows, vocab, slots = 4, 1000, 511
    state = SamplingState(*(array(p.shape, p.dtype) for p in abstract_state(slots, vocab)))
    held = sum(part.size * part.dtype.itemsize for part in state)
    assert held == (slots + 1) * (4 * vocab + 8 * MAX_LOGIT_BIAS + 4)  # as its module says
    full = jax.jit(_sample_full, donate_argnums=(3, 4)).lower(
        array((rows, vocab), jnp.float32),
        array((rows, len(Column))),
        array((rows, -(-vocab // 32))),
        array((slots + 1,)),
        state,
    )
    set_up = jax.jit(_set_up, donate_argnums=0).lower(state, array((SETUP_WIDTH,)))
    for program in (full.compile(), set_up.compile()):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= held
        assert memory.temp_size_in_bytes < held / 8
    pointers = [part.unsafe_buffer_pointer() for part in runner._state]
    generate(runner, 0, (3, 4, 5), params(**PENALTIES))
    assert pointers == [part.unsafe_buffer_pointer() for part in runner._state]


def test_memory_beside_the_pool_is_counted(runner):
    """What an accelerator's pool is sized by: sampling state, step outputs, temporaries."""
    factory, vocab = runner._factory, runner.model.vocab_size
    state = 5 * (4 * vocab + 8 * MAX_LOGIT_BIAS + 4)
    logits, hidden = 8 * vocab * 4, 64 * runner.model.hidden_size * 4
    masks = (8 + 4 + 1 + 8) * vocab // 8  # one of each size kept, one uploaded
    assert factory.step_bytes() == state + 2 * (logits + hidden) + masks  # two steps in flight
    temporary = factory.most_temporary_bytes(runner.table_width)
    largest = runner.memory_analysis(runner.buckets.shapes()[0]).temp_size_in_bytes
    assert temporary >= largest * 0.9


def test_the_compiled_greedy_program_sorts_nothing(runner):
    for program in runner._programs.greedy.values():
        assert "sort" not in program.as_text()
        assert "topk" not in program.as_text().lower()
    assert "sort" in runner._programs.full[1].as_text()


# ---- prompt scoring -------------------------------------------------------------------------


def check_scores(fixture, scores):
    """Scores by prompt id against the reference's logits."""
    for p in fixture.prompts:
        if p["id"] not in scores:
            continue
        want = jax.nn.log_softmax(fixture.logits[p["id"]].astype(np.float32))
        got, targets = scores[p["id"]], p["prompt"][1:]
        assert [s.token_id for s in got] == targets
        np.testing.assert_allclose(
            [s.logprob for s in got], want[np.arange(len(targets)), targets], atol=LOGIT_TOLERANCE
        )
        for s, row in zip(got, want, strict=False):
            assert len(s.top_logprobs) == 4
            np.testing.assert_allclose(
                [v for _, v in s.top_logprobs], np.sort(row)[::-1][:4], atol=LOGIT_TOLERANCE
            )
            np.testing.assert_allclose(
                [row[t] for t, _ in s.top_logprobs],
                [v for _, v in s.top_logprobs],
                atol=LOGIT_TOLERANCE,
            )


def scored_chunk(slot, prompt, start=0, end=None):
    end = len(prompt) if end is None else end
    return chunk(
        slot, prompt, params(), start=start, end=end,
        targets=prompt[start + 1 : end + 1], num_alternatives=4,
    )  # fmt: skip


def test_scores_equal_the_reference(runner):
    """In chunks: a prompt of 180 takes three steps, others share one."""
    fixture = load_fixture("deepseek_v3")
    scores: dict[str, list] = {}
    for p in fixture.prompts[1:]:
        prompt = tuple(p["prompt"])
        for start in range(0, len(prompt), 64):
            piece = scored_chunk(0, prompt, start, min(start + 64, len(prompt)))
            result = run(runner, step([piece]))
            scores.setdefault(p["id"], []).extend(result.scores["r0"])
    assert len(scores) == 7
    check_scores(fixture, scores)
    prompts = {s: fixture.prompts[i] for s, i in ((0, 1), (1, 2), (2, 3))}
    plan = step(
        [chunk(3, (4, 5), params())]
        + [scored_chunk(s, tuple(p["prompt"])) for s, p in prompts.items()]
    )
    result = run(runner, plan)
    assert sorted(result.scores) == ["r0", "r1", "r2"]
    check_scores(fixture, {p["id"]: result.scores[f"r{s}"] for s, p in prompts.items()})


def test_scores_on_a_mesh_take_several_launches():
    """Two slices with unequal numbers of targets, more than one block of them."""
    engine = fixture_engine(tp=4, dp=2, ep=2, extend_buckets=(192,))
    fixture = load_fixture("deepseek_v3")
    long, short = fixture.prompts[6], fixture.prompts[3]
    plan = step([scored_chunk(0, tuple(short["prompt"]))], [scored_chunk(1, tuple(long["prompt"]))])
    result = run(engine.runner, plan)
    check_scores(fixture, {short["id"]: result.scores["r0"], long["id"]: result.scores["r1"]})
    assert result.tokens[0][0].token_id == short["tokens"][0]
    assert result.tokens[1][0].token_id == long["tokens"][0]


def test_set_up_on_a_mesh():
    """One slice sets up two requests, the other none."""
    runner = fixture_engine(tp=2, dp=2).runner
    prompt = tuple(load_fixture("deepseek_v3").prompts[1]["prompt"])
    force = [params(logit_bias=((token, 100.0),)) for token in (40, 41)]
    plan = step(
        [chunk(0, prompt, force[0]), chunk(1, prompt, force[1])], [chunk(0, prompt, params())]
    )
    tokens = run(runner, plan).tokens
    assert [t.token_id for t in tokens[0]] == [40, 41]
    want = load_fixture("deepseek_v3").prompts[1]["tokens"][0]
    assert tokens[1][0].token_id == want


# ---- deterministic inference ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_deterministic_programs_prefill_without_decode_rows(name):
    runner = fixture_engine(
        name, enable_deterministic_inference=True, decode_buckets=(1, 4), extend_buckets=(16, 64)
    ).runner
    assert not runner._programs.greedy
    assert [(s.decode_rows, s.prefill_rows) for s in runner.buckets.shapes()] == [(0, 64), (4, 0)]
    fixture, counter = load_fixture(name), CompileCounter()
    for p in fixture.prompts[1:4]:
        assert generate(runner, 0, tuple(p["prompt"]), params(), steps=32) == p["tokens"]
    with pytest.raises(ValueError, match="either decode or prefill"):
        runner.launch(step([decode_row(0, 5, params()), chunk(1, (3, 4), params())]))
    assert counter.count == 0
