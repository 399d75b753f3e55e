"""Documents and examples packed into rows of one length: several to a row, with the ids that keep them apart."""

from typing import NamedTuple

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

    See plan_examples for what becomes of each.
    """
    examples = list(examples)
    plan, report = plan_examples(examples, seq_len, too_long)
    rows = empty_rows(report["rows"], seq_len, pad_id)
    for row in range(report["rows"]):
        fill_row({key: value[row] for key, value in rows.items()}, plan, row, examples)
    return rows, report


class Plan(NamedTuple):
    """Where examples go, in the order of their rows: example, its number; size, the places it takes from start on; all int64 [packed].
    first, int64 [rows + 1]: where in them a row begins."""

    example: np.ndarray
    size: np.ndarray
    start: np.ndarray
    first: np.ndarray


def plan_examples(examples, seq_len, too_long="truncate", packed=True):
    """(Plan, report) of examples, a sequence of (ids, loss mask), both [n]: whole into as few rows as best fit finds.

    An example takes n - 1 places, its tokens but the last, and its first token is never a target; a target's weight is its own mask.
    One with n - 1 > S is cut to its first S + 1 tokens, dropped, or an error, as too_long says. One without a target that counts
    is left out. Best fit: longest first, each into the fullest row that has room; O(n log n), and S / 64 words a step.
    With packed=False each has a row of its own, in the order of the examples.

    The report: examples, packed, rows, truncated, dropped, cut_tokens (of both), no_target, and fill, the share of places in use.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"data.too_long={too_long!r} is not one of {', '.join(TOO_LONG)}")
    if seq_len < 1:
        raise ValueError(f"train.seq_len={seq_len} must be 1 or more")
    report = dict.fromkeys(("examples", "packed", "rows", "truncated", "dropped", "cut_tokens", "no_target"), 0)
    kept = np.array(list(_fitting(examples, seq_len, too_long, report)), np.int64).reshape(-1, 2)
    row, start, rows = best_fit(kept[:, 1], seq_len) if packed else (np.arange(len(kept)), np.zeros(len(kept), np.int64), len(kept))
    order = np.lexsort((start, row))
    plan = Plan(*kept[order].T, start[order], np.searchsorted(row[order], np.arange(rows + 1)))
    report.update(packed=len(kept), rows=rows, fill=float(kept[:, 1].sum() / (rows * seq_len)) if rows else 0.0)
    return plan, report


def describe(report):
    """A report of plan_examples, in a line."""
    return (
        f"{report['packed']:,} of {report['examples']:,} conversations in {report['rows']:,} rows, {report['fill']:.0%} full;"
        f" {report['truncated']:,} truncated and {report['dropped']:,} dropped as longer than a row ({report['cut_tokens']:,} tokens),"
        f" {report['no_target']:,} left out without a target"
    )


def empty_rows(rows, seq_len, pad_id):
    """Rows of padding alone, a dict of arrays [rows, S]."""
    return {key: np.full((rows, seq_len), pad_id if key in ("tokens", "targets") else 0, dtype) for key, dtype in DTYPES.items()}


def fill_row(out, plan, row, examples):
    """Write the examples of a row of the plan into out, a dict of arrays [S] of padding."""
    for number, at in enumerate(range(plan.first[row], plan.first[row + 1]), 1):
        (ids, mask), size, start = examples[int(plan.example[at])], int(plan.size[at]), int(plan.start[at])
        place = slice(start, start + size)
        out["tokens"][place], out["targets"][place], out["loss_weights"][place] = ids[:size], ids[1 : size + 1], mask[1 : size + 1]
        out["segment_ids"][place], out["positions"][place] = number, np.arange(size)


def row_width(longest, narrowest, most):
    """Returns the tokens of a row: the smallest power of two times `narrowest` that holds the longest text, at most `most`, unless that
    text is longer. So texts of all lengths run in few compiled shapes."""
    width = narrowest
    while width < longest:
        width *= 2
    return max(longest, min(width, most))


def _fitting(examples, seq_len, too_long, report):
    """(number, places it takes) of the examples that are packed."""
    for i, (ids, mask) in enumerate(examples):
        shape, mask_shape = np.shape(ids), np.shape(mask)
        if shape != mask_shape or len(shape) != 1:
            raise ValueError(f"example {i} has ids of shape {shape} and a loss mask of shape {mask_shape}; give one mask value an id")
        report["examples"] += 1
        size, excess = len(ids) - 1, len(ids) - (seq_len + 1)
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
            size = seq_len
        if not np.any(mask[1 : size + 1]):
            report["no_target"] += 1
            continue
        yield i, size


def best_fit(sizes, seq_len, most=None):
    """(row, first place in it) of each size, int64 arrays, and the number of rows. most: the most sizes of a row; None: any number."""
    row_of, start_of = np.zeros((2, len(sizes)), np.int64)
    held = []  # sizes in each row
    by_room, rooms, count = {}, 0, 0  # rows by the places left in them; bit r of rooms: some row has r left
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, count
            count += 1
            held.append(0)
        row_of[i], start_of[i] = row, seq_len - room
        held[row] += 1
        left = room - size
        if left and held[row] != most:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return row_of, start_of, count
