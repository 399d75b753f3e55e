"""Trees: nested dicts, lists and tuples whose leaves are arrays or specs.

A path is the keys to a leaf, joined by dots: `layers.0.attention.wq`.
"""


def is_leaf(tree):
    """Whether `tree` is no dict, list or tuple."""
    return not isinstance(tree, (dict, list, tuple))


def tree_map(fn, tree, *rest):
    """Returns the tree of fn(leaf, *leaves of rest) over trees of equal structure. Dicts, lists and tuples stay such."""
    if isinstance(tree, dict):
        return {k: tree_map(fn, v, *(r[k] for r in rest)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(fn, v, *(r[i] for r in rest)) for i, v in enumerate(tree))
    return fn(tree, *rest)


def tree_paths(tree, path=()):
    """Returns [(path, leaf)], depth first, in the order of the tree."""
    if isinstance(tree, dict):
        return [item for k, v in tree.items() for item in tree_paths(v, path + (k,))]
    if isinstance(tree, (list, tuple)):
        return [item for i, v in enumerate(tree) for item in tree_paths(v, path + (str(i),))]
    return [(".".join(path), tree)]


def tree_leaves(tree):
    """Returns the leaves in the order of tree_paths."""
    return [leaf for _, leaf in tree_paths(tree)]


def select(tree, keep):
    """Returns the tree of the leaves for which keep(leaf) is true, under unchanged paths; None if there are none.

    A list that loses an element becomes a dict with the numbers of the others as keys.
    """
    if is_leaf(tree):
        return tree if keep(tree) else None
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    kept = {str(k): branch for k, v in items if (branch := select(v, keep)) is not None}
    if not isinstance(tree, dict) and len(kept) == len(tree):
        return type(tree)(kept.values())
    return kept or None


def shallow(tree):
    """Returns a tree with unchanged paths in which each layer, or other numbered branch, is one flat dict {path: leaf}.

    MindSpore takes at most six levels of nesting.
    """
    if is_leaf(tree):
        return tree
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    numbered = all(str(key).isdigit() for key, _ in items)
    return {str(key): dict(tree_paths(branch)) if numbered else shallow(branch) for key, branch in items}


def merge(like, *trees):
    """Returns a tree with the structure of `like` whose leaves are those of `trees`, found by path. Some of `trees` may be None."""
    found = {path: leaf for tree in trees if tree is not None for path, leaf in tree_paths(tree)}
    return unflatten(like, [found[path] for path, _ in tree_paths(like)])


def unflatten(like, leaves):
    """Returns a tree with the structure of `like` and the leaves of the sequence `leaves`, in order."""
    it = iter(leaves)
    out = tree_map(lambda _: next(it), like)
    assert next(it, None) is None, "more leaves than the tree has places"
    return out
