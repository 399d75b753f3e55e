"""Trees: nested dicts or lists whose leaves are arrays or specs.

A path is the tuple of keys to a leaf, written with dots: `layers.0.attention.wq`.
"""


def is_leaf(tree):
    return not isinstance(tree, (dict, list, tuple))


def tree_map(fn, tree, *rest):
    """fn(leaf, *leaves of rest) over trees of one structure, keeping dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {k: tree_map(fn, v, *(r[k] for r in rest)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(fn, v, *(r[i] for r in rest)) for i, v in enumerate(tree))
    return fn(tree, *rest)


def tree_paths(tree, path=()):
    """[(path, leaf)], depth first, in the tree's own order."""
    if isinstance(tree, dict):
        return [item for k, v in tree.items() for item in tree_paths(v, path + (k,))]
    if isinstance(tree, (list, tuple)):
        return [item for i, v in enumerate(tree) for item in tree_paths(v, path + (str(i),))]
    return [(".".join(path), tree)]


def tree_leaves(tree):
    return [leaf for _, leaf in tree_paths(tree)]


def select(tree, keep):
    """The part of a tree whose leaves keep(leaf) says, with the same paths; None where there are none.

    A list that loses an element becomes a dict by number.
    """
    if is_leaf(tree):
        return tree if keep(tree) else None
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    kept = {str(k): part for k, v in items if (part := select(v, keep)) is not None}
    if not isinstance(tree, dict) and len(kept) == len(tree):
        return type(tree)(kept.values())
    return kept or None


def shallow(tree):
    """A tree with the same paths, in which each numbered part, such as a layer, is one flat dict: MindSpore takes six levels of nesting."""
    if is_leaf(tree):
        return tree
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    numbered = all(str(key).isdigit() for key, _ in items)
    return {str(key): dict(tree_paths(part)) if numbered else shallow(part) for key, part in items}


def merge(like, *trees):
    """The tree of `like`'s structure of which trees, which may be None, have the leaves, by path."""
    found = {path: leaf for tree in trees if tree is not None for path, leaf in tree_paths(tree)}
    return unflatten(like, [found[path] for path, _ in tree_paths(like)])


def unflatten(like, leaves):
    """The tree of `like`'s structure whose leaves are taken from the sequence `leaves` in order."""
    it = iter(leaves)
    out = tree_map(lambda _: next(it), like)
    assert next(it, None) is None, "more leaves than the tree has places"
    return out
