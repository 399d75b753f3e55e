"""Documents packed into rows of one length: many documents a row, with the ids that keep them apart."""

import numpy as np

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}


def pack(token_docs, seq_len, eod_id):
    """Documents, each a sequence of ids, to numpy arrays [R, S]: tokens, targets, loss_weights, segment_ids, positions.

    eod_id is put after each document, all are joined, and rows overlap by one token: every pair of neighbours in a document is
    a target once. loss_weights are 0 where the target starts the next document. segment_ids count the documents of a row from 1;
    0 is padding, at the end of the last row. positions start at 0 with each document and each row. R is 0 if there is no pair.
    """
    if seq_len < 1:
        raise ValueError(f"train.seq_len={seq_len} must be 1 or more")
    token_docs = list(token_docs)
    lengths = np.array([len(doc) + 1 for doc in token_docs], np.int64)
    stream = np.full(lengths.sum(), eod_id, np.int32)
    starts = np.cumsum(lengths) - lengths
    for start, doc in zip(starts, token_docs):
        stream[start : start + len(doc)] = doc
    count = max(len(stream) - 1, 0)  # pairs of neighbours
    rows = -(-count // seq_len)

    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(count)
    row_start = place - place % seq_len
    first = document[:count]
    out = {
        "tokens": stream[:count],
        "targets": stream[1:],
        "loss_weights": first == document[1:],
        "segment_ids": first - document[row_start] + 1,
        "positions": place - np.maximum(starts[first], row_start),
    }
    fill = {"tokens": eod_id, "targets": eod_id}
    return {key: _rows(out[key], rows, seq_len, dtype, fill.get(key, 0)) for key, dtype in DTYPES.items()}


def _rows(values, rows, seq_len, dtype, fill):
    out = np.full(rows * seq_len, fill, dtype)
    out[: len(values)] = values
    return out.reshape(rows, seq_len)
