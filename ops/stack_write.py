"""Writing one layer's array into its place in a stack of all layers'."""

import mindspore as ms
from mindspore import nn, ops

from ops.custom import kernel
from ops.signature import FLOATS, check

ARGUMENTS = "stack L ...; at int32; x same ..."


def reference():
    """write(stack [L, ...], at int32 of 0 dims, x [...]) -> the stack with x in place `at`, which is from 0 to L - 1.

    A new array: `stack` stays as it is.
    """
    scatter, reshape, expand, require = ops.TensorScatterUpdate(), ops.Reshape(), ops.ExpandDims(), check("stack_write", ARGUMENTS)

    def write(stack, at, x):
        require((stack.shape, at.shape, x.shape), (stack.dtype, at.dtype, x.dtype))
        return scatter(stack, reshape(at, (1, 1)), expand(x, 0))

    return write


def reference_new(dims):
    """new(x) -> zeros [*dims, *x.shape] of x's dtype, to be written to."""
    zeros_like, zeros = ops.ZerosLike(), ops.Zeros()

    def new(x):
        return zeros(dims + x.shape, x.dtype) if dims else zeros_like(x)

    return new


def cpu():
    """The same in place: the stack that is given changes, and is what is returned; under the conditions of cache_write.cpu."""
    return _StackWrite()


def cpu_new(dims):
    """The same without a value yet: it is for a stack of which all is written to before any is read."""

    def shape(x):
        return (*dims, *x)

    new = kernel("stack_write", "stack_new", "x *", shape, _same, floats=FLOATS)
    return new.add_prim_attr("side_effect_hidden", True)  # or two stacks that are made from one x would be the same array


class _StackWrite(nn.Cell):
    def __init__(self):
        super().__init__()
        self.write = kernel("stack_write", "stack_write", ARGUMENTS, _one, _int32, floats=FLOATS)

    def __call__(self, stack, at, x):
        """Eager calls: a kernel is given a copy of a view, and what it writes there would be lost."""
        return super().__call__(stack.contiguous(), at, x)

    def construct(self, stack, at, x):
        return ops.depend(stack, self.write(stack, at, x))

    def bprop(self, stack, at, x, out, dout):
        raise RuntimeError("the stack_write kernel works in place and has no gradient; use ops.stack_write=reference")


def _one(stack, at, x):
    return (1,)


def _int32(stack, at, x):
    return ms.int32


def _same(x):
    return x
