"""Pre-training: python -m experiments.pretrain --config=experiments/configs/tiny.py --workdir=runs/tiny

On many ranks: python -m experiments.launch --nproc=4 -- experiments.pretrain --config=... --workdir=... --dp=2 --tp=2
"""

import os

import mindspore as ms
from absl import flags

from experiments import flags as command_line
from experiments import layout, layout_table, metrics, run_folder
from experiments.data import corpus, loader
from experiments.finish import finish
from experiments.train import build_program, initial_params, train, uses_scan
from ops import registry
from parallel import collectives
from parallel.sharding import Sharding
from parallel.spec import count
from qwen3.model import choose_kernels, param_specs

FLAGS = flags.FLAGS
command_line.define(command_line.MAINS["experiments.pretrain"])
flags.DEFINE_boolean("print_layout", False, "print where every parameter lies in the layout, and what it costs; train nothing")


def main(_):
    if FLAGS.print_layout:
        print(layout_table.describe(command_line.resolve(FLAGS, world=0)))
    else:
        pretrain(command_line.resolve(FLAGS), FLAGS.workdir)


def pretrain(config, workdir):
    """A whole run, into the new folder `workdir`; config as experiments.flags.resolve gives it."""
    rank, _ = collectives.start()
    cfg, parallel = command_line.model_config(config), config.parallel
    mesh = layout.mesh(cfg, parallel, rank)
    run_folder.make(workdir, mesh)
    data = corpus.load(config, cfg.vocab_size)
    cfg = corpus.with_token_ids(cfg, data.tokenizer, trained=not config.data.tokenizer)
    sharding = Sharding(mesh, seq_parallel=parallel.seq_parallel, zero=parallel.zero)
    program, params = build_program(cfg, config, sharding), initial_params(cfg, config)
    peak = metrics.mesh_peak_flops(mesh)
    if rank == 0:
        run_folder.write_config(workdir, config)
        announce(cfg, config, data, sharding, peak)

    writer = metrics.Writer(workdir if rank == 0 else None)
    place, dp = mesh.index(("dp",)), mesh.dp
    held = {key: value[: config.train.eval_rows or None] for key, value in data.held_out.items()}
    eval_batches = list(loader.eval_batches(held, config.train.batch_size, place, dp))
    cost = metrics.flops_per_token(cfg, config.train.seq_len)
    with loader.Loader(data.train, config.train.batch_size, config.train.seed, place, dp, parallel.micro_batches) as batches:
        state = train(program, program.init(params), batches, eval_batches, config, writer, lambda speed: speed * cost / peak)
    finish(program, state, cfg, config, data, writer, workdir, mesh)
    writer.close()


def announce(cfg, config, data, sharding, peak):
    mesh, device = sharding.mesh, ms.get_context("device_target")
    how = "one compiled layer, looped over" if uses_scan(cfg, config.train.layer_loop) else "unrolled"
    print(f"model      {config.model}: {count(param_specs(cfg)):,} parameters, {cfg.num_layers} layers, {how}")
    if mesh.world > 1:
        print(f"layout     {layout_table.summary(config)}")
    print(f"ops        {registry.describe(choose_kernels(config.ops, cfg, sharding), device)}")
    print(f"data       {corpus.describe(data, config.train.seq_len)}")
    cost, what = metrics.flops_per_token(cfg, config.train.seq_len), "these processes'" if mesh.world > 1 else "this machine's"
    print(f"compute    {cost:.3g} FLOPs a token; {what} float32 matmul peak {peak / 1e9:.0f} GFLOP/s; {os.cpu_count()} cores", flush=True)


if __name__ == "__main__":
    command_line.run(main)
