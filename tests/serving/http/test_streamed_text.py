"""An answer in pieces is the answer, whatever tokens the model says and wherever stops fall."""

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
                    "prompt": list(key),
                    "max_tokens": rng.choice([3, 100]),
                    "stop": stops(tokenizer, script, rng),
                    "no_stop_trim": rng.random() < 0.2,
                    "skip_special_tokens": rng.random() < 0.7,
                    "n": rng.choice([1, 1, 1, 3]),
                }
                whole = (await http.post("/v1/completions", json=body)).json()
                response = await http.post("/v1/completions", json=body | {"stream": True})
                *chunks, done = events_of(response.text)
                assert done == "[DONE]"
                pieces = [json.loads(chunk)["choices"][0] for chunk in chunks]
                for choice in whole["choices"]:
                    mine = [p for p in pieces if p["index"] == choice["index"]]
                    case = (number, script, body)
                    assert "".join(p["text"] for p in mine) == choice["text"], case
                    for field in ("finish_reason", "matched_stop"):
                        assert mine[-1][field] == choice[field], case
                    if isinstance(choice["matched_stop"], str):
                        num_stopped += 1
                        kept = choice["matched_stop"] in choice["text"]
                        assert kept == body["no_stop_trim"], case
                    elif name != "llama" and not body["no_stop_trim"]:
                        # Nothing is lost: it is what decoding at once gives.
                        said = script[: body["max_tokens"]]
                        skip = body["skip_special_tokens"]
                        text = tokenizer.decode(said, skip_special_tokens=skip)
                        assert choice["text"] == text, case
            assert num_stopped > num // 5
            assert state._live == {}
            assert engine.running == {}

    run(main, 90)
