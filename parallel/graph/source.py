"""Functions that are made from source text, with one argument or expression for each operand or leaf.

MindSpore refuses `*args` with a loop (so also with `zip`) in a hand-written backward, and loses gradients through `dict(zip())`
(docs/mindspore.md). A function with every argument written out needs neither.
"""

import hashlib
import linecache
import os
import tempfile

from ops import cache


def function(head, lines, **names):
    """Returns the function with the head `head`, such as "add(a, b)", and the body `lines`, which may use `names`.

    The text comes from this code base only, never from a file or a user. MindSpore reads the source of a compiled function through
    `inspect`, and needs the file to exist for its messages about the graph.
    """
    inner = [f"def {head}:", *(f"    {line}" for line in lines), f"return {head.partition('(')[0]}"]
    text = "\n    ".join([f"def make({', '.join(names)}):", *inner]) + "\n"  # a closure, since MindSpore does not find the names elsewhere
    file = _file(f"{hashlib.sha256(text.encode()).hexdigest()}.py", text)
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {"__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    return scope["make"](**names)


def _file(name, text):
    """Writes a file with this text, which is never read back. Returns its path, or `<name>` if it cannot be written."""
    try:
        folder = cache.folder("sources")
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
        handle, aside = tempfile.mkstemp(dir=folder, suffix=".new")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except (OSError, RuntimeError):
        return f"<{name}>"
    return path
