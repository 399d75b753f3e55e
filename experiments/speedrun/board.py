"""The board of the speedrun: a table of the records, as markdown or as a page."""

import html
import statistics

from experiments.speedrun import student
from experiments.speedrun.record import TARGET, faults
from experiments.speedrun.run import flops_of

HEAD = ("record", "what", "FLOPs", "of the baseline's", "CPU seconds of the baseline's", "bits a byte", "p", "seeds", "commit", "holds")


def rows(records):
    """Returns the table's rows, tuples of texts. records: all of a folder, in order."""
    out, before, first = [], None, None
    for record in records:
        flops = flops_of(record)
        first = first or flops
        wrong = faults(record, flops, before, before and flops_of(before))
        out.append((record.name, record.title, f"{flops:.3g}", f"{flops / first:.2f}", *_measured(record), "; ".join(wrong) or "yes"))
        before = record
    return out


def _measured(record):
    if len(record.seeds) < 2 or not all(isinstance(bit, float) for bit in record.bits):
        return "", "", "", str(len(record.seeds)), ""
    spread = f"{statistics.fmean(record.bits):.4f} ± {statistics.stdev(record.bits):.4f}"
    p = f"{student.p_below(record.bits, TARGET):.2g}"
    return f"{record.cpu_ratio:.2f}", spread, p, str(len(record.seeds)), (record.results.get("commit") or "")[:7]


def markdown(records):
    lines = [HEAD, ["---"] * len(HEAD), *rows(records)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def page(records):
    """Returns a page with the table, that needs no other file."""
    cell = lambda tag, words: f"<{tag}>{html.escape(words)}</{tag}>"
    body = "".join("<tr>" + "".join(cell("td", words) for words in row) + "</tr>\n" for row in rows(records))
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ccc}"
    return (
        f"<!doctype html><meta charset=utf-8><title>Speedrun</title><style>{style}</style>\n<h1>Speedrun: {TARGET} bits a byte</h1>\n"
        f"<table><tr>{''.join(cell('th', words) for words in HEAD)}</tr>\n{body}</table>\n"
    )
