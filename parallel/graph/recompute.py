"""Recompute: a function that keeps its inputs alone for the backward, which computes it again.

MindSpore's own (`Cell.recompute`, `ms.recompute`) runs on CPU and saves nothing there. A hand-written backward does: nothing inside the
function is kept, and what it reads waits for the cotangent, or the second computation would be merged with the first. Source: Chen et al.
2016. A program for MindSpore's partitioner, which is of Ascend alone, has MindSpore's: it splits no backward that is written by hand.
"""

from mindspore import nn, ops

from parallel.graph.nested import flatten_in_graph, rebuild_flat


def recomputed(body, like, lowering="manual"):
    """f(p, x, consts) -> what body(p, x, consts) returns, a tuple of tensors, to the bit; the gradients too.

    p: a tree of `like`'s structure. consts: a tuple of tensors without gradients, each of which body must use. See parallel/graph/scan.py for how
    body may be written.
    """
    if lowering == "shard":
        marked = _Marked(body)
        marked.recompute()
        return marked
    flatten, again = flatten_in_graph(like), _Recomputed(body, like)

    def run(p, x, consts):
        return again(x, flatten(p), consts)

    return run


class _Marked(nn.Cell):
    """A body as a Cell, which alone can be marked for MindSpore's recompute."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def construct(self, p, x, consts):
        return self.body(p, x, consts)


class _Recomputed(nn.Cell):
    def __init__(self, body, like):
        super().__init__()
        build = rebuild_flat(like)

        def of_leaves(leaves, x, consts):
            return body(build(leaves), x, consts)

        self.body = of_leaves
        self.vjp = ops.GradOperation(get_all=True, sens_param=True)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, leaves, consts):
        return self.body(leaves, x, consts)

    def bprop(self, x, leaves, consts, out, dout):
        none = ()
        for c in consts:
            none += (self.zeros_like(c),)
        waiting = ()
        for w in leaves:
            waiting += (ops.depend(w, dout[0]),)
        back = self.vjp(self.body)(waiting, ops.depend(x, dout[0]), consts, dout)
        return back[1], back[0], none
