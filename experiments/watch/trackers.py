"""Sends a run's metrics to experiment trackers, beside metrics.jsonl and TensorBoard: watch.trackers="wandb,mlflow".

A tracker is a class with `id`, `log(step, numbers)` and `close()`; TRACKERS has them by name; a new one is a class and a line there. Each
imports its library when it is made. None uses the network, unless the user's own environment asks for it (WANDB_MODE, MLFLOW_TRACKING_URI).

A tracker that fails never ends a run: rank 0 prints one warning and goes on without it.
"""

import importlib.util
import json
import os
import sys
import time

from experiments.watch.records import flat
from parallel.checkpoint.files import write_json

IDS = "trackers.json"  # in a run's folder: {tracker: id of its run}, by which a resumed run goes on with the same ones


class Wandb:
    """Weights & Biases. Offline, each start of a run writes a folder WORKDIR/wandb/offline-run-*, all with the id of one W&B run."""

    library = "wandb"

    def __init__(self, workdir, project, config, known):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would report its own errors over the network
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        quiet = wandb.Settings(silent=True, console="off")  # console: it would replace this process's standard output
        self.run = wandb.init(
            dir=workdir,
            project=project,
            name=_name(workdir),
            config=config,
            id=known,
            mode=mode,
            resume="allow" if known and mode == "online" else None,
            settings=quiet,
        )
        self.id = self.run.id

    def log(self, step, numbers):
        self.run.log(numbers, step=int(step))

    def close(self):
        self.run.finish()


class MLflow:
    """MLflow, on files in WORKDIR/mlruns, which MLflow opens only with MLFLOW_ALLOW_FILE_STORE=true."""

    library = "mlflow"

    def __init__(self, workdir, project, config, known):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        files = "file://" + os.path.abspath(os.path.join(workdir, "mlruns"))
        self.client, self.metric = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or files), Metric
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(project)
        self.id = self.client.create_run(number, run_name=_name(workdir)).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in config.items()]
        for first in range(0, len(params), 100):  # MLflow takes no more than 100 at a time, of 500 characters in old releases
            self.client.log_batch(self.id, params=params[first : first + 100])

    def log(self, step, numbers):
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[self.metric(name, float(value), now, int(step)) for name, value in numbers.items()])

    def close(self):
        self.client.set_terminated(self.id)


TRACKERS = {"wandb": Wandb, "mlflow": MLflow}


def _name(workdir):
    return os.path.basename(os.path.abspath(workdir))


def parse(text):
    """Returns the names in watch.trackers, such as "wandb,mlflow". Raises ValueError for a name that is no tracker, or stands twice."""
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    for name in names:
        if name not in TRACKERS or names.count(name) > 1:
            why = "stands twice" if name in TRACKERS else f"is no tracker; use some of {','.join(TRACKERS)}, or '' for none"
            raise ValueError(f"watch.trackers={text!r}: {name!r} {why}")
    return names


def check(text):
    """Raises ValueError for a tracker whose library is not installed. For mains that train."""
    for name in parse(text):
        if importlib.util.find_spec(TRACKERS[name].library) is None:
            raise ValueError(f"watch.trackers={text!r}: {name} is not installed; pip install -e '.[trackers]', or leave it out")


class Trackers:
    """The trackers of a run, opened in its folder by the rank that writes. Nothing here raises for a tracker's failure.

    watch: the config's section. config: the whole config as nested dicts. begun: the step from which a resumed run goes on; a run that
    starts anew gets new tracker runs.
    """

    def __init__(self, workdir, watch, config, begun=0):
        self.open, path = {}, os.path.join(workdir, IDS)
        ids = _read(path) if begun else {}
        for name in parse(watch.trackers):
            try:
                self.open[name] = TRACKERS[name](workdir, watch.project, flat(config), ids.get(name))
                ids[name] = self.open[name].id
            except Exception as error:
                _warn(name, error)
        if ids:
            write_json(path, ids)

    def log(self, step, numbers):
        """Sends the numbers of a step, {name: number}."""
        self._each(lambda tracker: tracker.log(step, numbers))

    def close(self):
        self._each(lambda tracker: tracker.close())

    def _each(self, do):
        for name, tracker in list(self.open.items()):
            try:
                do(tracker)
            except Exception as error:
                _warn(name, error)
                del self.open[name]


def _warn(name, error):
    reason = (str(error).splitlines() or [""])[0]
    print(f"warning: {name} failed, and the run goes on without it: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)


def _read(path):
    """Returns the ids of an earlier start; none if the file is missing or damaged, so that the trackers begin new runs."""
    try:
        with open(path, encoding="utf-8") as file:
            ids = json.load(file)
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in ids.items() if isinstance(value, str)} if isinstance(ids, dict) else {}
