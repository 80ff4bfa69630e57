"""Generated claims with evidence and a known label, for the demo, the tests and the benchmarks.

Each row is a claim about a made-up person, some sentences of evidence, and the label that
follows from them. Words and punctuation are separated by single spaces, so that a word-level
vocabulary (``vocabulary()``) covers every row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

LABELS = ("SUPPORTED", "REFUTED", "NOT ENOUGH INFO")

#: The prompt that the demo model was trained on.
PROMPT = "Evidence : {evidence} Claim : {claim} Answer :"

FIRST_NAMES = tuple(
    "Ada Alvar Bela Boris Carla Chen Dana Dmitri Elena Emil Fatima Felix Greta Hugo Ines "
    "Ivan Jana Karl Lena Liu Marta Milo Nadia Omar Petra Quinn Rosa Sven Tara Ugo Vera "
    "Walt Xenia Yara Zeno Amir".split()
)
LAST_NAMES = tuple(
    "Abbott Berg Castro Dumas Ekman Fischer Garcia Huber Ito Jensen Kovacs Lopez Meyer "
    "Novak Okafor Petrov Qureshi Rossi Silva Tanaka Ueda Vogel Weber Xu Young Zhang Adler "
    "Brandt Conti Duarte Endo Farkas Gomez Hansen Ivanov Jain".split()
)


class Relation(NamedTuple):
    """A property of a person: its values, and sentences that state it."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]


RELATIONS = (
    Relation(
        tuple(
            "Paris London Tokyo Lima Cairo Oslo Rome Delhi Quito Dakar Seoul Kyiv Boston Madrid "
            "Vienna Lagos".split()
        ),
        (
            "{who} was born in {what} .",
            "{who} is a native of {what} .",
            "the birthplace of {who} is {what} .",
        ),
    ),
    Relation(
        tuple(
            "painter physicist singer engineer novelist chemist pilot lawyer surgeon farmer "
            "architect dancer banker teacher sculptor actor".split()
        ),
        (
            "{who} worked as a {what} .",
            "{who} was a {what} by profession .",
            "by trade {who} was a {what} .",
        ),
    ),
    Relation(
        tuple(str(year) for year in range(1900, 2000, 4)),
        ("{who} died in {what} .", "{who} passed away in {what} .", "in {what} {who} died ."),
    ),
    Relation(
        tuple("Nobel Turing Pulitzer Fields Oscar Grammy Booker Abel Wolf Kyoto".split()),
        (
            "{who} won the {what} prize .",
            "{who} received the {what} award .",
            "the {what} prize went to {who} .",
        ),
    ),
    Relation(
        tuple("tennis chess golf rugby judo fencing rowing skiing boxing cricket".split()),
        (
            "{who} played {what} .",
            "{who} was known for playing {what} .",
            "{who} competed in {what} .",
        ),
    ),
    Relation(
        tuple("Arsenal Benfica Ajax Celtic Lyon Porto Roma Sevilla Napoli Monaco".split()),
        (
            "{who} supported {what} .",
            "{who} was a fan of {what} .",
            "the favourite club of {who} was {what} .",
        ),
    ),
)
MAX_FACTS = 3


class Claim(NamedTuple):
    """A claim, its evidence, and the label that follows from the evidence."""

    claim: str
    evidence: str
    label: str


def stream(
    seed: int, n_facts: int | None = None, labels: tuple[str, ...] = LABELS
) -> Iterator[Claim]:
    """Yield claims indefinitely; the same seed gives the same claims.

    Parameters
    ----------
    seed
        Seed of the generator.
    n_facts
        Sentences of evidence per row, 1 to 3; drawn for each row if None.
    labels
        Labels to draw from.
    """
    rng = random.Random(seed)
    while True:
        yield _draw(rng, n_facts or rng.randint(1, MAX_FACTS), rng.choice(labels))


def generate(n_rows: int, seed: int = 0) -> pd.DataFrame:
    """Return `n_rows` generated claims as a frame with columns id, claim, evidence, label.

    >>> generate(2).columns.tolist()
    ['id', 'claim', 'evidence', 'label']
    """
    rows = stream(seed)
    frame = pd.DataFrame([next(rows) for _ in range(n_rows)], columns=list(Claim._fields))
    frame.insert(0, "id", range(n_rows))
    return frame


def vocabulary() -> list[str]:
    """Every word that can occur in a prompt over generated claims or in its answer; sorted."""
    texts = [PROMPT.format(evidence="", claim=""), *LABELS, *FIRST_NAMES, *LAST_NAMES]
    for relation in RELATIONS:
        texts += relation.values
        texts += (sentence.format(who="", what="") for sentence in relation.sentences)
    return sorted({word for text in texts for word in text.split()})


def _draw(rng: random.Random, n_facts: int, label: str) -> Claim:
    """Draw a claim with a given label."""
    person = _person(rng)
    told = rng.sample(RELATIONS, n_facts)
    facts = {relation: rng.choice(relation.values) for relation in told}
    who, relation = person, rng.choice(told)
    what = facts[relation]
    if label == "REFUTED":
        what = rng.choice([value for value in relation.values if value != what])
    # Half of these ask for a relation without evidence, half for another person. The model can
    # thus not tell the label from the relation or from the name alone.
    elif label == "NOT ENOUGH INFO" and rng.random() < 0.5:
        relation = rng.choice([other for other in RELATIONS if other not in facts])
        what = rng.choice(relation.values)
    elif label == "NOT ENOUGH INFO":
        what = what if rng.random() < 0.5 else rng.choice(relation.values)
        while who == person:
            who = _person(rng)
    evidence = " ".join(_say(rng, of, person, value) for of, value in facts.items())
    return Claim(_say(rng, relation, who, what), evidence, label)


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _say(rng: random.Random, relation: Relation, who: str, what: str) -> str:
    return rng.choice(relation.sentences).format(who=who, what=what)
