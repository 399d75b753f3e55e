"""The engine's thread, and how the HTTP server's thread hands it work: bounded, and each event back to the request it belongs to."""

import itertools
import queue
import sys
import traceback
from dataclasses import dataclass, field

from qwen3.generate import CHUNK

STREAMED = 4  # tokens of a row between two looks at it while someone watches
FAILURES = 3  # steps that fail one after another, after which the engine is given up


class Full(Exception):
    """As much is at work and waiting as may be."""


@dataclass(eq=False)
class Job:
    """One text to make. request: a qwen3.engine.Request. put(event or exception) is called in the HTTP server's thread, in order.

    number: the engine's. streamed: someone watches it grow.
    """

    request: object
    put: object
    streamed: bool = False
    number: int | None = field(default=None, repr=False)


class Worker:
    """Runs an engine, in the thread that makes this object and calls run(). make(): a new Engine. most: jobs at a time, at work and
    waiting. call(function, argument) runs a function in the HTTP server's thread, to which submit and release belong; stop is anyone's."""

    def __init__(self, make, most, call):
        self.make, self.most, self.call = make, most, call
        self.engine, self.held, self.inbox = make(), set(), queue.SimpleQueue()

    def submit(self, jobs):
        """Hands over jobs, all or none. Each has to be released. Raises Full."""
        if len(self.held) + len(jobs) > self.most:
            raise Full
        self.held.update(jobs)
        for job in jobs:
            self.inbox.put(("submit", job))

    def release(self, jobs):
        """Their places are free again; those that have not ended are dropped."""
        for job in jobs:
            self.held.discard(job)
            self.inbox.put(("cancel", job))

    def stop(self):
        self.inbox.put(("stop", None))

    def run(self):
        """Until stop(). Raises what the engine raised where it failed FAILURES times in a row."""
        jobs, failures = {}, 0
        while self._take(jobs):
            try:
                events = self.engine.step(STREAMED if any(job.streamed for job in jobs.values()) else CHUNK)
                failures = 0
            except Exception as error:  # whatever it is, it must not end those that come after
                failures += 1
                report(error)
                self._deliver([(job, error) for job in jobs.values()])
                if failures == FAILURES:
                    raise
                self.engine = None  # its cache goes before there is another
                self.engine, jobs = self.make(), {}
                continue
            self._deliver([(jobs[event.id], event) for event in events if event.id in jobs])
            for event in events:
                if event.finish_reason:
                    jobs.pop(event.id, None)

    def _take(self, jobs):
        """Does what has been asked for meanwhile; waits where there is nothing else to do. Returns whether to go on."""
        while not jobs or not self.inbox.empty():
            what, job = self.inbox.get()
            if what == "stop":
                return False
            self._submit(jobs, job) if what == "submit" else self._cancel(jobs, job)
        return True

    def _submit(self, jobs, job):
        try:
            job.number = self.engine.submit(job.request)
        except ValueError as error:
            return self._deliver([(job, error)])
        jobs[job.number] = job

    def _cancel(self, jobs, job):
        if jobs.pop(job.number, None) is job:
            self.engine.cancel(job.number)

    def _deliver(self, found):
        if found:
            self.call(_put, found)


def _put(found):
    for job, event in found:
        job.put(event)


def report(error):
    """Where an error came from, without its words: they may quote what a client sent."""
    frames = itertools.chain.from_iterable(text.splitlines() for text in traceback.format_tb(error.__traceback__))
    print("\n".join([f"error      {type(error).__name__} at", *frames]), file=sys.stderr, flush=True)
