"""AscendC operators as MindSpore primitives: the compiled operator on Ascend, the emulated one on CPU.

A primitive of an operator has no backward. An nn.Cell with a bprop combines it with the operator of its gradient.
"""

import itertools

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from ops.ascendc import build
from ops.signature import FLOATS, Signature

_instances = itertools.count()


def kernel(family, name, arguments, shapes, dtypes, *, attrs=None, floats=FLOATS, **conditions):
    """Returns the operator `name` of ops/ascendc/op_host/FAMILY.cpp as a function of tensors.

    arguments: the text of its arguments for ops/signature.py, which takes `floats` and `conditions` too. For a gradient, which only its op
    calls, the number of its arguments. shapes, dtypes: functions of the shapes and of the dtypes of the inputs; they return that of the
    output, or a tuple for several outputs. attrs: {name: float or int}, in the order of the operator's definition.
    """
    inputs = arguments if isinstance(arguments, int) else arguments.count(";") + 1
    outputs, attrs = _count(dtypes, inputs), attrs or {}
    if inputs is not arguments:
        signature = Signature(family, arguments, floats, **conditions)
        shapes, dtypes = _after(signature.check_shapes, shapes), _after(signature.check_dtypes, dtypes)
    if ms.get_context("device_target") == "Ascend":
        return _compiled(name, inputs, outputs, shapes, dtypes, attrs)
    return _emulated(f"{build.emulated(family)}:{name}_emulated", inputs, outputs, shapes, dtypes, attrs)


def _compiled(name, inputs, outputs, shapes, dtypes, attrs):
    function = f"aclnn{build.type_of(name)}"
    info = _info(function, inputs, outputs)
    for key, value in attrs.items():
        info = info.attr(key, "required", type(value).__name__, value=value)
    return _primitive(function, shapes, dtypes, info.target("Ascend"))


def _emulated(function, inputs, outputs, shapes, dtypes, attrs):
    """Returns the emulated operator. On CPU it takes the attributes as one tensor after the inputs."""
    if not attrs:
        return _primitive(function, shapes, dtypes, _info(function, inputs, outputs).target("CPU"))
    values = ms.Tensor(list(attrs.values()), ms.float32)
    run = _primitive(function, _without_last(shapes), _without_last(dtypes), _info(function, inputs + 1, outputs).target("CPU"))

    def call(*tensors):
        return run(*tensors, values)

    return call


def _info(name, inputs, outputs):
    info = CustomRegOp(name)
    for i in range(inputs):
        info = info.input(i, f"x{i}", "required")
    for i in range(outputs):
        info = info.output(i, f"y{i}", "required")
    return info.dtype_format(*([DataType.None_None] * (inputs + outputs)))


def _primitive(function, shapes, dtypes, info):
    primitive = ops.Custom(function, shapes, dtypes, "aot", reg_info=info.get_op_info())
    return primitive.add_prim_attr("instance", next(_instances))  # see ops/custom.py


def _after(check, fn):
    def checked(*args):
        check(args)
        return fn(*args)

    return checked


def _without_last(fn):
    def given(*args):
        return fn(*args[:-1])

    return given


def _count(dtypes, inputs):
    out = dtypes(*([None] * inputs))
    return len(out) if isinstance(out, tuple) else 1
