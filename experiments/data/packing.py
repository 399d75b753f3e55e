"""Documents and examples packed into rows of one length: several to a row, with the ids that keep them apart."""

import numpy as np

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}
TOO_LONG = ("truncate", "drop", "error")


def pack(token_docs, seq_len, eod_id, reset=True):
    """Documents, each a sequence of ids, to numpy arrays [R, S]: tokens, targets, loss_weights, segment_ids, positions.

    eod_id is put after each document, all are joined, and rows overlap by one token: every pair of neighbours in a document is
    a target once. loss_weights are 0 where the target starts the next document. segment_ids count the documents of a row from 1;
    0 is padding, at the end of the last row. positions start at 0 with each document and each row. R is 0 if there is no pair.
    With reset=False a row is one segment, whose positions count up and whose every target has weight.
    """
    if seq_len < 1:
        raise ValueError(f"train.seq_len={seq_len} must be 1 or more")
    token_docs = list(token_docs)
    lengths = np.array([len(doc) + 1 for doc in token_docs], np.int64)
    stream = np.full(lengths.sum(), eod_id, np.int32)
    starts = np.cumsum(lengths) - lengths
    for start, doc in zip(starts, token_docs):
        stream[start : start + len(doc)] = doc
    document = np.repeat(np.arange(len(lengths)), lengths) if reset else np.zeros(len(stream), np.int64)
    return cut_rows(stream, document, seq_len, eod_id)


def cut_rows(stream, document, seq_len, pad_id):
    """The rows of joined documents, see pack: stream [n] of ids, document [n], the number of each one's document, rising."""
    count = max(len(stream) - 1, 0)  # pairs of neighbours
    rows = -(-count // seq_len)
    place = np.arange(count)
    row_start = place - place % seq_len
    first = document[:count]
    starts = np.diff(document, prepend=document[:1] - 1) != 0
    out = {
        "tokens": stream[:count],
        "targets": stream[1:],
        "loss_weights": first == document[1:],
        "segment_ids": first - document[row_start] + 1,
        "positions": place - np.maximum(np.maximum.accumulate(np.where(starts, np.arange(len(stream)), 0))[:count], row_start),
    }
    fill = {"tokens": pad_id, "targets": pad_id}
    return {key: _rows(out[key], rows, seq_len, dtype, fill.get(key, 0)) for key, dtype in DTYPES.items()}


def _rows(values, rows, seq_len, dtype, fill):
    out = np.full(rows * seq_len, fill, dtype)
    out[: len(values)] = values
    return out.reshape(rows, seq_len)


def pack_examples(examples, seq_len, pad_id, too_long="truncate"):
    """Examples (ids, loss mask), both [n], packed whole into as few rows as best fit finds: (rows as of pack, a report of counts).

    An example takes n - 1 places, its tokens but the last, and its first token is never a target; a target's weight is its own mask.
    One with n - 1 > S is cut to its first S + 1 tokens, dropped, or an error, as too_long says. One without a target that counts
    is left out. Best fit: longest first, each into the fullest row that has room; O(n log n), and S / 64 words a step.

    The report: examples, packed, rows, truncated, dropped, cut_tokens (of both), no_target, and fill, the share of places in use.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"data.too_long={too_long!r} is not one of {', '.join(TOO_LONG)}")
    if seq_len < 1:
        raise ValueError(f"train.seq_len={seq_len} must be 1 or more")
    report = dict.fromkeys(("examples", "packed", "rows", "truncated", "dropped", "cut_tokens", "no_target"), 0)
    kept = list(_fitting(examples, seq_len, too_long, report))
    row_of, start_of, number_of, rows = _best_fit(np.array([len(ids) - 1 for ids, _ in kept], np.int64), seq_len)
    out = {key: np.full((rows, seq_len), pad_id if key in ("tokens", "targets") else 0, dtype) for key, dtype in DTYPES.items()}
    for (ids, mask), row, start, number in zip(kept, row_of, start_of, number_of):
        place = row, slice(start, start + len(ids) - 1)
        out["tokens"][place], out["targets"][place], out["loss_weights"][place] = ids[:-1], ids[1:], mask[1:]
        out["segment_ids"][place], out["positions"][place] = number, np.arange(len(ids) - 1)
    report.update(packed=len(kept), rows=rows, fill=float((out["segment_ids"] > 0).mean()) if rows else 0.0)
    return out, report


def _fitting(examples, seq_len, too_long, report):
    for i, (ids, mask) in enumerate(examples):
        ids, mask = np.asarray(ids, np.int32), np.asarray(mask)
        if ids.shape != mask.shape or ids.ndim != 1:
            raise ValueError(f"example {i} has ids of shape {ids.shape} and a loss mask of shape {mask.shape}; give one mask value an id")
        report["examples"] += 1
        excess = len(ids) - (seq_len + 1)
        if excess > 0:
            if too_long == "error":
                raise ValueError(
                    f"example {i} has {len(ids)} tokens, more than train.seq_len={seq_len} + 1;"
                    " raise train.seq_len, or use data.too_long='truncate' or 'drop'"
                )
            report["cut_tokens"] += excess if too_long == "truncate" else len(ids)
            report["truncated" if too_long == "truncate" else "dropped"] += 1
            if too_long == "drop":
                continue
            ids, mask = ids[: seq_len + 1], mask[: seq_len + 1]
        if not mask[1:].any():
            report["no_target"] += 1
            continue
        yield ids, mask


def _best_fit(sizes, seq_len):
    """(row, first place, number in its row from 1) of each size, int lists, and the number of rows."""
    row_of, start_of, number_of = ([0] * len(sizes) for _ in range(3))
    by_room, rooms, count = {}, 0, []  # rows by the places left in them; bit r of rooms: some row has r left
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, len(count)
            count.append(0)
        count[row] += 1
        row_of[i], start_of[i], number_of[i] = row, seq_len - room, count[row]
        left = room - size
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return row_of, start_of, number_of, len(count)
