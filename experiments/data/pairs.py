"""Batches of tokens to the .bin/.idx pairs of their outputs, and what is in a pair."""

import contextlib
import math
import os
import sys

import numpy as np
from tqdm import tqdm

from experiments.data.megatron import IndexedDataset, Writer

REPORTED = 10  # bad records whose message is shown


class Skipped:
    """Called with the message of a bad record: raises it, or with `skip` counts it. It prints the first few, then each tenfold number.

    option: how a user asks to skip.
    """

    def __init__(self, skip, option="--skip_bad"):
        self.skip, self.option, self.count = skip, option, 0

    def __call__(self, message):
        if not self.skip:
            raise ValueError(f"{message}; mend it, or leave such records out with {self.option}")
        self.count += 1
        if self.count <= REPORTED or math.log10(self.count).is_integer():
            more = f"; {self.count:,} bad records so far" if self.count >= REPORTED else ""
            tqdm.write(f"left out: {message}{more}", file=sys.stderr)


def name(prefix, output):
    """The prefix of the pair of an output."""
    return f"{prefix}_{output}_document"


def loss_name(prefix):
    """The prefix of the loss masks that belong to the tokens of a conversation's pair."""
    return prefix.removesuffix("_text_document") + "_loss_document"


def write(prefix, batches, dtypes, total_bytes, bad):
    """Writes `<prefix>_<output>_document` for every output of dtypes, {output: dtype}. Returns (documents, {output: tokens}).

    A text is a document of one sequence; an empty one a document of none, so that document i of all outputs is one record's. No pair
    takes its name before all are complete, and those of an earlier run are gone by then: what is there is of one run.
    """
    os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
    documents, tokens = 0, dict.fromkeys(dtypes, 0)
    with contextlib.ExitStack() as stack:
        writers = {output: stack.enter_context(Writer(name(prefix, output), dtype)) for output, dtype in dtypes.items()}
        with tqdm(total=total_bytes, unit="B", unit_scale=True, mininterval=0.5) as bar:
            for batch in batches:
                for message in batch.bad:
                    bad(message)
                for output, (values, lengths) in batch.outputs.items():
                    _add(writers[output], values, lengths)
                    tokens[output] += len(values)
                documents += len(lengths)
                bar.update(batch.size - bar.n)
                rate = documents / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{documents} documents, {rate:.0f} a second, {bad.count} left out", refresh=False)
        if not documents:
            raise ValueError("input has no record to write; give one with text")
        for output in dtypes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{name(prefix, output)}.idx")
    return documents, tokens


def _add(writer, values, lengths):
    stop = 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        if length:
            writer.add(values[start:stop])
        writer.end_document()


def describe(prefix, tokenizer=None, document=0):
    """Text on a pair: counts, dtype, sizes, quantiles of lengths in tokens, and the ids of a document, as text with a tokenizer.

    Beside a pair of loss masks, what has no loss is shown in brackets.
    """
    if not prefix:
        raise ValueError("inspect needs the prefix of a pair: python -m experiments.preprocess inspect PREFIX")
    pair = IndexedDataset(prefix)
    ends = np.asarray(pair.document_indices)
    if not 0 <= document < len(ends) - 1:
        raise ValueError(f"document={document}: {prefix} has {len(ends) - 1} documents, numbered from 0")
    total = np.concatenate([[0], np.cumsum(pair.lengths, dtype=np.int64)])
    lengths = np.diff(total[ends])
    quantiles = [f"{q:g}% {v:.0f}" for q, v in zip((0, 5, 25, 50, 75, 95, 100), np.percentile(lengths, (0, 5, 25, 50, 75, 95, 100)))]
    lines = [
        f"documents  {len(lengths):,}, {np.count_nonzero(lengths == 0):,} of them empty, in {len(pair):,} sequences",
        f"tokens     {total[-1]:,}, {pair.dtype.name}; {os.path.getsize(f'{prefix}.bin') / 2**20:,.1f} MiB",
        f"lengths    {', '.join(quantiles)}; mean {lengths.mean():.1f}",
    ]
    ids = pair.flat[total[ends[document]] : total[ends[document + 1]]]
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    other = loss_name(prefix)
    loss = IndexedDataset(other) if os.path.exists(f"{other}.idx") and other != prefix else None
    if loss is not None and loss.dtype == np.uint8:
        if not np.array_equal(loss.lengths, pair.lengths):
            raise ValueError(f"{other} has other lengths than {prefix}; the two are not of one run, make both again")
        lines.append(f"loss       on {int(loss.flat.sum(dtype=np.int64)):,} tokens, {100 * loss.flat.mean(dtype=np.float64):.1f}%")
        text = _bracketed(ids, loss.flat[total[ends[document]] : total[ends[document + 1]]], tokenizer)
    return "\n".join([*lines, f"document {document}, {len(ids):,} tokens:", text])


def _bracketed(ids, mask, tokenizer):
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    parts = []
    for start, stop in zip(cuts, cuts[1:]) if len(ids) else ():
        part = tokenizer.decode(ids[start:stop]) if tokenizer else " ".join(map(str, ids[start:stop]))
        parts.append(part if mask[start] else f"[{part}]")
    return "".join(parts)
