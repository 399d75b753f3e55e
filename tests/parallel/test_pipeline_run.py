"""The executor of pipeline actions, on threads instead of processes: what comes out, and what is alive meanwhile."""

import queue
import threading
import weakref

import numpy as np
import pytest

from parallel.pipeline import schedule as pipeline
from parallel.pipeline.run import Executor
from tests.parallel.formulas import live_formula

CASES = [
    ("gpipe", 2, 4, 1),
    ("gpipe", 4, 3, 1),
    ("1f1b", 2, 5, 1),
    ("1f1b", 4, 8, 1),
    ("1f1b", 4, 2, 1),
    ("interleaved", 2, 4, 2),
    ("interleaved", 4, 8, 3),
]


class Number:
    """Stands for a tensor; can be weakly referred to."""

    def __init__(self, value):
        self.value = value


class Rank:
    """A thread's part: each stage multiplies by its weight. alive: the most inputs that were there at a time, right after a forward."""

    def __init__(self, rank, lists, weights, channels):
        self.rank, self.actions, self.weights, self.channels = rank, lists[rank], weights, channels
        self.executor = Executor(len(weights), self.send, self.receive)
        self.grads, self.results, self.inputs, self.alive, self.error = {}, {}, [], 0, None

    def send(self, message, rank):
        self.channels[self.rank, rank].put(message)

    def receive(self, action, rank):
        sent, message = self.channels[rank, self.rank].get(timeout=20)
        assert sent == action
        return (message,)

    def forward(self, action, carried):
        # the first stage's are its batch; made here, so that they can be counted with the others
        x = carried[0] if carried else Number(float(action.micro + 1))
        if not carried:
            self.first[action.micro] = x
        self.inputs.append(weakref.ref(x))
        self.alive = max(self.alive, sum(ref() is not None for ref in self.inputs))
        y = x.value * self.weights[action.stage]
        self.results[action.micro, action.stage] = y
        return (pipeline.users(action, len(self.weights)), Number(y))

    def backward(self, action, carried, cotangents):
        x = carried[0] if carried else self.first.pop(action.micro)
        dy = cotangents[0].value if cotangents else 1.0
        self.grads[action.stage] = self.grads.get(action.stage, 0.0) + dy * x.value
        return (pipeline.users(action, len(self.weights)), Number(dy * self.weights[action.stage]))

    def run(self):
        self.first = {}
        try:
            self.executor.run(self.actions, self.forward, self.backward)
        except BaseException as error:
            self.error = error


def on_threads(lists, weights):
    channels = {(a, b): queue.Queue() for a in range(len(lists)) for b in range(len(lists))}
    ranks = [Rank(rank, lists, weights, channels) for rank in range(len(lists))]
    threads = [threading.Thread(target=rank.run, daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    for rank in ranks:
        if rank.error:
            raise rank.error
    assert all(channel.empty() for channel in channels.values())
    return ranks


@pytest.mark.parametrize("name, count, micro, virtual", CASES)
def test_gradients_are_those_of_the_whole_and_inputs_live_as_long_as_predicted(name, count, micro, virtual):
    weights = [1.0 + 0.1 * s for s in range(count * virtual)]
    ranks = on_threads(pipeline.schedule(name, count, micro, virtual), weights)
    whole = np.prod(weights) * sum(range(1, micro + 1))
    for number, rank in enumerate(ranks):
        for stage, grad in rank.grads.items():
            assert grad == pytest.approx(whole / weights[stage])
        assert sorted(rank.grads) == list(range(number, count * virtual, count))
        predicted = live_formula(name, number, count, micro, virtual)
        assert rank.executor.live == predicted and rank.alive == predicted


def test_a_forward_alone_keeps_nothing():
    weights, lists = [2.0, 3.0], pipeline.forward_only(2, 3)
    channels = {(a, b): queue.Queue() for a in range(2) for b in range(2)}
    ranks = [Rank(rank, lists, weights, channels) for rank in range(2)]
    for rank in ranks:
        rank.first = {}
        rank.executor.run(rank.actions, rank.forward)
    assert [ranks[1].results[i, 1] for i in range(3)] == [6.0, 12.0, 18.0] and ranks[1].executor.live == 0
