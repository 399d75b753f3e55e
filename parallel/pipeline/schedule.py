"""Pipeline schedules as data: the layers of each stage and a list of actions for each rank. Nothing here starts a process.

Stage s is on rank s % ranks; with virtual stages a rank has several stages. A stage sends its result to the next stage and, in the
backward, the gradient of its input to the previous stage. Sources: GPipe, Huang et al. 2019; 1F1B, Narayanan et al. 2019; interleaved 1F1B,
Narayanan et al. 2021.

The lists have no deadlock, even if a send blocks until its receive. The actions of all ranks are sorted into one order of events, in which
a transfer directly follows the action that made its message, and each rank's list keeps this order. So the first event that is not done yet
never waits for a later one. simulate(blocking=True) checks this.
"""

from dataclasses import dataclass

SCHEDULES = ("gpipe", "1f1b", "interleaved")
AXES = ("pp",)  # the mesh axis of the stages


@dataclass(frozen=True)
class Forward:
    """The forward of stage `stage` on micro-batch `micro`. Its input is kept until its Backward."""

    micro: int
    stage: int


@dataclass(frozen=True)
class Backward:
    """The backward: gradients of the parameters of the stage and, except in the first stage, of its input."""

    micro: int
    stage: int


@dataclass(frozen=True)
class Send:
    """Sends the input of `action`, a Forward or Backward of another stage, to rank `rank`, which runs it."""

    action: object
    rank: int


@dataclass(frozen=True)
class Recv:
    """Receives the input of `action`, a Forward or Backward of this rank, from rank `rank`."""

    action: object
    rank: int


def split_layers(num_layers, stages):
    """Returns the number of layers of each stage.

    Stages get equal numbers. Remaining layers go to the inner stages, then to the first, never to the last, which has the head.
    """
    base, left = divmod(num_layers, stages)
    order = [*range(1, stages - 1), 0, stages - 1]
    return tuple(base + (s in order[:left]) for s in range(stages))


def stage_ranges(num_layers, ranks, virtual_stages=1, layers=()):
    """Returns the range of layers of each stage. layers: the number of layers of each stage; default: split_layers.

    Raises ValueError, with the key of the config, if the numbers do not add up to the model or if an inner stage has no layer. The first
    stage has the embedding and the last the head, so these may have no layer.
    """
    stages = ranks * virtual_stages
    if layers and (len(layers) != stages or sum(layers) != num_layers or min(layers) < 0):
        raise ValueError(
            f"parallel.stage_layers={tuple(layers)} must be {stages} numbers, the layers of each of pp={ranks} x"
            f" virtual_stages={virtual_stages} stages, with the sum num_layers={num_layers}; use {split_layers(num_layers, stages)}"
        )
    counts, out, first = tuple(layers) or split_layers(num_layers, stages), [], 0
    for stage, count in enumerate(counts):
        if not count and 0 < stage < stages - 1:
            raise ValueError(
                f"parallel.pp={ranks} x virtual_stages={virtual_stages}: stage {stage} of {counts} has no layer; only the first, which has"
                f" the embedding, and the last, which has the head, may. Use at most {num_layers + 2} stages"
            )
        out.append(range(first, first + count))
        first += count
    return tuple(out)


def check(name, ranks, micro_batches, virtual_stages):
    """Raises ValueError for a schedule that does not exist or that these numbers do not allow."""
    if name not in SCHEDULES:
        raise ValueError(f"parallel.pp_schedule={name!r} is not one of {', '.join(SCHEDULES)}")
    if virtual_stages < 1:
        raise ValueError(f"parallel.virtual_stages={virtual_stages} must be 1 or more")
    if name != "interleaved":
        if virtual_stages > 1:
            raise ValueError(f"parallel.virtual_stages={virtual_stages} needs parallel.pp_schedule=interleaved, not {name}; or use 1")
    elif micro_batches % ranks:
        raise ValueError(
            f"parallel.micro_batches={micro_batches} must be a multiple of parallel.pp={ranks} for pp_schedule=interleaved;"
            f" use --micro_batches={ranks * (micro_batches // ranks + 1)}, or 1f1b"
        )


def schedule(name, ranks, micro_batches, virtual_stages=1):
    """Returns for each rank the tuple of its actions in a training step. Raises ValueError as check() does."""
    check(name, ranks, micro_batches, virtual_stages)
    if name == "gpipe":
        orders = [_gpipe(rank, micro_batches) for rank in range(ranks)]
    elif name == "1f1b":
        orders = [_alternating(*_in_turn(rank, micro_batches), ranks - 1 - rank) for rank in range(ranks)]
    else:
        orders = [_interleaved(rank, ranks, micro_batches, virtual_stages) for rank in range(ranks)]
    return _with_transfers(orders, ranks * virtual_stages)


def forward_only(ranks, micro_batches, virtual_stages=1):
    """Returns for each rank the tuple of its actions in an evaluation, which has no backward."""
    orders = [
        [Forward(micro, chunk * ranks + rank) for chunk in range(virtual_stages) for micro in range(micro_batches)] for rank in range(ranks)
    ]
    return _with_transfers(orders, ranks * virtual_stages)


def _in_turn(rank, micro_batches):
    return [Forward(i, rank) for i in range(micro_batches)], [Backward(i, rank) for i in range(micro_batches)]


def _gpipe(rank, micro_batches):
    forwards, backwards = _in_turn(rank, micro_batches)
    return forwards + backwards


def _alternating(forwards, backwards, warm_up):
    """Returns `warm_up` forwards, then one forward and one backward in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forwards))
    out = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards):
        out += [forward, backward]
    return out + backwards[len(forwards) - warm_up :]


def _interleaved(rank, ranks, micro_batches, virtual_stages):
    """Takes micro-batches in groups of `ranks`. Each group runs through the first stage of this rank, then the second, and so on."""
    forwards, backwards = [], []
    for first in range(0, micro_batches, ranks):
        for chunk in range(virtual_stages):
            forwards += [Forward(first + i, chunk * ranks + rank) for i in range(ranks)]
            backwards += [Backward(first + i, (virtual_stages - 1 - chunk) * ranks + rank) for i in range(ranks)]
    return _alternating(forwards, backwards, 2 * (ranks - 1 - rank) + (virtual_stages - 1) * ranks)


def inputs(action, stages):
    """Returns the action of another stage whose result is the input of this action; None for the first forward and the last backward."""
    if isinstance(action, Forward):
        return Forward(action.micro, action.stage - 1) if action.stage else None
    return Backward(action.micro, action.stage + 1) if action.stage < stages - 1 else None


def users(action, stages):
    """Returns the action of another stage whose input is the result of this action; None if there is none."""
    if isinstance(action, Forward):
        return Forward(action.micro, action.stage + 1) if action.stage < stages - 1 else None
    return Backward(action.micro, action.stage - 1) if action.stage else None


def _with_transfers(orders, stages):
    """Returns the lists of forwards and backwards with sends and receives added, in the order of events that the module describes."""
    ranks, present = len(orders), {action for order in orders for action in order}
    events = []
    for action, end in _ends(orders, stages).items():
        events.append((end, 0, action.micro, action.stage, action, None))
        user = users(action, stages)
        if user in present:
            events.append((end, 1, action.micro, action.stage, action, user))
    out = [[] for _ in orders]
    for *_, action, user in sorted(events, key=lambda event: (*event[:4], isinstance(event[4], Forward))):
        here = action.stage % ranks
        if user is None:
            out[here].append(action)
        else:
            there = user.stage % ranks
            out[here].append(Send(user, there))
            out[there].append(Recv(user, here))
    return tuple(map(tuple, out))


def _ends(orders, stages):
    """Returns {action: end time}. A forward takes 1, a backward 2 and a transfer 0."""
    end, clocks, at = {}, [0] * len(orders), [0] * len(orders)
    present = {action for order in orders for action in order}
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                action = order[at[rank]]
                needed = inputs(action, stages)
                if needed in present and needed not in end:
                    break
                clocks[rank] = max(clocks[rank], end.get(needed, 0)) + (1 if isinstance(action, Forward) else 2)
                end[action] = clocks[rank]
                at[rank], moved = at[rank] + 1, True
    assert all(at[rank] == len(order) for rank, order in enumerate(orders)), "the orders wait for each other"
    return end


@dataclass(frozen=True)
class Timeline:
    """The result of simulate().

    events: for each rank (start, end, action) of its forwards and backwards. length: the end of the last event. bubble: the fraction of
    `length` in which ranks wait, averaged over the ranks.
    """

    events: tuple
    length: float
    bubble: float


def simulate(lists, forward=1.0, backward=2.0, transfer=0.0, blocking=False):
    """Returns the Timeline of the ranks' lists.

    forward, backward: the time of one, a number or a list with one for each stage. transfer: the time of a message.
    blocking: a send and its receive wait for each other. Else a send is buffered, and the action that needs a message waits for it.
    Raises ValueError if ranks wait for each other, or if an action comes before its input.
    """
    at, clocks, events = [0] * len(lists), [0.0] * len(lists), [[] for _ in lists]
    arrived, posted, done, moved = {}, [set() for _ in lists], set(), True
    stages = 1 + max(action.stage for actions in lists for action in actions if isinstance(action, (Forward, Backward)))
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            action = actions[at[rank]] if at[rank] < len(actions) else None
            if isinstance(action, (Forward, Backward)):
                _check_ready(action, posted[rank], done, stages)
                if action in posted[rank] and action not in arrived:
                    continue
                cost = forward if isinstance(action, Forward) else backward
                start = max(clocks[rank], arrived.get(action, 0.0))
                clocks[rank] = start + (cost[action.stage] if isinstance(cost, (list, tuple)) else cost)
                events[rank].append((start, clocks[rank], action))
                done.add(action)
            elif isinstance(action, Send):
                other, peer = action.rank, lists[action.rank]
                if inputs(action.action, stages) not in done:
                    raise ValueError(f"rank {rank} sends the input of {action.action} before it has it")
                if blocking:
                    if at[other] == len(peer) or peer[at[other]] != Recv(action.action, rank):
                        continue
                    clocks[rank] = clocks[other] = max(clocks[rank], clocks[other]) + transfer
                    posted[other].add(action.action)
                    at[other] += 1
                arrived[action.action] = clocks[rank] + transfer * (not blocking)
            elif isinstance(action, Recv) and not blocking:
                posted[rank].add(action.action)
            else:
                continue
            at[rank], moved = at[rank] + 1, True
    stuck = [f"rank {rank} at {actions[at[rank]]}" for rank, actions in enumerate(lists) if at[rank] < len(actions)]
    if stuck:
        raise ValueError(f"the ranks wait for each other: {'; '.join(stuck)}")
    length, busy = max(clocks), sum(end - start for each in events for start, end, _ in each)
    return Timeline(tuple(map(tuple, events)), length, 1 - busy / (length * len(lists)))


def _check_ready(action, posted, done, stages):
    if inputs(action, stages) is not None and action not in posted:
        raise ValueError(f"{action} comes before its input")
    if isinstance(action, Backward) and Forward(action.micro, action.stage) not in done:
        raise ValueError(f"{action} comes before its forward")


def live(actions):
    """Returns the largest number of stage inputs that a rank keeps at a time, each from its forward to its backward."""
    now = most = 0
    for action in actions:
        now += isinstance(action, Forward) - isinstance(action, Backward)
        most = max(most, now)
    return most


def bubble_formula(ranks, micro_batches, virtual_stages=1):
    """Returns the bubble for stages of equal cost. GPipe and 1F1B have equal bubbles; virtual stages make it smaller."""
    return (ranks - 1) / (micro_batches * virtual_stages + ranks - 1)


def draw(lists, columns=120, forward=1, backward=2):
    """Returns the Timeline of the lists as text, one line a rank.

    F0 is the forward of micro-batch 0 and B0 its backward. With virtual stages a letter names the stage of the rank: F0a, F0b. Lines longer
    than `columns` end in `...`.
    """
    timeline, ranks = simulate(lists, forward, backward), len(lists)
    several = any(action.stage >= ranks for each in timeline.events for *_, action in each)

    def label(action):
        return ("F" if isinstance(action, Forward) else "B") + str(action.micro) + (chr(97 + action.stage // ranks % 26) if several else "")

    width = 1 + max(len(label(action)) for each in timeline.events for *_, action in each)
    lines = []
    for rank, each in enumerate(timeline.events):
        line = ""
        for start, end, action in each:
            line = line.ljust(int(start) * width)
            line += label(action).ljust(int(end - start) * width - 1, "-" if isinstance(action, Backward) else " ") + " "
        lines.append(f"rank {rank:<3} {line if len(line) <= columns else line[: columns - 3] + '...'}".rstrip())
    return lines
