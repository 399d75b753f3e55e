"""Conversions between trees and the nested tuples that are arguments and results of a compiled function.

MindSpore takes nested tuples of tensors as inputs of a graph. It takes dicts as constants, or loses their gradients, without an error
(docs/mindspore.md). So a caller converts its trees with to_tuple, the compiled function rebuilds them with rebuild or joined, and the
caller converts its results with from_tuple.
"""

from parallel.graph.source import function
from parallel.trees import is_leaf, tree_leaves, tree_map, tree_paths, unflatten


def to_tuple(tree):
    """Returns a tree as nested tuples, in its order. For use outside of graphs."""
    if isinstance(tree, dict):
        return tuple(to_tuple(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return tuple(to_tuple(v) for v in tree)
    return tree


def from_tuple(like, nested):
    """Returns a tree with the structure of `like` from nested tuples. For use outside of graphs."""
    return unflatten(like, tree_leaves(nested))


def rebuild(like):
    """Returns f(nested tuples) -> a tree with the structure of `like`, for use in graphs. Lists become tuples."""
    lines = []
    return _tree_function("nested", expression(like, "nested", lines), lines)


def rebuild_flat(like):
    """Returns f(flat tuple of the leaves) -> a tree with the structure of `like`, for use in graphs. Lists become tuples."""
    places = iter(range(len(tree_leaves(like))))
    return _tree_function("flat", expression(tree_map(lambda _: f"flat[{next(places)}]", like)))


def joined(like, *parts):
    """Returns f(*nested) -> one tree with the structure of `like`, for use in graphs.

    parts: trees that together have the paths of `like`, such as trained and frozen parameters. nested: to_tuple of each of them.
    """
    lines, found = [], {}
    for number, part in enumerate(parts):
        found.update(_sources(part, f"nested{number}", lines))
    tree = unflatten(like, [found[path] for path, _ in tree_paths(like)])
    arguments = ", ".join(f"nested{i}" for i in range(len(parts)))
    return function(f"tree_of({arguments})", [*lines, f"return {expression(tree)}"])


def flatten_in_graph(like):
    """Returns f(tree with the structure of `like`) -> the flat tuple of its leaves, for use in graphs."""
    return _tree_function("tree", "(" + "".join(f"tree{at}, " for at in subscripts(like)) + ")")


def part(like):
    """Returns f(tree) -> the part of it with the structure of `like`, for use in graphs. Lists become tuples."""
    places = iter(subscripts(like))
    return _tree_function("tree", expression(tree_map(lambda _: f"tree{next(places)}", like)))


def expression(tree, at=None, lines=None):
    """Returns the source text of a literal with the structure of `tree`.

    at: the source text of nested tuples from which the leaves are taken; without it, the leaves of `tree` are source text themselves.
    lines: a list to which a statement is appended for each nested tuple, so that each has a name. The gradient of a subscript is a tuple of
    the size of what was subscripted, so leaves that are taken from the root, as in `nested[0][1][2]`, would make the compile time of a
    backward grow with the square of their number.
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
    """Returns the source text of the subscripts of each leaf, such as "['layers'][0]"."""
    if is_leaf(tree):
        return [""]
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [f"[{k!r}]" + rest for k in keys for rest in subscripts(tree[k])]


def _sources(tree, at, lines, path=()):
    """Returns {path: source text of the leaf} for nested tuples with the source text `at`. lines: see expression."""
    if is_leaf(tree):
        return {".".join(path): at}
    name, out = f"t{len(lines)}", {}
    lines.append(f"{name} = {at}")
    for i, key in enumerate(tree if isinstance(tree, dict) else range(len(tree))):
        out.update(_sources(tree[key], f"{name}[{i}]", lines, (*path, str(key))))
    return out


def _tree_function(argument, expression, lines=()):
    """Returns a function of one argument from the source text of its statements and of its result.

    The result is a literal, because gradients through dict(zip()) are lost (docs/mindspore.md).
    """
    return function(f"tree_of({argument})", [*lines, f"return {expression}"])
