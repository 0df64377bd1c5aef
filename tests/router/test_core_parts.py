"""Flags, request bodies, the prefix index, circuits, health, limits and pauses, one by one."""

import asyncio
import json
import random
import re
import time
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.breaker import PROBES, CircuitBreaker
from router.config import ConfigError, RouterConfig, parse_args
from router.health import HealthState
from router.limits import Limiter, RateLimited
from router.prefix_index import PrefixIndex
from router.request import BadRequest, RoutedRequest, block_end, with_fields
from router.retry import backoff_s, retry_after_s
from tests.router.support import run

# ---- flags


def test_defaults_are_those_of_the_peer():
    config = parse_args([])
    assert (config.policy, config.cache_threshold, config.balance_abs_threshold) == (
        "cache_aware",
        0.3,
        64,
    )
    assert (config.retry_max_retries, config.retry_max_backoff_ms) == (5, 30000)
    assert (config.cb_failure_threshold, config.cb_timeout_duration_secs) == (10, 60)
    assert config.port == 30000
    assert config.prometheus_port == 29000
    assert config.stream_failover


PEER = """
host 0.0.0.0 | port 30000 | worker-urls | policy cache_aware | cache-threshold 0.3
balance-abs-threshold 64 | balance-rel-threshold 1.5 | eviction-interval-secs 60
max-tree-size 67108864 | max-payload-size 536870912 | dp-aware off | enable-igw off
worker-startup-timeout-secs 1800 | worker-startup-check-interval 30 | log-dir | log-level info
prometheus-port 29000 | prometheus-host 0.0.0.0 | prometheus-duration-buckets 0.5 1.5
request-id-headers x-request-id x-correlation-id x-trace-id request-id
request-timeout-secs 1800 | shutdown-grace-period-secs 180 | cors-allowed-origins
max-concurrent-requests -1 | queue-size 100 | queue-timeout-secs 60
rate-limit-tokens-per-second | retry-max-retries 5 | retry-initial-backoff-ms 50
retry-max-backoff-ms 30000 | retry-backoff-multiplier 1.5 | retry-jitter-factor 0.2
disable-retries off | cb-failure-threshold 10 | cb-success-threshold 3
cb-timeout-duration-secs 60 | cb-window-duration-secs 120 | disable-circuit-breaker off
health-failure-threshold 3 | health-success-threshold 2 | health-check-timeout-secs 5
health-check-interval-secs 60 | health-check-endpoint /health | disable-health-check off
api-key | model-path | tokenizer-path | max-idle-secs 14400 | assignment-mode random
service-discovery off | selector | service-discovery-port 80 | service-discovery-namespace
tls-cert-path | tls-key-path | client-cert-path | client-key-path | ca-cert-paths
"""
"""Section 2: flags that are served, with their defaults."""

OTHER_VALUES = {
    "policy": "manual",
    "log-level": "debug",
    "assignment-mode": "min_load",
    "selector": "a=b",
    "worker-urls": "http://a:1",
    "rate-limit-tokens-per-second": "7",
    "cache-threshold": "0.7",
    "retry-jitter-factor": "0.7",
}
TOGETHER = {
    "tls-cert-path": ("--tls-key-path", "k"),
    "tls-key-path": ("--tls-cert-path", "c"),
    "client-cert-path": ("--client-key-path", "k"),
    "client-key-path": ("--client-cert-path", "c"),
    "service-discovery": ("--selector", "a=b"),
}


@pytest.mark.parametrize("flag", [f.strip() for f in re.split(r"[|\n]", PEER) if f.strip()])
def test_every_flag_of_the_peer(flag):
    """Its name, its default, and that it says something."""
    name, *default = flag.split()
    field = name.replace("-", "_")
    held = getattr(parse_args([]), field)
    if default == ["off"]:
        assert held is False
        given = parse_args([f"--{name}", *TOGETHER.get(name, ())])
        assert getattr(given, field) is True
        return
    if name == "prometheus-duration-buckets":
        assert held[:3] == (0.001, 0.005, 0.01)
        assert held[-1] == 240.0
        assert len(held) == 20
    elif isinstance(held, tuple):
        assert held == tuple(default)
    elif held is None:
        assert not default
    else:
        assert type(held)(default[0]) == held
    other = OTHER_VALUES.get(name, "77")
    told = getattr(parse_args([f"--{name}", other, *TOGETHER.get(name, ())]), field)
    values = told if isinstance(told, tuple) else (told,)
    assert values != (held,)
    assert [type(v)(other) for v in values] == list(values)


GUIDE = """
    --worker-urls http://a:1 http://b:2 --policy cache_aware --cache-threshold 0.5
    --balance-abs-threshold 32 --balance-rel-threshold 1.5 --eviction-interval-secs 120
    --max-tree-size 1000 --retry-max-backoff-ms 5000 --retry-backoff-multiplier 2.0
    --retry-jitter-factor 0.1 --cb-window-duration-secs 60 --no-stream-failover
    --request-id-headers a b --disable-retries
"""


def test_flags_as_the_guide_gives_them():
    config = parse_args(GUIDE.split())
    assert config.worker_urls == ("http://a:1", "http://b:2")
    assert config.request_id_headers == ("a", "b")
    assert not config.stream_failover
    assert config.disable_retries
    assert parse_args(["--eviction-interval", "7"]).eviction_interval_secs == 7


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--policy best", "invalid choice: 'best'"),
        (
            "--pd-disaggregation",
            "--pd-disaggregation is not served: each worker does prefill and decode",
        ),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--redis-url x", "--redis-url is not served: the router keeps no conversations"),
        ("--cache-threshold 2", "--cache-threshold must be between 0 and 1, got 2.0"),
        ("--max-concurrent-requests 0", "--max-concurrent-requests must be at least 1, or -1"),
        ("--worker-urls http://a/b/c", "'http://a/b/c' is no http://HOST:PORT"),
        ("--service-discovery", "--service-discovery needs a --selector"),
        ("--selector a", "'a' is no key=value"),
        ("--tls-cert-path x", "--tls-cert-path and --tls-key-path go together"),
        ("--request-timeout-secs 0", "--request-timeout-secs must be positive"),
        ("--port 70000", "--port must be between 0 and 65535"),
    ],
)
def test_wrong_flags_are_a_sentence(flags, text):
    with pytest.raises(ConfigError) as caught:
        parse_args(flags.split())
    assert text in str(caught.value)


# ---- bodies


def parse(path="/v1/chat/completions", headers=(), **fields):
    return RoutedRequest.parse(path, json.dumps(fields).encode(), headers)


def shared(one, other):
    """Blocks that two requests share."""
    num = 0
    for a, b in zip(one.blocks, other.blocks, strict=False):
        if a != b:
            break
        num += 1
    return num


LONG = "x" * 1000


def message(role, content):
    return {"role": role, "content": content}


def test_a_conversation_shares_its_beginning():
    first = parse(messages=[message("system", LONG), message("user", "a" * 500)])
    answer = [message("assistant", "b" * 300), message("user", "c" * 100)]
    second = parse(messages=[message("system", LONG), message("user", "a" * 500), *answer])
    assert shared(first, second) == len(first.blocks)
    assert len(second.blocks) > len(first.blocks)


@pytest.mark.parametrize("size", [10, 500, 64 * 255 + 3, 40_000])
def test_the_next_turn_begins_with_prompt_and_answer(size):
    """In text, in token ids, in messages; whatever the block that the answer begins in."""
    rng = random.Random(size)
    text, answer = ("".join(rng.choices("abcdefgh ", k=k)) for k in (size, 3000))
    first = parse("/v1/completions", prompt=text)
    second = parse("/v1/completions", prompt=text + answer)
    assert first.blocks_with(answer) == second.blocks
    assert first.blocks_with("") == first.blocks
    ids, more = ([rng.randrange(9999) for _ in range(k)] for k in (size // 4, 700))
    first = parse("/generate", input_ids=ids)
    assert first.by_ids
    assert first.blocks_with(more) == parse("/generate", input_ids=ids + more).blocks
    talk = [message("user", text)]
    first = parse(messages=talk)
    second = parse(messages=[*talk, message("assistant", answer), message("user", "?" * 2000)])
    both = first.blocks_with(answer)
    assert shared(second, first) == len(first.blocks) < len(both)
    assert second.blocks[: len(both)] == both


def test_roles_tools_and_order_are_part_of_the_key():
    plain = parse(messages=[message("user", LONG)])
    assert shared(plain, parse(messages=[message("system", LONG)])) == 0
    tools = [{"type": "function", "function": {"name": "f" * 100}}]
    assert shared(plain, parse(messages=[message("user", LONG)], tools=tools)) == 0
    pair = [message("user", LONG), message("user", "y" * 1000)]
    assert shared(parse(messages=pair), parse(messages=pair[::-1])) == 0
    parts = [{"type": "text", "text": LONG}]
    assert shared(plain, parse(messages=[message("user", parts)])) == len(plain.blocks)


def test_salts_and_models_do_not_share():
    body = {"messages": [message("user", LONG)]}
    assert shared(parse(**body), parse(**body, model="m")) == 0
    assert shared(parse(**body), parse(**body, cache_salt="s")) == 0
    assert shared(parse(**body, extra_key="k"), parse(**body, extra_key="k")) > 10


def test_token_ids_match_by_ids_not_by_length():
    ids = list(range(1000))
    one = parse("/v1/completions", prompt=ids)
    assert shared(one, parse("/v1/completions", prompt=[*ids[:500], *ids[:500]])) == 500 // 16
    assert shared(one, parse("/v1/completions", prompt=ids[::-1])) == 0
    assert shared(one, parse("/generate", input_ids=ids)) == len(one.blocks)
    assert one.num_chars == 4000
    several = parse("/v1/completions", prompt=[ids, ids[::-1]])
    assert several.blocks == one.blocks


def test_several_prompts_count_in_full():
    """What all of them cost, and what `usage.prompt_tokens` is about."""
    assert parse("/v1/completions", prompt=[LONG, LONG, "y" * 50]).num_chars == 2050
    assert parse("/generate", text=[LONG] * 3).num_chars == 3000
    assert parse("/generate", input_ids=[[1] * 100, [2] * 50]).num_chars == 600
    assert parse("/v1/completions", prompt=[5, [1], {}]).blocks == ()


def test_an_image_is_not_its_bytes():
    def chat(data):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
        return parse(messages=[message("user", [image, {"type": "text", "text": LONG}])])

    one = chat("A" * 500_000)
    assert one.num_chars < 1100
    assert shared(one, chat("A" * 500_000)) == len(one.blocks)
    assert shared(one, chat("B" * 500_000)) == 0


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [LONG, "y"]}),
        ("/generate", {"text": LONG}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/embeddings", {"input": LONG}),
        ("/v1/rerank", {"query": LONG, "documents": ["a"]}),
    ],
)
def test_every_route_has_a_key(path, fields):
    assert len(parse(path, **fields).blocks) == 1000 // 64


def test_what_is_read_besides():
    one = parse("/generate", text="a", stream=True)
    assert (one.model, one.stream, one.endpoint) == ("default", True, "generate")
    assert parse(model=5, stream="yes").model == "unknown"
    assert not parse(stream="yes").stream
    headers = [(b"x-smg-routing-key", b"k"), (b"x-smg-target-worker", b"2"), (b"cookie", b"c")]
    one = parse(headers=headers)
    assert (one.routing_key, one.target, one.implicit_key) == ("k", "2", "c")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b'{"a": \xff}'),
        b'{"messages": [], "tools": ["\xff"]}',
    ],
)
def test_what_is_no_object_is_refused(body):
    with pytest.raises(BadRequest) as caught:
        RoutedRequest.parse("/v1/completions", body)
    assert caught.value.status == 400
    assert "Failed to parse the request body as JSON" in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "x"},
        {"messages": [1, None, {"content": 5}, {"role": "user", "content": [{}, 3, "x"]}]},
        {"prompt": {"a": 1}},
        {"prompt": [1, "a", None]},
        {"prompt": []},
        {"input": [{"a": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
)
def test_wrong_types_are_the_workers_business(fields):
    parse("/v1/completions", **fields)


def test_long_prompts_have_few_blocks():
    text = "".join(random.Random(1).choices("abcdefgh", k=1 << 20))
    one = parse("/v1/completions", prompt=text)
    assert len(one.blocks) < 1400
    assert block_end(len(one.blocks) - 1) <= one.num_chars
    other = parse("/v1/completions", prompt=text[: 1 << 19] + "x" + text[1 << 19 :])
    assert 0.45 < block_end(shared(one, other) - 1) / one.num_chars <= 0.5


@pytest.mark.parametrize("body", [b"{}", b"{ }\n", b'{"a":1}', b'{"a": {"b": [1]} } \r\n'])
def test_fields_are_put_at_the_end(body):
    changed = with_fields(body, {"x": [1, 2], "a": 5})
    assert json.loads(changed) == json.loads(body) | {"x": [1, 2], "a": 5}
    assert changed.startswith(body.rstrip()[:-1].rstrip())


# ---- the prefix index


class PlainIndex:
    """The same, worker by worker, without bounds."""

    def __init__(self):
        self.held = {}

    def insert(self, worker, blocks):
        self.held.setdefault(worker, set()).update(blocks)

    def match(self, blocks, workers):
        depths = {}
        for worker in workers:
            num = 0
            while num < len(blocks) and blocks[num] in self.held.get(worker, ()):
                num += 1
            if num:
                depths[worker] = num
        return depths


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(0, 3), min_size=1, max_size=6)),
        max_size=20,
    ),
    st.lists(st.integers(0, 3), max_size=6),
    st.integers(0, 31),
)
def test_match_equals_a_walk_for_each_worker(inserts, asked, mask):
    def chain(items):
        return [hash(tuple(items[: i + 1])) for i in range(len(items))]

    index, plain = PrefixIndex(), PlainIndex()
    for worker in range(5):
        index.add(worker, 1 << 30)
    for worker, items in inserts:
        index.insert(worker, chain(items), 0.0)
        plain.insert(worker, chain(items))
    workers = [w for w in range(5) if mask >> w & 1]
    assert index.match(chain(asked), mask) == plain.match(chain(asked), workers)


def test_the_end_of_a_prefix_goes_before_its_beginning():
    index = PrefixIndex()
    index.add(0, 64 * 5)
    index.insert(0, [1, 2, 3], 0.0)
    index.insert(0, [1, 2, 4, 5], 1.0)
    assert index.match([1, 2, 3], 1) == {0: 3}
    index.insert(0, [9], 2.0)
    assert index.match([1, 2, 3], 1) == {0: 2}  # the oldest end went
    index.resize(0, 64 * 2)
    assert index.match([1, 2, 4, 5], 1) == {0: 1}
    assert index.chars(0) == 128
    index.forget_oldest(0, 64)
    assert index.match([9], 1) == {0: 1}
    assert index.size == 1
    index.remove(0)
    assert index.size == 0


def test_a_prompt_longer_than_a_cache_keeps_its_beginning():
    index = PrefixIndex()
    index.add(0, 64 * 300)
    index.insert(0, [-1, -2], 0.0)
    blocks = list(range(1000))
    index.insert(0, blocks, 1.0)
    assert index.chars(0) <= 64 * 300
    assert index.match(blocks, 1)[0] >= 256
    assert index.match([-1], 1) == {}


def test_what_was_not_computed_is_forgotten():
    index = PrefixIndex()
    index.add(0, 1 << 20)
    index.add(1, 1 << 20)
    for worker in (0, 1):
        index.insert(worker, [1, 2, 3], 0.0)
    index.forget(0, [2, 3, 4])
    assert index.match([1, 2, 3], 3) == {0: 1, 1: 3}
    assert index.chars(0) == 64
    index.forget(1, [1, 2, 3])
    assert index.size == 1


# ---- circuits, health, pauses


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def circuit(clock, **changes):
    seen = []
    settings = {"failure_threshold": 3, "success_threshold": 2, "timeout_s": 10.0} | changes
    breaker = CircuitBreaker(
        **settings, clock=clock, on_transition=lambda a, b: seen.append((a, b))
    )
    return breaker, seen


def record(breaker, *outcomes):
    for outcome in outcomes:
        breaker.end(breaker.begin(), outcome)


def test_a_circuit_opens_and_closes():
    clock = Clock()
    breaker, seen = circuit(clock)
    record(breaker, False, False, True, False, False)
    assert breaker.allows  # a success in between
    record(breaker, False)
    assert (breaker.state, breaker.allows) == ("open", False)
    clock.now = 10.0
    assert breaker.state == "half_open"
    record(breaker, True)
    assert breaker.state == "half_open"
    record(breaker, True)
    assert breaker.state == "closed"
    assert seen == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]


def test_one_failure_opens_a_half_open_circuit():
    clock = Clock()
    breaker, _ = circuit(clock)
    record(breaker, False, False, False)
    clock.now = 10.0
    record(breaker, True, False)
    assert breaker.state == "open"


def test_a_half_open_circuit_lets_few_through():
    """Not all traffic at once upon a worker that may still be ill."""
    clock = Clock()
    breaker, _ = circuit(clock)
    record(breaker, False, False, False)
    clock.now = 10.0
    for _ in range(PROBES):
        assert breaker.allows
        era = breaker.begin()
    assert not breaker.allows
    breaker.end(era, None)
    assert breaker.allows


def test_a_circuit_is_not_stuck_half_open():
    """Complaint 8: what began before the circuit opened is no probe, and its end says nothing."""
    clock = Clock()
    breaker, _ = circuit(clock)
    eras = [breaker.begin() for _ in range(40)]  # long streams
    for era in eras[:3]:
        breaker.end(era, False)
    clock.now = 10.0
    assert breaker.allows
    for era in eras[3:20]:
        breaker.end(era, False)
    assert breaker.state == "half_open"
    record(breaker, True, True)
    assert breaker.state == "closed"
    for era in eras[20:]:
        breaker.end(era, False)
    assert breaker.state == "closed"


def test_what_says_nothing_changes_nothing_and_a_disabled_circuit_never_opens():
    breaker, seen = circuit(Clock())
    record(breaker, False, False, None, False)
    assert breaker.state == "open"
    breaker, seen = circuit(Clock(), failure_threshold=None)
    record(breaker, *[False] * 100)
    assert breaker.allows
    assert seen == []


def test_health_changes_sides_after_so_many_in_a_row():
    """Complaint 14."""
    health = HealthState(failure_threshold=3, success_threshold=2)
    changes = [health.record(ok) for ok in (False, False, True, False, False, False)]
    assert changes == [False] * 5 + [True]
    assert not health.healthy
    changes = [health.record(ok) for ok in (True, False, True, True)]
    assert changes == [False, False, False, True]
    assert health.healthy


def test_pauses_grow_to_a_bound_with_jitter():
    config = RouterConfig(retry_initial_backoff_ms=100, retry_max_backoff_ms=1000)
    rng = random.Random(1)
    for k, middle in enumerate((0.1, 0.15, 0.225)):
        pauses = [backoff_s(config, k, rng) for _ in range(500)]
        assert 0.8 * middle <= min(pauses) < 0.85 * middle
        assert 1.15 * middle < max(pauses) <= 1.2 * middle
    assert backoff_s(config, 10_000, rng) <= 1.2
    assert backoff_s(config, 0, rng, retry_after_s=0.7) == 0.7
    assert backoff_s(config, 0, rng, retry_after_s=99) == 1.0


# ---- limits


def test_max_concurrent_is_a_concurrency_limit():
    async def main():
        limiter = Limiter(max_running=3, queue_size=100, clock=Clock())
        permits = [await limiter.acquire() for _ in range(3)]
        order = []

        async def one(i):
            permit = await limiter.acquire()
            order.append(i)
            return permit

        waiting = [asyncio.create_task(one(i)) for i in range(5)]
        await asyncio.sleep(0.05)
        assert (limiter.num_running, limiter.num_waiting, order) == (3, 5, [])
        for permit in permits:
            permit.release()
            permit.release()  # once
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == [0, 1, 2]  # first come, first served
        for task in waiting[:3]:
            (await task).release()
        for task in waiting[3:]:
            (await task).release()
        assert (limiter.num_running, limiter.num_waiting) == (0, 0)

    run(main)


def test_rate_limit_queue_full_429_and_timeout_408():
    async def main():
        told = []
        limiter = Limiter(
            max_running=1,
            queue_size=1,
            queue_timeout_s=0.05,
            clock=Clock(),
            on_decision=told.append,
        )
        permit = await limiter.acquire()
        waiting = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0)
        with pytest.raises(RateLimited) as full:
            await limiter.acquire()
        assert full.value.status == 429
        assert full.value.retry_after >= 1
        with pytest.raises(RateLimited) as late:
            await waiting
        assert late.value.status == 408
        assert "waited 0.05 s" in late.value.message
        assert limiter.num_waiting == 0
        permit.release()
        (await limiter.acquire()).release()
        assert told == ["allowed", "rejected", "rejected", "allowed"]

    run(main)


def test_a_client_that_leaves_the_queue_takes_no_place():
    async def main():
        limiter = Limiter(max_running=1, queue_size=9, clock=Clock())
        permit = await limiter.acquire()
        waiting = [asyncio.create_task(limiter.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert limiter.num_waiting == 2
        permit.release()
        waiting[1].cancel()  # in the very moment in which it got its place
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        (await waiting[2]).release()
        assert (limiter.num_running, limiter.num_waiting) == (0, 0)

    run(main)


def test_starts_per_second():
    async def main():
        loop = asyncio.get_running_loop()
        limiter = Limiter(per_second=50.0, max_running=5, queue_size=100, clock=loop.time)
        began = loop.time()

        async def one():
            (await limiter.acquire()).release()

        await asyncio.gather(*(one() for _ in range(15)))
        assert 0.17 < loop.time() - began < 2  # 5 at once, 10 more at 50 a second

    run(main)


def test_a_full_limiter_does_not_spin():
    """A place is free only when a request ends: no timer looks for it meanwhile."""

    async def main():
        limiter = Limiter(
            per_second=1000.0,
            max_running=1,
            queue_size=10,
            clock=asyncio.get_running_loop().time,
        )
        looks = []
        serve = limiter._serve
        limiter._serve = lambda: (looks.append(1), serve())
        permit = await limiter.acquire()
        waiting = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0.1)
        assert len(looks) < 10
        permit.release()
        (await waiting).release()

    run(main)


def test_without_limits_nothing_waits():
    async def main():
        limiter = Limiter(clock=Clock())
        for _ in range(1000):
            (await limiter.acquire()).release()

    run(main)


def test_retry_after_is_seconds_or_a_date():
    assert [retry_after_s(value) for value in (None, b"7", b" 0 ", b"soon", b"-1")] == [
        0.0,
        7.0,
        0.0,
        0.0,
        0.0,
    ]
    later = formatdate(time.time() + 60, usegmt=True).encode()
    assert 58 < retry_after_s(later) <= 60
    assert retry_after_s(b"Sun, 06 Nov 1994 08:49:37 GMT") == 0.0


def test_a_circuit_that_nobody_was_behind_is_tried_when_somebody_is():
    breaker, _ = circuit(Clock())
    for absent in (False, False, True):
        breaker.end(breaker.begin(), False, absent=absent)
    assert breaker.absent
    breaker.present()
    assert (breaker.state, breaker.allows) == ("half_open", True)
    # Whoever is there may be as ill as it was before.
    record(breaker, False)
    assert breaker.state == "open"
    breaker.present()
    assert breaker.state == "open"


def test_a_circuit_whose_worker_was_there_and_failed_waits_its_time():
    breaker, _ = circuit(Clock())
    breaker.present()
    for absent in (True, True, False):
        breaker.end(breaker.begin(), False, absent=absent)
    assert not breaker.absent
    breaker.present()
    assert (breaker.state, breaker.allows) == ("open", False)
