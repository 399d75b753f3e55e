"""The AdamW update of one array, and the squared norm of a gradient.

Source: Loshchilov and Hutter 2019; the order of operations is torch.optim.AdamW's.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops.auto_generate import InplaceCopy

from ops.custom import kernel
from ops.identity import identity
from ops.signature import check

ARGUMENTS = "values float32 n; scale float32; keep float32; p ...; g ...; m float32 ...; v float32 ..."
OF_LAYERS = "values float32 L n; scale float32; keep float32; p L ...; g L ...; m float32 L ...; v float32 L ..."
IN_KERNEL = "values n; scale; keep; constants 7; g ...; p ...; m ...; v ..."
IN_KERNEL_OF_LAYERS = "values L n; scale; keep; constants 7; g L ...; p L ...; m L ...; v L ..."


def reference(b1, b2, eps, decay, skips):
    """Returns update(values, scale, keep, p, g, m, v) -> new arrays (p, m, v).

    values: float32 [lr, 1 - b1**t, 1 - b2**t, ...]; or [L, n], such a row for each of the L layers of p [L, ...], which differ in lr alone.
    scale: a float32 scalar by which the gradient is multiplied. keep: a float32 scalar; if `skips` is set and keep <= 0, nothing changes.
    p and g have any float dtype, m and v are float32.
    """
    sqrt, cast, select, require = ops.Sqrt(), ops.Cast(), ops.Select(), check("adamw", ARGUMENTS, least={"n": 3})
    require_of_layers = check("adamw", OF_LAYERS, least={"n": 3})

    def checked(values, scale, keep, p, g, m, v):
        shapes, dtypes = _given(values, scale, keep, p, g, m, v)
        return require_of_layers(shapes, dtypes) if len(values.shape) == 2 else require(shapes, dtypes)

    def new(values, scale, p, g, m, v):
        g, lr, row = cast(g, ms.float32) * scale, rate(values, p), values if len(values.shape) == 1 else values[0]
        new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = cast(p, ms.float32)
        w = w * (1 - lr * decay) - lr * (new_m / row[1]) / (sqrt(new_v / row[2]) + eps)
        return cast(w, p.dtype), new_m, new_v

    def update(values, scale, keep, p, g, m, v):
        checked(values, scale, keep, p, g, m, v)
        return new(values, scale, p, g, m, v)

    def update_or_skip(values, scale, keep, p, g, m, v):
        checked(values, scale, keep, p, g, m, v)
        w, new_m, new_v = new(values, scale, p, g, m, v)
        same = ops.BroadcastTo(p.shape)(keep > 0)
        return select(same, w, p), select(same, new_m, m), select(same, new_v, v)

    return update_or_skip if skips else update


def rate(values, p):
    """The learning rate in `values`, see reference(): a scalar, or [L, 1, ...] for the layers of p [L, ...]."""
    if len(values.shape) == 1:
        return values[0]
    return ops.Reshape()(values[:, 0], (p.shape[0],) + (1,) * (len(p.shape) - 1))


def _given(values, scale, keep, p, g, m, v):
    """The shapes and dtypes of the arguments."""
    shapes = values.shape, scale.shape, keep.shape, p.shape, g.shape, m.shape, v.shape
    return shapes, (values.dtype, scale.dtype, keep.dtype, p.dtype, g.dtype, m.dtype, v.dtype)


def cpu(b1, b2, eps, decay, skips):
    """Returns update as `reference` does, as a float32 C++ kernel in one pass over memory that changes p, m and v in place.

    Another op that reads p, m or v may get old values, new ones or a mixture, unless `scale` or g depends on its result. An eager call
    raises ValueError for a p, m or v that is not contiguous, since only a copy of it would change.
    """
    return _Update(np.array([b1, 1 - b1, b2, 1 - b2, eps, decay, bool(skips)], np.float32))


class _Update(nn.Cell):
    def __init__(self, constants):
        super().__init__()
        self.constants = ms.Tensor(constants)
        self.update = kernel("adamw", "adamw", IN_KERNEL, _token, _first, least={"n": 3})
        self.update_layers = kernel("adamw", "adamw", IN_KERNEL_OF_LAYERS, _token, _first, least={"n": 3})

    def __call__(self, values, scale, keep, p, g, m, v):
        for name, x in zip("pmv", (p, m, v)):
            if not x.is_contiguous():
                raise ValueError(
                    f"adamw: {name} is a view of shape {x.shape} that is not contiguous, so only a copy would change; use contiguous()"
                )
        return super().__call__(values, scale, keep, p, g, m, v)

    def construct(self, values, scale, keep, p, g, m, v):
        if len(values.shape) == 2:
            done = self.update_layers(values, scale, keep, self.constants, g, p, m, v)
        else:
            done = self.update(values, scale, keep, self.constants, g, p, m, v)
        return ops.depend(p, done), ops.depend(m, done), ops.depend(v, done)


def reference_squares():
    """Returns squares(g of any shape) -> the sum of squares, a float32 scalar."""
    total, cast, require = ops.ReduceSum(), ops.Cast(), check("adamw", "g *")

    def squares(g):
        require((g.shape,), (g.dtype,))
        g = cast(g, ms.float32)
        return total(g * g, ())

    return squares


def cpu_squares():
    """Returns squares as a float32 C++ kernel in one pass."""
    return kernel("adamw", "sum_of_squares", "g *", _scalar, identity)


def vendor(b1, b2, eps, decay, skips):
    """Returns update as `reference` does, which copies the results into p, m and v with MindSpore's InplaceCopy, to save memory.

    Other ops that read p, m or v have the limits of cpu(). p, m and v must be in device memory: a graph copies tensors of the host, and
    would change the copy.
    """
    new, copy = reference(b1, b2, eps, decay, skips), InplaceCopy()

    def update(values, scale, keep, p, g, m, v):
        new_p, new_m, new_v = new(values, scale, keep, p, g, m, v)
        return ops.depend(p, copy(p, new_p)), ops.depend(m, copy(m, new_m)), ops.depend(v, copy(v, new_v))

    return update


def vendor_squares():
    """Returns reference_squares(), since MindSpore has no kernel for it."""
    return reference_squares()


def vendor_missing(use):
    """Returns "": it can always be used on Ascend."""
    return ""


def _token(values, scale, keep, constants, g, p, m, v):
    return (1,)


def _first(values, *rest):
    return values


def _scalar(g):
    return ()
