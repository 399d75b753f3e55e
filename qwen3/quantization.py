"""The `quantization_config` of config.json, which says how weights are quantised: by GPTQ, AWQ or compressed-tensors.

Sources: AutoGPTQ and GPTQModel (quantize_config), AutoAWQ (quant_config), compressed-tensors (QuantizationConfig), as transformers stores
them. qwen3/hf_quantized.py reads the tensors.
"""

from typing import NamedTuple

from qwen3.schema import Fields, Object, Text, Yes, checked, short, told, whole

WHOLE = -1  # the group size that stands for all inputs
GroupSize = told(int, f"a whole number from 1, or {WHOLE} for all inputs")


class Scheme(NamedTuple):
    """How the weights of a folder are quantised.

    method: "gptq", "awq", "pack-quantized" or "int-quantized". bits: 4 or 8. group: inputs that share a scale; None for all inputs; 0 for
    one scale a matrix. ordered: whether inputs may belong to groups in any order, by g_idx. symmetric: whether all zero points are
    2 ** (bits - 1), or there are none. offset: what is added to the stored zero points.
    """

    method: str
    bits: int
    group: int | None
    ordered: bool = False
    symmetric: bool = False
    offset: int = 0


class _Gptq(Fields):
    bits: whole(1, 32)
    group_size: GroupSize = 128
    desc_act: Yes = False
    sym: Yes = False
    checkpoint_format: Text = None
    format: Text = None
    pack_dtype: Text = "int32"
    is_marlin_format: Yes = False
    dynamic: Object = {}


class _Awq(Fields):
    bits: whole(1, 32)
    group_size: GroupSize = 128
    zero_point: Yes = True
    version: Text = "gemm"


class _Arguments(Fields):
    num_bits: whole(1, 32) = 8
    type: Text = "int"
    symmetric: Yes = True
    strategy: Text = None
    group_size: GroupSize = None
    actorder: told(str | bool, "a text, or false") = None
    dynamic: told(bool | str, "true, false or a text") = False


class _Group(Fields):
    targets: told(list[str], "a list of texts") = ["Linear"]
    weights: told(_Arguments, "an object")
    input_activations: told(_Arguments, "an object") = None
    output_activations: Object = None
    format: Text = None


class _Compressed(Fields):
    format: Text
    config_groups: told(dict[str, _Group], "an object of objects")
    kv_cache_scheme: Object = None
    sparsity_config: Object = {}
    transform_config: Object = {}


def scheme_of(config, where):
    """Returns the Scheme of a quantization_config; None if there is none. where: the path of config.json, for errors. Raises ValueError for
    a method or an option that is not supported, with its name and value."""
    if not config:
        return None
    method, at = config.get("quant_method"), f"{where}: quantization_config"
    if method == "gptq":
        return _gptq(checked(_Gptq, config, at), at)
    if method == "awq":
        return _awq(checked(_Awq, config, at), at)
    if method == "compressed-tensors":
        return _compressed(checked(_Compressed, config, at), at)
    raise ValueError(
        f"{at} (quant_method={short(method)}) is not supported; use the unquantised weights, or those of gptq, awq or compressed-tensors"
    )


def _gptq(found, at):
    _need(at, "bits", found.bits, (4, 8))
    form = found.checkpoint_format or found.format or "gptq"
    _need(at, "checkpoint_format", form, ("gptq", "gptq_v2"))
    _need(at, "pack_dtype", found.pack_dtype, ("int32",))
    _need(at, "is_marlin_format", found.is_marlin_format, (False,))
    _need(at, "dynamic", found.dynamic, ({},))
    offset = 1 if form == "gptq" else 0  # version 1 stores each zero point less 1
    return Scheme("gptq", found.bits, _group(found.group_size, at), found.desc_act, found.sym, offset)


def _awq(found, at):
    _need(at, "bits", found.bits, (4,))
    _need(at, "version", found.version.lower(), ("gemm",))
    _need(at, "zero_point", found.zero_point, (True,))
    return Scheme("awq", 4, _group(found.group_size, at))


def _compressed(found, at):
    _need(at, "format", found.format, ("pack-quantized", "int-quantized"))
    for key in ("kv_cache_scheme", "transform_config"):
        _need(at, key, getattr(found, key) or None, (None,))
    _need(at, "sparsity_config.format", found.sparsity_config.get("format", "dense"), ("dense",))
    if len(found.config_groups) != 1:
        raise ValueError(f"{at}: config_groups={short(list(found.config_groups))} is not supported; use weights with one group")
    ((name, group),) = found.config_groups.items()
    at, w = f"{at}: config_groups.{short(name)}", group.weights
    _need(at, "format", group.format or found.format, (found.format,))
    _need(at, "output_activations", group.output_activations, (None,))
    _need(at, "weights.type", w.type, ("int",))
    _need(at, "weights.num_bits", w.num_bits, (4, 8) if found.format == "pack-quantized" else (8,))
    _need(at, "weights.dynamic", w.dynamic, (False,))
    strategy = w.strategy or ("tensor" if w.group_size is None else "channel" if w.group_size == WHOLE else "group")
    _need(at, "weights.strategy", strategy, ("group", "channel", "tensor"))
    if group.input_activations:
        _need(at, "input_activations.type", group.input_activations.type, ("int",))
    if strategy == "group" and w.group_size is None:
        raise ValueError(f"{at}: weights.group_size is missing, which strategy='group' needs")
    size = {"group": _group(w.group_size or WHOLE, at), "channel": None, "tensor": 0}[strategy]
    return Scheme(found.format, w.num_bits, size, w.actorder in ("group", True), w.symmetric)


def _group(size, at):
    if size != WHOLE and size < 1:
        raise ValueError(f"{at}: group_size={size} must be a whole number from 1, or {WHOLE} for all inputs")
    return None if size == WHOLE else size


def _need(at, key, value, allowed):
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        names = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"{at}: {key}={short(value)} is not supported; only {names} is")
