"""The server on several ranks. Rank 0 answers the clients; the other ranks follow: each does with its engine what rank 0 tells it.

The ranks of a tensor parallel group and of a pipeline must make the same calls of their engines, and ranks that share experts must take
equally many steps. So rank 0 sends to each rank the requests that come and go on its data rank, and each step; all then step together. From
the first rank of each other data rank it gets the events back. `Leader` looks like one engine to the thread that runs it
(experiments/serve/engine.py).

Messages are JSON, each after its length in 4 bytes, on one TCP connection between rank 0 and each other rank. A rank shows by a secret that
it belongs to this job; rank 0 gives it to all ranks by a collective. Between two requests a follower waits in `receive`, which may take any
time; a collective on CPU would give up after 30 s.
"""

import dataclasses
import hmac
import json
import os
import secrets
import socket
import struct
import time

from experiments.generate import exchange
from experiments.generate.batch import TOGETHER
from qwen3.engine import Event, Request
from qwen3.guide import Plan

GRAMMAR_S = 2.0  # for a grammar at rank 0. The others, which have more time, compile it again while rank 0 waits
CONNECT_S, HELLO_S = 60.0, 10.0  # in which all ranks must have connected; in which a connection must say which rank it is
LENGTH = struct.Struct("!I")  # of a message, before it
MOST_BYTES = 1 << 30  # of a message: requests of all slots have far fewer
HELLO_BYTES = 1 << 12  # of the first message, from which anything may come


class Lost(ConnectionError):
    """The rank at the other end has gone."""


class Connection:
    """JSON messages to and from one rank. who: its name in errors."""

    def __init__(self, sock, who):
        self.sock, self.who = sock, who
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notices a machine that is gone

    def send(self, value):
        """Raises Lost."""
        data = json.dumps(value).encode()
        try:
            self.sock.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Lost(f"{self.who} has gone: {error}") from error

    def receive(self, most=MOST_BYTES):
        """Returns the next message; waits for it. Raises Lost, and ValueError for what is no message of at most `most` bytes."""
        (size,) = LENGTH.unpack(self._read(LENGTH.size))
        if size > most:
            raise ValueError(f"{self.who} sent a message of {size} bytes; {most} are the most")
        return json.loads(self._read(size))

    def _read(self, size):
        data = bytearray()
        while len(data) < size:
            try:
                found = self.sock.recv(min(size - len(data), 1 << 20))
            except OSError as error:
                raise Lost(f"{self.who} has gone: {error}") from error
            if not found:
                raise Lost(f"{self.who} has gone")
            data += found
        return bytes(data)

    def close(self):
        self.sock.close()


def connect(mesh):
    """Connects rank 0 with the others. Returns {rank: Connection} at rank 0, and {0: Connection} at the others. All ranks must call it.
    Raises ValueError where a rank does not connect in time."""
    listener, meeting = None, None
    if mesh.rank == 0:
        address = own_address(os.environ.get("MS_SCHED_HOST", "127.0.0.1"))
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        meeting = [*listener.getsockname()[:2], secrets.token_hex(32)]
    host, port, secret = exchange.shared(mesh, meeting)
    if listener is not None:
        with listener:
            return accept(listener, mesh.world, secret)
    connection = Connection(socket.create_connection((host, port), CONNECT_S), "rank 0, which answers the clients,")
    connection.send({"rank": mesh.rank, "secret": secret})
    return {0: connection}


def own_address(other):
    """Returns the address of this machine on the way to another host; no packet is sent."""
    family, _, _, _, address = socket.getaddrinfo(other, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return sock.getsockname()[0]


def accept(listener, world, secret, connect_s=CONNECT_S):
    """Returns {rank: Connection} of all ranks but 0. A connection that does not begin with the secret and a rank that is still missing is
    closed. Raises ValueError when `connect_s` seconds have passed."""
    found, end = {}, time.monotonic() + connect_s
    while len(found) < world - 1:
        missing = sorted(set(range(1, world)) - set(found))
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError as late:
            raise ValueError(f"ranks {missing} did not connect to rank 0 within {connect_s:g} s; look in their logs") from late
        rank = _introduced(sock, secret, missing)
        if rank is None:
            sock.close()
        else:
            found[rank] = Connection(sock, f"rank {rank}")
    return found


def _introduced(sock, secret, missing):
    """Returns the rank that a new connection belongs to, or None for one of something else."""
    first = Connection(sock, "a connection")
    sock.settimeout(HELLO_S)
    try:
        hello = first.receive(HELLO_BYTES)
        known = hmac.compare_digest(hello["secret"].encode(), secret.encode())
        return hello["rank"] if known and hello["rank"] in missing else None
    except (Lost, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


class Leader:
    """The engines of all ranks, as rank 0 sees them; it has the calls of qwen3.engine.Engine that a server needs.

    engine: that of this rank. mesh: of this rank. connections: by default those of connect(). A request goes to the data rank with the
    fewest requests.
    """

    def __init__(self, engine, mesh, connections=None):
        self.engine, self.connections = engine, connections or connect(mesh)
        meshes = {rank: dataclasses.replace(mesh, rank=rank) for rank in self.connections}
        self.data_ranks = {rank: other.index(("dp",)) for rank, other in meshes.items()}
        self.heads = [rank for rank, other in meshes.items() if heads_a_data_rank(other)]
        self.open, self._told, self._next, self._own = {}, {d: [] for d in range(mesh.dp)}, 0, Calls(engine)
        self._counts = {}  # rank -> the counts of its engine after the last step

    def submit(self, request):
        """Returns the id of a Request. Raises ValueError as Engine.submit does."""
        self.engine.checked(request)
        loads = [list(self.open.values()).count(d) for d in self._told]
        data_rank, number = loads.index(min(loads)), self._next
        self.open[number], self._next = data_rank, number + 1
        self._told[data_rank].append(["submit", number, packed(request)])
        if data_rank == 0:
            self._own.submit(number, request)
        return number

    def cancel(self, number):
        if number in self.open:
            data_rank = self.open.pop(number)
            self._told[data_rank].append(["cancel", number, None])
            if data_rank == 0:
                self._own.cancel(number)

    def busy(self):
        return bool(self.open)

    def step(self, most):
        """Steps the engines of all ranks. Returns the Events of all data ranks. Raises Lost where a rank has gone."""
        for rank, connection in self.connections.items():
            connection.send({"calls": self._told[self.data_ranks[rank]], "most": most})
        self._told = {d: [] for d in self._told}
        events = self._own.step(most)
        for rank in self.heads:
            answer = self.connections[rank].receive()
            self._counts[rank] = answer["counts"]
            events += map(received, answer["events"])
        for event in events:
            if event.finish_reason:
                self.open.pop(event.id, None)
        return events

    def counts(self):
        """Returns the sums of Engine.counts() over the data ranks."""
        every = [self.engine.counts(), *self._counts.values()]
        return {name: sum(counts.get(name, 0) for counts in every) for name in every[0]}

    def close(self):
        """Lets the other ranks end."""
        for connection in self.connections.values():
            try:
                connection.send({"end": True})
            except Lost:
                pass
            connection.close()


def heads_a_data_rank(mesh):
    """Whether this rank sends events to rank 0: the first of the ranks that generate a text together, of another data rank than 0."""
    return mesh.index(TOGETHER) == 0 and mesh.index(("dp",)) > 0


class Calls:
    """Calls of an engine by the ids that rank 0 gives to requests."""

    def __init__(self, engine):
        self.engine, self.numbers, self.ids = engine, {}, {}  # numbers: our id -> the engine's; ids: the inverse

    def submit(self, number, request):
        self.numbers[number] = self.engine.submit(request)
        self.ids[self.numbers[number]] = number

    def cancel(self, number):
        own = self.numbers.pop(number, None)
        if own is not None:  # else it has ended
            del self.ids[own]
            self.engine.cancel(own)

    def step(self, most):
        events = self.engine.step(most)
        found = [dataclasses.replace(event, id=self.ids[event.id]) for event in events]
        for event in found:
            if event.finish_reason:
                del self.ids[self.numbers.pop(event.id)]
        return found


def follow(engine, mesh, tokenizer, compiler, connection=None):
    """Does with the engine what rank 0 tells, until rank 0 lets this rank end. compiler: a qwen3.grammars.Grammars, or None. connection:
    to rank 0, by default that of connect(). Raises Lost where rank 0 has gone."""
    connection = connection or connect(mesh)[0]
    calls, reports = Calls(engine), heads_a_data_rank(mesh)
    while "end" not in (message := connection.receive()):
        for name, number, data in message["calls"]:
            if name == "submit":
                calls.submit(number, unpacked(data, tokenizer, compiler))
            else:
                calls.cancel(number)
        events = calls.step(message["most"])
        if reports:
            connection.send({"events": list(map(sent, events)), "counts": engine.counts()})


def sent(event):
    """Returns an Event as a JSON value."""
    return [event.id, event.token, event.logprob, event.top_logprobs, event.finish_reason]


def received(data):
    """Returns the Event of a JSON value."""
    number, token, logprob, top, reason = data
    return Event(number, token, logprob, None if top is None else [tuple(pair) for pair in top], reason)


def packed(request):
    """Returns a Request as a JSON value."""
    data = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    data["prompt"] = [int(token) for token in request.prompt]
    if plan := request.guide:
        text = plan.grammar.text if plan.grammar else None
        data["guide"] = {"grammar": text, "thinking": plan.thinking, "budget": plan.budget, "stop_ids": plan.stop_ids}
    return data


def unpacked(data, tokenizer, compiler):
    """Returns the Request of a JSON value. Its grammar was compiled at rank 0, and is again here."""
    data = {**data, "stop_ids": tuple(data["stop_ids"]), "logit_bias": tuple(map(tuple, data["logit_bias"]))}
    if plan := data["guide"]:
        grammar = compiler.compiled(plan["grammar"]) if plan["grammar"] is not None else None
        data["guide"] = Plan(tokenizer, grammar, plan["thinking"], plan["budget"], tuple(plan["stop_ids"]))
    return Request(**data)
