"""What the tests of the C++ kernels share: comparison with a reference in the ways of a model, and calls of a kernel without MindSpore."""

import ctypes

import mindspore as ms
import numpy as np
from mindspore import ops

from ops import build
from parallel.graph.jit import jit
from parallel.graph.scan import scan
from parallel.step import value_and_grad
from tests.tiny import assert_close, host

TOLERANCE = 1e-5  # float32 sums in another order


def tensors(*arrays):
    return tuple(map(ms.Tensor, arrays))


def agree(reference, fused, inputs, fixed=(), tolerance=TOLERANCE, ways=("eager", "compiled")):
    """The results of both on (*inputs, *fixed), float32 arrays and arrays without gradients, and the gradients of a weighted sum of all
    results with respect to inputs."""
    inputs, fixed = tensors(*inputs), tensors(*fixed)
    rng = np.random.default_rng(1)
    weights = tensors(*(rng.normal(0, 1, x.shape).astype(np.float32) for x in _tuple(reference(*inputs, *fixed))))
    for way in ways:
        expected, found = (_values_and_gradients(op, inputs, fixed, weights, way == "compiled") for op in (reference, fused))
        for kind, a, b in zip(("result", "gradient"), expected, found):
            assert len(a) == len(b)
            for i, (x, y) in enumerate(zip(a, b)):
                assert_close(x, y, tolerance, f"{way} {kind} {i}")


def _values_and_gradients(op, inputs, fixed, weights, compiled):
    several = len(weights) > 1

    def weighted(inputs, fixed, weights):
        out = op(*inputs, *fixed)
        if not several:
            return (out * weights[0]).sum()
        total = (out[0] * weights[0]).sum()
        for i in range(1, len(weights)):
            total += (out[i] * weights[i]).sum()
        return total

    def values(inputs, fixed):
        return op(*inputs, *fixed)

    _, grads = value_and_grad(weighted, compiled=compiled)(inputs, fixed, weights)
    return _tuple((jit(values) if compiled else values)(inputs, fixed)), grads


def agree_in_scan(reference, fused, x, w, consts, tolerance=TOLERANCE):
    """op(x, w, *consts) -> like x, as a layer of parallel.graph.scan, where its gradient is taken inside a hand-written backward.

    w: [L, ...], one for each layer.
    """
    params = {"x": ms.Tensor(x), "w": ms.Tensor(w)}

    def values(op):
        loop = scan(_layer(op, len(consts)), {"w": 0}, len(w), (1,))

        def weighted(params, weights, consts):
            y, stats = loop(params["x"], {"w": params["w"]}, consts)
            return (y * weights).sum() + stats.sum()

        return value_and_grad(weighted, compiled=True)(params, ms.Tensor(np.cos(x)), tensors(*consts))

    (expected, d_expected), (found, d_found) = values(reference), values(fused)
    assert_close(expected, found, tolerance, "value")
    for name in ("x", "w"):
        assert_close(d_expected[name], d_found[name], tolerance, f"gradient of {name}")


def _layer(op, count):
    total, reshape = ops.ReduceSum(), ops.Reshape()

    def of_none(p, x, consts):
        y = op(x, p["w"])
        return y, reshape(total(y, ()), (1,))

    def of_two(p, x, consts):
        y = op(x, p["w"], consts[0], consts[1])
        return y, reshape(total(y, ()), (1,))

    return {0: of_none, 2: of_two}[count]


def takes_views(op, *arrays):
    """Called eagerly on transposes, it gives what it gives on arrays that lie in order."""
    backwards = [ms.Tensor(np.ascontiguousarray(a.T)).T for a in arrays]
    assert not any(x.is_contiguous() for x in backwards if x.ndim > 1)
    for a, b in zip(_tuple(op(*tensors(*arrays))), _tuple(op(*backwards))):
        np.testing.assert_array_equal(host(a), host(b))


def call(source, name, inputs, shapes, threads):
    """The kernel of ops/cpu without MindSpore, whose own threads keep their number of threads: arrays -> float32 arrays of these shapes."""
    arrays = [np.array(x, order="C") for x in inputs] + [np.full(shape, np.nan, np.float32) for shape in shapes]
    n = len(arrays)
    data = (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays))
    sizes = [(ctypes.c_int64 * max(a.ndim, 1))(*a.shape) for a in arrays]
    pointers = (ctypes.POINTER(ctypes.c_int64) * n)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in sizes))
    dtypes = (ctypes.c_char_p * n)(*(str(a.dtype).encode() for a in arrays))
    kernel = getattr(ctypes.CDLL(build.library(source)), name)
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(threads)
    assert kernel(n, data, (ctypes.c_int * n)(*(a.ndim for a in arrays)), pointers, dtypes, None, None) == 0
    return arrays


def same_for_any_threads(source, name, inputs, shapes):
    """The same bits with 1, 2, 3 and 7 threads, and again."""
    first = call(source, name, inputs, shapes, 1)
    for threads in (2, 3, 7, 1):
        for a, b in zip(first, call(source, name, inputs, shapes, threads)):
            assert a.tobytes() == b.tobytes()


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)
