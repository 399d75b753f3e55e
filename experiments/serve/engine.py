"""The thread that runs the engine. The HTTP server's thread hands it a limited number of jobs and gets each job's events back."""

import itertools
import queue
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field

from qwen3.generate import CHUNK

STREAMED = 4  # most tokens of a row in one engine step while a client streams
SPARED = 4  # of so many slots, or more, one request leaves one free; of fewer, that would cost too much of its speed
UNREAD = 1024  # prompt tokens in the engine that are not read yet, above which no further prompt is given to it
FAILURES = 3  # the worker stops after this many failed steps in a row


class Full(Exception):
    """Raised where the limit of running and waiting jobs is reached."""


@dataclass(eq=False)
class Job:
    """One text to generate. request: a qwen3.engine.Request. put(event or exception) is called in the HTTP server's thread, in order.

    number: the engine's id of the request. streamed: whether a client reads the text while it grows. client, group: any values that are
    the same for the texts of one client, and of one request of it.
    """

    request: object
    put: object
    streamed: bool = False
    client: object = None
    group: object = None
    number: int | None = field(default=None, repr=False)


class Worker:
    """Runs an engine in the thread that creates this object and calls run().

    make(): returns a new Engine of so many slots. most: the limit of running and waiting jobs together. call(function, argument): runs a
    function in the HTTP server's thread. Only that thread may call submit and release; any thread may call stop.

    Jobs wait here, and the engine has those that its slots take. A free slot goes to the client with the fewest running jobs, then to the
    request with the fewest, then to the oldest job; and of SPARED or more slots, one request may not take the last one. So a short request
    waits for the next free slot, not for all texts of a large one.
    """

    def __init__(self, make, most, call, slots=1):
        self.make, self.most, self.call, self.slots = make, most, call, slots
        self.engine, self.held, self.inbox = make(), set(), queue.SimpleQueue()

    def submit(self, jobs):
        """Accepts all jobs, or raises Full and accepts none. Their places are free when they have ended or are released."""
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
        waiting, jobs, unread, failures = [], {}, {}, 0
        while self._take(waiting, jobs):
            try:
                self._start(waiting, jobs, unread)
                events = self.engine.step(STREAMED if any(job.streamed for job in jobs.values()) else CHUNK)
                failures = 0
            except Exception as error:  # no error of one step may end the requests that come later
                failures += 1
                report(error)
                self._deliver([(job, error) for job in jobs.values()])
                if failures == FAILURES:
                    self._deliver([(job, error) for job in waiting])
                    raise
                self.engine = None  # frees its cache before the next engine allocates one
                self.engine, jobs, unread = self.make(), {}, {}
                continue
            self._deliver([(jobs[event.id], event) for event in events if event.id in jobs])
            for event in events:
                unread.pop(event.id, None)
                if event.finish_reason:
                    jobs.pop(event.id, None)

    def _take(self, waiting, jobs):
        """Handles the messages in the inbox; waits for one where there is no job. Returns False after a "stop" message, else True."""
        while not (jobs or waiting) or not self.inbox.empty():
            command, job = self.inbox.get()
            if command == "stop":
                return False
            if command == "submit":
                waiting.append(job)
            elif jobs.get(job.number) is job:  # else it has ended, or its number is of an engine that failed
                del jobs[job.number]
                self.engine.cancel(job.number)
            elif job in waiting:
                waiting.remove(job)
        return True

    def _start(self, waiting, jobs, unread):
        """Gives waiting jobs to the engine: as many as it has slots, and one more, so that it looks for the end of each row; but not so
        many that a prompt which comes next waits for all of theirs. unread: {id: prompt tokens} of those that have no event yet."""
        for number in set(unread) - set(jobs):  # cancelled
            del unread[number]
        while len(jobs) <= self.slots and sum(unread.values()) < UNREAD and (job := self._next(waiting, jobs)):
            waiting.remove(job)
            try:
                job.number = self.engine.submit(job.request)
            except ValueError as error:
                self._deliver([(job, error)])
                continue
            jobs[job.number], unread[job.number] = job, len(job.request.prompt)

    def _next(self, waiting, jobs):
        """Returns the waiting job whose turn it is, or None."""
        clients, groups = Counter(job.client for job in jobs.values()), Counter(job.group for job in jobs.values())
        most = self.slots - 1 if self.slots >= SPARED else self.slots + 1
        allowed = [job for job in waiting if job.group is None or groups[job.group] < most]
        return min(allowed, key=lambda job: (clients[job.client], groups[job.group]), default=None)

    def _deliver(self, found):
        if found:
            self.call(self._put, found)

    def _put(self, found):
        for job, event in found:
            if isinstance(event, Exception) or event.finish_reason:
                self.held.discard(job)  # its place is free, even if its client has not read the text yet
            job.put(event)


def report(error):
    """Prints an error's type and traceback to stderr, without its message, which may quote a client's text."""
    frames = itertools.chain.from_iterable(text.splitlines() for text in traceback.format_tb(error.__traceback__))
    print("\n".join([f"error      {type(error).__name__} at", *frames]), file=sys.stderr, flush=True)
