"""Output of experiments.compare: plots as pictures, and an HTML page that holds its data and script, and loads no other file."""

import html
import json
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def page(curves, differences, names, axis, smooth):
    """Returns the page as HTML. curves: {metric: {run: (x, values)}}; differences: {config key: [value in each run of `names`]}; smooth:
    the number of values that each point averages."""
    lines = {metric: {name: [_numbers(x), _numbers(values)] for name, (x, values) in runs.items()} for metric, runs in curves.items()}
    data = {"curves": lines, "names": names, "axis": axis}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # so that no text in it can close the <script>
    note = f"Each point of a metric of training steps is the mean of {smooth}. " if smooth > 1 else ""
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


def plot(path, lines, metric, axis):
    """Writes a PNG of `lines`, {run: (x, values)}."""
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="tight")
    axes, colors = figure.subplots(), colormaps["viridis" if len(lines) > 10 else "tab10"]
    for i, (name, (x, values)) in enumerate(lines.items()):
        color = colors(i / max(1, len(lines) - 1)) if len(lines) > 10 else colors(i)
        axes.plot(x, values, label=name, color=color, linewidth=1, marker="o" if len(x) == 1 else None)
    axes.set(xlabel={"time": "hours of training", "tokens": "tokens seen"}.get(axis, axis), ylabel=metric)
    axes.grid(alpha=0.3)
    if len(lines) <= 20:
        axes.legend(fontsize=8)
    figure.savefig(path)


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
const get = (id) => document.getElementById(id), canvas = get("plot"), shown = new Set(data.names), left = 70, bottom = 40;
const color = (i) => `hsl(${(i * 137.5) % 360} 70% 42%)`;
let scale = null;

function lines() {
  const log = get("log").checked;
  return data.names.flatMap((name, i) => {
    const line = data.curves[get("metric").value][name];
    if (!line || !shown.has(name)) return [];
    const points = line[0].map((x, j) => [x, line[1][j]]).filter((p) => p[1] !== null && (!log || p[1] > 0));
    return [{ name, color: color(i), points: points.map(([x, y]) => [x, log ? Math.log10(y) : y]) }];
  });
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
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - 10);
  const py = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - bottom - 10);
  scale = { all, px, py, log };
  c.strokeStyle = "#ddd";
  c.fillStyle = "#333";
  for (let i = 0; i <= 5; i++) {
    const x = x0 + ((x1 - x0) * i) / 5, y = y0 + ((y1 - y0) * i) / 5;
    c.beginPath();
    c.moveTo(left, py(y));
    c.lineTo(width - 10, py(y));
    c.stroke();
    c.textAlign = "right";
    c.fillText((log ? 10 ** y : y).toPrecision(4), left - 6, py(y) + 4);
    c.textAlign = "center";
    c.fillText(x.toPrecision(4), px(x), height - bottom + 16);
  }
  c.fillText({ time: "hours of training", tokens: "tokens seen" }[data.axis] || data.axis, (left + width) / 2, height - 6);
  for (const line of all) {
    c.strokeStyle = line.color;
    c.beginPath();
    line.points.forEach(([x, y], j) => (j ? c.lineTo(px(x), py(y)) : c.moveTo(px(x), py(y))));
    c.stroke();
  }
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
  label.style.color = color(i);
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
