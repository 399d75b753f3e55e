"""The process that runs our side of a benchmark: python -m experiments.bench.ours, started by experiments/bench/peers.py."""

from experiments.bench.ours_serve import answers, serve_part
from experiments.bench.ours_train import load, train
from experiments.bench.turns import mem_mib, serve, timed
from ops import registry
from parallel.graph import runtime
from qwen3.engine import Engine
from qwen3.generate import generate, prefill

REQUESTS = 400  # short requests, to measure the growth of the engine's memory


def decode(job):
    """Returns (facts, step). A step times a prefill of the prompts, and a prefill with a greedy continuation."""
    (cfg, params), prompts, count = load(job), job["prompts"], job["new_tokens"]
    kernels = registry.choose({op: job["kernels"] for op in registry.OPS}, "CPU", cfg.compute_dtype)
    length = len(prompts[0]) + count
    if job.get("engine"):
        return _engine(Engine(params, cfg, slots=len(prompts), length=length, kernels=kernels), prompts, count)

    def read():
        logits, _ = prefill(params, prompts, cfg, length, kernels)
        return logits.asnumpy().argmax(-1)

    def write():
        return generate(params, prompts, cfg, count, kernels=kernels)

    def step():
        first, _ = timed(read)
        every, _ = timed(write)
        return {"prefill_s": first, "total_s": every}

    ids = write()
    return {"ids": ids}, step


def _engine(engine, prompts, count):
    """Returns (facts, step) of decode() with the engine. It also measures how much memory stays in use after many requests."""

    def write(prompts, count):
        return answers(engine, prompts, [count] * len(prompts))

    def step():
        first, _ = timed(write, prompts, 1)
        every, _ = timed(write, prompts, count)
        return {"prefill_s": first, "total_s": every}

    ids, short = write(prompts, count), [prompts[i % len(prompts)][: 1 + i % 16] for i in range(REQUESTS)]
    write(short[: REQUESTS // 4], 4)
    before = mem_mib()
    write(short, 4)
    return {"ids": ids, "served": {"requests": REQUESTS, "grown_mib": mem_mib() - before}}, step


if __name__ == "__main__":
    runtime.set_up()
    serve({"train": train, "decode": decode, "serve": serve_part})
