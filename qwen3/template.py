"""Renders chat templates, which are foreign code, in a process of their own that has limits of time, memory and size.

    text = render(template, {"messages": [...], "add_generation_prompt": True})

The sandbox of jinja2 keeps a template from Python's objects, but not from a loop without an end or a text of gigabytes. So a child process
renders; it is started once and used for many texts. At the limit of time the kernel ends it, wherever it is, and the next text gets a new
one. JSON goes in and out, one line a text.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading

LIMIT_S = 10.0  # seconds for one text
LARGEST = 1 << 26  # characters of one text
MEMORY = 1 << 30  # bytes of the process's memory, its libraries included
LONG_S, LOW_PRIORITY = 0.5, 15  # seconds of processor time after which a text's process has this priority, as of nice(1)
START_S = 120  # seconds that a child has to start and import jinja2
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from qwen3.template import answer; answer()"

_lock, _idle, _all = threading.Lock(), [], set()


def render(template, context, limit_s=LIMIT_S):
    """Returns the text that the template makes of the context, a dict of JSON data. Raises ValueError if the template fails, tries to leave
    its sandbox or reaches a limit."""
    line = json.dumps([template, context, limit_s]).encode() + b"\n"
    process = _take()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        found = process.stdout.readline()
    except OSError:
        found = b""
    except BaseException:  # such as Ctrl-C: its answer would be taken for that of the next text
        _end(process)
        raise
    if not found.endswith(b"\n"):
        raise ValueError(_why(_end(process), limit_s))
    with _lock:
        if process in _all:
            _idle.append(process)
    kind, text = json.loads(found)
    if kind == "error":
        raise ValueError(text)
    return text


def end():
    """Ends the processes. A render() in another thread then raises ValueError."""
    with _lock:
        processes = [process for process in _all if process.owner == os.getpid()]
        _idle.clear()
        _all.clear()
    for process in processes:
        process.kill()
        process.wait()


atexit.register(end)


def _take():
    """Returns a process that waits for work; starts one if there is none. One of a parent that this process was forked from is not used."""
    with _lock:
        for process in [process for process in _all if process.owner != os.getpid()]:
            _all.discard(process)
            if process in _idle:
                _idle.remove(process)
        while _idle:
            process = _idle.pop()
            if process.poll() is None:
                return process
            _all.discard(process)
        command = [sys.executable, "-I", "-c", CHILD, *map(os.path.abspath, sys.path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.owner = os.getpid()
        _all.add(process)
        return process


def _end(process):
    """Ends a process and returns its status."""
    with _lock:
        _all.discard(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)  # it may be ending by itself
    process.kill()
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    return status


def _why(status, limit_s):
    if status == -signal.SIGALRM:
        return f"it takes longer than {limit_s:g} s; look for a loop without an end"
    return f"its process ended with status {status}; it may need more than {MEMORY >> 20} MiB of memory"


def answer():
    """Is the child: renders a line of JSON after the other until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside a long operation of C
    signal.signal(signal.SIGVTALRM, _let_others_run)
    signal.setitimer(signal.ITIMER_REAL, START_S)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _libraries()
    signal.setitimer(signal.ITIMER_REAL, 0)
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        template, context, limit_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        signal.setitimer(signal.ITIMER_VIRTUAL, LONG_S)
        try:
            found = ["text", _text(template, context)]
        except MemoryError:
            found = ["error", f"it needs more than {MEMORY >> 20} MiB of memory"]
        except Exception as error:  # a template can fail in any way
            found = ["error", str(error)[:2000] or type(error).__name__]
        try:
            data = json.dumps(found).encode()
        except MemoryError:
            data = json.dumps(["error", f"it needs more than {MEMORY >> 20} MiB of memory"]).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        out.write(data + b"\n")
        out.flush()


def _let_others_run(number, frame):
    """A text that takes long gets the processor time that others leave: it may be a loop without an end."""
    if os.getpriority(os.PRIO_PROCESS, 0) < LOW_PRIORITY:
        os.setpriority(os.PRIO_PROCESS, 0, LOW_PRIORITY)


def _text(template, context):
    size, parts = 0, []
    for part in _compile(template).generate(context):
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"its text is longer than {LARGEST:,} characters")
        parts.append(part)
    return "".join(parts)


@functools.lru_cache(maxsize=1)
def _libraries():
    """Returns (the sandbox's class, the tag's class). jinja2 is imported in the child alone."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        """A sandbox that raises an error for an unsafe attribute, which the base class renders as empty text."""

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    class Generation(Extension):
        """The tag `{% generation %} ... {% endgeneration %}`, with which transformers marks the assistant's text. Like theirs, it is a
        scope."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_rendered", [jinja2.nodes.ContextReference()]), [], [], body).set_lineno(line)

        def _rendered(self, context, caller):
            before, after = context.get("generation_marks") or ("", "")
            return f"{before}{caller()}{after}"

    return Sandbox, Generation


@functools.lru_cache(maxsize=8)
def _compile(template):
    sandbox, generation = _libraries()
    env = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env.from_string(template)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter `tojson` of transformers. It does not escape HTML, which the filter of jinja2 does."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    import jinja2

    raise jinja2.TemplateError(message)
