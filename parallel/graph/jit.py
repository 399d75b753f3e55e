"""Compilation of pure functions of trees by MindSpore.

`fullgraph` refuses whatever would fall back to the interpreter.
"""

import mindspore as ms
from mindspore import Tensor, mutable

from parallel.graph.nested import rebuild, to_tuple
from parallel.trees import tree_map

ms.set_recursion_limit(100000)  # room for deep unrolled models; the default is 1000


def jit(fn, order="bfs"):
    """Compile fn(*trees) -> a tensor or nested tuples of tensors (not dicts).

    Arguments are trees of tensors or None. New values never compile again; a new structure, shape or dtype does, once. order: of ops on
    Ascend: bfs lets work go on beside exchanges, dfs keeps fewer tensors at a time.
    """
    graphs = {}

    def compiled(*args):
        key = structure(args)
        if key not in graphs:
            graphs[key] = _graph(fn, args, order)
        return graphs[key](mutable(to_tuple(tree_map(_placed, args))))

    return compiled


def _graph(fn, args, order):
    build, options = rebuild(args), {"exec_order": order} if ms.get_context("device_target") == "Ascend" else {}

    @ms.jit(fullgraph=True, **options)
    def graph(nested):
        return fn(*build(nested))

    return graph


def _placed(leaf):
    return _NONE if leaf is None else leaf.contiguous()  # a graph with loops reads a slice of a tensor from the wrong place


def in_device_memory(tree):
    """A tree of tensors in the device's memory. Of a tensor that comes from the host each graph on Ascend keeps a copy of its own; on CPU
    all take the host's, and the tree is returned as it is."""
    return tree if ms.get_context("device_target") == "CPU" else tree_map(_copied, tree)


def _copied(x):
    """Not in a graph, which would keep its input; nor of x itself, which would keep its own copy for as long as it is there."""
    return ms.Tensor.from_numpy(x.asnumpy()) * 1


def structure(tree):
    """A hashable description of a tree's keys, and of the shape and dtype of its leaves."""
    if isinstance(tree, dict):
        return ("dict", *((k, structure(v)) for k, v in tree.items()))
    if isinstance(tree, (list, tuple)):
        return ("list", *(structure(v) for v in tree))
    return None if tree is None else (tuple(tree.shape), str(tree.dtype))


_NONE = Tensor(0, ms.int32)  # stands for None at the border, where only tensors pass
