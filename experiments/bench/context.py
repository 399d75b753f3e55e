"""The context parallel benchmark: memory and time of a rank for one long row, sharded over 1, 2 and 4 ranks, in one job after the other.

experiments.launch starts each process of a job: python -m experiments.bench.context FOLDER CP ATTENTION SEQ_LEN STEPS
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.bench.train import packed_batch
from experiments.bench.turns import held_mem_gib, peak_mem_gib, timed
from experiments.configs import common
from experiments.layout import check as layout
from experiments.train.program import build_program
from parallel import collectives
from parallel.sharding import Sharding
from parallel.specs import init_params
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

MODEL = dict(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=384, tie_embeddings=True)
RANKS = (1, 2, 4)
SHORT = 256  # tokens of a row so short that compiling the graph needs most of the memory
ROOT = Path(__file__).parents[2]


def bench_context(options, ranks=RANKS):
    """Returns figures as a dict; those of N ranks begin with cpN_. options: seq_len, cp_attention, steps. The first step compiles and is
    not timed, unless it is the only one.

    above_mem_gib: a rank's peak memory minus its memory before the first step, including the compiler's memory; the largest over ranks.
    row_mem_gib: above_mem_gib minus that of a job with a row of SHORT tokens.
    """
    figures = {"what": "context", "seq_len": options.seq_len, "cp_attention": options.cp_attention}
    for cp in ranks:
        short, found = (_job(cp, options.cp_attention, length, steps) for length, steps in ((SHORT, 1), (options.seq_len, options.steps)))
        figures[f"cp{cp}_above_mem_gib"] = most = _most(found, "above_mem_gib")
        figures[f"cp{cp}_row_mem_gib"] = most - _most(short, "above_mem_gib")
        figures[f"cp{cp}_step_time_s"], figures[f"cp{cp}_loss"] = _most(found, "step_time_s"), found[0]["loss"]
    losses = [value for name, value in figures.items() if name.endswith("_loss")]
    figures["loss_difference"] = (max(losses) - min(losses)) / max(losses)
    return figures


def _job(cp, attention, seq_len, steps):
    """Runs a job. Returns the figures of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "experiments.launch", f"--nproc={cp}", f"--log_dir={folder}/logs", "--"]
        job = [*launch, "experiments.bench.context", *map(str, (folder, cp, attention, seq_len, steps))]
        subprocess.run(job, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]


def _most(found, name):
    return max(each[name] for each in found)


def rank_of_job(folder, cp, attention, seq_len, steps):
    rank, _ = collectives.start()
    cfg, config = Qwen3Config(**MODEL), common.get_config()
    config.parallel.cp, config.parallel.cp_attention = cp, attention
    program = build_program(cfg, config, Sharding(layout.mesh(cfg, config.parallel, rank)))
    state, batch = program.init(init_params(param_specs(cfg), 0)), packed_batch(cfg.vocab_size, 1, seq_len)
    held, times = held_mem_gib(), []
    for at in range(steps):
        took, (state, metrics) = timed(program.step, state, batch, config.optim.lr, at)
        times.append(took)
    figures = {"above_mem_gib": peak_mem_gib() - held, "step_time_s": min(times[1:] or times), "loss": metrics["loss"]}
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    folder, cp, attention, *numbers = sys.argv[1:]
    os.chdir(folder)  # MindSpore writes files to the current folder
    rank_of_job(folder, int(cp), attention, *map(int, numbers))
