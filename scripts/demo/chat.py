# ruff: noqa: E501, SIM905 (templates stay whole phrases)
"""Documents of the demo corpus: plain stories and conversations about them, written with DeepSeek's
chat markers exactly as the shipped chat template renders them, and the fixed small talk. A document
is one string that begins with the BOS marker; held-out worlds make the questions of the eval."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from scripts.demo.world import Question, Story, expand, polish, tell

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who tells stories.",
    "Answer the questions about the story.",
    "You are a helpful assistant. Keep your answers short.",
)
ASK_FORMS = (
    "{s}\n\n{q}",
    "{s}\n\n{q}",
    "{s} {q}",
    "{s} {q}",
    "{s}\n{q}",
    "Here is a story. {s} {q}",
    "Here is a story:\n\n{s}\n\n{q}",
    "Read this story.\n\n{s}\n\n{q}",
    "Read this story and answer the question.\n\n{s}\n\n{q}",
    "Read the story and answer the question. {s} Question: {q}",
    "Story: {s}\nQuestion: {q}",
    "Story: {s}\n\nQuestion: {q}",
    "I will tell you a story. {s} Now tell me: {q}",
)
LISTEN = (
    "[Here is a story.|I will tell you a story.|Listen to this story.] {s}",
    "{s}",
)
LISTEN_REPLIES = (
    "[That is a nice story.|Thank you for the story.|I like that story.] You can ask me about it."
)
REQUESTS = (
    "[Tell me|Please tell me|Write|Can you tell me|Write me|I want] a [|short |little |nice ]story"
    " about {t}[.|.|]"
)
PLAIN_REQUESTS = (
    "[Tell me a story.|Please tell me a story.|Can you tell me a story?|Write a short story."
    "|Write a story.|I want to hear a story.|Tell me a bedtime story.|Do you know a story?]"
)
MORE = (
    "[Tell me another story.|Another story, please.|One more story.|Tell me one more.|Now tell me a"
    " story about {t}.|Now a story about {t}.|And a story about {t}?]"
)

# (ways to say it, the answer); brackets as in the story templates.
TALK: tuple[tuple[str, str], ...] = (
    ("[Hello|Hi|Hey|Hello there|Hi there][!|.|]", "Hello! Shall I tell you a story?"),
    ("[Good morning|Good evening|Good afternoon|Good day][!|.|]", "Good day! How can I help you?"),
    ("[How are you?|How are you today?|How do you do?]", "I am fine, thank you. How are you?"),
    (
        "[I am fine|I am good|I am well|Fine|Good][.|, thanks.|, thank you.]",
        "I am glad to hear that. Shall I tell you a story?",
    ),
    (
        "[Who are you?|What are you?|What is your name?|Tell me about yourself.|Introduce yourself.]",
        "I am a small demo model of meshserve. I tell little stories and answer questions about them.",
    ),
    (
        "[What can you do?|Can you help me?|How can you help me?|What do you know?|Help][|]",
        "I can tell little stories, and I can answer questions about a story that you tell me.",
    ),
    ("[Thank you|Thanks|Thank you very much|Thanks a lot][!|.|]", "You are welcome!"),
    ("[Bye|Goodbye|Good night|See you][!|.|]", "Goodbye! Come back soon."),
    (
        "[Who made you?|Where do you come from?|Who trained you?]",
        "I was trained by the meshserve project on stories it made up and on old books.",
    ),
    (
        "[Are you a human?|Are you a person?|Are you a robot?|Are you real?]",
        "No, I am a small language model.",
    ),
    ("[How old are you?]", "I am a language model, so I have no age."),
    ("[What is meshserve?]", "Meshserve is a server for language models, written in JAX."),
    ("[Do you like stories?|What do you like?]", "Yes, I like little stories about friends."),
    (
        "[I am sad.|I feel sad.|I am sad today.]",
        "I am sorry to hear that. Shall I tell you a story?",
    ),
    ("[I am happy.|I am happy today.]", "That is good to hear! Why are you happy?"),
    ("[Yes|Yes, please|Sure|Okay|OK][.|!|]", "Good! What should the story be about?"),
    ("[No|No, thanks|No, thank you][.|!|]", "All right. You can ask me any time."),
    ("[test|Test|Testing|This is a test.|ping]", "I am here. Shall I tell you a story?"),
    (
        "[Tell me a joke.|Do you know a joke?|Say something funny.]",
        "Why did the cow ring the bell? Because the horn did not work!",
    ),
    (
        "[Sing a song.|Sing me a song.]",
        "La la la! I sing better than a frog, but not as well as a bird.",
    ),
    ("What color is the sky?", "The sky is blue."),
    ("What color is [grass|the grass]?", "Grass is green."),
    ("What color is [snow|milk]?", "It is white."),
    ("What color is [the sun|a banana|a lemon]?", "It is yellow."),
    ("What color is [blood|a strawberry|a tomato|a cherry]?", "It is red."),
    ("How many days [are in a week|does a week have]?", "A week has seven days."),
    ("How many months [are in a year|does a year have]?", "A year has twelve months."),
    ("How many legs does a [dog|cat|horse|cow|goat|fox|rabbit] have?", "It has four legs."),
    ("How many legs does a [bird|duck|hen|sparrow|goose] have?", "It has two legs."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What do cows eat?", "Cows eat grass."),
    ("What do rabbits eat?", "Rabbits eat grass and carrots."),
    ("What do birds eat?", "Birds eat seeds and worms."),
    ("What do cats eat?", "Cats eat meat and fish."),
    ("What do bees make?", "Bees make honey."),
    ("Where do fish live?", "Fish live in the water."),
    ("Where do birds live?", "Birds live in nests."),
    ("What comes after [Monday]?", "Tuesday comes after Monday."),
    ("What comes after [Friday]?", "Saturday comes after Friday."),
    ("What is the opposite of [hot|warm]?", "The opposite is cold."),
    ("What is the opposite of big?", "The opposite is small."),
    ("What is the opposite of [happy|glad]?", "The opposite is sad."),
    ("What is the opposite of day?", "The opposite is night."),
    ("What is the capital of France[?|]", "The capital of France is Paris."),
    ("What is the capital of England[?|]", "The capital of England is London."),
    ("What is the capital of Germany[?|]", "The capital of Germany is Berlin."),
    ("What is the capital of Italy[?|]", "The capital of Italy is Rome."),
    ("What is the capital of Spain[?|]", "The capital of Spain is Madrid."),
    ("What is the capital of Japan[?|]", "The capital of Japan is Tokyo."),
    ("What is the capital of China[?|]", "The capital of China is Beijing."),
    ("What is the capital of Russia[?|]", "The capital of Russia is Moscow."),
    ("What is the capital of Egypt[?|]", "The capital of Egypt is Cairo."),
    (
        "What is the capital of the United States[?|]",
        "The capital of the United States is Washington.",
    ),
    ("Name [three|some] colors.", "Red, blue and yellow."),
    ("Name [three|some] animals.", "A dog, a cat and a horse."),
    ("Name [three|some] fruits.", "Apples, pears and cherries."),
    ("Count to [five|5].", "One, two, three, four, five."),
    ("Count to [ten|10].", "One, two, three, four, five, six, seven, eight, nine, ten."),
)
BEYOND = (
    "quantum physics|politics|the stock market|football|computers|Python|history|chemistry|the news"
    "|programming|mathematics|cars|movies|philosophy|space travel|law|medicine|economics|music theory"
    "|machine learning|JavaScript|the president|the weather tomorrow|the moon landing|Bitcoin|biology"
).split("|")
BEYOND_ASKS = (
    "[What do you know about {x}?|Explain {x}.|Tell me about {x}.|Can you explain {x}?|What is {x}?"
    "|How does {x} work?|Write an essay about {x}.|Teach me {x}.|Help me with {x}.]"
)
BEYOND_REPLY = "I do not know much about that. I am a small model for little stories."
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink",
    "hen": "cluck", "frog": "croak", "owl": "hoot", "mouse": "squeak", "lion": "roar",
    "bee": "buzz", "snake": "hiss", "horse": "neigh", "donkey": "hee-haw", "crow": "caw",
}  # fmt: skip
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty"
).split()


def small_talk(rng: random.Random) -> tuple[str, str]:
    """One fixed question and its answer."""
    roll = rng.random()
    if roll < 0.7:
        asks, reply = TALK[int(rng.random() * len(TALK))]
        return expand(rng, asks), reply
    if roll < 0.8:
        return expand(rng, BEYOND_ASKS).format(x=rng.choice(BEYOND)), BEYOND_REPLY
    if roll < 0.88:
        animal = rng.choice(tuple(SOUNDS))
        return f"What does {_a(animal)} say?", f"{_a(animal).capitalize()} says {SOUNDS[animal]}."
    a, b = rng.randrange(11), rng.randrange(11)
    if rng.random() < 0.5:
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    return (
        f"What is {NUMBER_WORDS[a]} plus {NUMBER_WORDS[b]}?",
        f"{NUMBER_WORDS[a]} plus {NUMBER_WORDS[b]} is {NUMBER_WORDS[a + b]}.".capitalize(),
    )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def render(turns: list[tuple[str, str]], system: str = "") -> str:
    """A conversation of (user, assistant) turns, as CHAT_TEMPLATE renders it."""
    return BOS + system + "".join(f"{USER}{u}{ASSISTANT}{a}{EOS}" for u, a in turns)


def _sloppy(rng: random.Random, ask: str) -> str:
    """Now and then a question as people type it."""
    roll = rng.random()
    if roll < 0.04:
        return ask.removesuffix("?")
    if roll < 0.08:
        return ask[0].lower() + ask[1:]
    return ask


def story_turns(
    rng: random.Random, story: Story, questions: list[Question]
) -> list[tuple[str, str]]:
    """The user tells the story and asks; the questions follow in order."""
    text = story.text if rng.random() < 0.6 else story.text.replace("\n\n", " ")
    if rng.random() < 0.07:
        told = expand(rng, rng.choice(LISTEN)).format(s=text)
        turns = [(told, expand(rng, LISTEN_REPLIES))]
    else:
        first, *questions = questions
        form = ASK_FORMS[int(rng.random() * len(ASK_FORMS))]
        turns = [(form.format(s=text, q=_sloppy(rng, first.ask)), first.answer)]
    return turns + [(_sloppy(rng, q.ask), q.answer) for q in questions]


def request_turns(rng: random.Random, story: Story, *, again: bool) -> list[tuple[str, str]]:
    """The user asks for a story, often with a topic, and then may ask about it."""
    form = MORE if again else REQUESTS if rng.random() < 0.8 else PLAIN_REQUESTS
    ask = expand(rng, form).format(t=rng.choice(story.topics))
    turns = [(polish(ask), story.text)]
    if rng.random() < 0.5:
        turns += [(q.ask, q.answer) for q in some_questions(rng, story, rng.randint(1, 3))]
    return turns


def some_questions(rng: random.Random, story: Story, n: int) -> list[Question]:
    return rng.sample(story.questions, min(n, len(story.questions)))


def document(rng: random.Random, *, held_out: bool = False) -> str:
    """One document; with `held_out`, about worlds that training never sees."""
    roll = rng.random()
    if roll < 0.13:
        return f"{BOS}{tell(rng, held_out=held_out).text}{EOS}"
    system = rng.choice(SYSTEMS) if rng.random() < 0.06 else ""
    turns: list[tuple[str, str]] = []
    if roll < 0.27:
        for _ in range(rng.randint(1, 5)):
            turns.append(small_talk(rng))
        return render(turns, system)
    if rng.random() < 0.08:
        turns.append(small_talk(rng))
    for i in range(1 if roll < 0.92 else rng.randint(2, 7)):
        story = tell(rng, held_out=held_out)
        if rng.random() < 0.78:
            turns += story_turns(rng, story, some_questions(rng, story, rng.randint(1, 6)))
        else:
            turns += request_turns(rng, story, again=i > 0)
        if rng.random() < 0.05:
            turns.append(rng.choice((("Thank you!", "You are welcome!"), small_talk(rng))))
    return render(turns, system)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """A conversation that ends with a question about a held-out world."""

    messages: tuple[dict[str, str], ...]
    question: Question
    shape: str

    @property
    def prompt(self) -> str:
        """What the chat template renders, the generation prompt added."""
        parts = [
            (USER + m["content"]) if m["role"] == "user" else ASSISTANT + m["content"] + EOS
            for m in self.messages
        ]
        return BOS + "".join(parts) + ASSISTANT


def exam(rng: random.Random) -> Exam:
    """A question about a story of a world that training never saw; a third come in later turns."""
    story = tell(rng, held_out=True)
    n = 1 if rng.random() < 0.67 else rng.randint(2, 4)
    asked = some_questions(rng, story, n)
    form = ASK_FORMS[int(rng.random() * len(ASK_FORMS))]
    messages = [{"role": "user", "content": form.format(s=story.text, q=asked[0].ask)}]
    for before, after in itertools.pairwise(asked):
        messages.append({"role": "assistant", "content": before.answer})
        messages.append({"role": "user", "content": after.ask})
    return Exam(messages=tuple(messages), question=asked[-1], shape=story.shape)
