"""Recompute: keeps only the inputs of a function for the backward, which computes the function again.

MindSpore's own recompute (`Cell.recompute`, `ms.recompute`) saves no memory on CPU; the hand-written backward here does. In it the inputs
of the second computation depend on the cotangent, or the compiler would merge the two computations. MindSpore's partitioner, which
exists on Ascend only, cannot split a hand-written backward, so the shard lowering uses MindSpore's recompute. Source: Chen et al. 2016.
"""

from mindspore import nn, ops

from parallel.graph.nested import flatten_in_graph, rebuild_flat
from parallel.graph.source import function


def recomputed(body, like, lowering="manual"):
    """Returns f(p, x, consts) -> body(p, x, consts), a tuple of tensors. Results and gradients are bitwise those of body.

    p: a tree with the structure of `like`. consts: a tuple of tensors without gradients. body must use all of them and is compiled in a
    hand-written backward; parallel/graph/scan.py lists the limits of that.
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
    """A Cell around a body, since MindSpore's recompute is a method of Cell."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def construct(self, p, x, consts):
        return self.body(p, x, consts)


class _Recomputed(nn.Cell):
    """body with the hand-written backward."""

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
        # The backward of the layer before waits for the gradients of these weights. With ZeRO 3 they are reduce-scattered here, and
        # MindSpore would otherwise do that for all layers at the end, and keep their full gradients until then.
        return ops.depend(back[1], back[0]), back[0], none


def gathered_again(fn, count):
    """Returns f(x, w0, w1, ...) -> fn(x, w0, w1, ...), a tuple, with `count` weights: products of weights and of what fn gathers of x.

    The backward keeps x and gathers it again. The products are not computed again, because their gradients do not need them, and neither is
    what fn makes of the weights, because these do not wait for the cotangent.
    """
    names = [f"w{i}" for i in range(count)]
    weights = ", ".join(f"ws[{i}]" for i in range(count))
    again = _GatheredAgain(function("of_tuple(x, ws)", [f"return fn(x, {weights})"], fn=fn))
    return function(f"gathered_again(x, {', '.join(names)})", [f"return again(x, ({', '.join(names)},))"], again=again)


class _GatheredAgain(nn.Cell):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.vjp = fn, ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x, ws):
        return self.fn(x, ws)

    def bprop(self, x, ws, out, dout):
        back = self.vjp(self.fn)(ops.depend(x, dout[0]), ws, dout)
        return back[0], back[1]
