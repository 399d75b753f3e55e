"""Scan: a loop over stacked layers in a graph whose size does not depend on their number. The backward recomputes each layer.

MindSpore unrolls Python loops, so 64 layers take about a minute to compile, and its gradient of `while` loops is not usable. The cell here
runs one `while` loop forward, which keeps the input of each layer, and one `while` loop backward.
"""

import mindspore as ms
from mindspore import nn, ops

from ops import stack_write
from ops.registry import Kernels, pick
from parallel.graph.nested import expression, flatten_in_graph
from parallel.graph.source import function
from parallel.trees import select, tree_paths, unflatten


def scan(body, like, num_layers, stats_shape, kernels=None):
    """Returns f(x, stacked, consts) -> (x, stats [L, *stats_shape]) for body(p, x, consts) -> (x, stats) of one layer.

    like: a tree of ParamSpecs or arrays with the structure of p. Leaves that do not train get no gradients.
    stacked: a tree like p with leaves [L, ...]. consts: a tuple of tensors without gradients.
    kernels: gives the stack_write op, which keeps the input of each layer. Default: the reference.

    body is compiled in a hand-written backward. There, a function with a branch or a loop takes no default arguments (docs/mindspore.md).
    body must use every const, since MindSpore replaces an element of a tuple that nothing reads by the integer 0.
    """
    trained, frozen = (select(like, keep) for keep in (_trains, _is_frozen))
    loop = _Scan(body, like, num_layers, stats_shape, trained, frozen, kernels or Kernels())
    trained_leaves, frozen_leaves = (flatten_in_graph(tree) if tree else _none for tree in (trained, frozen))

    def run(x, stacked, consts):
        x, stats, _ = loop(x, trained_leaves(stacked), frozen_leaves(stacked), consts)
        return x, stats

    return run


def _trains(spec):
    return getattr(spec, "trains", True)


def _is_frozen(spec):
    return not _trains(spec)


def _none(stacked):
    return ()


class _Scan(nn.Cell):
    def __init__(self, body, like, num_layers, stats_shape, trained, frozen, kernels):
        super().__init__()
        self.num_layers, self.stats_shape = num_layers, (num_layers, *stats_shape)
        new = pick(kernels, "stack_write", "new")
        self.write, self.new_inputs, self.new_like = pick(kernels, "stack_write")(), new((num_layers,)), new(())
        self.write_stats, self.pick, build = stack_write.reference(), _pick, _rebuild_both(like, trained, frozen)

        def of_leaves(leaves, x, frozen, consts):
            return body(build(leaves, frozen), x, consts)

        self.body = of_leaves
        self.vjp = ops.GradOperation(get_all=True, sens_param=True)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, stacked, frozen, consts):
        i = ms.Tensor(0, ms.int32)
        stats = ops.zeros(self.stats_shape, ms.float32)  # a constant of the graph, so no op may write to it in place
        inputs = self.new_inputs(x)
        while i < self.num_layers:
            inputs = self.write(inputs, i, x)
            x, s = self.body(self.pick(stacked, i), x, self.pick(frozen, i), consts)
            stats = self.write_stats(stats, i, s)
            i = i + 1
        return x, stats, inputs

    def bprop(self, x, stacked, frozen, consts, out, dout):
        inputs, dx, dstats = out[2], dout[0], dout[1]
        none = ()
        for c in consts:
            none += (self.zeros_like(c),)
        still = ()
        for w in frozen:
            still += (self.zeros_like(w),)
        j = ms.Tensor(self.num_layers - 1, ms.int32)
        grads = (j,)  # a loop cannot carry a tuple of arrays of only one shape, so the counter is its first element
        for w in stacked:
            grads += (self.new_like(w),)
        while j >= 0:
            back = self.vjp(self.body)(self.pick(stacked, j), inputs[j], self.pick(frozen, j), consts, (dx, dstats[j]))
            dx = back[1]
            written = (j,)
            for k in range(1, len(grads)):
                written += (self.write(grads[k], j, back[0][k - 1]),)
            grads = written
            j = j - 1
        return dx, grads[1:], still, none


def _rebuild_both(like, trained, frozen):
    """Returns f(leaves of `trained`, leaves of `frozen`) -> a tree with the structure of `like`, for use in graphs."""
    places = {"trained": [path for path, _ in tree_paths(trained or {})], "frozen": [path for path, _ in tree_paths(frozen or {})]}
    found = {path: f"{name}[{i}]" for name, paths in places.items() for i, path in enumerate(paths)}
    literal = expression(unflatten(like, [found[path] for path, _ in tree_paths(like)]))
    return function("tree_of(trained, frozen)", [f"return {literal}"])


def _pick(stacked, i):
    leaves = ()
    for w in stacked:
        leaves += (w[i],)
    return leaves
