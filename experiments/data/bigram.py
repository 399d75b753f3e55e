"""A bigram model of the packed rows: the loss that a model which reads more than one token has to beat."""

import numpy as np

STRENGTHS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # of the unigram prior, in counts


def held_out_nats(train_rows, held_rows, vocab_size, max_tokens):
    """Cross-entropy, in nats per target, of the held-out rows under a bigram model of the first max_tokens targets of the train rows.

    p(b|a) = (c(a,b) + k p(b)) / (c(a) + k), p(b) = (c(b) + 1) / (n + V); k has the best likelihood on the last tenth of the train
    targets given the rest. Only targets with a loss weight count.
    """
    train = _pairs(train_rows, max_tokens)
    held = _pairs(held_rows, None)
    if len(train[0]) < 2 or not len(held[0]):
        raise ValueError(
            f"data.path gives {len(train[0])} train and {len(held[0])} held-out targets; a bigram model needs 2 and 1, give more text"
        )
    cut = len(train[0]) - max(1, len(train[0]) // 10)
    fit, tail = [x[:cut] for x in train], [x[cut:] for x in train]
    k = min(STRENGTHS, key=_scorer(fit, tail, vocab_size))
    return _scorer(train, held, vocab_size)(k)


def _pairs(rows, limit):
    """(inputs, targets), int64 [n], where the loss weight is above 0."""
    index = np.flatnonzero(rows["loss_weights"] > 0)[:limit]
    return [rows[key].reshape(-1)[index].astype(np.int64) for key in ("tokens", "targets")]


def _scorer(train, scored, vocab_size):
    """k -> mean nats of the scored pairs under counts of the train pairs."""
    (a, b), (x, y) = train, scored
    keys, counts = np.unique(a * vocab_size + b, return_counts=True)
    wanted = x * vocab_size + y
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    c_xy = np.where(keys[at] == wanted, counts[at], 0)
    c_x = np.bincount(a, minlength=vocab_size)[x]
    p_y = (np.bincount(b, minlength=vocab_size)[y] + 1) / (len(b) + vocab_size)
    return lambda k: float(-np.mean(np.log((c_xy + k * p_y) / (c_x + k))))
