"""The coordinate check of muP: how far a few steps move activations, over the width of the model.

    python -m experiments.ladder.coordinates --picture=coordinates.png

For each width it trains a small model for some steps on random tokens, with and without muP, and measures the root mean square of what
the steps changed: of the residual stream after the last layer, and of the logits. With muP the changes do not depend on the width.
Without, they grow with it, so that one learning rate cannot be right for all widths. Source: Yang et al. 2022, appendix D.1.
"""

import numpy as np
from absl import flags

from experiments import flags as command_line
from experiments import number_flags

WIDTHS, STEPS, RATE = (64, 128, 256, 512), 10, 2e-3
ROWS, LENGTH, HEAD_DIM, STD = 2, 32, 32, 0.02


def model(width, base_width=0, **changes):
    """Returns the Qwen3Config of a model of two layers with heads of 32 elements. base_width: of muP; 0 = without."""
    from qwen3.config import SIZES

    heads = width // HEAD_DIM
    sizes = dict(
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=HEAD_DIM,
        ffn_size=3 * width,
        num_layers=2,
        initializer_range=STD,
    )
    return SIZES["tiny"].replace(**{**sizes, "mup_base_width": base_width, **changes})


def changes_by_steps(cfg, steps=STEPS, rate=RATE, name="adamw"):
    """Trains `cfg` and returns {"residual stream": [after 1 step, ...], "logits": [...]}, the root mean square of the change since step 0.
    name: of the optimizer."""
    import mindspore as ms

    from experiments.configs import common
    from experiments.train import weights
    from experiments.train.program import build_program
    from qwen3 import model as qwen3

    config = common.get_config()
    config.optim.name, config.optim.weight_decay = name, 0.0
    config.train.batch_size, config.train.seq_len = ROWS, LENGTH
    program, op = build_program(cfg, config), qwen3.build(cfg).op
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": ones.astype(np.float32)}
    batch.update(segment_ids=ones, positions=positions)
    ids, places, documents = (ms.Tensor(np.ascontiguousarray(batch[key])) for key in ("tokens", "positions", "segment_ids"))

    def seen(state):
        params = program.params(state)
        rows = qwen3.rows_of(cfg, op, places, documents, None)
        x, _ = op.layers(params["layers"], qwen3.embed(cfg, op, params, ids), rows)
        return x.asnumpy(), qwen3.full_logits(cfg, op, params, x).asnumpy()

    state = program.init(weights.random(cfg, config))
    start, found = seen(state), ([], [])
    for step in range(steps):
        state, _ = program.step(state, batch, rate, step)
        for values, before, now in zip(found, start, seen(state)):
            values.append(float(np.sqrt(np.mean((now - before) ** 2))))
    return dict(zip(("residual stream", "logits"), found))


def slope(widths, values):
    """Returns the slope of log(value) over log(width)."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def define_flags():
    flags.DEFINE_string("picture", None, "the file of the picture, such as coordinates.png")
    number_flags.integer("steps", STEPS, "steps of each model", 1, 1000)
    flags.DEFINE_enum("optimizer", "adamw", ["adamw", "lion", "muon"], "the optimizer")


def main(_):
    arguments = flags.FLAGS
    found = {}
    for base, name in ((0, "standard"), (WIDTHS[0], "muP")):
        runs = [changes_by_steps(model(width, base), arguments.steps, name=arguments.optimizer) for width in WIDTHS]
        for what in runs[0]:
            found[name, what] = np.array([run[what] for run in runs])  # [widths, steps]
            last = found[name, what][:, -1]
            values = ", ".join(f"{width}: {value:.3f}" for width, value in zip(WIDTHS, last))
            print(
                f"{name:9} {what:16} change after {arguments.steps} steps by width: {values}; slope {slope(WIDTHS, last):+.2f}", flush=True
            )
    if arguments.picture:
        draw(found, arguments.picture)


def draw(found, path):
    """Writes the picture. found: {(parametrisation, what): [widths, steps]}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, sharey="row", layout="constrained")
    for place, ((name, what), values) in zip(axes.T.flat, found.items()):
        for step in range(values.shape[1]):
            place.plot(WIDTHS, values[:, step], marker=".", color=plt.cm.viridis(step / max(1, values.shape[1] - 1) * 0.9))
        place.set(title=f"{what}, {name}", xscale="log", yscale="log", xlabel="width", ylabel="change (root mean square)")
        place.set_xticks(WIDTHS, map(str, WIDTHS))
        place.minorticks_off()
        place.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    command_line.run(main, define_flags, is_rank=False)
