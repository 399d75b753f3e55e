"""Functions from text, of as many arguments or leaves as are known when they are built.

In a hand-written backward MindSpore refuses `*args` together with a loop, so `zip` too, and through `dict(zip())` it loses gradients
(docs/mindspore.md). Written out, neither is needed.
"""

import hashlib
import linecache
import os
import tempfile

from ops.build import cache_folder


def function(head, lines, **names):
    """The function `head`, such as "add(a, b)", of these lines, which may use `names`. The text is ours: no input goes into it.

    MindSpore reads the source of what it compiles where `inspect` looks, and, for what it says of a graph, wants the file to exist.
    """
    inner = [f"def {head}:", *(f"    {line}" for line in lines), f"return {head.partition('(')[0]}"]
    text = "\n    ".join([f"def make({', '.join(names)}):", *inner]) + "\n"  # names by closure: MindSpore does not find them elsewhere
    file = _file(f"{hashlib.sha256(text.encode()).hexdigest()}.py", text)
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {"__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    return scope["make"](**names)


def _file(name, text):
    """The path of a file of this text, named for it, and never read back; a name alone where none can be written."""
    folder = os.path.join(cache_folder(), "sources")
    path = os.path.join(folder, name)
    if os.path.exists(path):
        return path
    try:
        os.makedirs(folder, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=folder, suffix=".new")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except OSError:
        return f"<{name}>"
    return path
