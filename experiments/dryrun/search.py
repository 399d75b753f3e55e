"""Lists the layouts of a number of ranks that fit, the fastest first, by formulas for their memory and time.

The formulas give orders of magnitude: the figures of the machine below are assumptions, and nothing was measured on an NPU. Before you use
a layout, compile it with the dry run.
"""

import itertools
import re
from collections import Counter

from ml_collections import ConfigDict, FrozenConfigDict

from experiments import flags as command_line
from experiments.layout import check as layout
from experiments.layout import traffic as layout_traffic
from experiments.layout.sharding import sharding_of
from experiments.train.optim_rules import MOMENTS
from experiments.train.state import stage_placements
from experiments.watch import metrics
from layers import lora
from ops import head_loss
from ops.routing import shard_capacity
from parallel.placement import nbytes, place
from parallel.simulation import dryrun, traffic
from parallel.simulation.timeline import Machine
from parallel.trees import tree_leaves
from qwen3.model import param_specs

GIB = 2**30
MACHINE = Machine()

FORMULAS = """\
memory of a rank, in GiB
  state     float32 parameters and optimizer moments of a rank, by their placement; under a pipeline, of the rank that has most
  gradients float32, with the sharding that the model uses; from ZeRO 2 on, also sharded over dp
  saved     layers x tokens of a rank's micro-batch x (SAVED_ROWS x hidden / ranks of the rows + SAVED_INPUTS x hidden + SAVED_FFN x ffn
            / tp + SAVED_HEADS x (heads + 2 kv heads) x head_dim / tp) x 2 bytes + tokens x SAVED_LOGITS x vocabulary / tp x 4 bytes /
            chunks of the loss; inputs that the backward gathers again take hidden / ranks of the rows;
            an adapter with dropout saves its input a second time;
            if a layer has experts, the ffn term is: rows of their buffers x (hidden + SAVED_EXPERT_FFN x their ffn) + chosen rows x
            hidden + weights of a rank. A recomputed layer saves only hidden, and one layer at a time is saved in full. Under a pipeline:
            the layers of a stage, and hidden for each live input
  update    UPDATED_FIRST x the largest trained array of a rank + UPDATED_NEXT x the second largest
  peak      state + gradients + the larger of saved and update. With one micro-batch, activations are freed while gradients are made:
            state + the larger of saved and (gradients + update)
seconds of a step
  compute   model FLOPs of a step / (ranks x {flops:.3g} x {products:g}), plus a third with recomputation, and a third with a pipeline
  sent      for each collective and each transfer between stages: bytes / ({inside:.3g} a second inside a node of {node} ranks,
  {between:.3g} between nodes) + {call_s:.0e}
  bubble    compute x (pp - 1) / micro-batches"""

# Numbers of bfloat16 tensors that a layer saves for its backward pass, counted in compiled graphs: of [rows, hidden], sharded by sequence
# parallel; of [tokens, hidden], replicated on all tp ranks; of the heads; of the ffn; of the ffn of experts.
SAVED_ROWS, SAVED_INPUTS, SAVED_HEADS, SAVED_FFN, SAVED_EXPERT_FFN = 3, 2, 3, 5, 3
SAVED_LOGITS = 3  # float32 tensors of the logits, or of a chunk of them, alive at once in the loss and its backward pass
UPDATED_FIRST, UPDATED_NEXT = 6, 3  # float32 copies, alive at once in the update, of the largest and the second largest array


def search(config, world, hbm_gb, top):
    """Returns (lines of text: the `top` fastest layouts that fit, and the formulas; the configs of these layouts). The config gives the
    batch, the sequence length and the model."""
    tried = [(each, *estimate(each)) for each in candidates(config, world)]
    fitting = [row for row in tried if row[1]["peak"] + row[1]["margin"] <= hbm_gb * GIB]
    fitting.sort(key=lambda row: (sum(row[2].values()), row[1]["peak"]))
    lines = [f"{len(tried)} layouts of {world} ranks; {len(fitting)} fit {hbm_gb:g} GiB with their margins; by formula, none compiled"]
    head = f"{'layout':<66}{'state':>8}{'grad.':>8}{'saved':>8}{'peak':>8}{'margin':>8}{'compute s':>11}{'sent s':>9}{'bubble s':>10}"
    lines += [head] + [_line(*row) for row in fitting[:top]]
    if not fitting and tried:
        least = min(tried, key=lambda row: row[1]["peak"])
        lines += ["none fits; the layout with the lowest peak:", _line(*least)]
    formulas = re.sub(r"(SAVED|UPDATED)_\w+", lambda name: str(globals()[name[0]]), FORMULAS.format(**vars(MACHINE)))
    return [*lines, formulas], [each for each, *_ in fitting[:top]]


def _line(config, memory, seconds):
    p = config.parallel
    name = f"--dp={p.dp} --tp={p.tp}" + f" --pp={p.pp}" * (p.pp > 1) + f" --ep={p.ep}" * (p.ep > 1) + f" --zero={p.zero}" * (p.zero > 0)
    name += " --seq_parallel" * p.seq_parallel + f" --micro_batches={p.micro_batches}"
    gib = "".join(f"{memory[key] / GIB:8.1f}" for key in ("state", "gradients", "saved", "peak", "margin"))
    return f"{name:<66}{gib}{seconds['compute']:11.3f}{seconds['sent']:9.3f}{seconds['bubble']:10.3f}"


def candidates(config, world):
    """Yields the configs of all layouts that the model, the batch and the number of ranks allow. There is no context parallel, and a
    pipeline has a multiple of its stages as micro-batches."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    rows = config.train.batch_size
    experts = sizes if command_line.model_config(config, "any").num_experts else [1]
    for tp, pp, ep, zero, seq, micro in itertools.product(sizes, sizes, experts, range(4), (False, True), range(1, rows + 1)):
        dp = world // (tp * pp)
        if not dp or rows % (dp * micro) or (zero and dp == 1) or (seq and tp == 1) or micro % pp:
            continue
        each = ConfigDict(config.to_dict(), convert_dict=True)
        each.parallel.update(dp=dp, tp=tp, pp=pp, cp=1, ep=ep, zero=zero, seq_parallel=seq, micro_batches=micro)
        each.train.layer_loop = "unroll"
        try:
            layout.check(each, command_line.model_config(each, "any"), world)
        except ValueError:
            continue
        yield FrozenConfigDict(each)


def estimate(config):
    """Returns ({state, gradients, saved, peak, margin}: bytes of a rank, {compute, sent, bubble}: seconds of a step)."""
    cfg, parallel = command_line.model_config(config, "any"), config.parallel
    sharding = sharding_of(config, cfg, layout.mesh(cfg, parallel), "manual")
    mesh, pp = sharding.mesh, parallel.pp
    placed = max(_placed(config, cfg, sharding), key=lambda each: _bytes(mesh, each, "stored"))
    trained = [each for each in placed if each.spec.trains]
    stored, used, moment = _bytes(mesh, placed, "stored"), _bytes(mesh, trained, "used"), _bytes(mesh, trained, "state")
    state, gradients = stored + len(MOMENTS[config.optim.name]) * moment, moment if parallel.zero >= 2 else used
    saved, held = saved_bytes(config, cfg, sharding), _updated(mesh, trained)
    if config.train.recompute != "full":  # what a layer saves was counted with a copy of its weights in the compute dtype
        saved -= _bytes(mesh, [each for each in placed if each.path.startswith("layers.") and each.spec.dtype != "float32"], "used")
    calls = _calls(config, cfg, sharding, placed)
    groups = {mesh.members(call.atoms) for call in calls} | ({mesh.members(("pp",))} if pp > 1 else set())
    margin = int((dryrun.MARGIN_GIB + dryrun.MARGIN_PER_GROUP_GIB * len(groups)) * GIB)
    peak = state + (gradients + max(saved, held) if parallel.micro_batches > 1 else max(saved, gradients + held))
    memory = {"state": state, "gradients": gradients, "saved": saved, "peak": peak, "margin": margin}
    compute = metrics.flops_per_token(cfg, config.train.seq_len) * config.train.batch_size * config.train.seq_len
    compute *= (1 + ((config.train.recompute == "full") + (pp > 1)) / 3) / (mesh.world * MACHINE.flops * MACHINE.products)
    sent = sum(count * (call.sent(mesh) / MACHINE.rate(mesh.members(call.atoms)) + MACHINE.call_s) for call, count in calls.items())
    if pp > 1:
        message = _tokens(config) * cfg.hidden_size * 2 / (parallel.tp if parallel.seq_parallel else 1)
        sent += 2 * parallel.micro_batches * (message / MACHINE.rate(mesh.members(("pp",))[:2]) + MACHINE.call_s)
    return memory, {"compute": compute, "sent": sent, "bubble": compute * (pp - 1) / parallel.micro_batches}


def _placed(config, cfg, sharding):
    """Returns the Placed parameters of each rank along pp."""
    pp = config.parallel.pp
    if pp == 1:
        return [tree_leaves(place(sharding, param_specs(cfg)))]
    _, stages, _ = stage_placements(cfg, config, sharding)
    return [tree_leaves(tuple(stages[rank::pp])) for rank in range(pp)]


def _bytes(mesh, placed, axes):
    return sum(nbytes(mesh, p, axes) for p in placed)


def _calls(config, cfg, sharding, placed):
    """Returns a Counter of the calls of a step. Under a pipeline: those of an equal share of the layers, and of the embedding and head."""
    micro, pp = config.parallel.micro_batches, config.parallel.pp
    if pp == 1:
        return layout_traffic.step_calls(config, cfg, sharding)
    rest, layers = layout_traffic.model_calls(cfg, sharding, config.train.batch_size // micro, config.train.seq_len)
    layers = layers + layout_traffic.recomputed_calls(config, cfg, sharding, layers, cfg.num_layers) + traffic.again(layers, 1)
    mine = Counter({call: count / pp for call, count in layers.items()})
    return (
        traffic.times(rest + mine, micro) + traffic.of_update(sharding, placed, micro) + layout_traffic.muon_calls(config, sharding, placed)
    )


def _tokens(config):
    """Returns the tokens of a rank's micro-batch."""
    parallel = config.parallel
    return config.train.batch_size // (parallel.dp * parallel.micro_batches) * config.train.seq_len


def _updated(mesh, trained):
    """Returns the bytes that the update allocates besides state and gradients."""
    first, then, *_ = sorted((nbytes(mesh, each, "state") for each in trained), reverse=True) + [0, 0]
    return UPDATED_FIRST * first + UPDATED_NEXT * then


def saved_bytes(config, cfg, sharding):
    """Returns the bytes of activations that the forward pass of a micro-batch saves for the backward pass."""
    parallel, tp, pp, tokens = config.parallel, config.parallel.tp, config.parallel.pp, _tokens(config)
    given = tokens * cfg.hidden_size / (tp if parallel.seq_parallel else 1)
    rows = SAVED_ROWS * given + SAVED_INPUTS * (given if sharding.gathers_again else tokens * cfg.hidden_size)
    heads = tokens * SAVED_HEADS * (cfg.num_heads + 2 * max(cfg.num_kv_heads, tp)) * cfg.head_dim / tp
    sparse = sum(map(cfg.is_moe_layer, range(cfg.num_layers))) / cfg.num_layers  # the share of layers with experts
    ffn = (1 - sparse) * tokens * SAVED_FFN * cfg.ffn_size / tp + (sparse * _of_experts(config, cfg, sharding) if sparse else 0)
    layer, count = rows + heads + ffn + _dropped(cfg, sharding, tokens), -(-cfg.num_layers // pp)
    kept = {"none": count * layer, "attention": count * (layer - heads) + heads, "full": count * given + layer}[config.train.recompute]
    kept += min(parallel.micro_batches, pp - 1) * given
    chunks = len(head_loss.chunk_bounds(config.train.loss_chunks, tokens, -(-cfg.vocab_size // tp)))
    return int(2 * kept + tokens * SAVED_LOGITS * cfg.vocab_size / tp * 4 / chunks)


def _dropped(cfg, sharding, tokens):
    """Returns the number of elements of a layer's inputs of adapters after their dropout, which are saved for the backward pass."""
    if not (cfg.lora and cfg.lora.dropout):
        return 0
    sizes = {"embed": cfg.hidden_size, "heads": cfg.num_heads * cfg.head_dim, "ffn": cfg.ffn_size}
    of_targets = [(rows, columns) for target, rows, columns in lora.DROPPED.values() if target in cfg.lora.targets]
    split = {"rows": sharding.shards("rows") // sharding.shards("tokens"), "tokens": 1}
    return sum(tokens * sizes[columns] / split[rows] / sharding.shards(columns) for rows, columns in of_targets)


def _of_experts(config, cfg, sharding):
    """Returns the number of elements that a layer with experts saves for the backward pass."""
    shards, ffn, chosen = sharding.shards("experts"), cfg.moe_ffn_size / sharding.shards("expert_ffn"), cfg.experts_per_token
    rows = _tokens(config) * config.parallel.dp // sharding.shards("expert_rows")
    buffers = rows * chosen
    if shards > 1:
        buffers = shards * shard_capacity(rows, chosen, cfg.num_experts, shards, cfg.moe_capacity_factor)
    weights = 3 * cfg.num_experts / shards * cfg.hidden_size * ffn
    return buffers * (cfg.hidden_size + SAVED_EXPERT_FFN * ffn) + rows * chosen * cfg.hidden_size + weights
