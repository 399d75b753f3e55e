"""The stage `speed`: how fast this machine trains and decodes, and each kernel beside its roofline. Nothing is judged but that it runs."""

import functools
import importlib
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np

from experiments import flags as command_line
from experiments.accept import tiny
from experiments.accept.outcome import Failed, NotHere
from experiments.bench.cases import cases as bench_cases
from experiments.bench.ops import bench_case, copy_bandwidth
from experiments.bench.train import packed_batch
from experiments.layout import check as layout
from experiments.layout import memory as layout_memory
from experiments.layout.sharding import sharding_of
from experiments.train import weights
from experiments.train.program import build_program
from experiments.watch import metrics
from ops.ascendc import build as ascendc
from ops.ascendc import clock, measure
from parallel import host_memory
from parallel.graph.jit import in_device_memory
from parallel.mesh import WORLD
from parallel.specs import init_params
from parallel.trees import tree_leaves, tree_map
from qwen3.config import SIZES
from qwen3.generate import generate, prefill
from qwen3.model import param_specs

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ("tiny", "tiny_moe")
STEPS, WARM_UP = 10, 3
PROMPT, NEW_TOKENS, BATCHES = 64, 64, (1, 16)
DECODED = {"CPU": ("tiny", "tiny-moe"), "Ascend": ("tiny", "qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b")}
QUICK_KERNELS = ("rms_norm", "attention", "matmul", "grouped_matmul")
PREDICTED = ("RMS norm", "SwiGLU", "norm and rotary of q", "top-k")  # those that the emulator times in seconds at their full size
SOURCE = "predicted by the emulator's clock for Ascend 910B2, see docs/ops.md; not measured"


def speed_checks(job):
    target = ms.get_context("device_target")
    names = TINY if target == "CPU" else tuple(sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem.startswith(("tiny", "qwen"))))
    models = DECODED[target]
    if job.quick:
        names, models = names[:1] if target == "CPU" else TINY, models[:1]
    checks = {f"train {name}": partial(_trains, job, name) for name in names}
    for batch in BATCHES:
        checks |= {f"decode {model}, {batch} row{'s' * (batch > 1)}": partial(_decodes, job, model, batch) for model in models}
    if target == "CPU":
        kernels = {name: case for name, case in bench_cases().items() if not case.alone and (name in QUICK_KERNELS or not job.quick)}
        checks |= {f"kernel {name}": partial(_kernel, job, case) for name, case in kernels.items()}
    titles = [title for title in clock.cases() if target != "CPU" or title in PREDICTED[: 1 if job.quick else None]]
    return {**checks, **{f"Ascend kernel {title}": partial(_ascend_kernel, job, title) for title in titles}}


def _only_rank_0(job):
    if job.world > 1:
        raise NotHere("it is measured in one process; start the kit without experiments.launch, with --stages=speed")


def _trains(job, name):
    """Trains a shipped config on made-up tokens, in its own layout where that has the job's number of ranks, else with the rest in dp."""
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    target = ms.get_context("device_target")
    cfg = command_line.model_config(config, target)
    if job.quick:
        config.train.batch_size, config.train.seq_len = 4 * job.world, 64
    ranks = math.prod(config.parallel[axis] for axis in WORLD)
    if ranks != job.world:
        config.parallel.dp = -1
    try:
        config.parallel.update(layout.check(config, cfg, job.world))
    except ValueError as error:
        raise NotHere(f"the layout does not fit {job.world} rank{'s' * (job.world > 1)}: {error}") from None
    mesh, parallel = layout.mesh(cfg, config.parallel, job.rank), config.parallel
    sharding = sharding_of(config, cfg, mesh, device=target)
    needed, have = sum(layout_memory.least(config, cfg, sharding).values()), _memory(target)
    if needed > have:
        raise NotHere(f"a rank needs at least {needed / 2**30:.1f} GiB, and has {have / 2**30:.1f}")
    program = build_program(cfg, config, sharding)
    state, times = program.init(weights.random(cfg, config)), []
    rows = config.train.batch_size // mesh.dp
    batch = packed_batch(cfg.vocab_size, rows, config.train.seq_len)
    for at in range(WARM_UP + (2 if job.quick else STEPS)):
        began = time.perf_counter()
        state, found = program.step(state, batch, 1e-4, at)
        times.append(time.perf_counter() - began)
    if not math.isfinite(found["loss"]):
        raise Failed(f"the loss is {found['loss']} after {len(times)} steps")
    seconds, tokens = float(np.median(times[WARM_UP:])), config.train.batch_size * config.train.seq_len
    peak = metrics.mesh_peak_flops(mesh, cfg.compute_dtype)
    mfu = tokens / seconds * metrics.flops_per_token(cfg, config.train.seq_len) / peak
    facts = {"tokens/s": tokens / seconds, "step s": seconds, "MFU": mfu, "matmul peak GFLOP/s": peak / 1e9}
    return {**facts, "layout": tiny.title(parallel.to_dict()), "dtype": cfg.compute_dtype}


def _memory(target):
    if target == "CPU":
        return host_memory.machine_bytes() or math.inf
    return ms.hal.get_device_properties(0).total_memory if ms.hal.device_count(target) else math.inf


@functools.cache
def _decoder(model, target):
    cfg = SIZES[model].replace(**({"param_dtype": "float32", "compute_dtype": "float32"} if target == "CPU" else {}))
    size = sum(math.prod(spec.shape) for spec in tree_leaves(param_specs(cfg))) * (4 if cfg.param_dtype == "float32" else 2)
    if 1.2 * size > _memory(target):
        raise NotHere(f"its weights are {size / 2**30:.1f} GiB, and there are {_memory(target) / 2**30:.1f}")
    return cfg, in_device_memory(tree_map(ms.Tensor, init_params(param_specs(cfg), 0)))


def _decodes(job, model, batch):
    """Continues prompts greedily, as experiments.bench --what=decode does. The weights are random."""
    _only_rank_0(job)
    cfg, params = _decoder(model, ms.get_context("device_target"))
    new_tokens = 16 if job.quick else NEW_TOKENS
    prompts = np.random.default_rng(0).integers(1, cfg.vocab_size, (batch, PROMPT)).tolist()
    first, whole = [], []
    for _ in range(2 if job.quick else 4):  # the first compiles
        began = time.perf_counter()
        prefill(params, prompts, cfg, PROMPT + new_tokens)[0].asnumpy()
        first.append(time.perf_counter() - began)
        began = time.perf_counter()
        generate(params, prompts, cfg, new_tokens)
        whole.append(time.perf_counter() - began)
    prefill_s, total_s = min(first[1:]), min(whole[1:])
    rate = batch * (new_tokens - 1) / max(total_s - prefill_s, 1e-9)
    return {"decoded tokens/s": rate, "prefill ms": 1e3 * prefill_s, "rows": batch, "prompt": PROMPT, "new tokens": new_tokens}


@functools.cache
def _peaks():
    return {"matmul_gflops": metrics.peak_flops() / 1e9, "copy_gb_per_s": copy_bandwidth() / 1e9}


def _kernel(job, case):
    """Times a C++ kernel. Its roofline is the larger of its operations at the measured rate of products and its bytes at that of copies."""
    _only_rank_0(job)
    peaks, steps = _peaks(), 3 if job.quick else 10
    found = bench_case(case, SimpleNamespace(kernels="cpu", steps=steps), peaks)
    facts = {}
    for kind, word in (("forward", "forward"), ("forward_backward", "with gradient")):
        if f"{kind}.cpu_s" in found:
            seconds = found[f"{kind}.cpu_s"]
            least = max((found[f"{kind}.flop"] or 0) / peaks["matmul_gflops"], found[f"{kind}.bytes"] / peaks["copy_gb_per_s"]) / 1e9
            facts |= {f"{word} us": 1e6 * seconds, f"{word} roofline us": 1e6 * least, f"{word} over roofline": seconds / max(least, 1e-12)}
    if not facts:
        raise NotHere("it has no C++ kernel that runs here")
    return facts


def _ascend_kernel(job, title):
    """The time that the emulator predicts and, on an NPU, the time that was measured."""
    _only_rank_0(job)
    from ops import build

    if build.compiler() is None:
        raise NotHere("there is no g++, so the emulator cannot be built")
    case = clock.cases()[title]
    _, _, inputs, outputs, _, products = case
    least, bound = clock.roofline(inputs, outputs, products)
    predicted = measure.predicted_seconds(case)
    facts = {"predicted us": 1e6 * predicted, "roofline us": 1e6 * least, "bound by": bound, "prediction": SOURCE}
    if ms.get_context("device_target") == "CPU":
        return facts
    if lacks := ascendc.not_installed():
        raise NotHere(lacks)
    measured = measure.seconds(case)
    return {"measured us": 1e6 * measured, "measured over predicted": measured / predicted, "over roofline": measured / least, **facts}
