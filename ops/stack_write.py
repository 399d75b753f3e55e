"""Writes the array of one layer into a stack of the arrays of all layers."""

from mindspore import ops

from ops.custom import InPlace, kernel
from ops.identity import identity
from ops.signature import FLOATS, check

ARGUMENTS = "stack L ...; at int32; x same ..."


def reference():
    """Returns write(stack [L, ...], at, x [...]) -> a new stack with x at index `at`, an int32 scalar from 0 to L - 1."""
    scatter, reshape, expand, require = ops.TensorScatterUpdate(), ops.Reshape(), ops.ExpandDims(), check("stack_write", ARGUMENTS)

    def write(stack, at, x):
        require((stack.shape, at.shape, x.shape), (stack.dtype, at.dtype, x.dtype))
        return scatter(stack, reshape(at, (1, 1)), expand(x, 0))

    return write


def reference_new(dims):
    """Returns new(x) -> zeros [*dims, *x.shape] of the dtype of x, for write()."""
    zeros_like, zeros = ops.ZerosLike(), ops.Zeros()

    def new(x):
        return zeros(dims + x.shape, x.dtype) if dims else zeros_like(x)

    return new


def cpu():
    """Returns write as a C++ kernel that changes and returns the given stack. See ops.custom.InPlace."""
    return InPlace("stack_write", ARGUMENTS, FLOATS)


def cpu_new(dims):
    """Returns new(x) -> an uninitialised array, for a stack that is written completely before it is read."""

    def shape(x):
        return (*dims, *x)

    new = kernel("stack_write", "stack_new", "x *", shape, identity, floats=FLOATS)
    return new.add_prim_attr("side_effect_hidden", True)  # otherwise MindSpore would merge two stacks that are made from one x
