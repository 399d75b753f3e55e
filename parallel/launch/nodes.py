"""Communication between the launchers of a job on several nodes, so that all start together and all end for one cause.

The launcher of node 0 listens at the port after the scheduler's port and decides; the others connect to it. Messages are JSON objects, one
a line. They are not encrypted or signed, nor are those of MindSpore's scheduler, so the port must be reachable inside the cluster only.
"""

import errno
import json
import select
import socket
import time
from dataclasses import asdict, replace

from parallel.launch.process import POLL_S, Cause, first

SETTLE_S = 1.0  # time after the first failure to learn of failures that began earlier but were seen later
PATIENCE_S = 10.0  # time to wait for the decision of node 0 about a failure
MAX_MESSAGE = 1 << 20
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a node that lost power is noticed after 30 s


class Link:
    """A socket for messages. closed: the other end has closed it, or has sent something that is no message."""

    def __init__(self, sock):
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.sock, self.closed, self._rest = sock, False, b""

    def send(self, **message):
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def receive(self, wait_s=0):
        """Returns the list of complete messages (dicts) that have arrived."""
        try:
            if not self.closed and select.select([self.sock], [], [], wait_s)[0]:
                new = self.sock.recv(65536)
                self.closed = not new
                *lines, self._rest = (self._rest + new).split(b"\n")
                messages = [json.loads(line) for line in lines]
                if len(self._rest) < MAX_MESSAGE and all(isinstance(m, dict) for m in messages):
                    return messages
                self.closed = True
        except (OSError, ValueError):
            self.closed = True
        return []


class Nodes:
    """The connections of this launcher to those of the other nodes. address: (host, port) of node 0's launcher; unused for one node.

    Raises ValueError if node 0 cannot listen there.
    """

    def __init__(self, node_rank, nnodes, address):
        self.node_rank, self.nnodes, self.address = node_rank, nnodes, address
        self.links, self.causes, self.failed_s, self.done, self._verdict = {}, [], None, set(), None
        self._server = listen(*address) if nnodes > 1 and node_rank == 0 else None

    def join(self, job, timeout_s, stopped):
        """Waits for the launchers of the other nodes, or until stopped() is true. job: a dict that must be equal on all nodes.

        Raises ValueError when timeout_s has passed, or if node 0 refuses this node.
        """
        deadline = time.monotonic() + timeout_s
        gather = self._gather if self.node_rank == 0 else self._knock
        waiting = []
        while not stopped() and not gather(job, waiting):
            if time.monotonic() > deadline:
                raise ValueError(self._missing(timeout_s))
        if self.node_rank == 0:
            for link in self.links.values():
                link.send(start=True)

    def _gather(self, job, waiting):
        """On node 0: accepts connections. Returns whether all nodes have connected. waiting: links that have not sent their number yet."""
        if self.nnodes > 1 and select.select([self._server], [], [], POLL_S)[0]:
            waiting.append(Link(self._server.accept()[0]))
        for link in list(waiting):
            for message in link.receive():
                waiting.remove(link)
                self._admit(link, message, job)
                break
        waiting[:] = [link for link in waiting if not link.closed]
        self.links = {rank: link for rank, link in self.links.items() if link.receive() == [] and not link.closed}
        return len(self.links) == self.nnodes - 1

    def _admit(self, link, message, job):
        rank, theirs, problem = message.get("node_rank"), message.get("job"), None
        theirs = theirs if isinstance(theirs, dict) else {}
        if rank not in range(1, self.nnodes) or rank in self.links:
            problem = f"--node_rank={rank} is taken; give each node its own, from 0 to {self.nnodes - 1}"
        for key, value in job.items():
            if theirs.get(key) != value:
                problem = f"{key} is {theirs.get(key)!r} here and {value!r} on node 0; start all nodes with the same"
        if problem:
            link.send(refused=problem)
            link.closed = True
            print(f"refused    node {rank}: {problem}", flush=True)
        else:
            self.links[rank] = link

    def _knock(self, job, _):
        """On other nodes: connects to node 0 and sends the number of this node. Returns whether the job starts."""
        if not self.links:
            try:
                link = Link(socket.create_connection(self.address, 2))
            except OSError:
                time.sleep(0.2)
                return False
            link.send(node_rank=self.node_rank, job=job)
            self.links = {0: link}
        for message in self.links[0].receive(POLL_S):
            if "refused" in message:
                raise ValueError(message["refused"])
            return True
        if self.links[0].closed:  # node 0 has ended and may be started again
            self.links = {}
        return False

    def _missing(self, timeout_s):
        host, port = self.address
        if self.node_rank:
            return f"node 0 has not answered at {host}:{port} within --timeout_s={timeout_s:g}; start it, or correct --master_addr"
        late = [f"--node_rank={rank}" for rank in range(1, self.nnodes) if rank not in self.links]
        return (
            f"{len(late)} of --nnodes={self.nnodes} did not connect within --timeout_s={timeout_s:g}; start the same command there"
            f" with {', '.join(late)}, and see that {host}:{port} can be reached"
        )

    def fail(self, cause):
        """Reports that a process of this node has failed."""
        if self.nnodes > 1:
            cause = replace(cause, who=f"{cause.who} on node {self.node_rank}")
        self._failed(cause)
        if self.node_rank:
            self.links[0].send(failed={**asdict(cause), "sign_s": cause.sign_s - time.monotonic()})

    def succeed(self):
        """Reports that all ranks of this node have ended successfully."""
        if self.node_rank not in self.done:
            self.done.add(self.node_rank)
            if self.node_rank:
                self.links[0].send(done=True)

    def _failed(self, cause):
        self.causes.append(cause)
        self.failed_s = self.failed_s or time.monotonic()

    def verdict(self):
        """Returns None while the job runs, then the causes of its failure, earliest first, or [] if it succeeded."""
        if self._verdict is None:
            self._verdict = self._decide() if self.node_rank == 0 else self._hear()
            if self._verdict is not None and self.node_rank == 0:
                now = time.monotonic()
                told = [{**asdict(cause), "sign_s": cause.sign_s - now} for cause in self._verdict]
                for link in self.links.values():
                    link.send(verdict=told)
        return self._verdict

    def _decide(self):
        for rank, link in self.links.items():
            for message in link.receive():
                if "failed" in message:
                    self._failed(_cause(message["failed"]))
                elif "done" in message:
                    self.done.add(rank)
            if link.closed and rank not in self.done:
                self.done.add(rank)
                self._failed(_gone(rank))
        if self.causes and (time.monotonic() - self.failed_s >= SETTLE_S or any(cause.order < 0 for cause in self.causes)):
            return _sorted(self.causes)
        return [] if len(self.done) == self.nnodes and not self.causes else None

    def _hear(self):
        for message in self.links[0].receive():
            if "verdict" in message:
                return [_cause(cause) for cause in message["verdict"]]
        if self.links[0].closed:
            return _sorted([*self.causes, _gone(0)])
        return self.causes if self.causes and time.monotonic() - self.failed_s > PATIENCE_S else None

    def close(self):
        """Closes the connections. Node 0 waits for the others to close first, so that they have read the verdict."""
        for link in self.links.values():
            if self.node_rank == 0 and not link.closed:
                deadline = time.monotonic() + 2
                link.sock.shutdown(socket.SHUT_WR)
                while not link.closed and time.monotonic() < deadline:
                    link.receive(POLL_S)
            link.sock.close()
        if self._server:
            self._server.close()


def listen(host, port):
    """Returns a listening socket at an address of this node. Raises ValueError if that is not possible."""
    server = bind(host, port, "the port after --master_port, where launchers connect,")
    server.listen()
    return server


def bind(host, port, what, kind=socket.SOCK_STREAM):
    """Returns a socket bound to an address of this node, at a free port if `port` is 0. what: the name of the port in the ValueError."""
    family = socket.getaddrinfo(host, port)[0][0]
    sock = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier job may still be closing
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"{what} {port} is in use on {host}; use another") from error
        raise ValueError(f"--master_addr={host} is not an address of this node, which is node 0: {error.strerror}") from error
    return sock


def _sorted(causes):
    cause = first(causes)
    return [cause, *(other for other in causes if other is not cause)]


def _cause(message):
    return Cause(**{**message, "sign_s": message["sign_s"] + time.monotonic(), "lines": tuple(message["lines"])})


def _gone(rank):
    return Cause(f"node {rank}", "has lost its launcher", 1, time.monotonic(), 5)
