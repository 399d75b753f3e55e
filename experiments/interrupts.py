"""Ctrl-C while a main runs: one line on stderr, and exit status 130.

While modules are imported, the process ends at once: an exception cannot break off the initialisation of a C++ library, which then aborts
the process with a dump of its threads. Later Ctrl-C raises KeyboardInterrupt as usual, which unwinds the main.
"""

import os
import signal

WORDS = "stopped    by Ctrl-C"
STATUS = 128 + signal.SIGINT
_state = {"running": False}  # whether the main has parsed its flags or is about to


def install():
    """Handles SIGINT from here on, unless this process was started to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _asked)


def main_runs():
    """From here on, KeyboardInterrupt is caught by the caller, except during imports."""
    _state["running"] = True


def _asked(number, frame):
    if _state["running"] and not _imports(frame):
        raise KeyboardInterrupt
    os.write(2, f"{WORDS}\n".encode())
    os._exit(STATUS)


def _imports(frame):
    """Whether a frame, or one that called it, imports a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
