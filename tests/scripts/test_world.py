"""The generator of the demo model's text: seeded, held-out worlds apart, answers that check."""

import random

import numpy as np
import pytest

from scripts.demo import chat, world
from scripts.demo.data import Shard, mixture, pack_rows


def test_a_seed_names_a_text() -> None:
    texts = [[chat.document(random.Random(s)) for s in (1, 1, 2)] for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0][0] == texts[0][1] != texts[0][2]


@pytest.mark.parametrize("held_out", [False, True])
def test_pairs_are_on_their_side_of_the_hold_out(held_out: bool) -> None:
    rng = random.Random(3)
    for _ in range(200):
        story = world.tell(rng, held_out=held_out)
        assert world.is_held_out(story.hero, story.thing) == held_out
        assert world.is_held_out(story.thing, story.place) == held_out


def test_texts_are_finished_and_gold_answers_are_right() -> None:
    rng, shapes = random.Random(5), set()
    for _ in range(600):
        story = world.tell(rng)
        shapes.add(story.shape)
        for text in (story.text, *(q.ask + q.answer for q in story.questions)):
            assert not set("[]{}|") & set(text), text
            assert "  " not in text
        for q in story.questions:
            assert q.right(q.answer), (story.text, q)
            assert not q.right("Nobody knows the answer.")
    assert len(shapes) == len(world.SHAPES)


def test_naming_somebody_else_is_wrong() -> None:
    q = world.Question(
        kind="finder", ask="Who?", answer="Tom found it.", keys=("Tom",), rivals=("Ann",)
    )
    assert q.right("It was Tom.")
    assert not q.right("Tom and Ann found it.")
    assert not q.right("Tommy found it.")


def test_a_conversation_is_rendered_as_the_template_does() -> None:
    exam = chat.exam(random.Random(8))
    jinja2 = pytest.importorskip("jinja2")
    rendered = jinja2.Template(chat.CHAT_TEMPLATE).render(
        messages=exam.messages,
        bos_token=chat.BOS,
        eos_token=chat.EOS,
        add_generation_prompt=True,
    )
    assert exam.prompt == rendered


def test_rows_are_full_and_begin_with_a_document() -> None:
    rng = np.random.default_rng(0)
    documents = [
        np.array([0, *rng.integers(10, 99, rng.integers(2, 80)), 1], np.uint16) for _ in range(900)
    ]
    world_shard, prose = Shard.join(documents[:800]), Shard.join(documents[800:])
    shard, ids = mixture(world_shard, prose, 0.25)
    rows = pack_rows(shard, ids, 64, seed=1)
    assert rows.shape[1] == 64
    assert (rows[:, 0] == 0).all()
    assert rows.size > 0.9 * sum(min(64, len(shard[i])) for i in ids)
    assert (rows == pack_rows(shard, ids, 64, seed=1)).all()
