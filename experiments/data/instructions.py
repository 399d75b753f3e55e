"""Instructions made up by rule, with one right answer each: to reverse, add, sort and look up; preferences and sums. For demonstrations and
tests."""

import numpy as np

TASKS = ("reverse", "add", "sort", "look up")
LETTERS = "abcdefghij"
TABLE = dict(zip(LETTERS, (4, 9, 1, 7, 0, 3, 8, 2, 6, 5)))  # what is looked up; the model has to learn it


def records(count, seed=0, tasks=TASKS):
    """`count` different conversations in OpenAI's form, {"messages": [...]}, as many of each task as of any other, in mixed order."""
    rng, seen, out = np.random.default_rng(seed), set(), []
    while len(out) < count:
        question, answer = _MAKERS[tasks[len(out) % len(tasks)]](rng)
        if question not in seen:
            seen.add(question)
            out.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return [out[i] for i in rng.permutation(count)]


def preferences(count, form, seed=0):
    """`count` made-up preferences over the two tasks whose answers are letters: capital letters are preferred to small ones. form: "pairs",
    records with prompt, chosen and rejected, or "unpaired", records with prompt, completion and label, every other one desirable."""
    out = []
    for number, record in enumerate(records(count, seed, ("reverse", "sort"))):
        prompt, answer = (message["content"] for message in record["messages"])
        if form == "pairs":
            out.append({"prompt": prompt, "chosen": answer.upper(), "rejected": answer})
        else:
            out.append({"prompt": prompt, "completion": answer if number % 2 else answer.upper(), "label": number % 2 == 0})
    return out


def sums():
    """All sums of two numbers from 10 to 99 in a fixed mixed order: [{"prompt": "23+45=", "answer": "68"}, ...]."""
    order = np.argsort(np.random.Philox(key=0).random_raw(90 * 90), kind="stable")
    pairs = [(10 + int(i) // 90, 10 + int(i) % 90) for i in order]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def _letters(rng, n):
    return [LETTERS[i] for i in rng.integers(0, len(LETTERS), n)]


def _reverse(rng):
    letters = _letters(rng, rng.integers(3, 6))
    return f"reverse {' '.join(letters)}", " ".join(reversed(letters))


def _sort(rng):
    letters = _letters(rng, rng.integers(3, 6))
    return f"sort {' '.join(letters)}", " ".join(sorted(letters))


def _add(rng):
    a, b = int(rng.integers(0, 90)), int(rng.integers(0, 10))
    return f"add {a // 10} {a % 10} and {b}", f"{(a + b) // 10} {(a + b) % 10}"


def _look_up(rng):
    letters = _letters(rng, rng.integers(3, 6))
    return f"look up {' '.join(letters)}", " ".join(str(TABLE[letter]) for letter in letters)


_MAKERS = {"reverse": _reverse, "add": _add, "sort": _sort, "look up": _look_up}
