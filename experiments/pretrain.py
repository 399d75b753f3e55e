"""Pre-training: python -m experiments.pretrain --config=experiments/configs/tiny.py --workdir=runs/tiny"""

import math
import os
import tempfile

from absl import flags

from experiments import flags as command_line
from experiments import metrics, run_folder
from experiments.data import bigram, corpus, loader
from experiments.train import build_program, initial_params, train, uses_scan
from parallel.spec import count
from qwen3 import generate, hf
from qwen3.model import param_specs

FLAGS = flags.FLAGS
command_line.define("experiments/configs/tiny.py")


def main(_):
    pretrain(command_line.resolve(FLAGS), FLAGS.workdir)


def pretrain(config, workdir):
    """A whole run, into the new folder `workdir`; config as experiments.flags.resolve gives it."""
    run_folder.make(workdir)
    cfg = command_line.model_config(config)
    data = corpus.load(config, cfg.vocab_size)
    cfg = corpus.with_token_ids(cfg, data.tokenizer, trained=not config.data.tokenizer)
    run_folder.write_config(workdir, config)
    program, params = build_program(cfg, config), initial_params(cfg, config)
    peak, cost = metrics.peak_flops(), metrics.flops_per_token(cfg, config.train.seq_len)
    how = "one compiled layer, looped over" if uses_scan(cfg, config.train.layer_loop) else "unrolled"
    print(f"model      {config.model}: {count(param_specs(cfg)):,} parameters, {cfg.num_layers} layers, {how}")
    print(f"data       {corpus.describe(data, config.train.seq_len)}")
    print(f"compute    {cost:.3g} FLOPs a token; this machine's float32 matmul peak {peak / 1e9:.0f} GFLOP/s", flush=True)

    writer = metrics.Writer(workdir)
    held = {key: value[: config.train.eval_rows or None] for key, value in data.held_out.items()}
    eval_batches = list(loader.eval_batches(held, config.train.batch_size))
    with loader.Loader(data.train, config.train.batch_size, config.train.seed) as batches:
        state = train(program, program.init(params), batches, eval_batches, config, writer, lambda speed: speed * cost / peak)
    finish(program, state, cfg, config, data, writer, workdir)
    writer.close()


def finish(program, state, cfg, config, data, writer, workdir):
    """The end of a run: held-out loss, the bigram model's, the curve, the weights, and a sample of text."""
    nats = program.evaluate(state, loader.eval_batches(data.held_out, config.train.batch_size))
    seen = corpus.rows_seen(data.train, config)
    baseline = bigram.held_out_nats(seen, data.held_out, cfg.vocab_size, None)
    bits = nats / math.log(2) / corpus.bytes_per_target(data.tokenizer, data.held_out)
    writer.write(config.train.steps, {"eval_loss": nats, "bits_per_byte": bits, "bigram_loss": baseline})
    metrics.plot_losses(os.path.join(workdir, "loss.png"), writer.records, baseline)
    print(f"held out   {nats:.3f} nats a token, {bits:.3f} bits a byte; a bigram model: {baseline:.3f} nats")
    print(f"           (the bigram model counted {int(seen['loss_weights'].sum()):,} targets, of the first rows of the run)")
    params = program.params(state)
    if config.train.save_hf:
        save(os.path.join(workdir, "hf"), cfg, params, data.tokenizer)
    if config.train.sample_tokens:
        sample(params, cfg, config, data, workdir)


def save(folder, cfg, params, tokenizer):
    with tempfile.TemporaryDirectory() as files:
        tokenizer.save(files)
        hf.save(folder, cfg, params, tokenizer_dir=files)
    print(f"saved      {folder}, which transformers opens")


def sample(params, cfg, config, data, workdir):
    """Continues train.sample_prompt, or the start of a held-out document; greedy and sampled."""
    tokenizer = data.tokenizer
    prompt = tokenizer.encode(config.train.sample_prompt) or tokenizer.encode(data.held_text)[:32]
    with open(os.path.join(workdir, "sample.txt"), "w", encoding="utf-8") as file:
        for name, options in (("greedy", {}), ("temperature 0.8, top_p 0.95", {"temperature": 0.8, "top_p": 0.95})):
            new = generate.generate(params, [prompt], cfg, config.train.sample_tokens, stop_ids=(tokenizer.eod_id,), **options)[0]
            text = f"--- sample, {name}\n{tokenizer.decode(prompt)}|{tokenizer.decode(new)}\n"
            print(text, end="", flush=True)
            file.write(text)


if __name__ == "__main__":
    command_line.run(main)
