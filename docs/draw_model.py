"""Draws docs/model.png: python docs/draw_model.py, from the root of the project."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

fig = Figure(figsize=(9, 4.6), dpi=110)
ax = fig.add_axes([0, 0, 1, 1])
ax.set_xlim(0, 90)
ax.set_ylim(0, 46)
ax.axis("off")


SHAPE = "round,pad=0.2,rounding_size=0.8"


def box(x, y, w, h, text, color, size=9, family="monospace"):
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=SHAPE, facecolor=color, edgecolor="#444444", linewidth=0.9))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, family=family)


def arrow(x0, y0, x1, y1):
    ax.annotate("", xy=(x1, y1), xytext=(x0, y0), arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1.1})


BLUE, GREEN, YELLOW, GREY = "#dce9f7", "#e1f2df", "#fbf0d2", "#f2f2f2"
ax.text(2, 43.3, "qwen3/model.py: loss_of_batch(cfg, op, params, batch)", fontsize=10, family="monospace", weight="bold")
box(2, 34, 11, 5, "embed", BLUE)
box(61, 34, 13, 5, "final_norm", BLUE)
box(78, 34, 10, 5, "nats", BLUE)
box(16.5, 28.5, 41, 12.5, "", GREY)
ax.text(18, 38.6, "layer, once for each of L layers", fontsize=9, family="monospace")
box(18, 34, 16, 3.6, "attention_input", BLUE, 8.5)
box(37.5, 34, 18, 3.6, "attention", GREEN, 8.5)
box(18, 29.3, 10.5, 3.4, "add_ffn", BLUE, 8.5)
box(31, 29.3, 9.5, 3.4, "mlp | moe", GREEN, 8)
box(43, 29.3, 13.2, 3.4, "add_attention", BLUE, 8)
arrow(13.3, 36.5, 17.7, 36)
arrow(34.3, 35.8, 37.2, 35.8)
arrow(48, 33.8, 48, 33.0)
arrow(42.7, 31, 40.8, 31)
arrow(30.7, 31, 28.8, 31)
arrow(57.7, 36.5, 60.7, 36.5)
arrow(74.3, 36.5, 77.7, 36.5)
ax.text(82.9, 30.2, "loss", fontsize=10, ha="center", family="monospace")
arrow(83, 33.8, 83, 31.6)

ax.text(2, 23.6, "Each op is one line in a layer; its signature names the dims of the operands and of the result:", fontsize=10)
box(2, 17.2, 86, 4.4, 'q = op.matmul(x, p["wq"], "rows>tokens embed, embed heads -> tokens heads")', YELLOW, 11)
arrow(15, 17, 15, 13.2)
arrow(45, 17, 45, 13.2)
arrow(75, 17, 75, 13.2)
box(2, 5, 26, 8, "layers/op_table.py\nops/registry.py\n", GREY, 9)
ax.text(15, 6.3, "which kernel", ha="center", fontsize=9)
box(32, 5, 26, 8, "parallel/sharding.py\nRULES\n", GREY, 9)
ax.text(45, 6.3, "which mesh axes: heads -> tp", ha="center", fontsize=9)
box(62, 5, 26, 8, "parallel/lowering/\nparallel/collectives.py\n", GREY, 9)
ax.text(75, 6.3, "sequence parallel: all-gather over tp", ha="center", fontsize=9)
ax.text(
    45, 1.6, "On one device the op is the kernel alone; on many, the collectives follow, forward and backward.", ha="center", fontsize=10
)
fig.savefig("docs/model.png")
