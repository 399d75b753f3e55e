"""The stages `package` and `ops`: our kernels for Ascend, and every implementation of every op against its reference."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np

from experiments.accept.cases import TOLERANCES, cases
from experiments.accept.outcome import Failed, NotHere
from ops import registry
from ops.ascendc import build as ascendc
from ops.ascendc import clock, measure

QUICK_KERNELS = ("RMS norm", "SwiGLU", "rotary of q")
QUICK_OPS = ("rms_norm", "rms_norm.add", "swiglu", "matmul", "attention", "cross_entropy", "routing.top_k", "grouped_matmul", "adamw")


def package_checks(job):
    titles = [title for title in clock.cases(clock.SMALL) if not job.quick or title in QUICK_KERNELS]
    return {"built by CANN": partial(_built, job), **{title: partial(_as_the_emulator, job, title) for title in titles}}


def _built(job):
    """Builds the operator package into the folder from which all later stages take it."""
    if lacks := ascendc.missing("package"):
        raise NotHere(lacks)
    return {"CANN": ascendc.version(), "operators": sum(map(len, ascendc.families().values())), "package": ascendc.install(job.package)}


def _as_the_emulator(job, title):
    """Runs a kernel as MindSpore calls it, on the device or emulated on CPU, and compares it with the emulator called directly."""
    from ops import build

    if build.compiler() is None:
        raise NotHere("there is no g++, so the emulator cannot be built")
    vendor = os.path.join(job.package, "vendors", ascendc.VENDOR)
    if os.path.isdir(vendor):
        os.environ["ASCEND_CUSTOM_OPP_PATH"] = vendor
    import mindspore as ms

    target = ms.get_context("device_target")
    if target == "Ascend" and (lacks := ascendc.not_installed()):
        raise NotHere(lacks)
    error = measure.error_over_tolerance(clock.cases(clock.SMALL)[title])
    facts = {"error over tolerance": error, "ran": "on the device" if target == "Ascend" else "emulated, as a MindSpore op on CPU"}
    if not error <= 1:
        raise Failed(f"it differs from the emulator by {error:.3g} times its tolerance", facts)
    return facts


def ops_checks(job):
    import mindspore as ms

    target, wanted = ms.get_context("device_target"), {}
    for name, case in cases().items():
        for implementation in implementations(case, target):
            for dtype in case.dtypes:
                if not job.quick or (name in QUICK_OPS and dtype == "float32"):
                    wanted[f"{name}, {implementation}, {dtype}"] = (name, implementation, dtype)
    expected = Expected(os.path.join(job.scratch, "expected.npz"), sorted({(name, dtype) for name, _, dtype in wanted.values()}), target)
    checks = {title: partial(_against_reference, expected, *each, target) for title, each in wanted.items()}
    return checks if target == "CPU" else {"references, computed on CPU": expected.compute, **checks}


def implementations(case, target):
    """Returns the implementations of a case that this target may have. On CPU the reference is what judges, so it is not judged."""
    names = ("cpu", "ascendc") if target == "CPU" else ("reference", "vendor", "ascendc")
    return [name for name in names if _factory(case, name)]


def _factory(case, implementation):
    if implementation == "ascendc" and case.op not in ascendc.families():
        return None
    if implementation == "vendor" and not hasattr(importlib.import_module(f"ops.{case.op}"), "vendor_missing"):
        return None
    module = importlib.import_module(f"ops.ascendc.{case.op}" if implementation == "ascendc" else f"ops.{case.op}")
    return getattr(module, f"{implementation}_{case.function}" if case.function else implementation, None)


def _against_reference(expected, name, implementation, dtype, target):
    case = cases()[name]
    check_available(case, implementation, dtype, target)
    want = expected.of(name, dtype)
    if empty := [key for key, value in want.items() if value.dtype.kind == "f" and not value.any()]:
        raise Failed(f"the reference gives only zeros, so it can judge nothing: {', '.join(empty)}")
    found = _results_here(case, implementation, dtype, target)
    tolerance, facts, wrong = dict(zip(("value", "gradient"), TOLERANCES[dtype])), {}, []
    assert list(found) == list(want), (list(found), list(want))
    for key, value in found.items():
        kind = key.split()[0]
        error = error_of(want[key], value)
        facts[kind] = max(facts.get(kind, 0.0), error)
        if not error <= (tolerance[kind] if want[key].dtype.kind == "f" else 0):
            wrong.append(f"{key}: error {error:.3g}")
    facts.update({f"tolerance of {kind}s": tolerance[kind] for kind in tolerance if kind in facts})
    if wrong:
        raise Failed(f"it differs from the reference; {'; '.join(wrong)}", facts)
    return facts


def _results_here(case, implementation, dtype, target):
    """Returns results(); raises NotHere for an emulated kernel beside which MindSpore needs an op that it lacks on CPU in this dtype."""
    try:
        return results(case, implementation, dtype)
    except TypeError as error:
        lacking = re.search(r"Select CPU operator\[(\w+)\] fail! Unsupported data type", str(error))
        if target == "CPU" and dtype == "bfloat16" and lacking:
            raise NotHere(f"MindSpore has no {lacking[1]} of bfloat16 on CPU, which is needed beside the emulated kernel") from None
        raise


def check_available(case, implementation, dtype, target):
    """Raises NotHere with the registry's reason if an implementation cannot be used here in a dtype."""
    use = dict(case.more)
    asked = {case.op: implementation}
    if case.op == "routing" and not use.pop("padded", True):  # blocks of one row, as this implementation's product has them
        asked["grouped_matmul"] = implementation
    try:
        registry.choose(asked, target, dtype, **use)
    except ValueError as error:
        raise NotHere(str(error).split("; use --config")[0]) from None


def error_of(want, found):
    """Returns max|a - b| / max|a|: infinity for another shape, or where one has a NaN or infinity that the other has not. Of integers, the
    share that differs."""
    a, b = np.asarray(want, np.float64), np.asarray(found, np.float64)
    if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
        return float("inf")
    if np.asarray(want).dtype.kind != "f":
        return float((a != b).mean()) if a.size else 0.0
    whole = np.isfinite(a)
    if (a[~whole] != b[~whole]).any() and not np.isnan(a[~whole]).all():
        return float("inf")
    largest, difference = np.abs(a[whole]).max(initial=0), np.abs(a[whole] - b[whole]).max(initial=0)
    return float(difference / largest) if largest else (0.0 if difference == 0 else float("inf"))


class Expected:
    """The values and gradients of the references in float32 on CPU, of inputs that are rounded to a dtype.

    path: a file for them, which a process on CPU writes if this one is on another device. wanted: [(name of the case, dtype)].
    """

    def __init__(self, path, wanted, target):
        self.path, self.wanted, self.target, self._found = path, wanted, target, {}

    def of(self, name, dtype):
        """Returns {"value 0": array, ..., "gradient 0": array, ...}."""
        if (name, dtype) not in self._found:
            if self.target == "CPU":
                self._found[name, dtype] = results(cases()[name], "reference", "float32", rounded=dtype)
            else:
                self.compute()
        return self._found[name, dtype]

    def compute(self):
        """Computes all in a process on CPU, unless an earlier process of the stage has."""
        if not os.path.exists(self.path):
            compute_on_cpu("experiments.accept.kernels", self.path, json.dumps(self.wanted))
        with np.load(self.path, allow_pickle=False) as found:
            for name, dtype, keys in json.loads(str(found["names"])):
                self._found[name, dtype] = {key: found[f"{name}|{dtype}|{key}"] for key in keys}
        return {"cases": len(self._found)}


def compute_on_cpu(module, *arguments):
    """Runs `python -m module arguments`, which computes references on CPU, and raises RuntimeError if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the references could not be computed on CPU:\n{done.stderr[-2000:]}")


def results(case, implementation, dtype, rounded=None):
    """Runs a case. Returns {"value i": the i-th result, "gradient i": that of the i-th input} as float32 and int32 arrays.

    Gradients are of a weighted sum of all results of floats. rounded: the dtype to which inputs and weights are rounded first.
    """
    import mindspore as ms

    op = (case.make or (lambda factory: factory()))(_factory(case, implementation))
    if case.op == "sampling" and implementation == "reference":  # it runs on the host, on numpy arrays
        return {"value 0": op(*case.others)}
    inputs = tuple(_as(x, rounded or dtype, dtype) for x in case.inputs)
    others = tuple(ms.Tensor(x) for x in case.others)
    out = _called(op, case, inputs, others)
    found = {f"value {i}": _host(x) for i, x in enumerate(out)}
    if case.gradient and inputs:
        floats = tuple(i for i, x in enumerate(out) if x.dtype in (ms.float32, ms.float16, ms.bfloat16))
        weights = tuple(_as(_weights(out[i].shape), rounded or dtype, "float32") for i in floats)
        grads = _gradients(op, inputs, others, weights, floats, len(out))
        found.update({f"gradient {i}": _host(x) for i, x in enumerate(grads)})
    return found


def _as(x, rounded, dtype):
    """Returns a float32 array as a tensor of a dtype, rounded first to another."""
    import mindspore as ms
    import ml_dtypes

    x = x.astype({"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[rounded]).astype(np.float32)
    return ms.Tensor(x).astype(getattr(ms, dtype))


def _weights(shape):
    return np.cos(np.arange(int(np.prod(shape)), dtype=np.float32)).reshape(shape)


def _called(op, case, inputs, others):
    """Calls an op: compiled, as models do; eagerly where it changes arguments, which a graph would copy."""
    from parallel.graph.jit import jit

    def values(inputs, others):
        return op(*inputs, *others)

    out = (values if case.in_place else jit(values))(inputs, others)
    return out if isinstance(out, tuple) else (out,)


def _gradients(op, inputs, others, weights, floats, count):
    import mindspore as ms
    from mindspore import ops

    from parallel.step import value_and_grad

    n, cast = len(floats), ops.Cast()  # the sum is in float32: CPU has no product of bfloat16

    def of_one(inputs, others, weights):
        return (cast(op(*inputs, *others), ms.float32) * weights[0]).sum()

    def of_several(inputs, others, weights):
        out = op(*inputs, *others)
        total = (cast(out[floats[0]], ms.float32) * weights[0]).sum()
        for i in range(1, n):
            total += (cast(out[floats[i]], ms.float32) * weights[i]).sum()
        return total

    _, grads = value_and_grad(of_several if count > 1 else of_one, compiled=True)(inputs, others, weights)
    return grads


def _host(x):
    import mindspore as ms

    return (x.astype(ms.float32) if x.dtype in (ms.bfloat16, ms.float16) else x).asnumpy()


def main(path, wanted):
    """Writes the references' results on CPU to a file: {case|dtype|key: array}, and "names", a JSON list of (case, dtype, keys)."""
    import mindspore as ms

    ms.set_device("CPU")
    arrays, names = {}, []
    for name, dtype in json.loads(wanted):
        found = results(cases()[name], "reference", "float32", rounded=dtype)
        names.append((name, dtype, list(found)))
        arrays.update({f"{name}|{dtype}|{key}": value for key, value in found.items()})
    aside = f"{path}.new.npz"
    np.savez(aside, names=json.dumps(names), **arrays)
    os.replace(aside, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
