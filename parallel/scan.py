"""A loop over stacked layers whose graph does not grow with their number, with a backward that recomputes each layer.

MindSpore unrolls Python loops: 64 layers take about a minute to compile, and `while` loops have no gradient of their own worth
having. This cell runs one `while` loop forward, which keeps each layer's input, and one backward.
"""

import mindspore as ms
from mindspore import nn, ops

from parallel.step import flatten_in_graph, rebuild_flat


def scan(body, like, num_layers, stats_shape):
    """f(x, stacked, consts) -> x, stats [L, *stats_shape], for body(p, x, consts) -> x, stats of one layer.

    p: a tree of `like`'s structure; stacked: the same with every leaf [L, ...]. consts: a tuple of tensors without gradients.
    body must be straight-line, as MindSpore cannot parse a function with branches in a backward, and must use every const:
    it replaces elements of a tuple that nothing reads by the integer 0.
    """
    flatten, loop = flatten_in_graph(like), _Scan(body, like, num_layers, stats_shape)

    def run(x, stacked, consts):
        x, stats, _ = loop(x, flatten(stacked), consts)
        return x, stats

    return run


class _Scan(nn.Cell):
    def __init__(self, body, like, num_layers, stats_shape):
        super().__init__()
        self.num_layers, self.stats_shape = num_layers, (num_layers, *stats_shape)
        self.put, self.pick, build = _put(), _pick, rebuild_flat(like)

        def of_leaves(leaves, x, consts):
            return body(build(leaves), x, consts)

        self.body = of_leaves
        self.vjp = ops.GradOperation(get_all=True, sens_param=True)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, stacked, consts):
        i = ms.Tensor(0, ms.int32)
        stats = ops.zeros(self.stats_shape, ms.float32)
        inputs = ops.zeros((self.num_layers,) + x.shape, x.dtype)
        while i < self.num_layers:
            inputs = self.put(inputs, i, x)
            x, s = self.body(self.pick(stacked, i), x, consts)
            stats = self.put(stats, i, s)
            i = i + 1
        return x, stats, inputs

    def bprop(self, x, stacked, consts, out, dout):
        inputs, dx, dstats = out[2], dout[0], dout[1]
        none = ()
        for c in consts:
            none += (self.zeros_like(c),)
        j = ms.Tensor(self.num_layers - 1, ms.int32)
        grads = (j,)  # first, as a loop cannot carry a tuple of arrays that are all of one shape
        for w in stacked:
            grads += (self.zeros_like(w),)
        while j >= 0:
            back = self.vjp(self.body)(self.pick(stacked, j), inputs[j], consts, (dx, dstats[j]))
            dx = back[1]
            written = (j,)
            for k in range(1, len(grads)):
                written += (self.put(grads[k], j, back[0][k - 1]),)
            grads = written
            j = j - 1
        return dx, grads[1:], none


def _pick(stacked, i):
    leaves = ()
    for w in stacked:
        leaves += (w[i],)
    return leaves


def _put():
    scatter, reshape, expand = ops.TensorScatterUpdate(), ops.Reshape(), ops.ExpandDims()

    def put(buffer, i, value):
        return scatter(buffer, reshape(i, (1, 1)), expand(value, 0))

    return put
