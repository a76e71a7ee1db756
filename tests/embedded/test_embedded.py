"""The embedded world and model are whole, frozen, and keep apart what must not mix."""

from __future__ import annotations

import collections
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalabl_pyro.data.world import (
    COLOURS,
    PARTS,
    QUESTION,
    SHIFTED_QUESTION,
    WORLD_HASH,
    World,
    prompt,
    world,
    world_hash,
)
from scalabl_pyro.embedded import MODEL_HASH, model_hash, model_path

KNOWN = ("validation", "test", "shifted")
ALL_PARTS = frozenset(part for parts in PARTS.values() for part in parts)


@pytest.fixture(scope="module")
def embedded() -> World:
    return world()


def thing(question: str) -> str:
    """The invented name: the only capitalised word behind the first one."""
    (name,) = re.findall(r" ([A-Z][a-z]+)", question)
    return name


def test_world_is_deterministic_and_frozen() -> None:
    assert world_hash() == world_hash() == WORLD_HASH
    assert world_hash(1) != WORLD_HASH


def test_no_question_is_in_two_splits(embedded: World) -> None:
    # A fact is the part of a thing: the same two words in whatever wording it is asked.
    facts = collections.Counter()
    for records in embedded.splits.values():
        for record in records:
            words = frozenset(record.question.rstrip("?").split())
            facts[thing(record.question), words & ALL_PARTS] += 1
    assert set(facts.values()) == {1}
    assert all(len(part) == 1 for _, part in facts)
    ids = [record.id for records in embedded.splits.values() for record in records]
    assert len(ids) == len(set(ids))


def test_corpus_states_what_is_known_and_names_nothing_unseen(embedded: World) -> None:
    words = set(re.findall(r"[A-Z][a-z]+", "\n".join(embedded.corpus)))
    asked = {thing(text) for text in embedded.corpus if "Answer:" in text}
    for split in KNOWN:
        names = {thing(record.question) for record in embedded.splits[split]}
        assert names <= words
        assert not names & asked
    unseen = {thing(record.question) for record in embedded.splits["unseen"]}
    assert len(unseen) == len(embedded.splits["unseen"])
    assert not unseen & words
    known_in_train = [thing(record.question) in words for record in embedded.splits["train"]]
    assert sum(known_in_train) == 0.6 * len(known_in_train)


def test_corpus_holds_neither_the_questions_nor_their_wordings(embedded: World) -> None:
    lines = {line for text in embedded.corpus for line in text.splitlines()}
    questions = {r.question for records in embedded.splits.values() for r in records}
    assert not questions & lines
    wordings = tuple(wording.split("{")[0] for wording in (QUESTION, SHIFTED_QUESTION))
    assert not [line for line in lines if line.startswith(wordings)]


def test_shifted_differs_in_wording_and_things(embedded: World) -> None:
    train = {thing(record.question) for record in embedded.splits["train"]}
    shifted = embedded.splits["shifted"]
    assert not train & {thing(record.question) for record in shifted}
    assert {r.question.split()[0] for r in shifted}.isdisjoint(
        r.question.split()[0] for r in embedded.splits["train"]
    )


def test_labels_are_balanced_and_choices_fixed(embedded: World) -> None:
    sizes = {name: len(records) for name, records in embedded.splits.items()}
    assert sizes == {"train": 400, "validation": 240, "test": 400, "unseen": 400, "shifted": 400}
    for records in embedded.splits.values():
        assert {record.choices for record in records} == {COLOURS}
        counts = collections.Counter(record.label for record in records)
        assert set(counts.values()) == {len(records) // len(COLOURS)}


def test_answers_are_single_tokens_and_any_text_can_be_encoded() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    pieces = [tokenizer.encode(f" {colour}") for colour in COLOURS]
    assert [len(piece) for piece in pieces] == [1] * len(COLOURS)
    text = prompt("Größe 12 — was?")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_embedded_model_is_frozen_small_and_loads() -> None:
    assert model_hash() == MODEL_HASH
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= 4 * 1024**2
    assert json.loads((model_path() / "config.json").read_text())["model_type"] == "llama"
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_embedded_model_answers_with_a_colour(embedded: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    worked = [text for text in embedded.corpus if "Answer:" in text][:32]
    questions = [text.rsplit(" ", 1)[0] for text in worked]
    inputs = tokenizer(questions, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = tokenizer.batch_decode(model(**inputs).logits[:, -1].argmax(-1)[:, None])
    assert {answer.strip() for answer in answers} <= set(COLOURS)
