"""Trees at the border of a compiled function: nested tuples there, rebuilt inside.

MindSpore takes nested tuples of tensors as true inputs. Dicts at that border are constants, or lose their gradients, without a word
(docs/mindspore.md).
"""

from parallel.graph.source import function
from parallel.trees import is_leaf, tree_leaves, tree_map, tree_paths, unflatten


def to_tuple(tree):
    """Nested tuples with the leaves of a tree, in its order. On the host."""
    if isinstance(tree, dict):
        return tuple(to_tuple(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return tuple(to_tuple(v) for v in tree)
    return tree


def from_tuple(like, nested):
    """The inverse of to_tuple: a tree of `like`'s structure. On the host."""
    return unflatten(like, tree_leaves(nested))


def rebuild(like):
    """A function, for use inside a compiled one, from to_tuple's form to a tree of `like`'s structure; lists become tuples."""
    lines = []
    return _tree_function("nested", expression(like, "nested", lines), lines)


def rebuild_flat(like):
    """The same from the flat tuple of the leaves."""
    places = iter(range(len(tree_leaves(like))))
    return _tree_function("flat", expression(tree_map(lambda _: f"flat[{next(places)}]", like)))


def joined(like, *parts):
    """f(*nested) -> the tree of `like`'s structure, for use inside a compiled function; nested: to_tuple of each of the trees `parts`,
    which have its leaves between them, by path."""
    lines, found = [], {}
    for number, part in enumerate(parts):
        found.update(_sources(part, f"nested{number}", lines))
    tree = unflatten(like, [found[path] for path, _ in tree_paths(like)])
    arguments = ", ".join(f"nested{i}" for i in range(len(parts)))
    return function(f"tree_of({arguments})", [*lines, f"return {expression(tree)}"])


def _sources(tree, at, lines, path=()):
    """{path: source of the leaf}, taken from nested tuples at `at`; lines: as in expression."""
    if is_leaf(tree):
        return {".".join(path): at}
    name, out = f"t{len(lines)}", {}
    lines.append(f"{name} = {at}")
    for i, key in enumerate(tree if isinstance(tree, dict) else range(len(tree))):
        out.update(_sources(tree[key], f"{name}[{i}]", lines, (*path, str(key))))
    return out


def flatten_in_graph(like):
    """A function, for use inside a compiled one, from a tree of `like`'s structure to the flat tuple of its leaves."""
    return _tree_function("tree", "(" + "".join(f"tree{at}, " for at in subscripts(like)) + ")")


def expression(tree, at=None, lines=None):
    """Python source of a literal like `tree`, its leaves taken from nested tuples at `at`; without it, leaves are source.

    lines: gets statements that name each nested tuple once. The gradient of a subscript is a whole tuple, so that leaves taken
    one by one from the root, as `nested[0][1][2]`, make the compile time of a backward grow with the square of their number.
    """
    if is_leaf(tree):
        return "None" if tree is None else at or tree
    if at:
        lines.append(f"t{len(lines)} = {at}")
        at = f"t{len(lines) - 1}"
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    parts = [expression(tree[k], at and f"{at}[{i}]", lines) for i, k in enumerate(keys)]
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k!r}: {part}" for k, part in zip(keys, parts)) + "}"
    return "(" + "".join(part + ", " for part in parts) + ")"


def subscripts(tree):
    """Python source of the way to each leaf, such as "['layers'][0]"."""
    if is_leaf(tree):
        return [""]
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [f"[{k!r}]" + rest for k in keys for rest in subscripts(tree[k])]


def _tree_function(argument, expression, lines=()):
    """A function of one argument, from the statements before its result and the result.

    The result is a literal, because gradients through dict(zip()) are lost (docs/mindspore.md).
    """
    return function(f"tree_of({argument})", [*lines, f"return {expression}"])
