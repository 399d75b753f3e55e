"""The bigram baseline, against a count by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from experiments.data.bigram import STRENGTHS, held_out_nats
from experiments.data.packing import pack

V = 12


def markov_docs(seed, count, length):
    """Documents of a chain where token a is mostly followed by 5a + 1."""
    rng = np.random.default_rng(seed)
    docs = []
    for _ in range(count):
        doc = [int(rng.integers(1, V))]
        while len(doc) < length:
            doc.append((5 * doc[-1] + 1) % V if rng.random() < 0.8 else int(rng.integers(1, V)))
        docs.append(doc)
    return docs


def pairs_by_hand(docs):
    return [pair for doc in docs for pair in zip(doc, [*doc[1:], 0])]


def nats_by_hand(train, scored, k):
    pairs, inputs, targets = Counter(train), Counter(a for a, _ in train), Counter(b for _, b in train)
    total = 0.0
    for a, b in scored:
        unigram = (targets[b] + 1) / (len(train) + V)
        total -= math.log((pairs[a, b] + k * unigram) / (inputs[a] + k))
    return total / len(scored)


@pytest.mark.parametrize("seq_len, max_tokens", [(7, 10**9), (50, 10**9), (16, 333)])
def test_loss_equals_a_count_by_hand(seq_len, max_tokens):
    train, held = markov_docs(0, 40, 20), markov_docs(1, 10, 20)
    pairs = pairs_by_hand(train)[:max_tokens]
    cut = len(pairs) - len(pairs) // 10
    k = min(STRENGTHS, key=lambda k: nats_by_hand(pairs[:cut], pairs[cut:], k))
    expected = nats_by_hand(pairs, pairs_by_hand(held), k)
    loss = held_out_nats(pack(train, seq_len, 0), pack(held, seq_len, 0), V, max_tokens)
    assert loss == pytest.approx(expected, rel=1e-12)  # float64 sums in another order


def test_strength_is_not_chosen_on_the_held_out_rows():
    train = pack(markov_docs(0, 40, 20), 16, 0)
    held = markov_docs(1, 1, 3)
    loss = held_out_nats(train, pack(held, 16, 0), V, 10**9)
    best = min(nats_by_hand(pairs_by_hand(markov_docs(0, 40, 20)), pairs_by_hand(held), k) for k in STRENGTHS)
    assert loss > best


def test_bigram_comes_near_the_entropy_of_its_own_chain_and_beats_unigrams():
    loss = held_out_nats(pack(markov_docs(0, 300, 100), 64, 0), pack(markov_docs(1, 50, 100), 64, 0), V, 10**9)
    hit, miss = 0.8 + 0.2 / (V - 1), 0.2 / (V - 1)
    entropy = -hit * math.log(hit) - (V - 2) * miss * math.log(miss)
    assert entropy - 0.05 < loss < entropy + 0.15 < math.log(V) - 0.5


def test_unseen_inputs_and_targets_have_a_finite_loss():
    loss = held_out_nats(pack([[1, 2] * 20], 8, 0), pack([[9, 10, 11]], 8, 0), V, 100)
    assert math.log(2) < loss < 20


def test_targets_without_weight_are_not_counted():
    train, held = pack(markov_docs(0, 40, 20), 16, 0), pack(markov_docs(1, 10, 20), 16, 0)
    loss = held_out_nats(train, held, V, 10**9)
    for rows in (train, held):
        rows["targets"][rows["loss_weights"] == 0] = 7
    assert held_out_nats(train, held, V, 10**9) == loss


def test_a_large_vocabulary_needs_no_table_of_its_square():
    rows = pack([[151_000, 151_001] * 50], 16, 151_643)
    assert 0 < held_out_nats(rows, rows, 151_669, 10**6) < 1


@pytest.mark.parametrize("train, held", [([], [[1, 2]]), ([[1]], [[1, 2]]), ([[1, 2, 3]], [])])
def test_too_few_targets_are_an_error(train, held):
    with pytest.raises(ValueError, match="data.path"):
        held_out_nats(pack(train, 4, 0), pack(held, 4, 0), V, 100)
