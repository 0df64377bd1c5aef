"""An answer in pieces is the answer, whatever tokens the model says and wherever stops fall."""

import asyncio
import json
import random

import pytest

from serving.config import DEMO_MODEL_PATH
from serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine
from tests.serving.http.support import DATA, TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(120)

NUM_ANSWERS = 1000
TEXTS = [
    "Grüße! ",
    "世界",
    "🪁 kite",
    "e\u0301",
    "\n\n",
    "stop",
    " the end",
    "a",
    " ",
    "．",
    "<think>",
]
TOKENIZERS = {
    "byte level": TOKENIZER,
    "demo": Tokenizer.from_folder(DEMO_MODEL_PATH),
    "llama": Tokenizer.from_folder(DATA / "llama"),
}


def answer_tokens(tokenizer, rng):
    """Random tokens and pieces of real text in turn; no end-of-sequence token."""
    ids = []
    while len(ids) < 30:
        if rng.random() < 0.5:
            ids += tokenizer._fast.encode(rng.choice(TEXTS), add_special_tokens=False).ids
        else:
            ids += rng.choices(range(tokenizer.num_entries), k=rng.randrange(1, 4))
    return [i for i in ids if i not in tokenizer.eos_token_ids][: rng.randrange(1, 30)]


def stops(tokenizer, ids, rng):
    """Strings of which some are in the answer, across tokens."""
    text = tokenizer.decode(ids)
    found = []
    for _ in range(rng.randrange(0, 3)):
        if text:
            at = rng.randrange(len(text))
            found.append(text[at : at + rng.randrange(1, 6)])
    return [*found, "st", "never said"] if rng.random() < 0.5 else found


async def both(http, url, body):
    """The same request whole and as the JSON events of a stream."""
    whole = await http.post(url, json=body)
    assert whole.status_code == 200, whole.text
    streamed = await http.post(url, json=body | {"stream": True})
    *events, done = events_of(streamed.text)
    assert done == "[DONE]"
    return whole.json(), [json.loads(event) for event in events]


async def completions(http, prompt, body):
    """(text, finish reason, what stopped it) of each answer, whole and from the stream."""
    return await openai_route(http, "/v1/completions", body | {"prompt": prompt})


async def chat(http, prompt, body):
    """The same by the chat route, which takes tokens, too."""
    return await openai_route(http, "/v1/chat/completions", body | {"input_ids": prompt})


async def openai_route(http, url, body):
    whole, chunks = await both(http, url, body)
    answers = [(text_of(c), c["finish_reason"], c["matched_stop"]) for c in whole["choices"]]
    pieces = [chunk["choices"][0] for chunk in chunks]
    streamed = []
    for index in range(len(answers)):
        mine = [piece for piece in pieces if piece["index"] == index]
        text = "".join(map(text_of, mine))
        streamed.append((text, mine[-1]["finish_reason"], mine[-1]["matched_stop"]))
    return answers, streamed


def text_of(choice):
    said = choice.get("message") or choice.get("delta") or choice
    return said.get("content", said.get("text", ""))


async def generate(http, prompt, body):
    """The same by /generate, whose events hold all text so far."""
    params = {"max_new_tokens" if k == "max_tokens" else k: v for k, v in body.items()}
    whole, events = await both(http, "/generate", {"input_ids": prompt, "sampling_params": params})
    last, so_far = {}, {}
    for event in events:
        index = event.get("index", 0)
        assert event["text"].startswith(so_far.get(index, ""))
        last[index], so_far[index] = event, event["text"]
    ended = whole if isinstance(whole, list) else [whole]
    return [native(end) for end in ended], [native(last[i]) for i in sorted(last)]


def native(answer):
    reason = answer["meta_info"]["finish_reason"]
    return answer["text"], reason["type"], reason.get("matched")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_joined_are_the_whole_answer(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    scripts = {}

    def choose(context):
        """What the answer to this prompt says next; prompts are numbers."""
        script = scripts[context[0], context[1]]
        at = len(context) - 2
        return script[at] if at < len(script) else tokenizer.eos_token_ids[0]

    engine = FakeEngine(next_token=choose, max_context_tokens=512)
    num = NUM_ANSWERS // len(TOKENIZERS) + 1

    async def main():
        async with serving(engine, tokenizer=tokenizer) as (http, state, _):
            num_stopped = 0
            for number in range(num):
                key = divmod(number, 100)
                script = scripts[key] = answer_tokens(tokenizer, rng)
                body = {
                    "max_tokens": rng.choice([3, 100]),
                    "stop": stops(tokenizer, script, rng),
                    "no_stop_trim": rng.random() < 0.2,
                    "skip_special_tokens": rng.random() < 0.7,
                    "n": rng.choice([1, 1, 1, 3]),
                }
                ask = rng.choice([completions, chat, generate])
                whole, streamed = await ask(http, list(key), body)
                case = (number, ask.__name__, script, body)
                assert streamed == whole, case
                assert len(whole) == body["n"]
                for text, reason, matched in whole:
                    assert reason in ("stop", "length"), case
                    if isinstance(matched, str):
                        num_stopped += 1
                        assert (matched in text) == body["no_stop_trim"], case
                    elif name != "llama" and not body["no_stop_trim"]:
                        # Nothing is lost: it is what decoding at once gives.
                        said = script[: body["max_tokens"]]
                        skip = body["skip_special_tokens"]
                        assert text == tokenizer.decode(said, skip_special_tokens=skip), case
            assert num_stopped > num // 5
            assert state._live == {}
            while engine.running:  # that a stop string ended the last one is on its way
                await asyncio.sleep(0.01)

    run(main, 90)
