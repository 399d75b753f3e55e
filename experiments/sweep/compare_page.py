"""Output of experiments.compare: plots as pictures, and an HTML page that holds its data and script, and loads no other file."""

import html
import json
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def groups(differences, names):
    """Returns {run: number of its group}: runs that differ in their seed alone are of one group."""
    kinds = [tuple(str(values[i]) for key, values in differences.items() if key != SEED) for i in range(len(names))]
    if SEED not in differences:  # the same config twice: runs of other code, which have colours of their own
        kinds = list(enumerate(kinds))
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return {name: numbers[kind] for name, kind in zip(names, kinds)}


def bands(lines, group_of):
    """Returns {group: (x, mean, low, high)} of the groups with several runs among lines, {run: (x, values)}: over the part of the axis that
    all of its runs have, their values joined by straight lines between their points."""
    out = {}
    for group in dict.fromkeys(group_of[name] for name in lines):
        members = [lines[name] for name in lines if group_of[name] == group]
        start, end = max(x[0] for x, _ in members), min(x[-1] for x, _ in members)
        x = np.unique(np.concatenate([x[(x >= start) & (x <= end)] for x, _ in members]))
        if len(members) > 1 and len(x):
            values = np.stack([np.interp(x, *member) for member in members])
            out[group] = x, values.mean(0), values.min(0), values.max(0)
    return out


def page(curves, differences, names, axis, smooth, group_of=None):
    """Returns the page as HTML. curves: {metric: {run: (x, values)}}; differences: {config key: [value in each run of `names`]}; smooth:
    the number of values that each point averages; group_of: of groups(), else each run is a group."""
    group_of = group_of or {name: i for i, name in enumerate(names)}
    lines = {metric: {name: [_numbers(x), _numbers(values)] for name, (x, values) in runs.items()} for metric, runs in curves.items()}
    found = {
        metric: {group: [_numbers(part) for part in band] for group, band in bands(runs, group_of).items()}
        for metric, runs in curves.items()
    }
    data = {"curves": lines, "names": names, "axis": axis, "groups": [group_of[name] for name in names], "bands": found}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # so that no text in it can close the <script>
    same = "Runs that differ in train.seed alone have one colour, their mean and their range. " if any(found.values()) else ""
    note = same + (f"Each point of a metric of training steps is the mean of {smooth}. " if smooth > 1 else "")
    parts = {"NOTE": note, "TABLE": _table(differences, names), "DATA": text}
    return re.sub("@(NOTE|TABLE|DATA)@", lambda match: parts[match[1]], PAGE)


def _numbers(values):
    """Rounds to 6 digits, more than a screen shows. Infinities and NaN become None, as JSON has neither."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def _table(differences, names):
    if not differences:
        return "<p>The runs have the same config.</p>"
    head = "".join(f"<th>{html.escape(key)}</th>" for key in differences)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(str(values[i]))}</td>' for values in differences.values())}</tr>"
        for i, name in enumerate(names)
    )
    return f"<table><tr><th>run</th>{head}</tr>{rows}</table>"


def plot(path, lines, metric, axis, group_of=None, smooth=1):
    """Writes a PNG of draw()."""
    draw(lines, metric, axis, group_of, smooth).savefig(path)


def draw(lines, metric, axis, group_of=None, smooth=1):
    """Returns a Figure of `lines`, {run: (x, values)}. Runs of a group have one colour: a band from the lowest to the highest of them, and
    their mean. smooth: the number of values that each point averages."""
    group_of = group_of or {name: i for i, name in enumerate(lines)}
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="tight")
    shown = list(dict.fromkeys(group_of[name] for name in lines))
    axes, colors, found = figure.subplots(), colormaps["viridis" if len(shown) > 10 else "tab10"], bands(lines, group_of)
    for i, group in enumerate(shown):
        color = colors(i / (len(shown) - 1)) if len(shown) > 10 else colors(i)
        members = [name for name in lines if group_of[name] == group]
        for name in members if group not in found else ():
            x, values = lines[name]
            axes.plot(x, values, label=name, color=color, linewidth=1, marker="o" if len(x) == 1 else None)
        if group in found:
            x, mean, low, high = found[group]
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(x, mean, label=f"{members[0]} and {len(members) - 1} other seeds: mean and range", color=color, linewidth=1.5)
    label = {"time": "hours of training", "tokens": "tokens seen"}.get(axis, axis)
    axes.set(xlabel=label, ylabel=f"{metric}, mean of {smooth}" if smooth > 1 else metric)
    axes.grid(alpha=0.3)
    if len(shown) <= 20:
        axes.legend(fontsize=8)
    return figure


SEED = "train.seed"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Runs</title>
<style>
body { font: 14px sans-serif; margin: 1.5em; }
canvas { border: 1px solid #ccc; width: 100%; height: 60vh; }
table { border-collapse: collapse; margin-top: 1em; }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: left; font-weight: normal; }
#runs { columns: 18em; margin: .6em 0; }
#runs label { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
</style>
<h1>Runs</h1>
<p>@NOTE@Move over the picture to read a point. <label>Metric <select id="metric"></select></label>
<label><input type="checkbox" id="log"> logarithmic</label> <button id="all">all</button> <button id="none">none</button>
<span id="point"></span></p>
<canvas id="plot"></canvas>
<div id="runs"></div>
<h2>Config</h2>
@TABLE@
<script>
const data = @DATA@;
const get = (id) => document.getElementById(id), canvas = get("plot"), shown = new Set(data.names);
const left = 70, right = 40, top_ = 10, bottom = 40;
const color = (i) => `hsl(${(i * 137.5) % 360} 70% 42%)`;
let scale = null;

function lines() {
  const log = get("log").checked;
  return data.names.flatMap((name, i) => {
    const line = data.curves[get("metric").value][name];
    if (!line || !shown.has(name)) return [];
    const points = line[0].map((x, j) => [x, line[1][j]]).filter((p) => p[1] !== null && (!log || p[1] > 0));
    return [{ name, group: data.groups[i], color: color(data.groups[i]), points: points.map(([x, y]) => [x, log ? Math.log10(y) : y]) }];
  });
}

function ticks(low, high, most) {  // round numbers between low and high: steps of 1, 2 or 5 times a power of 10
  const power = 10 ** Math.floor(Math.log10((high - low) / most)), found = [];
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => (high - low) / s <= most);
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function powers(low, high) {  // logarithms of round numbers between the logarithms low and high: powers of 10 if they are far apart
  if (high - low < 1) return ticks(10 ** low, 10 ** high, 6).map(Math.log10);
  const found = [];
  for (let k = Math.floor(low); k <= high; k++) for (const n of high - low > 4 ? [1] : [1, 2, 5]) found.push(Math.log10(n) + k);
  return found.filter((y) => y >= low && y <= high);
}

function draw() {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight, log = get("log").checked;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const c = canvas.getContext("2d"), all = lines();
  c.scale(ratio, ratio);
  const range = (k) => {
    let low = Infinity, high = -Infinity;
    for (const { points } of all) for (const p of points) { low = Math.min(low, p[k]); high = Math.max(high, p[k]); }
    return low < high ? [low, high] : [low - 1, low + 1];
  };
  if (!all.some((line) => line.points.length)) { scale = null; return; }
  const [x0, x1] = range(0), [y0, y1] = range(1);
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - bottom - top_);
  scale = { all, px, py, log };
  c.strokeStyle = "#ddd";
  c.fillStyle = "#333";
  for (const y of log ? powers(y0, y1) : ticks(y0, y1, 6)) {
    c.beginPath();
    c.moveTo(left, py(y));
    c.lineTo(width - right, py(y));
    c.stroke();
    c.textAlign = "right";
    c.fillText(String(Number((log ? 10 ** y : y).toPrecision(4))), left - 6, py(y) + 4);
  }
  c.textAlign = "center";
  for (const x of ticks(x0, x1, 8)) c.fillText(String(x), px(x), height - bottom + 16);
  c.save();
  c.translate(12, (height - bottom) / 2);
  c.rotate(-Math.PI / 2);
  c.fillText(get("metric").value, 0, 0);
  c.restore();
  c.fillText({ time: "hours of training", tokens: "tokens seen" }[data.axis] || data.axis, (left + width) / 2, height - 6);
  const drawn = new Set(all.map((line) => line.group)), bands = data.bands[get("metric").value] || {};
  for (const [group, [xs, mean, low, high]] of Object.entries(bands)) {
    if (!drawn.has(Number(group))) continue;
    const at = (y) => py(log ? Math.log10(Math.max(y, 10 ** y0)) : y);
    c.fillStyle = color(Number(group));
    c.globalAlpha = 0.15;
    c.beginPath();
    xs.forEach((x, j) => c.lineTo(px(x), at(high[j])));
    for (let j = xs.length - 1; j >= 0; j--) c.lineTo(px(xs[j]), at(low[j]));
    c.fill();
    c.globalAlpha = 1;
    c.lineWidth = 2.5;
    c.strokeStyle = color(Number(group));
    c.beginPath();
    xs.forEach((x, j) => c.lineTo(px(x), at(mean[j])));
    c.stroke();
  }
  c.lineWidth = 1;
  for (const line of all) {
    c.globalAlpha = bands[line.group] ? 0.4 : 1;
    c.strokeStyle = line.color;
    c.beginPath();
    line.points.forEach(([x, y], j) => (j ? c.lineTo(px(x), py(y)) : c.moveTo(px(x), py(y))));
    c.stroke();
  }
  c.globalAlpha = 1;
}

canvas.onmousemove = (event) => {
  if (!scale) return;
  let best = null;
  for (const line of scale.all) for (const [x, y] of line.points) {
    const d = (scale.px(x) - event.offsetX) ** 2 + (scale.py(y) - event.offsetY) ** 2;
    if (!best || d < best.d) best = { d, x, y, name: line.name };
  }
  get("point").textContent = best ? `${best.name}: ${best.x}, ${(scale.log ? 10 ** best.y : best.y).toPrecision(6)}` : "";
};

data.names.forEach((name, i) => {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  box.onchange = () => { box.checked ? shown.add(name) : shown.delete(name); draw(); };
  label.style.color = color(data.groups[i]);
  label.append(box, name);
  label.title = name;
  get("runs").append(label);
});
for (const [id, value] of [["all", true], ["none", false]]) get(id).onclick = () => {
  for (const box of get("runs").querySelectorAll("input")) { box.checked = value; box.onchange(); }
};
for (const metric of Object.keys(data.curves)) get("metric").append(new Option(metric));
get("metric").onchange = get("log").onchange = onresize = draw;
draw();
</script>
</html>
"""
