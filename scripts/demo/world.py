# ruff: noqa: E501 (templates stay whole phrases)
"""The generator of the demo model's text: a small world (people, animals, things, places), stories
told over its state in fifteen shapes, and questions whose answers follow from that state. Every
draw comes from the `random.Random` that is passed in, so a seed names a text; worlds whose
(hero, thing) and (thing, place) pairs are held out never appear in training text."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from scripts.demo import words as W

UNKNOWN = "The story does not say."
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_SENTENCE = re.compile(r"(^|[.!?] |\n)([a-z])")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question over a story, the answer the model should give, and the words that decide."""

    kind: str
    ask: str
    answer: str
    keys: tuple[str, ...]
    rivals: tuple[str, ...] = ()

    def right(self, reply: str) -> bool:
        """Whether `reply` has a key of the answer and names nobody the answer does not name."""
        text = f" {' '.join(_WORD.findall(reply.lower()))} "
        plain = [f" {' '.join(_WORD.findall(k.lower()))} " for k in (*self.keys, *self.rivals)]
        keys, rivals = plain[: len(self.keys)], plain[len(self.keys) :]
        return any(k in text for k in keys) and not any(r in text for r in rivals)


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with a fixed name and fixed pronouns; formats as the name."""

    name: str
    female: bool
    kind: str = "child"

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()

    @property
    def kid(self) -> str:
        return "girl" if self.female else "boy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A told story: its text, what can be asked about it, and what a request may call it."""

    shape: str
    text: str
    questions: tuple[Question, ...]
    topics: tuple[str, ...]
    hero: str
    thing: str
    place: str


@lru_cache(maxsize=8192)
def _parse(template: str) -> tuple[tuple[str, ...] | str, ...]:
    """Splits 'a [b|c] d' into fixed pieces and tuples of alternatives (innermost level)."""
    parts: list[tuple[str, ...] | str] = []
    last = 0
    for m in _BRACKET.finditer(template):
        parts += [template[last : m.start()], tuple(m.group(1).split("|"))]
        last = m.end()
    parts.append(template[last:])
    return tuple(parts)


def expand(rng: random.Random, template: str) -> str:
    """Chooses one alternative in every [..|..] of the template; brackets may be nested."""
    while "[" in template:
        template = "".join(
            p if isinstance(p, str) else p[int(rng.random() * len(p))] for p in _parse(template)
        )
    return template


def polish(text: str) -> str:
    """Puts 'an' before vowels and capitals at the beginning of sentences."""
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE.sub(lambda m: m.group(1) + m.group(2).upper(), text)


def is_held_out(left: str, right: str) -> bool:
    """Whether the pair is kept from training text: one pair in eight, by a fixed hash."""
    return zlib.crc32(f"{left}|{right}".lower().encode()) % 8 == 0


def made_up_name(rng: random.Random) -> str:
    """A name of two or three syllables that is (almost surely) in no list."""
    name = "".join(
        rng.choice(W.ONSETS) + rng.choice(W.VOWELS) for _ in range(rng.choice((1, 2, 2)))
    )
    return (name + rng.choice(W.CODAS)).capitalize()


def bare(phrase: str) -> str:
    """The phrase without its article: 'a golden cup' -> 'golden cup'."""
    return re.sub(r"^(a|an|the) ", "", phrase)


@dataclass
class Teller:
    """Tells one story: owns the cast, the text so far and the facts that may be asked about."""

    rng: random.Random
    held_out: bool = False
    lines: list[str] = field(default_factory=list)
    asked: list[Question] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    cast: dict[str, object] = field(default_factory=dict)

    # -- drawing the world ---------------------------------------------------------------------
    def pick(self, options: Sequence[str] | Iterable[str] | str) -> str:
        if isinstance(options, str):
            options = options.split("|")
        options = options if isinstance(options, (tuple, list)) else tuple(options)
        return options[int(self.rng.random() * len(options))]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def person(self, kind: str = "child", invented: float = 0.15) -> Person:
        """A person whose name nobody in this story has yet."""
        while True:
            female = self.chance(0.5)
            first = made_up_name(self.rng) if self.chance(invented) else ""
            if not first:
                first = self.pick(W.GIRLS if female else W.BOYS)
            if kind == "grown":
                title = self.pick("Aunt|Grandma|Mrs.|Miss" if female else "Uncle|Grandpa|Mr.")
                if title in ("Mrs.", "Miss", "Mr."):
                    first = self.pick(W.SURNAMES)
                first = f"{title} {first}"
            taken = {w for p in self.people for w in str(p).split()}
            if taken.isdisjoint(first.split()):
                break
        who = Person(first, female, kind)
        self.people.append(who)
        return who

    def setup(self, things: Sequence[str], places: Sequence[str]) -> tuple[Person, str, str]:
        """The hero, the main thing and the main place, on the right side of the hold-out."""
        while True:
            self.people.clear()
            hero, thing, place = self.person(), self.pick(things), self.pick(places)
            pairs = (is_held_out(str(hero), thing), is_held_out(thing, place))
            if all(pairs) if self.held_out else not any(pairs):
                break
        prep = W.PLACES[place][0] if place in W.PLACES else "at"
        self.cast |= {"h": hero, "thing": thing, "place": place, "at": prep}
        return hero, thing, place

    def place(self) -> str:
        """A further place."""
        while True:
            place = self.pick(tuple(W.PLACES))
            if place != self.cast["place"]:
                return place

    # -- telling -------------------------------------------------------------------------------
    def fill(self, template: str, **more: object) -> str:
        return polish(expand(self.rng, template).format(**(self.cast | more)))

    def say(self, template: str, **more: object) -> None:
        if line := self.fill(template, **more).strip():
            self.lines.append(line)

    def paragraph(self) -> None:
        self.lines.append("\n")

    def q(self, kind: str, ask: str, answer: str, *keys: object, **more: object) -> None:
        """Records a question; names in the answer count, all others in the story are rivals."""
        said = self.fill(answer, **more)
        self.known.add(kind)
        self.asked.append(
            Question(
                kind=kind,
                ask=self.fill(ask, **more),
                answer=said,
                keys=tuple(str(k) for k in keys),
                rivals=tuple(str(p) for p in self.people if not set(str(p).split()) & names(said)),
            )
        )

    def spot(self, place: str) -> str:
        return self.pick(W.PLACES[place][1])

    # -- pieces that many shapes share ---------------------------------------------------------
    def intro(self, *, time: bool = True) -> None:
        h = self.cast["h"]
        assert isinstance(h, Person)
        age = self.pick(W.NUMBERS[2:])
        home = self.pick(W.HOMES)
        opening = self.rng.random()
        if opening < 0.35:
            self.say(
                "[Once upon a time|Once|Long ago|One day|Some time ago], there was a [[|little |young"
                " |clever |kind |quiet |cheerful |brave ]]{h.kid} [named|called] {h}."
            )
            self.topic(f"a {h.kid}", f"a {h.kid} named {h}")
        elif opening < 0.55:
            self.say(
                "{h} was a [happy|kind|clever|curious|quiet|cheerful|brave|gentle|busy] {h.kid}."
            )
            self.topic(f"a {h.kid}")
        elif opening < 0.75:
            self.say("{h} was a {h.kid} of {age} years.", age=age)
            self.age(age)
        else:
            self.say("{h} lived {home}.", home=home)
            self.home(home)
        if "age" not in self.known and self.chance(0.35):
            self.say("[{h}|{h.He}] was {age} years old.", age=age)
            self.age(age)
        if "home" not in self.known and self.chance(0.4):
            extra = self.pick("|with {h.his} mother|with {h.his} father|with {h.his} family|alone")
            extra = f" {extra}" if extra and self.chance(0.3) else ""
            self.say("{h.He} lived {home}" + extra + ".", home=home)
            self.home(home)
        if self.chance(0.25):
            self.friend()
        if self.chance(0.3):
            self.pet()
        if time and self.chance(0.5):
            weather = self.pick(tuple(W.WEATHER))
            self.say("[" + W.WEATHER[weather] + "]")
            self.q(
                "weather",
                "[What was the weather like|How was the weather|What kind of day was it]?",
                "It was a {w} day.",
                weather,
                w=weather,
            )

    def age(self, age: str) -> None:
        self.q("age", "How old [was|is] {h}?", "{h} was {age} years old.", age, age=age)

    def home(self, home: str) -> None:
        self.q("home", "Where [did {h} live|does {h} live]?", "{h} lived {home}.", home, home=home)

    def friend(self) -> None:
        friend = self.person()
        self.cast["friend"] = friend
        self.say(
            "[{h.His} best friend was {friend}.|{h} had a good friend named {friend}."
            "|{h.His} best friend was called {friend}.]"
        )
        self.q(
            "friend",
            "[Who was {h}'s friend?|Who was {h}'s best friend?|What was the name of {h}'s friend?]",
            "{h}'s friend was {friend}.",
            friend,
        )

    def pet(self) -> None:
        kind, pet = self.pick(W.PET_KINDS), self.pick(W.PETS)
        if self.chance(0.15):
            pet = made_up_name(self.rng)
        self.cast |= {"pet": pet, "petkind": kind}
        self.say(
            "[{h} had a {petkind} named {pet}.|{h.He} had a [little|small|funny|clever] {petkind}"
            " called {pet}.|{h.His} {petkind} was called {pet}.|{h.He} also had a {petkind}, and its"
            " name was {pet}.]"
        )
        self.q(
            "pet name",
            "[What was the name of {h}'s {petkind}?|What was {h}'s {petkind} called?]",
            "{h}'s {petkind} was called {pet}.",
            pet,
        )
        self.q(
            "pet kind",
            "[What kind of animal was {pet}?|What animal was {pet}?|Who was {pet}?]",
            "{pet} was a {petkind}.",
            kind,
        )
        self.topic(f"a {kind}", f"a {kind} named {pet}")

    def topic(self, *names_: str) -> None:
        self.topics += [_ARTICLE.sub(r"\1n ", t) for t in names_]

    def feel(self) -> None:
        """A line of feeling before the turn of the story."""
        feeling, line = self.pick(
            (
                "sad:{h} was [very |so |]sad.",
                "sad:{h} felt [very |]sad and sat down.",
                "worried:{h} was [very |]worried.",
                "angry:{h} was a little angry.",
                "upset:{h} was [very |]upset.",
                "sad:{h} was sad and began to cry.",
            )
        ).split(":")
        self.cast["feeling"] = feeling
        self.say(line)
        self.q(
            "feeling",
            "How did {h} feel[| at first]?",
            "{h} was {feeling}.",
            feeling,
            *(("sad",) if feeling == "upset" else ()),
        )

    def ending(self, lesson: str, company: str) -> None:
        """A closing scene, often with food, and now and then a lesson."""
        roll = self.rng.random()
        if roll < 0.45:
            food = self.pick(W.FOODS)
            self.say(
                "[In the end|At the end of the day|After that|Then|Later], {h} and {c} [ate|shared"
                "|had] {food}[| together| and talked for a long time| and laughed].",
                c=company,
                food=food,
            )
            self.q(
                "food",
                "What did {h} and {c} [eat|have][| in the end]?",
                "{h} and {c} ate {food}.",
                food,
                c=company,
                food=food,
            )
        elif roll < 0.65:
            drink = self.pick(W.DRINKS)
            self.say(
                "[Afterwards|In the end|Back home|Later], {h} and {c} drank {drink}[| by the fire"
                "| in the sun| at the table].",
                c=company,
                drink=drink,
            )
            self.q(
                "drink",
                "What did {h} and {c} drink[| in the end]?",
                "{h} and {c} drank {drink}.",
                drink,
                c=company,
                drink=drink,
            )
        elif roll < 0.85:
            self.say(
                "[From that day on, {h} and {c} were good friends.|{h} went home with a big smile."
                "|That night, {h} fell asleep [happy and tired|with a smile|at once].|{h} never"
                " forgot that day.|{h} told everyone [at home|in the village] about it.|And so the"
                " day ended well.|They all lived happily ever after.]",
                c=company,
            )
        if self.chance(0.25):
            self.say("[" + W.LESSONS[lesson] + "]")

    def unknowns(self) -> None:
        """Questions that this story leaves open; the right answer is that it does not say."""
        options = {
            "age": ("How old [was|is] {h}?",),
            "home": ("Where [did {h} live|does {h} live]?",),
            "weather": ("[What was the weather like|How was the weather]?",),
            "pet name": ("What was the name of {h}'s [dog|cat|horse]?",),
            "color": ("What color was {h}'s [hair|bed|bike|door]?",),
            "mother": ("What was the name of {h}'s [mother|father|teacher|sister|brother]?",),
        }
        free = [k for k in options if k not in self.known]
        kind = self.pick(free)
        self.asked.append(
            Question(
                kind="unknown",
                ask=self.fill(options[kind][0]),
                answer=UNKNOWN,
                keys=("does not say", "not say"),
                rivals=tuple(str(p) for p in self.people),
            )
        )

    def about(self, shape: str) -> None:
        """What the story is about, in one sentence."""
        what, *keys = ABOUT[shape].split("|")
        values = [str(self.cast[k]) for k in keys]
        self.q("about", "[What is the story about|What was the story about]?", what, *values)
        if self.chance(0.3):
            self.q(
                "hero",
                "[Who is the story about|Who is the main character]?",
                "The story is about {h}.",
                self.cast["h"],
            )

    def done(self, shape: str) -> Story:
        self.about(shape)
        self.unknowns()
        paragraphs = " ".join(self.lines).split("\n")
        text = "\n\n".join(p.strip() for p in paragraphs if p.strip())
        cast = self.cast
        self.topic(f"{cast['h']}")
        return Story(
            shape=shape,
            text=text,
            questions=tuple(self.asked),
            topics=tuple(dict.fromkeys(self.topics)),
            hero=str(cast["h"]),
            thing=str(cast["thing"]),
            place=str(cast["place"]),
        )

    def lead(self) -> str:
        """How the first event is dated; sometimes a day or time that can be asked for."""
        roll = self.rng.random()
        if roll < 0.25:
            day = self.pick(W.DAYS)
            self.q(
                "day",
                "[On what day did this happen?|What day was it?|Which day was it?]",
                "It was {day}.",
                day,
                day=day,
            )
            return f"On {day}, "
        if roll < 0.5:
            time = self.pick(W.TIMES)
            self.q(
                "time",
                "What time of day was it[| when the story began]?",
                "It was {time}.",
                time,
                time=time,
            )
            return f"One {time}, "
        return self.pick("One day, |Then one day, |")

    # -- the shapes ----------------------------------------------------------------------------
    def lost(self) -> Story:
        """A thing is lost, searched for and found."""
        h, thing, place = self.setup(W.THINGS, tuple(W.PLACES))
        self.intro()
        color = self.pick(W.COLORS if self.chance(0.6) else W.SIZES)
        helper = self.person("grown") if self.chance(0.35) else self.cast.get("friend")
        helper = helper or self.person()
        self.cast |= {"p": helper, "color": color, "spot": self.spot(place)}
        if self.chance(0.5):
            self.say(
                "{h} [loved|liked] {h.his} {color} {thing} [more than anything|very much|a lot]."
            )
        else:
            giver = self.pick("mother|father|grandmother|grandfather|aunt|uncle|sister|brother")
            self.say("{h} had a {color} {thing}. It was a gift from {h.his} {giver}.", giver=giver)
            self.q(
                "giver",
                "Who [gave {h} the {thing}|was the {thing} from]?",
                "{h}'s {giver} gave {h.him} the {thing}.",
                giver,
                giver=giver,
            )
        self.paragraph()
        lead = self.lead()
        self.say(lead + "{h} [went to|walked to|visited] the {place}[| with the {thing}| to play].")
        self.say(
            "[But when|When] {h.he} [wanted to go home|looked into {h.his} bag|came back], the"
            " {thing} was gone[!|.]"
        )
        if self.chance(0.6):
            self.feel()
        if self.chance(0.5):
            self.say(
                '"[Where is my {thing}|Oh no, my {thing} is gone|I lost my {thing}]!" said {h}.'
            )
        wrong = self.spot(place)
        if wrong != self.cast["spot"] and self.chance(0.5):
            self.say("{h} looked {wrong}, but it was not there.", wrong=wrong)
            self.q(
                "first look",
                "Where did {h} look first?",
                "{h} looked {wrong}.",
                wrong,
                wrong=wrong,
            )
        self.say(
            '[{p} saw {h} and wanted to help.|{p} came by. "[Do not worry|Let us look together|I will'
            ' help you]," said {p}.|Then {h} asked {p} for help.|{h} met {p} and told {p.him} about'
            " the {thing}.]"
        )
        who = self.rng.random()
        pet = self.cast.get("pet")
        if pet and who < 0.3:
            self.cast["f"] = pet
            self.say("Suddenly {pet} [barked|ran off|made a noise] and [stopped|sat down] {spot}.")
            self.say("There was the {thing}! {pet} had found it.")
        elif who < 0.65:
            self.cast["f"] = helper
            self.say(
                "[After a while|Soon|A little later|At last], {p} found the {thing} {spot}."
                if self.chance(0.6)
                else '"[Look|Here it is|I have it]!" called {p}. {p.He} had found the {thing} {spot}.'
            )
        else:
            self.cast["f"] = h
            self.say(
                "[They looked and looked.|They searched [everywhere|for a long time].] [At last|Then"
                "|Finally], {h} found the {thing} {spot}."
            )
        self.say(
            "[{h} was very happy.|{h} was happy again.|{h} jumped for joy.|How happy {h} was!]"
            '[| {h} thanked {p}.| "Thank you, {p}!" said {h}.]'
        )
        self.ending("friends" if self.chance(0.5) else "care", str(helper))
        self.topic(f"a {thing}", f"a lost {thing}", f"a {color} {thing}", f"the {place}")
        self.q(
            "finder",
            "Who found the {thing}[?| in the end?]",
            "{f} found the {thing}.",
            self.cast["f"],
        )
        self.q(
            "found where",
            "Where [was the {thing}|did they find the {thing}|was the {thing} found]?",
            "The {thing} was {spot}.",
            self.cast["spot"],
        )
        self.q(
            "lost what",
            "What did {h} lose?",
            "{h} lost {h.his} {thing}.",
            thing,
        )
        self.q("place", "Where did {h} go?", "{h} went to the {place}.", place)
        self.q("helper", "Who helped {h}?", "{p} helped {h}.", helper)
        self.q(
            "look",
            "[What did the {thing} look like|What kind of {thing} was it|What kind of {thing} did {h}"
            " have]?"
            if color in W.SIZES
            else "[What color was the {thing}|Which color was {h}'s {thing}]?",
            "The {thing} was {color}.",
            color,
        )
        return self.done("lost")

    def broken(self) -> Story:
        """A thing breaks and is mended."""
        _, thing, place = self.setup(tuple(W.MENDABLE), W.OUTDOORS)
        self.intro()
        fixer, tool = self.person("grown" if self.chance(0.6) else "child"), ""
        tool = self.pick(W.MENDABLE[thing])
        cause = self.pick(
            "fell on a stone|rolled down the steps|was caught by the wind|fell into the water"
            "|was stepped on by a cow|hit a wall|fell from a wall|got stuck in a door"
        )
        job = self.pick(W.JOBS) if fixer.kind == "grown" and self.chance(0.5) else ""
        self.cast |= {"p": fixer, "tool": tool, "cause": cause, "job": job}
        color = self.pick(W.COLORS)
        self.cast["color"] = color
        lead = self.lead()
        self.say(
            lead + "{h} played with {h.his} {color} {thing} {at} the {place}."
            if self.chance(0.6)
            else lead + "{h} took {h.his} {color} {thing} to the {place}."
        )
        self.say("[Suddenly|Then|But then], the {thing} {cause} and broke.")
        if self.chance(0.7):
            self.feel()
        self.paragraph()
        self.say("{h} [carried|took|brought] the {thing} to {p}" + (", the {job}." if job else "."))
        self.say(
            '["Can you fix it?" asked {h}.|"Please help me," said {h}.|"It is broken," said {h}'
            " quietly.]"
        )
        self.say(
            '[{p} smiled.|{p} looked at it [closely|for a while].|"[Of course|Let me see|That is easy'
            ']," said {p}.]'
        )
        self.say(
            "{p} [took|used|found] {tool} and [fixed|mended|repaired] the {thing}."
            "[| It was as good as new.| It looked better than before.]"
        )
        self.say('[{h} was so glad.|{h} laughed and danced.|"Thank you!" said {h}.]')
        if self.chance(0.4):
            thanks = self.pick("a flower|a drawing|some cookies|an apple|a song|a jar of honey")
            self.say("{h} gave {p} {thanks} to say thank you.", thanks=thanks)
            self.q(
                "thanks",
                "What did {h} give {p}[| to say thank you]?",
                "{h} gave {p} {thanks}.",
                bare(thanks),
                thanks=thanks,
            )
        self.ending("kindness", str(fixer))
        self.topic(f"a {thing}", f"a broken {thing}", f"a {color} {thing}")
        if job:
            self.topic(f"a {job}")
            self.q(
                "job", "[What was {p}'s job?|What did {p} do for work?]", "{p} was a {job}.", job
            )
        self.q("fixer", "Who [fixed|repaired|mended] the {thing}?", "{p} fixed the {thing}.", fixer)
        self.q(
            "tool",
            "What did {p} use[?| to fix the {thing}?]",
            "{p} used {tool}.",
            bare(tool),
        )
        self.q(
            "cause",
            "[How did the {thing} break?|Why did the {thing} break?|What happened to the {thing}?]",
            "The {thing} {cause} and broke.",
            cause,
        )
        self.q("what broke", "What [broke|was broken]?", "{h}'s {thing} broke.", thing)
        self.q("color", "What color was the {thing}?", "The {thing} was {color}.", color)
        self.q(
            "place",
            "[Where did {h} play with the {thing}|Where was {h} when the {thing} broke]?",
            "{h} was {at} the {place}.",
            place,
        )
        return self.done("broken")

    def rescue(self) -> Story:
        """An animal is in trouble and is saved."""
        _, thing, place = self.setup(tuple(dict.fromkeys(W.WILD)), W.OUTDOORS)
        self.intro()
        trap = self.pick(tuple(W.TRAPS))
        tool = self.pick(W.TRAPS[trap])
        p = self.person("grown" if self.chance(0.5) else "child")
        self.cast |= {"p": p, "trap": trap, "tool": tool, "noise": self.pick("cry|sound|noise")}
        lead = self.lead()
        self.say(
            lead + "{h} was [walking|playing|picking flowers] {at} the {place} when {h.he} heard a"
            " [strange|soft|sad] {noise}."
            if self.chance(0.6)
            else lead + "{h} [went to|was on the way to] the {place}. {h.He} heard a {noise}."
        )
        size = self.pick("little|small|young|baby") + " "
        self.say("[It was|{h.He} saw] a {size}{thing}. It was stuck {trap}[!|.]", size=size)
        self.say(
            '["Poor {thing}," said {h}.|"Do not be afraid," said {h} softly.|The {thing} looked very'
            " [tired|scared|sad].|The {thing} could not get out.|]"
        )
        self.paragraph()
        if self.chance(0.75):
            self.say(
                "{h} [ran to|called|went to get] {p}. [Together they|They] [brought|fetched|came back"
                " with] {tool}."
            )
            self.say(
                "With {tool}, they [got the {thing} out|set the {thing} free|saved the {thing}]."
                if self.chance(0.7)
                else "{p} held {tool} and {h} [lifted|pulled] the {thing} out."
            )
            self.q("helper", "Who helped {h}?", "{p} helped {h}.", p)
        else:
            self.say("{h} found {tool} and [got the {thing} out|saved the {thing}] alone.")
            self.say('{p} saw it and said, "[Well done|You are very brave|What a kind {h.kid}]!"')
            self.q(
                "praise",
                "Who [saw it|praised {h}]?",
                "{p} saw it and praised {h}.",
                p,
            )
        if self.chance(0.5):
            hurt = self.pick("leg|wing|ear|tail|nose|foot")
            if hurt != "wing" or self.cast["thing"] in ("owl", "duckling", "crow", "swan", "robin"):
                self.say("Its {hurt} was hurt, so {h} [cleaned it|put a bandage on it].", hurt=hurt)
                self.q(
                    "hurt",
                    "[What was hurt?|What part of the {thing} was hurt?]",
                    "Its {hurt} was hurt.",
                    hurt,
                    hurt=hurt,
                )
        if self.chance(0.6):
            name = self.pick(W.PETS) if self.chance(0.8) else made_up_name(self.rng)
            if name != self.cast.get("pet"):
                self.say("{h} [named|called] the {thing} {name}.", name=name)
                self.q(
                    "animal name",
                    "[What did {h} call the {thing}?|What was the {thing}'s name?|What name did {h}"
                    " give the {thing}?]",
                    "{h} called the {thing} {name}.",
                    name,
                    name=name,
                )
        self.say(
            "[Then the {thing} ran happily back to its mother.|The {thing} looked at them and went"
            " home.|The {thing} stayed with {h} for [two|three|four] days.|]"
        )
        self.ending("kindness", str(p))
        self.topic(f"a {thing}", f"a {size}{thing}", f"the {place}", "an animal")
        self.q(
            "animal",
            "[What animal did {h} find|Which animal was in trouble|What kind of animal was stuck]?",
            "It was a {thing}.",
            thing,
        )
        self.q("trap", "Where was the {thing} stuck?", "The {thing} was stuck {trap}.", trap)
        self.q(
            "tool",
            "What did [they|{h}] use[?| to save the {thing}?]",
            "They used {tool}." if "helper" in self.known else "{h} used {tool}.",
            bare(tool),
        )
        self.q(
            "place",
            "Where was {h}[?| when {h.he} heard the {noise}?]",
            "{h} was {at} the {place}.",
            place,
        )
        return self.done("rescue")

    def gift(self) -> Story:
        """Somebody makes a present for somebody."""
        h, thing, place = self.setup(W.MAKES, tuple(W.PLACES))
        self.intro()
        p = self.person("grown" if self.chance(0.6) else "child")
        occasion = self.pick(W.OCCASIONS)
        if p.kind == "child":
            occasion = "birthday" if self.chance(0.6) else "name day"
        material, color = self.pick(W.MATERIALS), self.pick(W.COLORS)
        self.cast |= {"p": p, "occasion": occasion, "material": material, "color": color}
        self.say(
            "[It was {p}'s {occasion}|The next day was {p}'s {occasion}|{p}'s {occasion} was coming],"
            " and {h} wanted to [make|give] {p.him} a [present|gift]."
        )
        self.say(
            "[But {h} had no money.|{h} thought for a long time.|{h} did not know what to make at"
            ' first.|"What would {p} like?" {h} asked {h.his} mother.|]'
        )
        lead = self.lead()
        self.say(lead + "{h} went to the {place} and found [some|a lot of] {material}.")
        self.say(
            "[With it|From it|Out of it], {h.he} made a {color} {thing}."
            "[| It took the whole day.| It was hard work.| It was not easy.]"
        )
        self.paragraph()
        who = self.rng.random()
        if who < 0.4:
            q = self.person()
            self.cast["q"] = q
            self.say(
                "{q} [helped {h} to paint it|helped {h} with the work|tied a ribbon around it]."
            )
            self.q("helper", "Who helped {h}?", "{q} helped {h}.", q)
        hide = self.pick(
            "under the bed|behind the sofa|in a drawer|on top of the wardrobe|in a big box"
        )
        if self.chance(0.4):
            self.say("{h} hid the {thing} {hide}[| until the big day].", hide=hide)
            self.q(
                "hidden",
                "Where did {h} hide the {thing}?",
                "{h} hid the {thing} {hide}.",
                hide,
                hide=hide,
            )
        self.say(
            "When {p} [saw|opened|got] the present, {p.he} [smiled|laughed|was very happy|hugged"
            " {h}]."
        )
        self.say(
            '["This is the best gift of all," said {p}.|"I will keep this {thing} forever," said'
            ' {p}.|"Did you make it yourself?" asked {p}.|]'
        )
        self.ending("work" if self.chance(0.5) else "kindness", str(p))
        self.topic(f"a {thing}", "a present", "a gift", f"a {h.kid} who makes a {thing}")
        self.q(
            "gift",
            "What did {h} make[?| for {p}?]",
            "{h} made a {color} {thing}.",
            thing,
        )
        self.q(
            "material",
            "[What was the {thing} made of|What did {h} find {at} the {place}]?",
            "It was {material}.",
            material,
        )
        self.q("for whom", "Who was the [gift|present|{thing}] for?", "It was for {p}.", p)
        self.q("maker", "Who made the {thing}?", "{h} made the {thing}.", h)
        self.q("color", "What color was the {thing}?", "The {thing} was {color}.", color)
        self.q(
            "occasion",
            "Why did {h} [make|give {p}] a [present|gift]?",
            "It was {p}'s {occasion}.",
            occasion,
        )
        self.q(
            "place", "Where did {h} find the {material}?", "{h} found it {at} the {place}.", place
        )
        return self.done("gift")

    def quarrel(self) -> Story:
        """Two children want the same thing; somebody finds a way."""
        h, thing, place = self.setup(W.THINGS, tuple(W.PLACES))
        self.intro()
        r, p = self.person(), self.person("grown")
        self.cast |= {"r": r, "p": p, "color": self.pick(W.COLORS)}
        lead = self.lead()
        self.say(lead + "{h} and {r} [were|played] {at} the {place}[| after school| together].")
        first = self.rng.random() < 0.5
        a, b = (h, r) if first else (r, h)
        self.cast |= {"a": a, "b": b}
        self.say(
            "{a} [found|saw|picked up] a {color} {thing}. {b} [wanted it too|wanted to have it as"
            " well|said that it was not fair]."
        )
        self.say(
            '["It is mine!" cried {a}. "No, it is mine!" cried {b}.|"Give it to me!" said {b}. "No!"'
            " said {a}.|They [pulled and pulled|shouted at each other|began to fight].]"
        )
        self.paragraph()
        self.say("[Then|Soon|At that moment], {p} [came|walked by|heard the noise].")
        ways = (
            "take turns:You can take turns",
            "share it:You can share it",
            "toss a coin:You can toss a coin",
            "play with it together:You can play with it together",
            "make a second one:You can make a second one",
            "ask whose it is:You can ask whose it is",
            "draw straws:You can draw straws",
        )
        way, line = self.pick(ways).split(":")
        self.cast["way"] = way
        self.say('"[Stop fighting. |Do not fight. |Listen to me. |]{line}," said {p}.', line=line)
        self.say(
            "[{a} and {b} thought about it.|{a} looked at {b}.|They were both quiet for a moment.|]"
            " [So that is what they did.|They did what {p} said.|They both agreed.]"
        )
        sorry = self.pick(("a", "b"))
        if self.chance(0.6):
            s, o = (a, b) if sorry == "a" else (b, a)
            self.say('"I am sorry," said {s} to {o}.', s=s, o=o)
            self.q("sorry", "Who said sorry?", "{s} said sorry.", s, s=s)
        game = self.pick(W.GAMES)
        if self.chance(0.5):
            self.say("[Later|After that|Then], they played {game}.", game=game)
            self.q("game", "What did they play[?| later?]", "They played {game}.", game, game=game)
        self.ending("sharing", str(r))
        self.topic(f"a {thing}", "sharing", "two friends", "a fight")
        self.q("finder", "Who [found|saw|had] the {thing} first?", "{a} found the {thing}.", a)
        self.q("elder", "Who [stopped the fight|helped them|told them what to do]?", "{p} did.", p)
        self.q(
            "thing",
            "What did they [fight about|both want]?",
            "They both wanted the {thing}.",
            thing,
        )
        self.q("advice", "What did {p} [say|tell them to do]?", "{p} told them to {way}.", way)
        self.q(
            "color", "What color was the {thing}?", "The {thing} was {color}.", self.cast["color"]
        )
        self.q("place", "Where were [they|{h} and {r}]?", "They were {at} the {place}.", place)
        self.q("who else", "Who was with {h}?", "{r} was with {h}.", r)
        return self.done("quarrel")

    def trip(self) -> Story:
        """A journey, a storm, a shelter."""
        h, thing, place = self.setup(W.VEHICLES, W.GOALS)
        self.intro(time=False)
        self.known.add("weather")
        p = self.person("grown" if self.chance(0.4) else "child")
        shelter = self.pick(W.SHELTERS)
        trouble = self.pick("a storm|heavy rain|thick fog|a snowstorm|strong wind|hail")
        pack = self.pick(W.THINGS)
        food = self.pick(W.FOODS)
        self.cast |= {"p": p, "shelter": shelter, "trouble": trouble, "pack": pack, "food": food}
        lead = self.lead()
        self.say(
            lead + "{h} and {p} [went|traveled|set out] to the {place} by {thing}."
            if self.chance(0.7)
            else lead + "{h} took the {thing} to the {place}. {p} came along."
        )
        if self.chance(0.7):
            self.say("{h} [packed|took along|carried] a {pack}.")
            self.q("pack", "What did {h} [pack|take along|carry]?", "{h} took a {pack}.", pack)
        if self.chance(0.5):
            self.say("{p} [brought|had] {food} for the way.")
            self.q("snack", "What did {p} bring?", "{p} brought {food}.", food)
        self.say(
            "[At first everything was fine.|The way was long.|They sang songs on the way.|They saw"
            " [cows|hills|birds|clouds] on the way.|]"
        )
        self.paragraph()
        self.say("[Suddenly|On the way|Half way], there was {trouble}.")
        scared = self.rng.random() < 0.5
        s, o = (h, p) if scared else (p, h)
        if self.chance(0.6):
            self.say(
                '{s} was afraid. [{o} took {s.his} hand.|"We will be safe," said {o}.|]', s=s, o=o
            )
            self.q("afraid", "Who was afraid?", "{s} was afraid.", s, s=s)
        saw = self.pick((h, p))
        self.cast["f"] = saw
        self.say("Then {f} [saw|found|noticed] {shelter}. They [waited there|went in|hid there].")
        wait = self.pick(
            "they told each other stories|they sang songs|they played cards|they slept a little"
            "|they counted the clouds|they dried their clothes"
        )
        if self.chance(0.6):
            self.say("[While they waited|Inside|There], {wait}.", wait=wait)
            self.q(
                "waiting",
                "What did they do [while they waited|in the meantime|inside]?",
                wait.capitalize() + ".",
                wait,
            )
        self.say(
            "[When it was over|After an hour|At last], they [went on|reached the {place}|came to the"
            " {place}]. [It was a great day.|What a trip!|]"
        )
        self.ending("courage", str(p))
        self.topic(
            f"a trip to the {place}",
            f"a {thing}",
            "a trip",
            bare(trouble) if trouble != "strong wind" else "the wind",
        )
        self.q(
            "vehicle",
            "How did {h} [travel|go|get] to the {place}?",
            "{h} went there by {thing}.",
            thing,
        )
        self.q("goal", "Where did {h} [go|travel]?", "{h} went to the {place}.", place)
        self.q("company", "Who [went|came|traveled] with {h}?", "{p} went with {h}.", p)
        self.q("trouble", "What happened on the way?", "There was {trouble}.", bare(trouble))
        self.q(
            "shelter",
            "Where did they [wait|hide|stay]?",
            "They waited in {shelter}." if shelter != "a bus stop" else "They waited at {shelter}.",
            bare(shelter),
        )
        self.q(
            "shelter finder",
            "Who [saw|found] [the shelter|{shelter}]?",
            "{f} found {shelter}.",
            saw,
        )
        return self.done("trip")

    def growing(self) -> Story:
        """Seeds, a pest, something that keeps the pest away."""
        _, thing, place = self.setup(
            W.SEEDS,
            ("garden", "yard", "farm", "orchard", "hill", "meadow", "island", "village", "school"),
        )
        self.intro()
        p, r = self.person("grown"), self.person()
        pest, guard = self.pick(W.PESTS), self.pick(W.GUARDS)
        self.cast |= {"p": p, "r": r, "pest": pest, "guard": guard}
        lead = self.lead()
        self.say(lead + "{h} [planted|wanted to grow] {thing} {at} the {place}.")
        if self.chance(0.6):
            self.say("{p} gave {h.him} the seeds.")
            self.q("seeds", "Who gave {h} the seeds?", "{p} gave {h} the seeds.", p)
        n = self.pick("day|morning|evening")
        self.say("{h} watered them every {n}.", n=n)
        self.q(
            "water",
            "[When did {h} water the {thing}|How often did {h} water them]?",
            "{h} watered them every {n}.",
            n,
            n=n,
        )
        self.say(
            "[Soon small green leaves came out.|After a week, they began to grow.|They grew and"
            " grew.|]"
        )
        self.paragraph()
        self.say("But then {pest} came and [ate the leaves|wanted to eat them|ate some of them].")
        if self.chance(0.6):
            self.feel()
        self.say(
            '["You could put up {guard}," said {r}.|{r} had an idea. "Try {guard}," said {r}'
            '.|"What about {guard}?" asked {r}.]'
        )
        self.say(
            "[So {h} put up {guard}|{h} made {guard} at once|They built {guard} together]. The"
            " {pest} [went away|stayed away|did not come back]."
        )
        gave = self.pick(("p", "r", ""))
        many = self.pick(W.NUMBERS)
        if self.chance(0.5):
            self.say(
                "In the end, {h} had {many} big bunches."
                if thing in W.FLOWERS
                else "In the end, {h} had {many} baskets full.",
                many=many,
            )
            self.q(
                "many",
                "How many " + ("bunches" if thing in W.FLOWERS else "baskets") + " did {h} have?",
                "{h} had {many}.",
                many,
                many=many,
            )
        if gave:
            self.cast["g"] = self.cast[gave]
            self.say("{h} gave some of the {thing} to {g}.")
            self.q(
                "given",
                "Who got some of the {thing}?",
                "{g} got some of the {thing}.",
                self.cast["g"],
            )
        self.ending("patience", str(r))
        self.topic(thing, "a garden", "growing " + thing, pest)
        self.q("plant", "What did {h} [plant|grow]?", "{h} planted {thing}.", thing)
        self.q(
            "pest", "[What ate the leaves|What came|Which animals came]?", "The {pest} came.", pest
        )
        self.q("idea", "Who had [the idea|an idea|a good idea]?", "{r} had the idea.", r)
        self.q(
            "guard",
            "[What did {h} put up|What kept the {pest} away|What did {r} suggest]?",
            "It was {guard}.",
            bare(guard),
        )
        self.q(
            "place",
            "Where did {h} [plant|grow] the {thing}?",
            "{h} planted them {at} the {place}.",
            place,
        )
        return self.done("growing")

    def afraid(self) -> Story:
        """A fear, something that helps, and courage."""
        h, thing, place = self.setup(tuple(W.FEARS), tuple(W.PLACES))
        self.intro()
        p = self.person("grown" if self.chance(0.6) else "child")
        aid = self.pick(W.FEARS[thing])
        self.cast |= {"p": p, "aid": aid}
        self.say("[There was one problem: |But |]{h} was afraid of {thing}.")
        self.say(
            "[The other children laughed.|{h} did not tell anyone.|{h} did not know what to do."
            "|Every time, {h.his} knees [shook|began to shake].|]"
        )
        lead = self.lead()
        self.say(lead + "{h} [told {p} about it|talked to {p}] {at} the {place}.")
        self.paragraph()
        self.say("{p} [listened|nodded|smiled] and gave {h} {aid}.")
        self.say(
            '["[Everyone is afraid sometimes|You are braver than you think|You can do it|This'
            ' will help you]," said {p}.]'
        )
        if self.chance(0.5):
            other = self.pick("mice|the sea|frogs|thunder|cows|the wind|geese|bees")
            self.say('"When I was small, I was afraid of {other}," said {p}.', other=other)
            self.q(
                "other fear",
                "What was {p} afraid of[?| once?]",
                "{p} was afraid of {other}.",
                other,
                other=other,
            )
        days = self.pick(W.NUMBERS)
        if self.chance(0.6):
            self.say("{h} practiced for {days} days.", days=days)
            self.q(
                "days",
                "How [long|many days] did {h} practice?",
                "{h} practiced for {days} days.",
                days,
                days=days,
            )
        self.say(
            "[At first it was hard.|{h.His} heart beat fast.|{h} took a deep breath.|Step by"
            " step, it became easier.]"
        )
        self.say("[In the end|At last|After that], {h} was not afraid of {thing} any more.")
        if self.chance(0.5):
            m = self.person()
            self.say('"[You are brave|That was great|Well done|I am proud of you]!" said {m}.', m=m)
            self.q("praise", "Who praised {h}[?| in the end?]", "{m} praised {h}.", m, m=m)
        self.ending("courage", str(p))
        self.topic("being brave", f"a brave {h.kid}", thing, "courage")
        self.q("fear", "What was {h} afraid of?", "{h} was afraid of {thing}.", thing)
        self.q("helper", "Who helped {h}?", "{p} helped {h}.", p)
        self.q(
            "aid",
            "[What did {p} give {h}|What did {h} get from {p}]?",
            "{p} gave {h} {aid}.",
            bare(aid),
        )
        self.q("place", "Where did {h} talk to {p}?", "{h} talked to {p} {at} the {place}.", place)
        return self.done("afraid")

    def trade(self) -> Story:
        """A chain of swaps."""
        _, thing, place = self.setup(
            W.THINGS,
            (
                "market",
                "harbor",
                "village",
                "square",
                "school",
                "park",
                "farm",
                "station",
                "shop",
                "castle",
            ),
        )
        self.intro()
        b, c = self.pick(W.THINGS), self.pick(W.THINGS)
        while len({thing, b, c}) < 3:
            b, c = self.pick(W.THINGS), self.pick(W.THINGS)
        p, r = self.person(), self.person("grown" if self.chance(0.5) else "child")
        self.cast |= {"p": p, "r": r, "b": b, "c": c}
        self.say(
            "{h} had a {thing}, but {h.he} [did not need it any more|wanted something else|had"
            " no use for it]."
        )
        lead = self.lead()
        self.say(lead + "{h} [went to|took it to] the {place}.")
        self.say("[There {h.he} met {p}|{p} was there]. {p} had a {b}.")
        self.say(
            '["Shall we swap?" asked {h}.|"I like your {thing}," said {p}.|"I like your {b},"'
            " said {h}.|They talked for a while.]"
        )
        self.say("So {h} gave {p} the {thing} and got the {b}.")
        self.paragraph()
        self.say(
            "[Then|Later|On the way home], {h} met {r}. {r} [needed|wanted] a {b}[| very much]."
        )
        self.say("{r} gave {h} a {c} for the {b}.")
        self.say(
            "[{h} was happy with the {c}.|Now {h} had a {c}. {h.He} laughed.|{h} ran home with"
            " the {c}.|The {c} was just what {h.he} wanted.]"
        )
        self.ending("sharing", str(r))
        self.topic(f"a {thing}", f"the {place}", "swapping things", f"a {c}")
        self.q(
            "first", "What did {h} have [at first|in the beginning]?", "{h} had a {thing}.", thing
        )
        self.q(
            "second", "[What did {h} get from {p}|What did {p} give {h}]?", "{p} gave {h} a {b}.", b
        )
        self.q(
            "third", "[What did {h} get from {r}|What did {r} give {h}]?", "{r} gave {h} a {c}.", c
        )
        self.q("last", "What did {h} have in the end?", "{h} had a {c}.", c)
        self.q("who got", "Who got the {thing}?", "{p} got the {thing}.", p)
        self.q(
            "who got second",
            "Who [wanted|needed|got] the {b} [in the end|from {h}]?",
            "{r} wanted the {b}.",
            r,
        )
        self.q("place", "Where did {h} [go|meet {p}]?", "It was {at} the {place}.", place)
        return self.done("trade")

    def contest(self) -> Story:
        """A contest with a winner and a prize."""
        h, thing, place = self.setup(tuple(W.CONTESTS), tuple(W.PLACES))
        self.intro()
        r, third = self.person(), self.person()
        order = [h, r, third]
        self.rng.shuffle(order)
        prize = self.pick(W.PRIZES)
        did, ing = W.CONTESTS[thing].split("|")
        self.cast |= {
            "r": r,
            "t": third,
            "first": order[0],
            "second": order[1],
            "prize": prize,
            "last": order[2],
            "ing": ing,
            "did": did,
        }
        lead = self.lead()
        self.say(lead + "there was a {thing} {at} the {place}.")
        self.say("{h}, {r} and {t} [took part|wanted to win|were there]. The prize was {prize}.")
        days = self.pick(W.NUMBERS)
        if self.chance(0.5):
            self.say("{h} had practiced {ing} for {days} weeks.", days=days)
            self.q(
                "practice",
                "How [many weeks|long] did {h} practice?",
                "{h} practiced for {days} weeks.",
                days,
                days=days,
            )
        self.paragraph()
        self.say(
            "[Everyone was excited.|Many people came to watch.|The sun was high.|A bell rang and"
            " it began.|] {r} {did}. [{t} did well, too.|{t} tried hard, too.|{h} did not give"
            " up.]"
        )
        if self.chance(0.7):
            self.say("{first} won. {second} came second, and {last} came third.")
            self.q("second", "Who came second?", "{second} came second.", order[1])
            self.q("third", "Who came [third|last]?", "{last} came third.", order[2])
        else:
            self.say("In the end, {first} won[| by a hair| easily].")
        self.say(
            "[{first} got {prize} and held it up.|{first} was so proud of the prize.|Everyone"
            " clapped for {first}.]"
        )
        if order[0] != h and self.chance(0.6):
            self.say('"[Well done|You were great|I am happy for you], {first}," said {h}.')
        elif self.chance(0.5):
            self.say("{first} shared the joy with the others.")
        other = r if order[0] == h else order[0]
        self.ending("work", str(other))
        self.topic(f"a {thing}", "winning", f"the {place}", "a contest")
        self.q("winner", "Who won[?| the {thing}?]", "{first} won the {thing}.", order[0])
        self.q(
            "prize",
            "What [was the prize|did the winner get|did {first} win]?",
            "The prize was {prize}.",
            bare(prize),
        )
        self.q("what contest", "What kind of contest was it?", "It was a {thing}.", thing)
        self.q("place", "Where was the {thing}?", "The {thing} was {at} the {place}.", place)
        return self.done("contest")

    def treasure(self) -> Story:
        """A map, a way, a chest."""
        h, thing, place = self.setup(W.TREASURES, tuple(W.PLACES))
        self.intro()
        p, goal = self.person(), self.place()
        spot = self.spot(goal)
        spot1 = self.spot(place)
        self.cast |= {"p": p, "goal": goal, "spot": spot, "spot1": spot1, "gat": W.PLACES[goal][0]}
        lead = self.lead()
        self.say(lead + "{h} found an old map {at} the {place}.")
        if self.chance(0.6):
            self.say("It lay {spot1}.")
            self.q("map spot", "Where [was|lay] the map?", "The map was {spot1}.", spot1)
        self.say(
            '{h} showed it to {p}. ["It is a treasure map!" said {p}.|{p}\'s eyes grew big.'
            '|"Let us follow it," said {p}.]'
        )
        self.say("The map [led|showed the way] to the {goal}.")
        self.paragraph()
        self.say("They [walked|ran|hurried] there and [dug|looked] {spot}.")
        who = self.pick((h, p))
        self.cast["f"] = who
        self.say(
            "[Soon|At last|After a while], {f} [found|pulled out|saw] a [small|big|wooden|rusty"
            "|heavy] chest. Inside they found {thing}."
        )
        share = self.pick(
            "shared it|gave it to the village|kept it as a secret|took it to the museum"
            "|showed it to everyone|hid it again|took it home"
        )
        self.cast["share"] = share
        self.say("They {share}.")
        self.ending("friends", str(p))
        self.topic("a treasure", "a map", "a treasure map", f"the {goal}")
        self.q(
            "found",
            "What [was in the chest|did they find|was the treasure]?",
            "They found {thing}.",
            bare(thing),
        )
        self.q("map place", "Where did {h} find the map?", "{h} found it {at} the {place}.", place)
        self.q("goal", "Where did the map lead[?| them?]", "The map led to the {goal}.", goal)
        self.q("company", "Who did {h} show the map to?", "{h} showed it to {p}.", p)
        self.q("finder", "Who [found|saw] the chest?", "{f} found the chest.", who)
        self.q("share", "What did they do with [it|the treasure]?", "They {share}.", share)
        self.q("spot", "Where [was the chest|did they dig|did they look]?", "It was {spot}.", spot)
        return self.done("treasure")

    def baking(self) -> Story:
        """Something is baked; one thing is missing; a neighbor has it."""
        h, thing, place = self.setup(
            tuple(W.BAKED),
            ("kitchen", "bakery", "school", "farm", "castle", "cabin", "village", "garden"),
        )
        self.intro()
        parts = W.BAKED[thing].split()
        self.rng.shuffle(parts)
        p, guest = self.person("grown"), self.person()
        self.cast |= {"p": p, "guest": guest, "missing": parts[0], "b": parts[1], "c": parts[2]}
        if place == "cabin":
            self.cast["at"] = "in"
        lead = self.lead()
        self.say(lead + "{h} wanted to make {thing} {at} the {place}.")
        if self.chance(0.6):
            self.say("{guest} was coming [to visit|for dinner].")
            self.q("guest", "Who was coming?", "{guest} was coming.", guest)
        self.say("{h} had {b} and {c}, but [there was |]no {missing}.")
        self.say(
            '["What now?" said {h}.|"I can not do it without {missing}," said {h}.|{h}'
            " looked in every cupboard.]"
        )
        self.paragraph()
        self.say("[So {h.he}|{h}] went to {p} and asked for {missing}.")
        amount = self.pick("a cup|a bag|a bowl|a basket|a jar")
        self.say("{p} gave {h.him} {amount} of {missing}.", amount=amount)
        self.q(
            "amount",
            "How much {missing} did {h} get?"
            if not parts[0].endswith("s")
            else "How many {missing} did {h} get?",
            "{h} got {amount} of {missing}.",
            bare(amount),
            amount=amount,
        )
        if self.chance(0.4):
            warn = self.pick(
                "Do not forget the salt|Stir it well|Watch the fire|Do not burn it"
                "|Save me a piece|Use a big spoon"
            )
            self.say('"{warn}," said {p}.', warn=warn)
            self.q("said", "What did {p} say?", '{p} said, "{warn}."', warn, warn=warn)
        self.say(
            "{h} [mixed everything|stirred and stirred|worked for an hour]. The {thing} smelled"
            " [wonderful|good|sweet]."
        )
        who = self.pick((p, guest)) if "guest" in self.known else p
        self.say("{h} gave the [first|biggest|best] piece to {who}.", who=who)
        self.q("piece", "Who got a piece[?| from {h}?]", "{who} got a piece.", who, who=who)
        self.ending("kindness", str(who))
        self.topic(thing, "cooking", f"a {h.kid} who makes {thing}", "baking")
        self.q("dish", "What did {h} [make|want to make]?", "{h} made {thing}.", thing)
        self.q(
            "missing", "[What was missing|What did {h} need]?", "{h} needed {missing}.", parts[0]
        )
        self.q(
            "helper",
            "Who [gave {h} the {missing}|helped {h}|had the {missing}]?",
            "{p} gave {h} the {missing}.",
            p,
        )
        self.q(
            "place",
            "Where was {h}[?| when {h.he} wanted to make {thing}?]",
            "{h} was {at} the {place}.",
            place,
        )
        return self.done("baking")

    def newcomer(self) -> Story:
        """Somebody new arrives and finds a friend."""
        h, thing, place = self.setup(W.GAMES, tuple(W.PLACES))
        self.intro()
        n = self.person(invented=0.35)
        origin = self.pick(
            "a far country|the mountains|the sea|a big city|an island|the north"
            "|the south|a small village|the desert"
        )
        talent = self.pick(
            "whistle|juggle|dance|draw horses|climb trees|play the flute|sing"
            "|tell jokes|walk on hands|swim|bake bread|do magic tricks"
        )
        self.cast |= {"n": n, "origin": origin, "talent": talent}
        lead = self.lead()
        self.say(
            lead + "a new {n.kid} came to [town|the street|the school|the village]. {n.His} name"
            " was {n}, and {n.he} came from {origin}."
        )
        self.say(
            "[{n} was shy and stood alone|{n} did not know anyone|{n} sat alone] {at} the {place}."
        )
        self.say("[Nobody talked to {n.him}.|The others only looked.|]")
        self.paragraph()
        self.say(
            '{h} [went to {n.him}|saw this and went over]. "[Do you want to play {thing}|Shall'
            ' we play {thing}|Come, let us play {thing}]?" asked {h}.'
        )
        self.say(
            "[{n} smiled|{n} nodded|{n}'s face lit up], and they played {thing}"
            "[| until dark| all day| for hours]."
        )
        self.say("{n} [could|knew how to] {talent}, and [everyone|{h}] wanted to learn it.")
        if self.chance(0.5):
            item = self.pick(W.THINGS)
            self.say("[The next day|Later|A week later], {n} gave {h} a {item}.", item=item)
            self.q("present", "What did {n} give {h}?", "{n} gave {h} a {item}.", item, item=item)
        self.ending("friends", str(n))
        self.topic("a new friend", "friends", "friendship", thing)
        self.q(
            "new",
            "[Who was new|What was the name of the new {n.kid}]?",
            "The new {n.kid} was {n}.",
            n,
        )
        self.q("origin", "Where did {n} come from?", "{n} came from {origin}.", bare(origin))
        self.q("game", "What did [they|{h} and {n}] play?", "They played {thing}.", thing)
        self.q("talent", "What could {n} do?", "{n} could {talent}.", talent)
        self.q(
            "place", "Where was {n}[?| when {h} saw {n.him}?]", "{n} was {at} the {place}.", place
        )
        self.q(
            "kind one",
            "Who [asked {n} to play|talked to {n}|was kind to {n}]?",
            "{h} asked {n} to play.",
            h,
        )
        return self.done("newcomer")

    def noise(self) -> Story:
        """A noise in the night and what made it."""
        h, thing, place = self.setup(
            W.NOISE_MAKERS,
            (
                "attic",
                "barn",
                "kitchen",
                "garden",
                "castle",
                "yard",
                "library",
                "school",
                "cave",
                "shop",
            ),
        )
        self.intro(time=False)
        p = self.person() if self.chance(0.6) else self.person("grown")
        noise = self.pick(W.NOISES)
        light = self.pick("a candle|a lantern|a flashlight|a lamp|a torch")
        guess = self.pick("a ghost|a thief|a dragon|a giant|a monster|a witch|a bear")
        self.cast |= {"p": p, "noise": noise, "light": light, "guess": guess}
        hour = self.pick("one|two|three|four|ten|eleven|twelve")
        self.say(
            "[One night|One night at {hour} o'clock|Late at night], {h} heard {noise}. It came"
            " from the {place}.",
            hour=hour,
        )
        self.say('"[It must be|I think it is|Maybe it is] {guess}," [whispered|said|thought] {h}.')
        self.say("[{h} could not sleep.|{h.His} heart beat fast.|{h} hid under the blanket.|]")
        self.paragraph()
        self.say(
            "{h} [woke|called|ran to] {p}. {p} [took|lit|brought] {light}, and they went to the"
            " {place}[| on tiptoe| together| very slowly]."
        )
        self.say("[Step by step they came closer.|The door creaked.|It was very dark.|]")
        self.say("[There they saw|And what was it? It was|But it was only] {thing}!")
        laugh = self.pick((h, p))
        self.say("{laugh} [laughed|began to laugh|laughed out loud].", laugh=laugh)
        self.q("laugh", "Who laughed?", "{laugh} laughed.", laugh, laugh=laugh)
        self.ending("courage", str(p))
        self.topic("a noise in the night", "the night", guess, thing)
        self.q("noise", "What did {h} hear?", "{h} heard {noise}.", bare(noise))
        self.q(
            "cause",
            "What [made the noise|was it really|was the noise]?",
            "It was {thing}.",
            bare(thing),
        )
        self.q("guess", "What did {h} think it was?", "{h} thought it was {guess}.", bare(guess))
        self.q("place", "Where did the noise come from?", "The noise came from the {place}.", place)
        self.q("company", "Who went with {h}?", "{p} went with {h}.", p)
        self.q("light", "What did {p} [take|bring]?", "{p} took {light}.", bare(light))
        return self.done("noise")

    def letter(self) -> Story:
        """Something must be brought to somebody, and the way is lost."""
        things = W.PARCELS
        h, thing, place = self.setup(things, tuple(W.PLACES))
        self.intro()
        p, to, guide = self.person("grown"), self.person("grown"), self.person()
        wrong = self.place()
        self.cast |= {
            "p": p,
            "to": to,
            "g": guide,
            "wrong": wrong,
            "way": self.pick(
                "left at the mill|right at the bridge|over the hill"
                "|along the river|through the gate|past the church"
                "|down the stairs|behind the barn"
            ),
        }
        lead = self.lead()
        self.say(
            lead + '{p} gave {h} a {thing}. "Please [take|bring] it to {to} {at} the {place},"'
            " said {p}."
        )
        self.say(
            '[{h} put it into {h.his} bag and left.|"I will," said {h}.|{h} was proud and set'
            " out at once.|]"
        )
        self.say(
            "But {h} [took the wrong road|took a wrong turn|lost the way] and came to the {wrong}."
        )
        if self.chance(0.5):
            self.feel()
        self.paragraph()
        self.say('There {h.he} [met|saw|asked] {g}. "Go {way}," said {g}.')
        self.say('[{h} thanked {g.him} and ran.|{h} did that.|"Thank you!" said {h}.]')
        self.say(
            "[Soon|At last|Before dark], {h} [reached|came to] the {place} and gave the {thing}"
            " to {to}."
        )
        reward = self.pick("a coin|an apple|a warm hug|a piece of cake|a pear|a story|a small bell")
        if self.chance(0.6):
            self.say("{to} [thanked {h.him} and |]gave {h.him} {reward}.", reward=reward)
            self.q(
                "reward",
                "[What did {h} get from {to}|What did {to} give {h}]?",
                "{to} gave {h} {reward}.",
                bare(reward),
                reward=reward,
            )
        self.ending("work", str(to))
        self.topic(f"a {thing}", "a long way", f"the {place}", f"a {h.kid} who gets lost")
        self.q("what", "What did {h} [carry|bring|take to {to}]?", "{h} brought a {thing}.", thing)
        self.q("sender", "[Who gave {h} the {thing}|Who sent {h}]?", "{p} gave {h} the {thing}.", p)
        self.q(
            "receiver", "Who [got the {thing}|was the {thing} for]?", "{to} got the {thing}.", to
        )
        self.q(
            "guide",
            "Who [showed {h} the way|told {h} the way|helped {h}]?",
            "{g} showed {h} the way.",
            guide,
        )
        self.q(
            "way",
            "[Where did {g} tell {h} to go|What did {g} say]?",
            "{g} told {h} to go {way}.",
            self.cast["way"],
        )
        self.q(
            "wrong",
            "Where did {h} come to by mistake?" if self.chance(0.5) else "Where did {h} meet {g}?",
            "It was {wat} the {wrong}.",
            wrong,
            wat=W.PLACES[wrong][0],
        )
        self.q("place", "Where was {to}?", "{to} was {at} the {place}.", place)
        return self.done("letter")


# shape -> sentence and the parts of the cast of which one must be named
ABOUT = {
    "lost": "It is about {h}, who lost {h.his} {thing}.|thing",
    "broken": "It is about {h}, whose {thing} broke.|thing",
    "rescue": "It is about {h}, who saved a {thing}.|thing",
    "gift": "It is about {h}, who made a {thing} for {p}.|thing",
    "quarrel": "It is about {h} and {r}, who wanted the same {thing}.|thing",
    "trip": "It is about {h}, who went to the {place}.|place",
    "growing": "It is about {h}, who planted {thing}.|thing",
    "afraid": "It is about {h}, who was afraid of {thing}.|thing",
    "trade": "It is about {h}, who swapped a {thing}.|thing",
    "contest": "It is about a {thing}.|thing",
    "treasure": "It is about {h}, who found an old map.|h",
    "baking": "It is about {h}, who wanted to make {thing}.|thing",
    "newcomer": "It is about {n}, who was new.|n",
    "noise": "It is about {h}, who heard {noise}.|h",
    "letter": "It is about {h}, who had to bring a {thing} to {to}.|thing",
}
SHAPES: tuple[Callable[[Teller], Story], ...] = (
    Teller.lost,
    Teller.broken,
    Teller.rescue,
    Teller.gift,
    Teller.quarrel,
    Teller.trip,
    Teller.growing,
    Teller.afraid,
    Teller.trade,
    Teller.contest,
    Teller.treasure,
    Teller.baking,
    Teller.newcomer,
    Teller.noise,
    Teller.letter,
)


def names(text: str) -> set[str]:
    """The words of a text, as written, possessive endings and points taken off."""
    return {w.removesuffix("'s").strip('.,!?"') for w in text.replace("Mr.", "Mr").split()}


def tell(rng: random.Random, *, held_out: bool = False) -> Story:
    """One story about a fresh world."""
    shape = SHAPES[int(rng.random() * len(SHAPES))]
    return shape(Teller(rng, held_out=held_out))
