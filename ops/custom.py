"""C++ kernels as primitives: `kernel` makes one of a function in ops/cpu, for eager and compiled code.

A kernel has no backward of its own; an nn.Cell with a bprop joins it with the kernel of its gradient. Its C++ side is

    extern "C" int name(int count, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *stream, void *extra)

with the inputs' and then the outputs' arrays, all contiguous. Scalars arrive as tensors of one element. It returns 0, or a number that
MindSpore raises an error with: 1 for types and 2 for shapes that are not its own, which `arguments` tell of first, in words.
"""

import itertools

from mindspore import ops
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


def _after(check, fn):
    def checked(*args):
        check(args)
        return fn(*args)

    return checked


def _count(dtypes, inputs):
    out = dtypes(*([None] * inputs))
    return len(out) if isinstance(out, tuple) else 1
