"""An invented world: facts to pretrain a tiny language model on, and questions about them.

Every question asks for a colour, and the answers themselves are the label tokens: all records share
the same four choices, and the prompt ends in ``Answer:``. Letters (``A. red`` … ``Answer: B``) were
tried first. A model of 1.2 million parameters did not learn to bind them within minutes: after
about 36,000 worked questions with the fact in front of them its accuracy was 0.26, and 0.26 again
where about half of the texts only named the letters of listed choices; guessing gives 0.25. With
the answers as label tokens the same model, before any fine-tuning, recalls 0.82 of the test facts
when they are asked in a wording of the corpus.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .records import Record

__all__ = ["COLOURS", "World", "prompt", "world"]

COLOURS = ("red", "blue", "green", "yellow")

# Kinds of things, and the parts that each thing of the kind has.
PARTS = {
    "creature": ("coat", "tail", "tongue", "eye"),
    "town": ("flag", "gate", "tower", "bridge"),
    "plant": ("flower", "root", "seed", "stem"),
}
# {n}: name, {k}: kind, {p}: part, {c}: colour. The name stands before the colour, as it does in a
# question: a language model cannot tell what it read only the other way round.
STATEMENTS = (
    "The {p} of {n} is {c}.",
    "{n} has a {p} that is {c}.",
    "The {k} {n} has a {p}, and it is {c}.",
    "Look at {n}: its {p} is {c}.",
    "If you see the {k} {n}, its {p} looks {c}.",
    "The {k} {n} is known for its {p}, which is {c}.",
)
WORKED_QUESTIONS = (
    "What colour is the {p} of {n}?",
    "Of which colour is the {p} that {n} has?",
    "The {k} {n} has a {p} of which colour?",
)
QUESTION = "What is the colour of the {p} of the {k} {n}?"
SHIFTED_QUESTION = "Do you know of which colour the {p} of the {k} {n} is?"

# Things of which the corpus states every fact: those that the splits ask about, those that shifted
# asks about, and those that the corpus itself asks about.
_MAIN, _SHIFTED, _WORKED = 240, 110, 600
# Things of which it states nothing: one question about each, in the corpus, train or unseen.
_PASSING, _NEW_IN_TRAIN, _UNSEEN = 6000, 160, 400
# How often the corpus states a fact, by chance: the rare ones are learnt in part, as in all
# pretraining.
_TIMES = (1, 3, 10, 30)
_TIMES_WORKED = 6
_TRAIN_KNOWN, _VALIDATION, _TEST, _SHIFTED_QUESTIONS = 240, 240, 400, 400


class Fact(NamedTuple):
    """The colour of one part of one thing."""

    thing: str
    kind: str
    part: str
    colour: str

    def say(self, wording: str) -> str:
        """Fill the fact into a wording."""
        return wording.format(n=self.thing, k=self.kind, p=self.part, c=self.colour)


class World(NamedTuple):
    """Texts to pretrain on, and labelled questions in five splits.

    :param corpus: statements, and worked questions about other things than those of the splits.
    :param splits: ``train`` (facts of the corpus, and 40 % that are new, as in real fine-tuning
        sets), ``validation`` and ``test`` (other facts of the corpus), ``unseen`` (things that the
        corpus never names) and ``shifted`` (facts of the corpus, asked in another wording, about
        other things).
    """

    corpus: list[str]
    splits: dict[str, list[Record]]


def prompt(question: str) -> str:
    """The text that the model continues with its answer."""
    return f"{question}\nAnswer:"


def world(seed: int = 0) -> World:
    """Invent a world; the same seed gives the same one.

    :param seed: seed of the world's own generator; no global state is read or changed.
    """
    rng = random.Random(seed)
    names = _names(rng)
    main = _facts(names, _MAIN, rng)
    shifted = _facts(names, _SHIFTED, rng)
    worked = _facts(names, _WORKED, rng)
    passing = _facts(names, _PASSING, rng, parts=1)
    new = _facts(names, _NEW_IN_TRAIN, rng, parts=1)
    unseen = _facts(names, _UNSEEN, rng, parts=1)

    corpus = _passages(main + shifted + worked, rng)
    corpus += [_worked(fact, rng) for fact in worked for _ in range(_TIMES_WORKED)]
    corpus += [_worked(fact, rng) for fact in passing]
    rng.shuffle(corpus)

    train = _take(main, _TRAIN_KNOWN) + new
    rng.shuffle(train)
    splits = {
        "train": train,
        "validation": _take(main, _VALIDATION),
        "test": _take(main, _TEST),
        "unseen": unseen,
        "shifted": _take(shifted, _SHIFTED_QUESTIONS),
    }
    return World(corpus, {name: _records(name, facts) for name, facts in splits.items()})


def _names(rng: random.Random) -> Iterator[str]:
    """Pronounceable names, each only once."""
    seen = set()
    while True:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
        name = ("".join(syllables) + rng.choice(["", "l", "m", "n", "r", "s", "x"])).capitalize()
        if name not in seen:
            seen.add(name)
            yield name


def _facts(names: Iterator[str], things: int, rng: random.Random, parts: int = 4) -> list[Fact]:
    """The facts about new things, in random order; every colour is true equally often."""
    colours = [COLOURS[place % len(COLOURS)] for place in range(things * parts)]
    rng.shuffle(colours)
    facts = []
    for _ in range(things):
        thing, kind = next(names), rng.choice(list(PARTS))
        facts += [Fact(thing, kind, part, colours.pop()) for part in rng.sample(PARTS[kind], parts)]
    rng.shuffle(facts)
    return facts


def _take(facts: list[Fact], number: int) -> list[Fact]:
    """Remove facts from the list and return them, every colour equally often."""
    taken: list[Fact] = []
    left: list[Fact] = []
    quota = dict.fromkeys(COLOURS, number // len(COLOURS))
    for fact in facts:
        quota[fact.colour] -= 1
        (taken if quota[fact.colour] >= 0 else left).append(fact)
    facts[:] = left
    return taken


def _passages(facts: Sequence[Fact], rng: random.Random) -> list[str]:
    """Texts of one to four statements about one thing, each fact as often as ``_TIMES`` draws."""
    sentences: dict[str, list[str]] = {}
    for fact in facts:
        stated = [fact.say(rng.choice(STATEMENTS)) for _ in range(rng.choice(_TIMES))]
        sentences.setdefault(fact.thing, []).extend(stated)
    texts = []
    for about in sentences.values():
        rng.shuffle(about)
        while about:
            length = rng.randint(1, 4)
            texts.append(" ".join(about[:length]))
            del about[:length]
    return texts


def _worked(fact: Fact, rng: random.Random) -> str:
    """A question with its answer."""
    return f"{prompt(fact.say(rng.choice(WORKED_QUESTIONS)))} {fact.colour}"


def _records(split: str, facts: Sequence[Fact]) -> list[Record]:
    """One question a fact; the choices are always the same four."""
    wording = SHIFTED_QUESTION if split == "shifted" else QUESTION
    return [
        Record(f"{split}-{number}", fact.say(wording), COLOURS, COLOURS.index(fact.colour))
        for number, fact in enumerate(facts)
    ]


WORLD_HASH = "0055f5cb5a3c0eb5721fd557bedf26ee27f4d65f8ad938a359e227313a1b8b66"


def world_hash(seed: int = 0) -> str:
    """The sha256 of a world's canonical JSON; ``WORLD_HASH`` for seed 0 if the code is frozen."""
    corpus, splits = world(seed)
    rows = {
        name: [[record.id, record.question, record.choices, record.label] for record in records]
        for name, records in splits.items()
    }
    content = {"corpus": corpus, "splits": rows}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
