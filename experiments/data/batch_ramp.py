"""The ramp of the batch size: train.batch_ramp, such as "4:100,8:300": steps of 4 rows until 100 steps are done, of 8 until 300, then of
train.batch_size. Learning rates, evaluations and checkpoints count steps, whatever their size.

Each size compiles its own graphs once. Source of small batches first: Smith et al. 2018; McCandlish et al. 2018.
"""


def parse(text):
    """Returns [(rows, steps that are done when it ends)]. Raises ValueError for a text that is no such list."""
    out = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        rows, _, until = (word.strip() for word in part.partition(":"))
        if not (rows.isdecimal() and until.isdecimal() and len(part) < 40 and int(rows) > 0 and int(until) > 0):
            raise ValueError(f"train.batch_ramp: {part!r} must be ROWS:STEPS, such as '4:100,8:300'")
        out.append((int(rows), int(until)))
    if any(b <= a for (_, a), (_, b) in zip(out, out[1:])):
        raise ValueError(f"train.batch_ramp={text!r}: the steps at which sizes end must rise, such as '4:100,8:300'")
    return out


def sizes(train):
    """Returns the numbers of rows that steps may have. train: the config's section."""
    return tuple(dict.fromkeys([*(rows for rows, _ in parse(train.batch_ramp)), train.batch_size]))


def rows_of(train):
    """Returns f(step from 0) -> the rows of its global batch."""
    ramp, last = parse(train.batch_ramp), train.batch_size
    return lambda step: next((rows for rows, until in ramp if step < until), last)


def total(train, steps):
    """Returns the rows of the first `steps` steps."""
    done, count = 0, 0
    for rows, until in [*parse(train.batch_ramp), (train.batch_size, steps)]:
        until = min(until, steps)
        count, done = count + rows * max(0, until - done), max(done, until)
    return count
