"""C++ kernels as MindSpore primitives: `kernel` makes a primitive from a function in ops/cpu, for eager and compiled code.

A primitive of a kernel has no backward. An nn.Cell with a bprop combines it with the kernel of its gradient. The C++ function is

    extern "C" int name(int count, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *stream, void *extra)

Its arrays are the inputs, then the outputs, all contiguous; scalars are tensors of one element. It returns 0, or an error number for which
MindSpore raises an error: 1 for wrong dtypes and 2 for wrong shapes. The check of `arguments` finds these earlier, with a clear message.
"""

import itertools

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import CustomRegOp, DataType

from ops import build
from ops.signature import Signature

_instances = itertools.count()


def kernel(source, name, arguments, shapes, dtypes, *, floats=("float32",), **conditions):
    """Returns the function `name` of ops/cpu/SOURCE.cc as a primitive.

    arguments: the text of its arguments for ops/signature.py, which takes `floats` and `conditions` too. For a gradient, which only its op
    calls, the number of its arguments. shapes, dtypes: functions of the shapes and of the dtypes of the inputs; they return that of the
    output, or a tuple for several outputs.
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
    # Without it an eager call would take its output shapes from an earlier call of any primitive with equal attributes and inputs.
    return primitive.add_prim_attr("instance", next(_instances))


class Writes(nn.Cell):
    """f(array, a, b) -> the array, which the kernel `write` of an op changes in place. Its output is an integer to wait for.

    The write has no order relative to other reads of the given array, so read only the returned array. In a graph, a write whose result is
    not read does not happen. A graph that returns the result copies it, and the given array changes too. Differentiating f is an error.
    """

    def __init__(self, op, write):
        super().__init__()
        self.write = write
        self.no_gradient = f"the {op} kernel works in place and has no gradient; use ops.{op}=reference"

    def __call__(self, array, a, b):
        """Makes the array contiguous. In an eager call a kernel gets a copy of a view, and what it writes to the copy would be lost."""
        return super().__call__(array.contiguous(), a, b)

    def construct(self, array, a, b):
        return ops.depend(array, self.write(array, a, b))

    def bprop(self, array, a, b, out, dout):
        raise RuntimeError(self.no_gradient)


class InPlace(Writes):
    """Writes by the kernel NAME of ops/cpu/NAME.cc."""

    def __init__(self, name, arguments, floats):
        super().__init__(name, kernel(name, name, arguments, _one, _int32, floats=floats))


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
