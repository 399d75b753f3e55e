"""The context parallel benchmark: one long row over more and more ranks, in jobs one after the other; memory and time of a rank.

In each process of a job: python -m experiments.bench_context FOLDER CP ATTENTION SEQ_LEN STEPS, by experiments.launch.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments import layout
from experiments.bench_train import packed_batch
from experiments.bench_turns import held_mem_gib, peak_mem_gib, timed
from experiments.configs import common
from experiments.train import build_program
from parallel import collectives
from parallel.sharding import Sharding
from parallel.spec import init_params
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

MODEL = dict(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=384, tie_embeddings=True)
RANKS = (1, 2, 4)
ROOT = Path(__file__).parents[1]


def bench_context(options, ranks=RANKS):
    """Figures as a dict, cpN_... of N ranks. options: seq_len, cp_attention, steps, of which the first compiles and, unless it is the
    only one, is not timed.

    above_mem_gib: what the peak of the rank that needs most is above what it had before its first step, the compiler's part included.
    """
    figures = {"what": "context", "seq_len": options.seq_len, "cp_attention": options.cp_attention}
    for cp in ranks:
        with tempfile.TemporaryDirectory() as folder:
            job = [folder, cp, options.cp_attention, options.seq_len, options.steps]
            launch = [sys.executable, "-m", "experiments.launch", f"--nproc={cp}", f"--log_dir={folder}/logs", "--"]
            subprocess.run([*launch, "experiments.bench_context", *map(str, job)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]
        for name in ("above_mem_gib", "step_time_s"):
            figures[f"cp{cp}_{name}"] = max(each[name] for each in found)
        figures[f"cp{cp}_loss"] = found[0]["loss"]
    losses = [value for name, value in figures.items() if name.endswith("_loss")]
    figures["loss_difference"] = (max(losses) - min(losses)) / max(losses)
    return figures


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
    os.chdir(folder)  # MindSpore writes files where it runs
    rank_of_job(folder, int(cp), attention, *map(int, numbers))
