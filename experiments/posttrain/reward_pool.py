"""Computes the rewards of answers in processes of their own, each within a time limit. A reward that raises, hangs, ends its process or is
not a finite number is one bad answer with its reason."""

import json
import os
import queue
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

START_S = 120.0  # the longest that a process may take to import the module of the reward


class Pool:
    """Runs `name`, "module:function", in `processes` processes. Use it in a `with`.

    Raises ValueError, naming rl.reward, if the function cannot be imported.
    """

    def __init__(self, name, processes, timeout_s):
        self.name, self.timeout_s, self._free = name, timeout_s, queue.Queue()
        self._threads = ThreadPoolExecutor(processes, "rewards")
        self._workers = [_Worker(name, timeout_s) for _ in range(processes)]
        for worker in self._workers:
            self._free.put(worker)

    def submit(self, prompt, text, record):
        """Returns a Future of (reward, ""), or of (0.0, reason) for an answer without a reward."""
        return self._threads.submit(self._reward, json.dumps([prompt, text, record]))

    def _reward(self, line):
        worker = self._free.get()
        try:
            return worker.ask(line)
        finally:
            self._free.put(worker)

    def __enter__(self):
        try:
            self._workers[0].start()  # tells of a wrong name before anything is sampled
        except ValueError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()


class _Worker:
    """One process, which starts when it is needed, and again after it was killed."""

    def __init__(self, name, timeout_s):
        self.name, self.timeout_s, self.process, self.rest = name, timeout_s, None, b""

    def start(self):
        """Starts the process. Raises ValueError if it does not find the function."""
        command = [sys.executable, "-m", "experiments.posttrain.reward_worker", self.name, str(self.timeout_s)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process, self.rest = subprocess.Popen(command, env=environment, start_new_session=True, **pipes), b""
        line = self._line(START_S)
        reason = json.loads(line).get("reason") if line else f"its process ended, or was not ready after {START_S:g} s"
        if reason:
            self.stop()
            raise ValueError(f"rl.reward={self.name}: {reason}; give module:function, of a module that can be imported here")

    def ask(self, line):
        """Returns (reward, ""), or (0.0, reason)."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
            found = self._line(self.timeout_s)
        except BrokenPipeError:
            found = b""
        if found:
            answer = json.loads(found)
            return answer.get("reward", 0.0), answer.get("reason", "")
        self.stop()
        return 0.0, "its process ended" if found == b"" else f"the reward took more than rl.reward_timeout_s={self.timeout_s:g}"

    def _line(self, most_s):
        """Returns the next line of the process; None if it does not come in time, b"" if the process has ended."""
        out = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            if not select.select([out], [], [], most_s)[0]:
                return None
            more = os.read(out, 1 << 16)
            if not more:
                return b""
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def stop(self):
        """Ends the process, and those that it started."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()
        self.process.wait()
        self.process = None
