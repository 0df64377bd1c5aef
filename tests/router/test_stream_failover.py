"""Streams whose worker dies: the client sees one unbroken answer, wherever the break is."""

import asyncio
import contextlib
import itertools
import json

import pytest

from tests.fakes import FakeEngine, answer
from tests.router.support import CHAT, COMPLETIONS, cutting, routed, run, workers
from tests.serving.http.support import listening

pytestmark = pytest.mark.timeout(120)


def event_ends(body):
    """Where the events of a stream end, as counts of bytes."""
    ends, at = [], 0
    for event in body.split(b"\n\n")[:-1]:
        at += len(event) + 2
        ends.append(at)
    return ends


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("cut_event", [False, True])
def test_killed_after_any_number_of_events(path, cut_event):
    async def main():
        async with workers(2) as fleet, routed([w.url for w in fleet]) as server:
            whole = await server.client.stream(path)
            text = whole.text()
            assert len(text) == 48
            for num in range(13):
                for worker in fleet:
                    worker.faults.die_after_chunks = -1
                doomed = fleet[num % 2]
                doomed.faults.update({"die_after_chunks": num, "cut_event": cut_event})
                for _ in range(2):  # one of the two begins there
                    reply = await server.client.stream(path)
                    assert reply.text() == text
                    assert len({chunk["id"] for chunk in reply.chunks}) == 1
                    assert "token_ids" not in reply.body.decode()
                    reasons = [c["choices"][0]["finish_reason"] for c in reply.chunks]
                    assert reasons[-1] == "length"
                    assert reasons.count(None) == len(reasons) - 1
                    if path == CHAT:
                        roles = ["role" in c["choices"][0]["delta"] for c in reply.chunks]
                        assert roles.count(True) == 1
            assert sum(worker.counts.continued for worker in fleet) > 10

    run(main)


def test_the_clients_own_ids_seed_and_usage_stay():
    async def main():
        async with workers(2) as fleet, routed([w.url for w in fleet]) as server:
            fields = {
                "return_token_ids": True,
                "seed": 3,
                "temperature": 1,
                "stream_options": {"include_usage": True},
            }
            whole = await server.client.stream(**fields)
            fleet[0].faults.die_after_chunks = 4
            for _ in range(2):
                reply = await server.client.stream(**fields)
                assert reply.text() == whole.text()
                *chunks, usage = reply.chunks
                ids = [i for c in chunks for i in c["choices"][0]["token_ids"]]
                assert len(ids) == 12
                assert usage["usage"]["completion_tokens"] == 12
                assert usage["choices"] == []
            assert fleet[1].last.body["seed"] == 3

    run(main)


def test_sampled_answers_go_on_too():
    """Without a seed each worker would draw its own: the router gives one."""

    async def main():
        async with workers(2) as fleet, routed([w.url for w in fleet]) as server:
            fleet[0].faults.die_after_chunks = 5
            texts = set()
            for _ in range(6):
                reply = await server.client.stream(temperature=1)
                assert len(reply.text()) == 48
                texts.add(reply.text())
            assert len(texts) == 6
            assert fleet[1].counts.continued >= 3

    run(main)


def test_several_workers_in_a_row_may_die():
    async def main():
        async with workers(3) as fleet, routed([w.url for w in fleet]) as server:
            text = (await server.client.stream(max_tokens=30)).text()
            for worker in fleet:
                worker.faults.die_after_chunks = 3
            reply = await server.client.stream(max_tokens=30)
            assert reply.text() == text
            assert sum(worker.counts.continued for worker in fleet) == 9

    run(main)


@pytest.mark.parametrize("code", [500, 503])
def test_an_error_event_of_the_worker_is_a_break(code):
    async def main():
        async with workers(2) as fleet, routed([w.url for w in fleet]) as server:
            text = (await server.client.stream()).text()
            fleet[0].faults.update({"die_after_chunks": 5, "error_event": code})
            for _ in range(2):
                assert (await server.client.stream()).text() == text

    run(main)


def test_an_error_event_that_is_the_requests_own_passes():
    async def main():
        async with workers(2) as fleet, routed([w.url for w in fleet]) as server:
            for worker in fleet:
                worker.faults.update({"die_after_chunks": 2, "error_event": 400})
            *_, error, done = (await server.client.stream()).events
            assert json.loads(error)["error"]["code"] == 400
            assert done == "[DONE]"
            assert sum(worker.counts.continued for worker in fleet) == 0

    run(main)


@pytest.mark.parametrize("how", ["worker", "flag", "endpoint"])
def test_stream_worker_death_says_error_event(how):
    """Where going on is not possible, the client is told, and never with half an event."""

    async def main():
        continues = how != "worker"
        path = "/generate" if how == "endpoint" else COMPLETIONS
        async with (
            workers(2, continues=continues) as fleet,
            routed(
                [w.url for w in fleet], continues=continues, stream_failover=how != "flag"
            ) as server,
        ):
            for worker in fleet:
                worker.faults.update({"die_after_chunks": 5, "cut_event": True})
            body = {"prompt": "x", "model": "m", "stream": True, "max_tokens": 9, "text": "x"}
            reply = await server.client.post(path, body)
            *chunks, error, done = reply.events
            assert len(chunks) == 5
            for chunk in chunks:
                json.loads(chunk)
            told = json.loads(error)["error"]
            assert told["code"] == 500
            assert told["type"] == "read_response_body_failed"
            assert done == "[DONE]"
            assert len(fleet[0].seen) + len(fleet[1].seen) == 1
            if how != "endpoint":
                assert "return_token_ids" not in (fleet[0].seen or fleet[1].seen)[-1].body

    run(main)


def test_a_request_that_kills_every_worker_does_not_go_round_for_ever():
    async def main():
        async with (
            workers(4) as fleet,
            routed([w.url for w in fleet], retry_max_retries=3) as server,
        ):
            for worker in fleet:
                worker.faults.die_after_chunks = 0
            fleet[0].faults.die_after_chunks = 2
            server.router.n = 3  # begin with the first
            reply = await server.client.stream()
            if len(reply.events) > 1 and "error" not in reply.events[0]:
                assert json.loads(reply.events[-2])["error"]["code"] == 500
            assert sum(len(worker.seen) for worker in fleet) <= 1 + 3

    run(main)


def test_a_stream_waits_for_a_worker_that_comes_back():
    async def main():
        async with (
            workers(1, tpot=0.01) as fleet,
            routed([fleet[0].url], disable_circuit_breaker=True) as server,
        ):
            text = (await server.client.stream(max_tokens=40)).text()
            task = asyncio.create_task(server.client.stream(max_tokens=40))
            await asyncio.sleep(0.15)
            await fleet[0].kill()
            await asyncio.sleep(0.3)
            await fleet[0].start()
            assert (await task).text() == text

    run(main)


def test_token_texts_that_look_like_events():
    """The real worker's JSON with a text that looks like what the router searches for."""
    body = {"prompt": [5, 6], "stream": True, "max_tokens": 6, "logprobs": 2, "temperature": 0}

    async def main():
        async with listening(FakeEngine()) as (url, _, _), routed([url]) as server:
            plain = await server.client.post(COMPLETIONS, body, base=url)
            through = await server.client.post(COMPLETIONS, body)
            mine, its = plain.chunks, through.chunks
            for chunk in mine + its:
                for name in ("id", "created"):
                    chunk.pop(name)
            assert its == mine

    run(main)


@contextlib.asynccontextmanager
async def real_workers():
    """Two real fronts over fake engines, the first behind something that cuts."""
    async with (
        listening(FakeEngine(delay_s=0.001)) as (first, _, _),
        listening(FakeEngine(delay_s=0.001)) as (second, _, _),
        cutting(first) as cutter,
    ):
        yield cutter, second


BODIES = [
    (COMPLETIONS, {"prompt": [5, 6, 7]}),
    (COMPLETIONS, {"prompt": [[5, 6], [7, 8]], "n": 2, "temperature": 0.7}),
    (CHAT, {"messages": [{"role": "user", "content": "Hello"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_cut_anywhere_the_real_worker_goes_on_exactly(path, body):
    """At every end of an event, and in the middle of each."""
    body = body | {"stream": True, "max_tokens": 7, "stream_options": {"include_usage": True}}
    num = 4 if "n" in body else 1

    async def main():
        async with real_workers() as (cutter, second):  # noqa: SIM117
            async with routed([cutter.url, second]) as server:

                def ask():
                    return server.client.post(path, body | {"seed": 4})

                whole = await ask()
                texts = [whole.text(i) for i in range(num)]
                visible = whole.chunks[-1]["usage"]["completion_tokens"]
                assert visible == 7 * num
                asked = body | {"seed": 4, "return_token_ids": True}
                raw = (await server.client.post(path, asked, base=cutter.url)).body
                places = [0, *event_ends(raw)]
                middles = [(a + b) // 2 for a, b in itertools.pairwise(places)]
                for place in sorted({*places[:-1], *middles}):
                    # Framing of chunks adds bytes: any place is good, and these are many.
                    cutter.cut_after = place
                    replies = [await ask(), await ask()]
                    for reply in replies:
                        assert [reply.text(i) for i in range(num)] == texts
                        assert len({chunk["id"] for chunk in reply.chunks}) == 1
                        usages = [c["usage"] for c in reply.chunks if not c["choices"]]
                        assert [u["completion_tokens"] for u in usages] == [7 * num]
                        ends = [
                            c["choices"][0]["finish_reason"] for c in reply.chunks if c["choices"]
                        ]
                        assert sum(end is not None for end in ends) == num
                assert cutter.num_cuts > 10

    run(main, 60)


def test_a_given_seed_is_treated_as_the_workers_own():
    """The router's seed must not change what is sampled but for the draw: same range as theirs."""

    async def main():
        async with listening(FakeEngine()) as (url, _, engine), routed([url]) as server:
            await server.client.post(COMPLETIONS, {"prompt": [5], "stream": True})
            await server.client.post(COMPLETIONS, {"prompt": [5], "stream": True, "seed": None})
            await server.client.post(COMPLETIONS, {"prompt": [5], "stream": True}, base=url)
            seeds = [request.sampling.seed for request in engine.seen]
            assert len(set(seeds)) == 3
            assert all(0 <= seed < 2**31 for seed in seeds)
            assert {r.sampling.temperature for r in engine.seen} == {1.0}
            assert answer([5], 1)

    run(main)


def test_a_stream_of_a_worker_that_hangs_goes_on_when_it_is_found_unhealthy(monkeypatch):
    monkeypatch.setattr("router.proxy.STALLED_S", 0.1)

    async def main():
        async with workers(2, tpot=0.02) as fleet, routed([w.url for w in fleet]) as server:
            text = (await server.client.stream()).text()
            fleet[0].settings.tpot = fleet[1].settings.tpot = 60
            task = asyncio.create_task(server.client.stream())
            await asyncio.sleep(0.2)
            hung = next(w for w in fleet if w.counts.running)
            for worker in fleet:
                worker.settings.tpot = 0.0
            listed = {worker.base_url: worker for worker in server.registry.list()}
            for worker in fleet:  # that the other one is well changes nothing for this stream
                if worker is not hung:
                    server.proxy.worker_unhealthy(listed[worker.url])
            await asyncio.sleep(0.1)
            assert not task.done()
            server.proxy.worker_unhealthy(listed[hung.url])
            assert (await task).text() == text

    run(main)


def test_a_stream_that_stood_still_for_less_is_looked_at_again(monkeypatch):
    """Health checks may find out sooner than a stream counts as standing still."""
    monkeypatch.setattr("router.proxy.STALLED_S", 0.4)

    async def main():
        async with workers(2, tpot=0.02) as fleet, routed([w.url for w in fleet]) as server:
            text = (await server.client.stream()).text()
            fleet[1].settings.tpot = 60
            task = asyncio.create_task(server.client.stream())
            await asyncio.sleep(0.1)
            hung = server.registry.list()[1]
            assert hung.in_flight == 1
            hung.health.healthy = False
            server.proxy.worker_unhealthy(hung)
            assert (await task).text() == text

    run(main)
