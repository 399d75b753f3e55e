"""Quantised folders, as tests/qwen3/quantised_folders.py writes them, are read as the floats that they stand for; others are refused."""

import numpy as np
import pytest

from ops.int8 import dequantize
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.config import Qwen3Config
from qwen3.int8 import Quantised, int8_specs
from qwen3.model import param_specs
from tests.qwen3.hf_folders import edit_config, edit_tensors
from tests.qwen3.quantised_folders import awq, compressed, gptq, write
from tests.tiny import DENSE, MOE, QWEN2, host

FORMS = {
    "gptq 4": gptq(),
    "gptq 8, all inputs": gptq(8, None),
    "gptq 4, in any order": gptq(4, 8, order=True),
    "gptq 4, groups that do not divide": gptq(4, 16),
    "gptq 4, version 2": gptq(4, 8, version="gptq_v2"),
    "awq": awq(),
    "awq, all inputs": awq(None),
    "packed 4": compressed(),
    "packed 8, zero points": compressed(bits=8, symmetric=False),
    "packed 4, zero points, in any order": compressed(order=True, symmetric=False),
    "packed 4, all inputs": compressed(group=None),
    "integers": compressed("int-quantized", 8, None),
    "integers, groups and zero points": compressed("int-quantized", 8, 8, symmetric=False),
}
Q = "model.layers.1.self_attn.q_proj"


def check(folder, cfg, floats):
    """Compares every parameter of a folder, whole and by slices, with the floats that it was written from."""
    reader = hf.Reader(folder)
    for path in reader.paths:
        origin = hf.source(path, reader.shape(path))
        if origin.names[0] not in floats:
            continue
        each = [floats.pop(name).T for name in origin.names]
        wanted, found = np.stack(each) if origin.stacked else each[0], reader.read(path)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
        for part in ((slice(3, 14), slice(5, 13)), (slice(8, 16), slice(0, 1)), (slice(0, 1), slice(15, 16))):
            index = (*(slice(1, n) for n in wanted.shape[:-2]), *part)
            np.testing.assert_array_equal(reader.read(path, index), wanted[index])
    assert not floats


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_read_as_its_floats(tmp_path, form):
    check(tmp_path / "m", DENSE, write(tmp_path / "m", DENSE, FORMS[form]))


KEPT = ("gptq 4", "gptq 4, version 2", "awq", "awq, all inputs", "packed 4", "packed 4, all inputs", "integers")


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_8_bits_or_less_are_kept_where_they_fit(tmp_path, form):
    floats = write(tmp_path / "m", DENSE, FORMS[form])
    reader, specs = hf.Reader(tmp_path / "m"), param_specs(DENSE)
    kept = [path for path in reader.paths if reader.int8_group(path)]
    in_part = 2 if form == "gptq 4, groups that do not divide" else 0  # 16 divides the inputs of o_proj alone
    assert len(kept) == (len(floats) if form in KEPT else in_part)
    read, wanted = Quantised(reader.read, specs, 8, reader).read, dict(tree_paths(int8_specs(specs, 8, reader)))
    for path in kept:
        (origin,) = hf.source(path, reader.shape(path)).names
        for part in ((slice(0, 1), slice(0, 1)), (slice(1, 3), slice(0, 1))):  # of the shape that specs say, and of a shard
            N, G = wanted[f"{path}.scale"].shape
            each = wanted[f"{path}.int8"].shape[1] // G
            rows, groups = (slice(0, N), slice(0, G)) if part[0].start == 0 else part
            numbers = read(f"{path}.int8", (rows, slice(groups.start * each, groups.stop * each)))
            found = dequantize(numbers, read(f"{path}.scale", (rows, groups)))
            np.testing.assert_array_equal(found, floats[origin][rows, groups.start * each : groups.stop * each])


def test_numbers_that_do_not_fit_are_named(tmp_path):
    write(tmp_path / "m", DENSE, gptq(8, 8))
    edit_config(tmp_path / "m", quantization_config=gptq(8, 8, sym=True)[0])
    reader = hf.Reader(tmp_path / "m")
    with pytest.raises(ValueError, match="q_proj.weight has zero points or groups that config.json does not tell; use --weights=float"):
        reader.read_int8("layers.0.attention.wq", (slice(0, 32), slice(0, 24)))


def test_scales_that_are_not_finite_are_named(tmp_path):
    write(tmp_path / "m", DENSE, FORMS["awq"])
    edit_tensors(tmp_path / "m", change("scales", np.full((3, 32), np.inf, np.float16)))
    with pytest.raises(ValueError, match="q_proj.weight has scales that are NaN or infinite; copy the file again"):
        hf.Reader(tmp_path / "m").read_int8("layers.1.attention.wq", (slice(0, 32), slice(0, 24)))


@pytest.mark.parametrize("form", ["gptq 4", "awq", "packed 4, zero points, in any order", "integers"])
def test_experts_are_stacked(tmp_path, form):
    check(tmp_path / "m", MOE, write(tmp_path / "m", MOE, FORMS[form]))


def test_what_is_not_quantised_stays_and_saving_writes_floats(tmp_path):
    write(tmp_path / "m", QWEN2, FORMS["gptq 4"])
    cfg, params = hf.load(tmp_path / "m")
    assert cfg == QWEN2
    hf.save(tmp_path / "floats", cfg, params)
    again = dict(tree_paths(hf.load(tmp_path / "floats")[1]))
    for path, w in tree_paths(params):
        np.testing.assert_array_equal(host(w), host(again[path]))


def test_biases_of_zeros_that_autogptq_writes_are_left_out(tmp_path):
    floats = write(tmp_path / "m", DENSE, FORMS["gptq 4"])
    edit_tensors(tmp_path / "m", lambda t: t.update({f"{Q}.bias": np.zeros(32, np.float16)}))
    check(tmp_path / "m", DENSE, floats)
    edit_tensors(tmp_path / "m", lambda t: t.update({f"{Q}.bias": np.ones(32, np.float16)}))
    with pytest.raises(ValueError, match=f"unexpected tensors {Q}.bias"):
        hf.Reader(tmp_path / "m")


def changed(form, **weights):
    config, *rest = form
    group = config["config_groups"]["group_0"]
    return {**config, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **weights}}}}


REFUSED = {
    "fp8": ({"quant_method": "fp8"}, r"quantization_config \(quant_method='fp8'\) is not supported; use the unquantised weights"),
    "no method": ({"bits": 4}, r"quant_method=None"),
    "bits": (gptq(bits=3)[0], "quantization_config: bits=3 is not supported; only 4 or 8 is"),
    "bits of another type": (gptq(bits="4")[0], "bits='4' must be a whole number"),
    "marlin": (gptq(version="marlin")[0], "checkpoint_format='marlin' is not supported; only 'gptq' or 'gptq_v2' is"),
    "dynamic": (gptq(dynamic={"+:.*": {"bits": 8}})[0], "dynamic=.* is not supported"),
    "group size": (gptq(group_size=-5)[0], "group_size=-5 must be a whole number from 1, or -1 for all inputs"),
    "gemv": (awq(version="gemv")[0], "version='gemv' is not supported; only 'gemm' is"),
    "awq without zero points": (awq(zero_point=False)[0], "zero_point=False is not supported; only True is"),
    "floats": (compressed(format="float-quantized")[0], "format='float-quantized' is not supported"),
    "type": (changed(compressed(), type="float"), "group_0.*weights.type='float' is not supported; only 'int' is"),
    "six bits": (changed(compressed(), num_bits=6), "weights.num_bits=6 is not supported; only 4 or 8 is"),
    "block": (changed(compressed(), strategy="block"), "weights.strategy='block' is not supported"),
    "no group size": (changed(compressed(), group_size=None), "weights.group_size is missing"),
    "cache": (compressed(kv_cache_scheme={"num_bits": 8})[0], "kv_cache_scheme=.* is not supported"),
    "sparse": (compressed(sparsity_config={"format": "sparse-24"})[0], "sparsity_config.format='sparse-24' is not supported"),
    "rotations": (compressed(transform_config={"config_groups": {}})[0], "transform_config=.* is not supported"),
    "two groups": (compressed(config_groups={})[0], r"config_groups=\[\] is not supported"),
    "list": (gptq(dynamic=[1])[0], "dynamic=.* must be an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_hf({**DENSE.to_hf(), "quantization_config": config})


def change(name, array):
    return lambda tensors: tensors.update({f"{Q}.{name}": array})


SPOILT = {
    "part missing": ("gptq 4", lambda t: t.pop(f"{Q}.qzeros"), rf"tensor {Q}.qzeros is missing beside {Q}.qweight"),
    "order missing": ("gptq 4, in any order", lambda t: t.pop(f"{Q}.g_idx"), rf"tensor {Q}.g_idx is missing"),
    "zero points missing": ("packed 8, zero points", lambda t: t.pop(f"{Q}.weight_zero_point"), "weight_zero_point is missing"),
    "all missing": ("awq", lambda t: [t.pop(n) for n in list(t) if "proj" in n], "its weights are quantised.*no tensor ends in .qweight"),
    "module missing": ("awq", lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.")], f"missing tensors {Q}.weight"),
    "dtype": ("gptq 4", change("qweight", np.zeros((3, 32), np.int64)), rf"tensor {Q}.qweight is I64 and has to be I32"),
    "dims": ("gptq 4", change("qweight", np.zeros(96, np.int32)), rf"tensor {Q}.qweight has shape \[96\] and has to have 2 dims"),
    "rows": ("gptq 4", change("qweight", np.zeros((4, 32), np.int32)), rf"tensor {Q}.qzeros has shape \[3, 4\] and has to have \[4, 4\]"),
    "scales": ("awq", change("scales", np.zeros((2, 32), np.float16)), rf"tensor {Q}.scales has shape \[2, 32\] and has to have \[3, 32\]"),
    "shape": ("packed 4", change("weight_shape", np.array([32, 2**40])), rf"{Q}.weight_shape holds \[32, 1099511627776\] and has to fit"),
    "integers": ("integers", change("weight", np.zeros((32, 24), np.int32)), rf"tensor {Q}.weight is I32 and has to be I8"),
    "model": ("integers", change("weight", np.zeros((32, 16), np.int8)), r"has shape \[32, 16\], but config.json makes it \[32, 24\]"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_tensors_that_do_not_fit_are_named(tmp_path, case):
    form, spoil, message = SPOILT[case]
    write(tmp_path / "m", DENSE, FORMS[form])
    edit_tensors(tmp_path / "m", spoil)
    with pytest.raises(ValueError, match=message):
        hf.Reader(tmp_path / "m")


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_groups_that_do_not_exist_are_named(tmp_path, group):
    write(tmp_path / "m", DENSE, FORMS["gptq 4, in any order"])
    edit_tensors(tmp_path / "m", change("g_idx", np.full(24, group, np.int32)))
    with pytest.raises(ValueError, match=rf"tensor {Q}.g_idx names groups outside 0..2"):
        hf.Reader(tmp_path / "m").read("layers.1.attention.wq")


def test_a_group_size_that_does_not_divide_is_named(tmp_path):
    write(tmp_path / "m", DENSE, FORMS["packed 4"])
    edit_config(tmp_path / "m", quantization_config=compressed(group=7)[0])
    with pytest.raises(ValueError, match=r"has \d+ inputs, which group_size=7 does not divide"):
        hf.Reader(tmp_path / "m")
