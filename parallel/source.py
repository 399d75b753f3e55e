"""Functions from text: straight-line code of a length known when it is built, where MindSpore cannot compile a loop."""

import hashlib
import linecache


def function(head, lines, **names):
    """The function `head`, such as "add(a, b)", of these lines, which may use `names`.

    MindSpore reads the source of what it compiles, so the text is put where `inspect` looks. The text is ours: no input goes into it.
    """
    inner = [f"def {head}:", *(f"    {line}" for line in lines), f"return {head.partition('(')[0]}"]
    text = "\n    ".join([f"def make({', '.join(names)}):", *inner]) + "\n"  # names by closure: MindSpore does not find them elsewhere
    file = f"<source {hashlib.sha256(text.encode()).hexdigest()}>"  # two texts under one name would give each other's source
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {"__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    return scope["make"](**names)
