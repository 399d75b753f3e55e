"""Compiles pure functions of trees with MindSpore's jit.

With fullgraph=True MindSpore raises an error for code that it cannot compile, instead of running it in the Python interpreter.
"""

import mindspore as ms
from mindspore import Tensor, mutable

from parallel.graph.nested import rebuild, to_tuple
from parallel.trees import tree_map

ms.set_recursion_limit(100000)  # room for deep unrolled models; the default is 1000
_NONE = Tensor(0, ms.int32)  # takes the place of None, since arguments of a graph are tensors


def jit(fn, order="bfs"):
    """Returns the compiled form of fn(*trees) -> a tensor or nested tuples of tensors (not dicts).

    The arguments are trees of tensors or None. Each new structure, shape or dtype is compiled once; new values are not compiled again.
    order: the order of ops on Ascend. "bfs" overlaps computation with collectives; "dfs" keeps fewer tensors in memory at a time.
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
    return _NONE if leaf is None else leaf.contiguous()  # a graph with loops reads a view of a tensor at the wrong offset


def structure(tree):
    """Returns a hashable description of the keys of a tree and of the shape and dtype of its leaves."""
    if isinstance(tree, dict):
        return ("dict", *((k, structure(v)) for k, v in tree.items()))
    if isinstance(tree, (list, tuple)):
        return ("list", *(structure(v) for v in tree))
    return None if tree is None else (tuple(tree.shape), str(tree.dtype))


def in_device_memory(tree):
    """Returns a tree of tensors in the memory of the device; on CPU, the tree itself.

    On Ascend each graph would keep its own copy of a tensor that comes from the host.
    """
    return tree if ms.get_context("device_target") == "CPU" else tree_map(_copied, tree)


def _copied(x):
    # Outside of a graph, which would keep its input, and from a new host tensor, since x would keep its device copy as long as it lives.
    return ms.Tensor.from_numpy(x.asnumpy()) * 1
