"""A profile of some steps of a run: MindSpore's trace, and a table of the time of each op.

MindSpore's profiler names each of our C++ kernels "Custom". The compiled graph has the real names, so MindSpore writes the graphs to files
while it compiles, the names are read from them, and the files are removed. Open the trace with chrome://tracing or Perfetto.
"""

import csv
import glob
import os
import re
import shutil
import time

import mindspore as ms
from mindspore import profiler

FOLDER, TRACE, TABLE = "profile", "trace_view.json", "ops.csv"
PASS = "graph_build"  # the last compiler pass, after which the names of ops are final
NAMED = re.compile(r'reg_op_name: "(\w+)"')
FULL_NAME = re.compile(r"Fullname with scope: \((.+)\)")
HEAD = ("op", "calls a step", "ms a step", "share")


class Profile:
    """Profiles some steps of a run into the folder `workdir`/profile. steps: "FIRST:LAST", counted from 1, both included.

    Create it before anything is compiled, use it as a context around the run, and wrap the step function in `around`.
    """

    def __init__(self, workdir, steps):
        self.folder, (self.first, self.last) = os.path.join(workdir, FOLDER), map(int, steps.split(":"))
        self.graphs, self.raw = os.path.join(self.folder, "graphs"), os.path.join(self.folder, "raw")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.raw)
        self.running, self.steps, self.seconds = None, 0, 0.0

    def __enter__(self):
        os.environ["MS_DEV_DUMP_IR_PASSES"] = PASS
        ms.set_context(save_graphs=1, save_graphs_path=self.graphs)  # MS_DEV_SAVE_GRAPHS is read only when MindSpore is imported
        return self

    def around(self, step):
        """Returns step(state, batch, lr, number from 0), which also starts and stops the profiler."""

        def watched(state, batch, rate, at):
            if self.running is None and self.first <= at + 1 <= self.last and not self.steps:
                self._start()
            began = time.perf_counter()
            out = step(state, batch, rate, at)
            if self.running is not None:
                self.steps += 1
                self.seconds += time.perf_counter() - began
                if at + 1 == self.last:
                    self._stop()
            return out

        return watched

    def _start(self):
        ms.set_context(save_graphs=0)
        activities = [profiler.ProfilerActivity.CPU]
        if ms.get_context("device_target") == "Ascend":
            activities.append(profiler.ProfilerActivity.NPU)
        self.running = profiler.profile(activities=activities, on_trace_ready=profiler.tensorboard_trace_handler(self.raw))
        self.running.start()

    def _stop(self):
        self.running.stop()
        self.running = None
        self._keep_trace()
        names = kernel_names(self.graphs)
        rows = table(self._details(), names, self.steps, self.seconds)
        with open(os.path.join(self.folder, TABLE), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([HEAD, *rows])
        print(f"profile    {self.steps} steps, {1e3 * self.seconds / self.steps:.1f} ms each; {self.folder} has {TRACE} and {TABLE}")
        for op, calls, took, share in rows[:12]:
            print(f"           {op:24} {calls:8.1f} calls {took:9.2f} ms {100 * share:5.1f} %")

    def _keep_trace(self):
        for path in glob.glob(os.path.join(self.raw, "**", TRACE), recursive=True):
            os.replace(path, os.path.join(self.folder, TRACE))

    def _details(self):
        """Returns [(type, full name, calls, ms)] of all ops that ran on the host."""
        out = []
        for path in glob.glob(os.path.join(self.raw, "**", "cpu_op_detail_info_*.csv"), recursive=True):
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    out.append((row["op_type"], row["full_op_name"], int(row["op_occurrences"]), float(row["op_total_time(ms)"])))
        return out

    def __exit__(self, *_):
        if self.running is not None:  # the run ended before the last of the steps
            self._stop()
        ms.set_context(save_graphs=0)
        os.environ.pop("MS_DEV_DUMP_IR_PASSES", None)
        shutil.rmtree(self.graphs, ignore_errors=True)
        shutil.rmtree(self.raw, ignore_errors=True)


def kernel_names(folder):
    """Returns {full name in the graph: kernel} of our kernels, from the graph files in a folder."""
    names = {}
    for path in glob.glob(os.path.join(folder, f"{PASS}*.ir")):
        kernel = None
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if found := NAMED.search(line):
                    kernel = found[1]
                elif kernel and (full := FULL_NAME.search(line)):
                    names[full[1]], kernel = kernel, None
    return names


def table(details, names, steps, seconds):
    """Returns [(op, calls a step, ms a step, share of the step's time)], the longest first. The last row is the time outside of ops."""
    totals = {}
    for kind, full_name, calls, took in details:
        total = totals.setdefault(names.get(full_name, kind), [0, 0.0])
        total[0] += calls
        total[1] += took
    rows = [(op, calls / steps, took / steps, took / 1e3 / seconds) for op, (calls, took) in totals.items()]
    rows.sort(key=lambda row: -row[2])
    rest = 1e3 * seconds / steps - sum(row[2] for row in rows)
    return [*rows, ("(outside ops)", 0.0, rest, rest * steps / 1e3 / seconds)]
