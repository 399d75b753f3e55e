"""The thread that runs the engine. The HTTP server's thread hands it a limited number of jobs and gets each job's events back."""

import ctypes
import gc
import itertools
import queue
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

from qwen3.generate import CHUNK

LIBC = ctypes.CDLL(None)
STREAMED = 4  # most tokens of a row in one engine step while a client streams
STEP_S = 0.02  # how long a step may last, in which no prompt that comes is looked at
COLLECT_S = 5.0  # between two collections of garbage while requests come, each of which takes 2 ms
IDLE_S = 0.5  # without a request, after which garbage is collected, and free memory given back
LATELY_S, CLIENTS = 60.0, 1000  # for how long a client counts after its last token; the most clients that are remembered
GUESTS = 4  # places a slot beyond the limit, for clients that have none
SPARED = 4  # of so many slots, or more, some are left free for others; of fewer, that would cost too much speed
UNREAD, SHORT = 1024, 256  # prompt tokens in the engine that are not read yet, from which on it gets no prompt of more tokens than SHORT
FAILURES = 3  # in a row, after which the worker stops


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


class Lately:
    """Which clients have lately had texts at work."""

    def __init__(self, clock=time.monotonic):
        self.clock, self.seen = clock, {}  # client: when, the oldest first

    def see(self, client):
        self.seen.pop(client, None)
        self.seen[client] = self.clock()
        if len(self.seen) > CLIENTS:
            del self.seen[next(iter(self.seen))]

    def clients(self):
        """Returns those of the last LATELY_S seconds."""
        now = self.clock()
        return {client for client, when in self.seen.items() if now - when < LATELY_S}


class Pace:
    """How many tokens of a row a step may decode: about as many as take STEP_S seconds. A prompt that comes during a step waits for its
    end, so what is a good number depends on the model and on what else the machine does."""

    def __init__(self):
        self.token_s = STEP_S / STREAMED

    def note(self, took_s, tokens):
        """Takes the seconds of a step that decoded so many tokens of a row. A slow step is noted at once, a quick one by and by."""
        token_s = took_s / tokens
        self.token_s = token_s if token_s > self.token_s else 0.8 * self.token_s + 0.2 * token_s

    def most(self):
        return int(min(max(STEP_S / max(self.token_s, 1e-9), 1), CHUNK))


class Worker:
    """Runs an engine in the thread that creates this object and calls run().

    make(): returns a new Engine of so many slots. most: the limit of running and waiting jobs together. call(function, argument): runs a
    function in the HTTP server's thread. failures: the worker stops after so many failed steps in a row. Only the HTTP server's thread may
    call submit and release; any thread may call stop.

    Jobs wait here, and the engine has those that its slots take. A free slot goes to the client with the fewest running jobs, then to the
    request with the fewest, then to the oldest job. Of SPARED or more slots, a request may not take the last one; a client leaves one
    free for each other client of late, but has no less than half; and of three clients or more, the last one is for a client that has no
    running job. So a short request waits for the next free slot, not for all texts of a large one, and beside clients that always ask
    for more there is a slot for one that asks for little.
    """

    def __init__(self, make, most, call, slots=1, failures=FAILURES):
        self.make, self.most, self.call, self.slots, self.failures = make, most, call, slots, failures
        self.guests, self.lately, self.running = GUESTS * slots, Lately(), 0  # running: the jobs that have a slot
        self.pace = Pace()
        self.engine, self.held, self.inbox = make(), set(), queue.SimpleQueue()

    def submit(self, jobs):
        """Accepts all jobs, or raises Full and accepts none. Their places are free when they have ended or are released.

        Where other clients fill all places, a client that has none may still have a few: `guests` of them, shared by all such clients.
        """
        alone = len(jobs) <= self.slots and not any(job.client == jobs[0].client for job in self.held)
        if len(self.held) + len(jobs) > self.most + (self.guests if alone else 0):
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
        """Steps the engine until stop() is called. Raises the engine's error after so many failures in a row."""
        waiting, jobs, unread, failures, collected_s = [], {}, {}, 0, time.monotonic()
        while self._take(waiting, jobs):
            try:
                self._start(waiting, jobs, unread)
                self.running = min(len(jobs), self.slots)
                most, began = min(_most_tokens(jobs.values()), self.pace.most()), time.perf_counter()
                events = self.engine.step(most)
                failures, took_s = 0, time.perf_counter() - began
                if events and not unread:
                    self.pace.note(took_s, max(Counter(event.id for event in events).values()))
            except Exception as error:  # no error of one step may end the requests that come later
                failures += 1
                report(error)
                self._deliver([(job, error) for job in jobs.values()])
                if failures == self.failures:
                    self._deliver([(job, error) for job in waiting])
                    raise
                self.engine = None  # frees its cache before the next engine allocates one
                self.engine, jobs, unread = self.make(), {}, {}
                continue
            self._deliver([(jobs[event.id], event) for event in events if event.id in jobs])
            for event in events:
                unread.pop(event.id, None)
                if event.id in jobs:
                    self.lately.see(jobs[event.id].client)
                if event.finish_reason:
                    jobs.pop(event.id, None)
            if time.monotonic() > collected_s + COLLECT_S:
                gc.collect()
                collected_s = time.monotonic()

    def _take(self, waiting, jobs):
        """Handles the messages in the inbox; waits for one where there is no job. Returns False after a "stop" message, else True."""
        while not (jobs or waiting) or not self.inbox.empty():
            command, job = self._message() if not (jobs or waiting) else self.inbox.get()
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

    def _message(self):
        """Waits for the next message while there is no job."""
        self.running = 0
        try:
            return self.inbox.get(timeout=IDLE_S)
        except queue.Empty:
            gc.collect()
            give_back_memory()
        return self.inbox.get()

    def _start(self, waiting, jobs, unread):
        """Gives waiting jobs to the engine: as many as it has slots, and one more, so that it looks for the end of each row; but not so
        many long ones that a prompt which comes next finds all slots taken by them. unread: {id: prompt tokens} of those that have no event
        yet."""
        for number in set(unread) - set(jobs):  # cancelled
            del unread[number]
        while len(jobs) <= self.slots:
            short = [job for job in waiting if len(job.request.prompt) <= SHORT]
            job = self._next(waiting if sum(unread.values()) < UNREAD else short, jobs)
            if job is None:
                return
            waiting.remove(job)
            try:
                job.number = self.engine.submit(job.request)
            except ValueError as error:
                self._deliver([(job, error)])
                continue
            jobs[job.number], unread[job.number] = job, len(job.request.prompt)
            self.lately.see(job.client)

    def _next(self, waiting, jobs):
        """Returns the waiting job whose turn it is, or None."""
        clients, groups = Counter(job.client for job in jobs.values()), Counter(job.group for job in jobs.values())
        if self.slots >= SPARED:
            others = len(self.lately.clients() | clients.keys() | {job.client for job in waiting}) - 1
            most = max(self.slots // 2, self.slots - others) if others else self.slots + 1  # the one more, see _start
            last_for_new = self.slots - (others > 1)  # from so many on, the next is for a client without any
            if others and len(jobs) >= last_for_new:
                waiting = [job for job in waiting if not clients[job.client]]
            waiting = [job for job in waiting if clients[job.client] < most and (job.group is None or groups[job.group] < self.slots - 1)]
        return min(waiting, key=lambda job: (clients[job.client], groups[job.group]), default=None)

    def _deliver(self, found):
        if found:
            self.call(self._put, found)

    def _put(self, found):
        for job, event in found:
            if isinstance(event, Exception) or event.finish_reason:
                self.held.discard(job)  # its place is free, even if its client has not read the text yet
            job.put(event)


def _most_tokens(jobs):
    """Returns the most tokens of a row in the next step, during which no prompt that comes is looked at. Of rows whose tokens the host
    chooses, many in a step would save nothing."""
    if any(job.request.needs_logits for job in jobs):
        return 1
    return STREAMED if any(job.streamed for job in jobs) else CHUNK


def give_back_memory():
    """Gives memory that was freed back to the system, where the C library can: else the process keeps what a burst of requests took."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def report(error):
    """Prints an error's type and traceback to stderr, without its message, which may quote a client's text."""
    frames = itertools.chain.from_iterable(text.splitlines() for text in traceback.format_tb(error.__traceback__))
    print("\n".join([f"error      {type(error).__name__} at", *frames]), file=sys.stderr, flush=True)
