"""Compares the compiled step of a dry run with the specs and signatures, and reports it in figures and tables."""

import math
import re
from collections import Counter
from typing import NamedTuple

from experiments.dryrun.steps import rank_placements
from experiments.layout import traffic as layout_traffic
from experiments.train.optim_rules import MOMENTS
from parallel.placement import local_shape, place
from parallel.simulation import dryrun
from parallel.simulation.dryrun import Exchange
from parallel.simulation.timeline import ITEMSIZE, Machine, timeline
from parallel.trees import tree_leaves
from qwen3.model import param_specs

GIB = 2**30
HELD = ("params_bytes", "gradients_bytes", "optimizer_bytes", "cache_bytes")
TIMES = ("step_s", "compute_s", "sent_s", "exposed_s")
LARGEST = 12  # number of source lines in the list of the largest buffers
# kind or name of a Block -> its description in the report
NAMES = {
    "input": "parameters, state and other inputs from the host",
    "weight": "parameters and moments",
    "constant": "constants of the graph",
    "UpdateOutputDeviceAddress": "results of graphs",
}


class Expected(NamedTuple):
    """What a layout expects of a compiled step.

    held: {kind: {path: local shape}}, from the specs. calls: Counter of the Exchanges (collectives) of a training step, from the
    signatures; None for generation. spare: Counter of those calls that a graph may leave out, because nothing uses their results.
    """

    held: dict
    calls: Counter | None = None
    spare: Counter = Counter()


def expected(config, cfg, sharding, step):
    """Returns the Expected of a layout, for a step "train" or "generate"."""
    if step != "train":
        return Expected({"params": _shapes(sharding.mesh, place(sharding, param_specs(cfg)), "used")})
    (trainable, frozen), mesh = rank_placements(config, cfg, sharding), sharding.mesh
    params = {**_shapes(mesh, trainable, "stored"), **_shapes(mesh, frozen or (), "stored")}
    moments = {}
    for kind in MOMENTS[config.optim.name]:
        moments.update(_shapes(mesh, trainable, "state", f"{kind}."))
    held = {"params": params, "optimizer": moments}
    if sharding.lowering == "manual":  # with the other lowering, gradients stay inside the graph
        held["gradients"] = _shapes(mesh, trainable, "state")
    if mesh.pp > 1:
        calls, spare = layout_traffic.pipeline_calls(config, cfg, sharding)
    else:
        calls, spare = layout_traffic.step_calls(config, cfg, sharding), layout_traffic.spare_calls(config, cfg, sharding)
    return Expected(held, _exchanges(mesh, calls), _exchanges(mesh, spare))


def _shapes(mesh, placed, axes, tag=""):
    return {tag + p.path: list(local_shape(mesh, p.spec, getattr(p, axes))) for p in tree_leaves(placed)}


def _exchanges(mesh, calls):
    out = Counter()
    for call, count in calls.items():
        out[Exchange(call.kind, mesh.members(call.atoms) if call.atoms else (), call.elements, call.itemsize)] += count
    return out


def problems(trace, wanted):
    """Returns one line of text for each difference between a compiled step and `wanted`, an Expected."""
    out = []
    for kind, shapes in wanted.held.items():
        found = trace.said.get(kind, {})
        for path, shape in shapes.items():
            if path not in found:
                out.append(f"{kind}: {path} is not in the compiled step")
            elif found[path][0] != shape:
                out.append(f"{kind}: {path} is {_shape(found[path][0])} in the compiled step, but {_shape(shape)} in the layout")
    out += _missing_inputs(trace)
    if wanted.calls is not None:
        steps = train_steps(trace)
        for exchange in sorted({*wanted.calls, *trace.exchanges}):
            most, seen = wanted.calls[exchange], trace.exchanges[exchange] / steps
            least = most - wanted.spare[exchange]
            if not least <= seen <= most:
                said = f"{least} to {most}" if least < most else most
                out.append(f"{_words(exchange)}: {seen:g} in a step, but {said} by the signatures")
    return out


def train_steps(trace):
    """Returns how often the step was run."""
    return trace.said["steps"]


def _missing_inputs(trace):
    """Returns a line for each size of input tensors for which the allocator has no block of that size."""
    given = Counter(block.size for block in trace.blocks if block.kind in ("input", "weight"))
    wanted = Counter(dryrun.aligned(nbytes(w)) for kind in ("params", "optimizer") for w in trace.said.get(kind, {}).values())
    lacking = wanted - given
    return [f"no memory was allocated for {count} inputs of {size:,} bytes" for size, count in sorted(lacking.items())]


def nbytes(tensor):
    """Returns the bytes of a tensor [shape, dtype]."""
    return math.prod(tensor[0]) * ITEMSIZE[tensor[1]]


def figures(trace, mesh):
    """Returns the figures of one rank at one depth, as JSON."""
    held = {key: sum(map(nbytes, trace.said.get(key.removesuffix("_bytes"), {}).values())) for key in HELD}
    top, live = dryrun.peak(trace.blocks)
    line = timeline(trace.tasks, Machine())
    return {
        **held,
        "peak_bytes": top,
        "peaks": dryrun.peaks(trace.blocks),
        "rest_bytes": top - sum(held.values()),
        "with_fragments_bytes": max(top, trace.with_fragments),
        "margin_bytes": int(dryrun.margin_gib(trace.exchanges) * GIB),
        "compile_s": round(trace.said["compile_s"], 1),
        "host_bytes": trace.said["host_bytes"],
        **times(line, train_steps(trace)),
        "collectives": collectives(trace, line, mesh),
        "largest": largest(trace, live),
        "local_shapes": {path: shape for path, (shape, _) in trace.said["params"].items()},
    }


def times(line, steps):
    """Returns {name: seconds} of a step, from the Timeline of some steps."""
    each = line.total, line.compute, sum(line.sent.values()), sum(line.exposed.values())
    return {name: value / steps for name, value in zip(TIMES, each)}


def collectives(trace, line, mesh):
    """Returns [[kind, axes, ranks, calls, bytes that a rank sends, seconds, seconds in which computation waits for them]], all in a step,
    one for each kind and group of ranks. line: the Timeline of the trace, which gives the seconds."""
    steps, out = train_steps(trace), {}

    def add(kind, ranks, *values):
        key = kind, axes_of(ranks, mesh) if ranks else "pp", len(ranks) or 2
        out[key] = [before + value / steps for before, value in zip(out.get(key, [0] * 4), values)]

    for exchange, count in trace.exchanges.items():
        add(exchange.kind, exchange.ranks, count, exchange.sent() * count, 0, 0)
    for (kind, ranks), took in line.sent.items():
        add(kind, ranks, 0, 0, took, line.exposed[kind, ranks])
    return [[*key, *value] for key, value in sorted(out.items())]


def axes_of(ranks, mesh):
    """Returns the names of the mesh axes that these ranks span, such as "tp" or "dp+ep"."""
    atoms = [atom for atom in mesh.sizes if set(mesh.members((atom,))) <= set(ranks)]
    return "+".join(dict.fromkeys(atom[:2] for atom in atoms)) if mesh.members(tuple(atoms)) == ranks else f"ranks {ranks}"


def largest(trace, live):
    """Returns [[bytes, buffers, source]] of the buffers alive at the peak, grouped by the source line that made them, most first."""
    out = {}
    for block in live:
        known = NAMES.get(block.kind) or NAMES.get(block.name)
        made = known or trace.lines.get((block.graph, block.name)) or re.sub(r"-op\d+$", "", block.name)
        size, count = out.get(made, (0, 0))
        out[made] = size + block.size, count + 1
    return [[size, count, made] for made, (size, count) in sorted(out.items(), key=lambda item: -item[1][0])[:LARGEST]]


def extrapolated(low, high, layers):
    """Extrapolates the figures of two depths linearly to `layers`. low, high: (number of layers, figures).

    The peak of each graph is extrapolated separately, and the highest result is the peak. Memory lost to fragmentation does not grow with
    depth, so the larger of the two values is taken.
    """
    (a, x), (b, y) = low, high

    def line(p, q):
        return p + (q - p) * (layers - a) / (b - a)

    held = {key: line(x[key], y[key]) for key in HELD if key in x}
    took = {key: line(x[key], y[key]) for key in TIMES}
    peak = max(line(x["peaks"].get(graph, top), top) for graph, top in y["peaks"].items())
    lost = max(found["with_fragments_bytes"] - found["peak_bytes"] for found in (x, y))
    out = {**held, **took, "peak_bytes": peak, "rest_bytes": peak - sum(held.values()), "with_fragments_bytes": peak + lost}
    first = {tuple(row[:3]): row[3:] for row in x["collectives"]}
    rows = [[*row[:3], *(line(p, q) for p, q in zip(first.get(tuple(row[:3]), [0] * 4), row[3:]))] for row in y["collectives"]]
    return {**out, "margin_bytes": line(x["margin_bytes"], y["margin_bytes"]), "collectives": rows, "largest": y["largest"]}


def verdict(found, hbm_gb):
    """Returns (whether the layout fits, a sentence with the sizes).

    When the norm of the gradients is taken, parameters, optimizer state and all gradients are held. Where two depths lead to a lower peak,
    another moment of the step has the peak at both, and the line through them says nothing.
    """
    if found.get("rest_bytes", 0) < 0:
        least = (found["peak_bytes"] - found["rest_bytes"]) / GIB
        words = f"these depths are too shallow: what is held takes {least:.1f} GiB by itself; compile deeper ones, such as --layers=6,12"
        return False, f"NOT KNOWN: {words}"
    used, spare = found["with_fragments_bytes"] / GIB, found["margin_bytes"] / GIB
    fits = used + spare <= hbm_gb
    what = f"peak {used:.1f} GiB with fragments + {spare:.1f} GiB that simulation does not count"
    return fits, f"{'fits' if fits else 'DOES NOT FIT'}: {what} = {used + spare:.1f} GiB, of {hbm_gb:g}"


LOWERINGS = {"manual": "manual lowering", "shard": "partitioned by MindSpore"}
ROWS = (
    ("parameters", "params_bytes"),
    ("gradients", "gradients_bytes"),
    ("optimizer state", "optimizer_bytes"),
    ("KV cache", "cache_bytes"),
    ("the rest at the peak", "rest_bytes"),
    ("peak", "peak_bytes"),
    ("peak with fragments", "with_fragments_bytes"),
)


def text(report):
    """Returns a rank's report as lines of text."""
    found, depths = report["figures"], [layers for layers, _ in report["compiled"]]
    how = "" if len(depths) == 1 else f", extrapolated from {depths[0]} and {depths[1]}"
    took = " and ".join(f"{figures['compile_s']:.0f} s, {figures['host_bytes'] / GIB:.1f} GiB here" for _, figures in report["compiled"])
    what = f"{report['layers']:g} layers{report['of']}, {LOWERINGS[report['lowering']]}{how}"
    out = [f"rank {report['rank']}, {what} (compiled and run in {took})"]
    out += [f"  {name:<22} {found[key] / GIB:9.3f} GiB" for name, key in ROWS if found[key]]
    if found["collectives"]:
        out.append(f"  {'sent in a step':<22} {'over':<8} {'ranks':>5} {'calls':>9} {'GiB a rank':>12} {'ms':>9} {'exposed':>9}")
        for kind, axes, n, calls, sent, took, waits in found["collectives"]:
            out.append(f"  {kind:<22} {axes:<8} {n:>5} {calls:>9,.0f} {sent / GIB:>12.3f} {took * 1e3:>9.1f} {waits * 1e3:>9.1f}")
    step, compute, sent, waits = (found[name] * 1e3 for name in TIMES)
    under = f"sends {sent:,.1f} ms, in {waits:,.1f} of which computation waits" if sent else "sends nothing"
    out.append(f"  by assumed rates, in the compiled order: {step:,.1f} ms a step; computes {compute:,.1f} ms, {under}")
    out.append(f"  alive at the peak of {depths[-1]} layers, by the source line that made it")
    out += [f"  {size / GIB:9.3f} GiB in {count:>4}  {made}" for size, count, made in found["largest"]]
    out += [f"  WRONG {line}" for line in report["problems"]] or ["  every shard and every collective is as the layout says"]
    return [*out, f"  {report['verdict']}"]


def beside(manual, shard):
    """Returns lines of text that compare a rank's two reports, one of each lowering."""
    both = manual, shard
    shapes = [report["compiled"][-1][1]["local_shapes"] for report in both]
    other = [path for path in shapes[0] if shapes[0][path] != shapes[1].get(path)]
    other = list(dict.fromkeys(re.sub(r"^layers\.\d+", "layers.*", path) for path in other))
    shaped = f"other local shapes: {', '.join(other)}" if other else f"the local shapes of all {len(shapes[0])} parameters are the same"
    out = [f"rank {manual['rank']}, manual lowering | partitioned by MindSpore", f"  {shaped}"]
    out.append(f"  {'sent in a step':<22} {'over':<8} {'ranks':>5}" + f" {'calls':>9} {'GiB a rank':>12}" * 2)
    rows = [{tuple(row[:3]): row[3:] for row in report["figures"]["collectives"]} for report in both]
    for kind, axes, n in sorted({*rows[0], *rows[1]}):
        sides = "".join(f" {calls:>9,.0f} {sent / GIB:>12.3f}" for calls, sent in (side.get((kind, axes, n), (0, 0))[:2] for side in rows))
        out.append(f"  {kind:<22} {axes:<8} {n:>5}{sides}")
    peaks = "".join(f" {report['figures']['with_fragments_bytes'] / GIB:>22.3f}" for report in both)
    return [*out, f"  {'peak with fragments':<37}{peaks}"]


def _words(exchange):
    ranks = f"over ranks {' '.join(map(str, exchange.ranks))}" if exchange.ranks else "between stages"
    return f"{exchange.kind} of {exchange.elements} elements of {exchange.itemsize} bytes {ranks}"


def _shape(shape):
    return " x ".join(map(str, shape)) or "a scalar"
