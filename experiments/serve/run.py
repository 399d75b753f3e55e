"""Runs experiments.serve: the engine in the calling thread, the HTTP server in another; SIGTERM and SIGINT end both."""

import asyncio
import gc
import signal
import threading

from experiments.serve.engine import Worker
from experiments.serve.http import Server, serve


def _collect_less():
    """Keeps the garbage collector from looking at all objects while requests wait: that takes 0.2 s, in which nothing else runs. It never
    looks again at what exists by now, the modules among it. At the oldest of other objects it looks when the engine's thread says so."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 1000)


def run(settings, make, most, sockets, host, drain_s, connections, idle_s, failures):
    """Serves until SIGTERM or SIGINT; a second signal drops the requests that still run.

    make() -> a warmed-up Engine. most: the limit of running and waiting texts together. sockets: of access.bind, for `host`. connections,
    idle_s: see http.Gate. failures: of the engine in a row, after which the server ends. Raises the error of the engine or the server where
    one fails.
    """
    loop, stop, signals, failed = asyncio.new_event_loop(), asyncio.Event(), [], []
    worker = Worker(make, most, loop.call_soon_threadsafe, settings.slots, failures)
    _collect_less()
    server = Server(settings, worker, connections, idle_s)

    def ready(bound):
        print(f"serving    {settings.model} on http://{host}:{bound}/v1{'' if settings.keys else ', without API keys'}", flush=True)

    def http():
        try:
            loop.run_until_complete(serve(server, sockets, ready, stop, drain_s))
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
        raise ValueError(f"--host={host}: {failed[0].strerror}; give another address or port") from failed[0]
    if failed:
        raise failed[0]
