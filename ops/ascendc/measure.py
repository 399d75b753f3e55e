"""On a machine with Ascend 910B and CANN: builds the AscendC kernels, compares each with the emulator, and times it.

    python -m ops.ascendc.measure --install=DIR   # all of that; prints the measured time of each kernel next to the prediction
    python -m ops.ascendc.measure --target=CPU    # the comparison alone, with the emulated kernels as MindSpore calls them

The comparison has small sizes and the numbers that the emulator computes. The times are at the sizes of Qwen3-8B and Qwen3-30B-A3B.
"""

import argparse
import os
import re
import sys
import time

import numpy as np

from ops.ascendc import build, clock

TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-6}  # of the largest number: sums in another order, and two roundings
TURNS = 20
WRITES = ("qwen_paged_write",)  # operators whose result is in their first input


def main():
    parser = argparse.ArgumentParser(description="Builds the AscendC kernels, compares them with the emulator and times them on Ascend.")
    parser.add_argument("--install", metavar="DIR", help="build the package into DIR first; without it, ASCEND_CUSTOM_OPP_PATH has one")
    parser.add_argument("--target", choices=("Ascend", "CPU"), default="Ascend", help="where MindSpore runs the kernels")
    parser.add_argument("--kernel", default="", help="only the kernels whose title has this text")
    args = parser.parse_args()
    if args.install:
        os.environ["ASCEND_CUSTOM_OPP_PATH"] = f"{build.install(args.install)}:{os.environ.get('ASCEND_CUSTOM_OPP_PATH', '')}"
    if args.target == "Ascend" and build.not_installed():
        raise RuntimeError(build.not_installed())
    import mindspore as ms  # after the path of the package is set

    ms.set_device(args.target)
    wrong = [title for title, case in clock.cases(clock.SMALL).items() if args.kernel in title and not _near(title, case)]
    if args.target == "Ascend":
        for title, case in clock.cases().items():
            if args.kernel in title:
                _time(title, case)
    if wrong:
        raise RuntimeError(f"kernels that differ from the emulator: {', '.join(wrong)}")


def _near(title, case):
    """Prints how far a kernel is from the emulator; returns whether it is near."""
    error = error_over_tolerance(case)
    near = error <= 1
    print(f"{title:34} {'as the emulator' if near else 'DIFFERS FROM THE EMULATOR'}; error over tolerance: {error:.2f}", flush=True)
    return near


def error_over_tolerance(case):
    """Runs a case of ops/ascendc/clock.py by MindSpore. Returns how far its outputs are from the emulator's, over the tolerance."""
    family, name, inputs, outputs, attrs, _ = case
    given = _numbers(inputs)
    expected = [(np.zeros(shape, np.uint16 if dtype == "bfloat16" else dtype), dtype) for shape, dtype in outputs]
    arrays = [(_bits(x, dtype), dtype) for x, dtype in given]
    clock.predict(build.emulated(family), name, arrays, expected, attrs, 2, clock.TIMED)
    expected += arrays[:1] if name in WRITES else []
    far = []
    for (a, dtype), b in zip(expected, _run(case, given)):
        a, b = _floats(a, dtype).astype(np.float64), b.astype(np.float64)
        far.append(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) / TOLERANCE.get(dtype, 1e-9))
    return float(np.max(far))


def _time(title, case):
    products, measured, predicted = case[-1], seconds(case), predicted_seconds(case)
    rate = f", {2e-12 * products / measured:.0f} TFLOP/s" if products else ""
    print(f"{title:34} measured {1e6 * measured:9.0f} us{rate}, predicted {1e6 * predicted:9.0f} us", flush=True)


def seconds(case):
    """Runs a case on the device. Returns the seconds of a call, the mean of TURNS."""
    import mindspore as ms

    run, tensors = _operator(case), _tensors(_numbers(case[2]))
    for _ in range(3):
        run(*tensors)
    ms.runtime.synchronize()
    begin = time.perf_counter()
    for _ in range(TURNS):
        run(*tensors)
    ms.runtime.synchronize()
    return (time.perf_counter() - begin) / TURNS


def predicted_seconds(case):
    """Returns the seconds that the emulator's clock predicts for a case on Ascend 910B."""
    family, name, inputs, outputs, attrs, _ = case
    return clock.predict(build.emulated(family), name, inputs, outputs, attrs)["seconds"]


def _numbers(inputs):
    """Returns [(float32 or int32 array, dtype name)]: integers as they are given, and small numbers where none are."""
    rng = np.random.default_rng(0)
    given = [(x, "int32") if isinstance(x, np.ndarray) else (rng.normal(0, 0.5, x[0]).astype(np.float32), x[1]) for x in inputs]
    return [(_floats(_bits(x, dtype), dtype), dtype) for x, dtype in given]


def _bits(x, dtype):
    """Returns the array as the emulator has it: of bfloat16 the upper halves of float32."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _floats(x, dtype):
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x


def _tensors(given):
    import mindspore as ms

    return [ms.Tensor(x).astype(getattr(ms, dtype)) for x, dtype in given]


def _operator(case):
    """Returns the operator as a function of tensors, as the ops of ops/ascendc call it."""
    import mindspore as ms

    from ops.ascendc.custom import kernel

    family, name, inputs, outputs, attrs, _ = case
    shapes, dtypes = tuple(shape for shape, _ in outputs), tuple(getattr(ms, dtype) for _, dtype in outputs)
    if len(outputs) == 1:
        shapes, dtypes = shapes[0], dtypes[0]
    text = (build.HOST / f"{family}.cpp").read_text()
    declared = re.search(rf"class {build.type_of(name)} .*?\n}};", text, re.S)[0]
    names = re.findall(r'Attr\("(\w+)"\)\.AttrType\(REQUIRED\)\.(\w+)\(\)', declared)
    values = {key: (float if kind == "Float" else int)(value) for (key, kind), value in zip(names, attrs or (), strict=True)}
    return kernel(family, name, len(inputs), lambda *_: shapes, lambda *_: dtypes, attrs=values)


def _run(case, given):
    tensors = _tensors(given)
    found = _operator(case)(*tensors)
    found = found if isinstance(found, tuple) else (found,)
    found += tuple(tensors[:1]) if case[1] in WRITES else ()
    import mindspore as ms

    return [(x.astype(ms.float32) if x.dtype == ms.bfloat16 else x).asnumpy() for x in found]


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
