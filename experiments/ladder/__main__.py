"""Trains models of growing size and predicts the loss of the largest one: python -m experiments.ladder --config=FILE --workdir=DIR

FILE has LADDER beside get_config(), see experiments/ladder/rungs.py. Each rung is a run of experiments.pretrain in a folder of its own. The
same command continues a ladder that stopped: finished rungs are not trained again. From the fourth rung on, the loss of a rung is predicted
from the rungs below it, and written to DIR/predictions.json, before the rung is trained. At the end DIR/ladder.json has sizes, losses and
errors.
"""

import json
import os

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.sweep import sweeps
from experiments.watch.records import METRICS, read_records
from parallel.checkpoint.files import write_json

FLAGS = flags.FLAGS
PREDICTIONS, RESULT = "predictions.json", "ladder.json"


def define_flags():
    flags.DEFINE_string("config", None, "a file with get_config() and LADDER")
    flags.DEFINE_string("workdir", None, "folder of the ladder, with one for each rung")
    number_flags.integer("nproc", 1, "processes of each run, started by experiments.launch", 1, number_flags.MOST_PROCESSES)
    flags.DEFINE_float("noise", 0.01, "the standard deviation of a loss over seeds, in nats, for the band of a prediction", 0.0)


def main(_):
    sweeps.check_given(FLAGS.config, FLAGS.workdir, "a file with LADDER", "a folder for the ladder")
    from experiments.ladder import rungs
    from experiments.sweep.jobs import Sweep
    from experiments.sweep.sweeps import Run

    ladder = rungs.load(FLAGS.config)
    sweep = Sweep(FLAGS.config, FLAGS.workdir, "experiments.pretrain", (), FLAGS.nproc)
    climbed = []
    for depth in ladder.depths:
        run = Run(f"depth={depth}", rungs.overrides(ladder, depth))
        config = command_line.resolved(sweep.target(run), FLAGS.nproc)
        cfg = command_line.model_config(config, "any")
        run.overrides["train.steps"] = rungs.steps(ladder, cfg, config.train.seq_len)
        climbed.append(climb(sweep, run, rungs.parameters(cfg), climbed, FLAGS.noise))
        write_json(os.path.join(FLAGS.workdir, RESULT), climbed)
    worst = climbed[-1]
    print(f"ladder     the loss of the last rung was predicted within {abs(worst['error']):.1%}")


def climb(sweep, run, size, below, noise):
    """Predicts the loss of a rung from those below it, trains it unless it is finished, and returns its row of the result. A prediction
    that is on the disk stays as it is: it was made before the rung was trained."""
    from experiments.ladder import fit, rungs
    from experiments.sweep import jobs

    row = {"rung": run.name, "parameters": size, "steps": run.overrides["train.steps"]}
    if len(below) >= rungs.MIN_RUNGS - 1:
        made = _predictions(sweep.workdir)
        if run.name not in made:
            if os.path.exists(os.path.join(sweep.folder(run), "finished.json")):
                raise ValueError(f"{sweep.folder(run)} is finished, and {PREDICTIONS} lacks it; remove that folder, or put the file back")
            made[run.name] = fit.predict([r["parameters"] for r in below], [r["loss"] for r in below], size, noise)
            os.makedirs(sweep.workdir, exist_ok=True)
            write_json(os.path.join(sweep.workdir, PREDICTIONS), made)
        row["prediction"] = made[run.name]
        print("predict    {rung}: {loss:.3f} ({low:.3f} to {high:.3f})".format(rung=run.name, **made[run.name]), flush=True)
    if jobs.run_all(sweep, [run], 1):
        raise ValueError(f"{run.name} failed; {os.path.join(sweep.workdir, jobs.LOGS, run.name)}.log says why; the same command goes on")
    row["loss"] = final_loss(sweep.folder(run))
    print(f"rung       {run.name}: {size:,} parameters in layers, {row['steps']} steps, held-out loss {row['loss']:.3f}", flush=True)
    if "prediction" in row:
        row["error"] = row["prediction"]["loss"] / row["loss"] - 1
        print(f"error      {run.name}: {row['error']:+.2%} of its loss", flush=True)
    return row


def final_loss(folder):
    """Returns the last held-out loss of a finished run, in nats a token."""
    found = [record["final_loss"] for record in read_records(os.path.join(folder, METRICS)) if "final_loss" in record]
    if not found:
        raise ValueError(f"{folder}/{METRICS} has no final_loss; the ladder needs data.held_out above 0")
    return found[-1]


def _predictions(workdir):
    path = os.path.join(workdir, PREDICTIONS)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


if __name__ == "__main__":
    command_line.run(main, define_flags, is_rank=False)
