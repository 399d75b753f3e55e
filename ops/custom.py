"""C++ kernels as primitives: `kernel` makes one of a function in ops/cpu, for eager and compiled code.

A kernel has no backward of its own; an nn.Cell with a bprop joins it with the kernel of its gradient. Its C++ side is

    extern "C" int name(int count, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *stream, void *extra)

with the inputs' and then the outputs' arrays, all contiguous. Scalars arrive as tensors of one element. It returns 0, or a number that
MindSpore raises an error with: 1 for types and 2 for shapes that are not its own, which `arguments` tell of first, in words.
"""

import itertools

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import CustomRegOp, DataType

from ops import build
from ops.signature import Signature

_instances = itertools.count()


def kernel(source, name, arguments, shapes, dtypes, *, floats=("float32",), **conditions):
    """The function `name` of ops/cpu/SOURCE.cc as a primitive.

    arguments: what it takes, as in ops/signature.py, with `floats` and `conditions`; for a gradient, which only its op calls, their number.
    shapes, dtypes: functions of the inputs' shapes, and of their dtypes, to the output's, or a tuple of the outputs'.
    """
    inputs = arguments if isinstance(arguments, int) else arguments.count(";") + 1
    outputs = _count(dtypes, inputs)
    if inputs is not arguments:
        signature = Signature(source, arguments, floats, **conditions)
        shapes, dtypes = _after(signature.check_shapes, shapes), _after(signature.check_dtypes, dtypes)
    info = CustomRegOp(name)
    for i in range(inputs):
        info = info.input(i, f"x{i}")
    for i in range(outputs):
        info = info.output(i, f"y{i}")
    info = info.dtype_format(*([DataType.None_None] * (inputs + outputs))).target("CPU").get_op_info()
    primitive = ops.Custom(f"{build.library(source)}:{name}", shapes, dtypes, "aot", reg_info=info)
    # Eager calls take the results' shapes from an earlier call of any primitive with these attributes and inputs, whatever `shapes` says.
    return primitive.add_prim_attr("instance", next(_instances))


class InPlace(nn.Cell):
    """f(array, a, b) -> the array, which the kernel NAME of ops/cpu/NAME.cc has written to; its output is one integer, to wait for.

    Nothing orders the write against other reads of the array that was given, so read the returned one only; a write whose result nothing
    reads does not happen in a graph; and a graph that returns the result copies it, while the array that was given has changed already.
    It has no gradient: differentiating it is an error.
    """

    def __init__(self, name, arguments, floats):
        super().__init__()
        self.write = kernel(name, name, arguments, _one, _int32, floats=floats)
        self.no_gradient = f"the {name} kernel works in place and has no gradient; use ops.{name}=reference"

    def __call__(self, array, a, b):
        """Eager calls: a kernel is given a copy of a view, and what it writes there would be lost."""
        return super().__call__(array.contiguous(), a, b)

    def construct(self, array, a, b):
        return ops.depend(array, self.write(array, a, b))

    def bprop(self, array, a, b, out, dout):
        raise RuntimeError(self.no_gradient)


def _one(array, a, b):
    return (1,)


def _int32(array, a, b):
    return ms.int32


def _after(check, fn):
    def checked(*args):
        check(args)
        return fn(*args)

    return checked


def _count(dtypes, inputs):
    out = dtypes(*([None] * inputs))
    return len(out) if isinstance(out, tuple) else 1
