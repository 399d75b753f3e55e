"""A profile of some steps of a run: MindSpore's trace, and a table of the time of each op.

MindSpore calls every C++ kernel of ours Custom. Which is which is in the compiled graph, so that is written out as it is compiled, read for
the names, and removed. The trace is for chrome://tracing or Perfetto.
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
PASS = "graph_build"  # the last one, whose names are those that run
NAMED = re.compile(r'reg_op_name: "(\w+)"')
FULL_NAME = re.compile(r"Fullname with scope: \((.+)\)")
HEAD = ("op", "calls a step", "ms a step", "share")


class Profile:
    """Of `steps`, "FIRST:LAST", counted from 1, both included, in the folder `workdir`/profile. Made before anything is compiled; used as a
    context around the run, with `around` for its step function."""

    def __init__(self, workdir, steps):
        self.folder, (self.first, self.last) = os.path.join(workdir, FOLDER), map(int, steps.split(":"))
        self.graphs, self.raw = os.path.join(self.folder, "graphs"), os.path.join(self.folder, "raw")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.raw)
        self.running, self.steps, self.seconds = None, 0, 0.0

    def __enter__(self):
        os.environ["MS_DEV_DUMP_IR_PASSES"] = PASS
        ms.set_context(save_graphs=1, save_graphs_path=self.graphs)  # the variable that is to replace this is read when MindSpore is loaded
        return self

    def around(self, step):
        """step(state, batch, lr, step from 0), watched."""

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
        """[(type, full name, calls, ms)] of all ops on the host."""
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
    """{full name in the graph: kernel} of our kernels, from the graphs that MindSpore has written there."""
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
    """[(op, calls a step, ms a step, share of the step's time)], the longest first; the last is what passed outside ops."""
    totals = {}
    for kind, full_name, calls, took in details:
        total = totals.setdefault(names.get(full_name, kind), [0, 0.0])
        total[0] += calls
        total[1] += took
    rows = [(op, calls / steps, took / steps, took / 1e3 / seconds) for op, (calls, took) in totals.items()]
    rows.sort(key=lambda row: -row[2])
    rest = 1e3 * seconds / steps - sum(row[2] for row in rows)
    return [*rows, ("(outside ops)", 0.0, rest, rest * steps / 1e3 / seconds)]
