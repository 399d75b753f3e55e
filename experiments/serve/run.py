"""Runs experiments.serve: the engine in the calling thread, the HTTP server in another; SIGTERM and SIGINT end both."""

import asyncio
import ipaddress
import os
import signal
import socket
import threading

from experiments.serve.engine import Worker
from experiments.serve.http import Server, Settings, connection_limit, serve
from qwen3.json_files import read_text

__all__ = ["Settings", "connection_limit", "names", "read_keys", "run"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_CHARACTERS = 16


def run(settings, make, most, host, port, drain_s, connections, idle_s):
    """Serves until SIGTERM or SIGINT; a second signal drops the requests that still run.

    make() -> a warmed-up Engine. most: the limit of running and waiting texts together. connections, idle_s: see http.Gate. Raises the
    error of the engine or the server where one fails.
    """
    loop, stop, signals, failed = asyncio.new_event_loop(), asyncio.Event(), [], []
    worker = Worker(make, most, loop.call_soon_threadsafe, settings.slots)
    server = Server(settings, worker, connections, idle_s)

    def ready(bound):
        print(f"serving    {settings.model} on http://{host}:{bound}/v1{'' if settings.keys else ', without API keys'}", flush=True)

    def http():
        try:
            loop.run_until_complete(serve(server, host, port, ready, stop, drain_s))
        except Exception as error:
            failed.append(error)
        worker.stop()

    def end(number=None, frame=None):
        signals.append(number)
        loop.call_soon_threadsafe(stop.set)
        if number is None or len(signals) > 1:
            loop.call_soon_threadsafe(server.idle.set)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=http, name="http")
    thread.start()
    try:
        worker.run()
    finally:
        end()
        thread.join()
        loop.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed and isinstance(failed[0], OSError):
        raise ValueError(f"--host={host} --port={port}: {failed[0].strerror}; give another address or port") from failed[0]
    if failed:
        raise failed[0]


def names(host):
    """Returns the host names that requests may name: the loopback's for a server on the loopback, else None, which accepts any.

    Every address that `host` stands for must be one of the loopback, such as 127.0.0.2 or a name in /etc/hosts.
    """
    try:
        found = {ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in socket.getaddrinfo(host, None)}
    except OSError:  # an address that cannot be listened on; that is said where it is tried
        return LOOPBACK
    own = tuple(str(address) for address in found if str(address) not in LOOPBACK)
    return (*LOOPBACK, *own, *({host.lower()} - {*LOOPBACK, *own})) if all(address.is_loopback for address in found) else None


def read_keys(path):
    """Returns the API keys of a file, one a line; () without a file. Raises ValueError for a key that is short enough to guess."""
    if path is None:
        return ()
    lines = read_text(os.path.expanduser(path)).splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys or min(map(len, keys)) < KEY_CHARACTERS:
        raise ValueError(
            f"--api_key_file={path}: give keys of {KEY_CHARACTERS} characters or more, one a line, as `openssl rand -hex 32` makes"
        )
    return keys
