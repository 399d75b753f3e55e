"""The thread that runs the engine. The HTTP server's thread hands it a limited number of jobs and gets each job's events back."""

import itertools
import queue
import sys
import traceback
from dataclasses import dataclass, field

from qwen3.generate import CHUNK

STREAMED = 4  # most tokens of a row in one engine step while a client streams
FAILURES = 3  # the worker stops after this many failed steps in a row


class Full(Exception):
    """Raised where the limit of running and waiting jobs is reached."""


@dataclass(eq=False)
class Job:
    """One text to generate. request: a qwen3.engine.Request. put(event or exception) is called in the HTTP server's thread, in order.

    number: the engine's id of the request. streamed: whether a client reads the text while it grows.
    """

    request: object
    put: object
    streamed: bool = False
    number: int | None = field(default=None, repr=False)


class Worker:
    """Runs an engine in the thread that creates this object and calls run().

    make(): returns a new Engine. most: the limit of running and waiting jobs together. call(function, argument): runs a function in the
    HTTP server's thread. Only that thread may call submit and release; any thread may call stop.
    """

    def __init__(self, make, most, call):
        self.make, self.most, self.call = make, most, call
        self.engine, self.held, self.inbox = make(), set(), queue.SimpleQueue()

    def submit(self, jobs):
        """Accepts all jobs, or raises Full and accepts none. The caller must release each of them."""
        if len(self.held) + len(jobs) > self.most:
            raise Full
        self.held.update(jobs)
        for job in jobs:
            self.inbox.put(("submit", job))

    def release(self, jobs):
        """Frees the jobs' places, and cancels those that have not ended."""
        for job in jobs:
            self.held.discard(job)
            self.inbox.put(("cancel", job))

    def stop(self):
        self.inbox.put(("stop", None))

    def run(self):
        """Steps the engine until stop() is called. Raises the engine's error after FAILURES failures in a row."""
        jobs, failures = {}, 0
        while self._take(jobs):
            try:
                events = self.engine.step(STREAMED if any(job.streamed for job in jobs.values()) else CHUNK)
                failures = 0
            except Exception as error:  # no error of one step may end the requests that come later
                failures += 1
                report(error)
                self._deliver([(job, error) for job in jobs.values()])
                if failures == FAILURES:
                    raise
                self.engine = None  # frees its cache before the next engine allocates one
                self.engine, jobs = self.make(), {}
                continue
            self._deliver([(jobs[event.id], event) for event in events if event.id in jobs])
            for event in events:
                if event.finish_reason:
                    jobs.pop(event.id, None)

    def _take(self, jobs):
        """Handles the messages in the inbox; waits for one where no job runs. Returns False after a "stop" message, else True."""
        while not jobs or not self.inbox.empty():
            command, job = self.inbox.get()
            if command == "stop":
                return False
            self._submit(jobs, job) if command == "submit" else self._cancel(jobs, job)
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
    """Prints an error's type and traceback to stderr, without its message, which may quote a client's text."""
    frames = itertools.chain.from_iterable(text.splitlines() for text in traceback.format_tb(error.__traceback__))
    print("\n".join([f"error      {type(error).__name__} at", *frames]), file=sys.stderr, flush=True)
