"""Every collective on 4 processes, eager and compiled: results and gradients, for test_collectives.py to judge."""

from dataclasses import dataclass, field
from functools import cached_property

import mindspore as ms
import numpy as np
from mindspore import ops

from parallel import collectives, step
from parallel.mesh import Mesh

# name -> sizes of a mesh of 4 ranks, axes, and the groups of ranks that these are
LAYOUTS = {
    "dp_over_tp": (dict(dp=2, tp=2), ("dp",), [(0, 2), (1, 3)]),
    "tp_in_dp": (dict(dp=2, tp=2), ("tp",), [(0, 1), (2, 3)]),
    "dp_and_tp": (dict(dp=2, tp=2), ("dp", "tp"), [(0, 1, 2, 3)]),
    "dp_beside_ep": (dict(dp=4, ep=2), ("dp-ep",), [(0, 2), (1, 3)]),
    "repeated_kv": (dict(tp=4, kv_repeat=2), ("tp/kv",), [(0, 1), (2, 3)]),
    "ep_of_dp_and_cp": (dict(dp=2, cp=2, ep=4), ("ep",), [(0, 1, 2, 3)]),
}
# An op, and its options that are not drawn.
KINDS = {
    "psum": ("psum", {}),
    "pvary": ("pvary", {}),
    "pmax": ("pmax", {}),
    "all_gather_scatter": ("all_gather", {"grad": "scatter"}),
    "all_gather_slice": ("all_gather", {"grad": "slice"}),
    "reduce_scatter": ("reduce_scatter", {}),
    "split": ("split", {}),
    "all_to_all": ("all_to_all", {}),
    "ppermute": ("ppermute", {}),
    "broadcast": ("broadcast", {}),
}
SUMS = ("psum", "reduce_scatter")  # where infinities may meet; all others are given some
SAME_INPUT = ("pvary", "split")  # what they take is held alike by a group's ranks
SAME_COTANGENT = ("psum", "all_gather_slice")  # and so are their cotangents
MODES = {"eager": False, "jit": True}


@dataclass(frozen=True)
class Case:
    """A collective on a layout. shape: of a rank's input."""

    kind: str
    layout: str
    dtype: str
    seed: int
    shape: tuple
    options: dict = field(compare=False)

    def __str__(self):
        return f"{self.kind}-{self.layout}-{self.dtype}"

    @property
    def groups(self):
        return LAYOUTS[self.layout][2]

    @cached_property
    def inputs(self):
        """One array a rank."""
        return self._draw(0, self.shape, self.kind in SAME_INPUT, self.dtype == "float32" and self.kind not in SUMS)

    def weights(self, shape):
        """One array a rank: the cotangents of a result of this shape."""
        return self._draw(1, shape, self.kind in SAME_COTANGENT, False)

    def _draw(self, stream, shape, same, infinities):
        out = {}
        for group in self.groups:
            for rank in group:
                rng = np.random.default_rng([self.seed, stream, group[0] if same else rank])
                x = rng.integers(-99, 100, shape) / (8 if self.dtype == "float32" else 1)  # eighths, whose sums are exact
                if infinities:
                    x.flat[rng.integers(x.size, size=2)] = np.inf, -np.inf
                out[rank] = np.asarray(x, self.dtype)
        return [out[rank] for rank in sorted(out)]


def cases():
    """Every kind in float32 on three layouts, whose groups are strided ranks, neighbours and all; and on one of them in int32."""
    out = []
    for i, kind in enumerate(KINDS):
        layouts = list(LAYOUTS)[i % 2 :: 2]
        out += [_case(kind, layout, "float32", 100 * i + j) for j, layout in enumerate(layouts)]
        out.append(_case(kind, layouts[(i + 2) % 3], "int32", 100 * i + 3))
    return out


def _case(kind, layout, dtype, seed):
    rng = np.random.default_rng(seed)
    n, ndim = len(LAYOUTS[layout][2][0]), int(rng.integers(1, 5))
    if kind == "psum" and seed % 100 == 0:
        ndim = 0
    one_dim = seed % 2 == 1  # of an all-to-all
    if kind == "all_to_all" and not one_dim:
        ndim = max(ndim, 3)
    shape, options = [int(m) for m in rng.integers(2, 5, ndim)], dict(KINDS[kind][1])
    dims = [int(dim) for dim in rng.permutation(ndim)]
    op = KINDS[kind][0]
    if op in ("all_gather", "reduce_scatter", "split"):
        options["dim"] = dims[0]
    if op == "all_to_all":
        options |= {"split_dim": dims[0], "concat_dim": dims[0 if one_dim else 1]}
    if op in ("reduce_scatter", "split", "all_to_all"):
        shape[dims[0]] *= n
    if op == "ppermute":
        chain = [(i, i + 1) for i in range(n - 1)]
        cycle = [*chain, (n - 1, 0)]
        options["pairs"] = [chain, cycle, [(n - 1, 0)], cycle][seed % 4]
    if op == "broadcast":
        options["root"] = int(rng.integers(n))
    return Case(kind, layout, dtype, seed, tuple(shape), options)


def in_default_tests(case, mode):
    """All eager ones. Of a kind, a graph has the first layout and integers: which ranks are in a group makes no other graph."""
    return mode == "eager" or case.dtype == "int32" or case.seed % 100 == 0


def main(speed):
    """{`case.mode.value` and, in float32, `case.mode.grad`}. speed: "fast", or "slow" for the others in a graph."""
    rank, _ = collectives.start()
    meshes = {layout: (Mesh(**sizes, rank=rank), axes) for layout, (sizes, axes, _) in LAYOUTS.items()}
    results = {}
    for kind, (op, _) in KINDS.items():
        for mode, compiled in MODES.items():
            of_kind = [case for case in cases() if case.kind == kind]
            some = [case for case in of_kind if in_default_tests(case, mode) == (speed == "fast")]
            if not some:
                continue
            some += [case for case in of_kind if case.dtype == "int32" and case not in some]  # the last
            fns = [getattr(collectives, op)(*meshes[case.layout], **case.options) for case in some]
            xs = [ms.Tensor(case.inputs[rank]) for case in some]
            ws = [ms.Tensor(case.weights(result_shape(case))[rank]) for case in some]
            values, grads = _differentiated(fns, xs[:-1], xs[-1], ws, compiled)
            results |= {f"{case}.{mode}.value": value.asnumpy() for case, value in zip(some, values)}
            results |= {f"{case}.{mode}.grad": grad.asnumpy() for case, grad in zip(some, grads)}
    return results


def _differentiated(fns, xs, integers, ws, compiled):
    """The results of all, the last of which is of integers, and the gradients of the others, in one graph if compiled."""
    n, total = len(xs), ops.ReduceSum()

    def loss(xs, integers, ws):
        value, ys = 0.0, ()
        for i in range(n):
            y = fns[i](xs[i])
            value, ys = value + total(y * ws[i]), (*ys, y)
        return value, (*ys, fns[n](integers))

    (_, values), grads = step.value_and_grad(loss, range(n + 1), compiled)(xs, integers, ws)
    return [values[i] for i in range(n + 1)], grads


def result_shape(case):
    shape, n = list(case.shape), len(case.groups[0])
    op, options = KINDS[case.kind][0], case.options
    if op == "all_gather":
        shape[options["dim"]] *= n
    if op in ("reduce_scatter", "split"):
        shape[options["dim"]] //= n
    if op == "all_to_all":
        shape[options["split_dim"]] //= n
        shape[options["concat_dim"]] *= n
    return tuple(shape)
