"""The corpus of the speedrun: 400 kB of text from a seeded grammar, the same bytes on every machine.

Paragraphs tell of people who fetch, count and give things. A model has to learn words and their spelling, agreement (one pot, two pots),
names that come back within a paragraph, sums, and brackets that close in order. Only `random.random()` is used, whose sequence Python
promises to keep, and the digest is checked each time.
"""

import hashlib
import os
import random

BYTES = 400_000
DIGEST = "a56bbf1f8883318f235a817772c0f1f2f6d28c0d0f098c0a04d410b31a39b4d4"
PEOPLE = (
    "Ana Bram Chidi Dora Emil Farah Goran Hana Ivo Jun Kofi Lena Mira Nils Oona Pavel Quin Rosa Sami Tuva Umar Vera Wim Yara Zeno"
).split()
THINGS = "apple basket candle drum egg feather glove hammer jar kettle lamp mirror nail orange pot quilt rope spoon ticket wheel".split()
PLACES = "attic barn cellar harbour kitchen library market mill orchard tower workshop yard".split()
COLOURS = "amber black blue brown green grey red white yellow".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split()


def text():
    """Returns the corpus. Raises ValueError if it is not the one of the records."""
    made = _made()
    digest = hashlib.sha256(made.encode()).hexdigest()
    if digest != DIGEST:
        raise ValueError(f"the speedrun's corpus has the digest {digest[:12]} instead of {DIGEST[:12]}; undo the change of {__file__}")
    return made


def write(folder):
    """Writes the corpus to a file in a folder. Returns its path."""
    path = os.path.join(folder, "corpus.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text())
    return path


def _made():
    draw, parts, size = random.Random(27).random, [], 0
    while size < BYTES:
        parts.append(_paragraph(draw))
        size += len(parts[-1])
    return "".join(parts)


def _one(draw, words):
    return words[int(draw() * len(words))]


def _count(number, thing):
    return f"{NUMBERS[number]} {thing}{'' if number == 1 else 's'}"


def _paragraph(draw):
    people, thing, place, colour = [_one(draw, PEOPLE) for _ in range(2)], _one(draw, THINGS), _one(draw, PLACES), _one(draw, COLOURS)
    has = [int(draw() * 10) for _ in people]
    lines = [f"{who} has {_count(n, f'{colour} {thing}')} in the {place}." for who, n in zip(people, has)]
    for _ in range(1 + int(draw() * 4)):
        lines.append(_event(draw, people, thing, place, colour, has))
    return " ".join(lines) + "\n"


def _event(draw, people, thing, place, colour, has):
    kind, giver = int(draw() * 5), int(draw() * 2)
    who, other = people[giver], people[1 - giver]
    if kind == 0 and has[giver]:
        given = 1 + int(draw() * has[giver])
        has[giver], has[1 - giver] = has[giver] - given, min(18, has[1 - giver] + given)
        return f"{who} gives {other} {_count(given, thing)}, and now {other} has {NUMBERS[has[1 - giver]]}."
    if kind == 1:
        return f"Together they count {_count(min(18, sum(has)), thing)}."
    if kind == 2:
        a, b = int(draw() * 50), int(draw() * 50)
        return f"{who} writes {a} + {b} = {a + b} on the wall of the {place}."
    if kind == 3:
        opened = [_one(draw, ["()", "[]", "{}"]) for _ in range(1 + int(draw() * 4))]
        return f"{other} draws {''.join(p[0] for p in opened)}{colour}{''.join(p[1] for p in reversed(opened))} beside the {thing}s."
    return f'"Who is in the {place}?" asks {who}. "It is {other}, with {_count(has[1 - giver], thing)}," says {_one(draw, people)}.'
