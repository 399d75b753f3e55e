"""Writing one layer's array into its place in a stack of all layers'."""

from mindspore import ops

from ops.custom import InPlace, kernel
from ops.identity import identity
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
    """The same in place: the stack that is given changes, and is what is returned. See ops.custom.InPlace."""
    return InPlace("stack_write", ARGUMENTS, FLOATS)


def cpu_new(dims):
    """The same without a value yet: it is for a stack of which all is written to before any is read."""

    def shape(x):
        return (*dims, *x)

    new = kernel("stack_write", "stack_new", "x *", shape, identity, floats=FLOATS)
    return new.add_prim_attr("side_effect_hidden", True)  # or two stacks that are made from one x would be the same array
