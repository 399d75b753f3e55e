"""The end of a run: held-out loss, the bigram model's, the curve, the weights, and a sample of text."""

import os
import tempfile

import mindspore as ms

from experiments import metrics, run_folder
from experiments.data import bigram, corpus, loader
from parallel.spec import tree_leaves, tree_map
from qwen3 import generate, hf
from qwen3.model import choose_kernels


def finish(program, state, cfg, config, data, writer, workdir, mesh):
    """All ranks evaluate and gather the weights: one at a time as rank 0 writes them, or first all of them where there is to be a sample.
    Rank 0 writes and prints."""
    batches = loader.eval_batches(data.held_out, config.train.batch_size, mesh.index(("dp",)), mesh.dp)
    nats, weights = program.evaluate(state, batches), program.spread(state)
    if mesh.rank != 0:
        for leaf in tree_leaves(weights) if config.train.sample_tokens or config.train.save_hf else ():
            leaf.asnumpy()  # in the order in which rank 0 asks for them
        return
    if config.train.sample_tokens:
        weights = tree_map(lambda leaf: leaf.asnumpy(), weights)
    if config.train.save_hf:
        save(os.path.join(workdir, "hf"), cfg, weights, data.tokenizer)
    report(nats, cfg, config, data, writer, workdir)
    if config.train.sample_tokens:
        sample(tree_map(ms.Tensor.from_numpy, weights), cfg, config, data, workdir)
    run_folder.finish(workdir, config.train.steps)


def report(nats, cfg, config, data, writer, workdir):
    seen = corpus.rows_seen(data.train, config)
    baseline = bigram.held_out_nats(seen, data.held_out, cfg.vocab_size, None)
    found = metrics.held_out(nats, corpus.bytes_per_target(data.tokenizer, data.held_out))
    writer.write(config.train.steps, {**found, "bigram_loss": baseline})
    metrics.plot_losses(os.path.join(workdir, "loss.png"), writer.records, baseline)
    print(f"held out   {nats:.3f} nats a token, {found['bits_per_byte']:.3f} bits a byte; a bigram model: {baseline:.3f} nats")
    print(f"           (the bigram model counted {int(seen['loss_weights'].sum()):,} targets, of the first rows of the run)")


def save(folder, cfg, weights, tokenizer):
    with tempfile.TemporaryDirectory() as files:
        tokenizer.save(files)
        hf.save(folder, cfg, weights, tokenizer_dir=files)
    print(f"saved      {folder}, which transformers opens")


def sample(params, cfg, config, data, workdir):
    """Continues train.sample_prompt, or the start of a held-out document; greedy and sampled, with the run's ops."""
    tokenizer, kernels = data.tokenizer, choose_kernels(config.ops, cfg)
    prompt = tokenizer.encode(config.train.sample_prompt) or tokenizer.encode(data.held_text)[:32]
    with open(os.path.join(workdir, "sample.txt"), "w", encoding="utf-8") as file:
        for name, options in (("greedy", {}), ("temperature 0.8, top_p 0.95", {"temperature": 0.8, "top_p": 0.95})):
            options = {"stop_ids": (tokenizer.eod_id,), "kernels": kernels, **options}
            new = generate.generate(params, [prompt], cfg, config.train.sample_tokens, **options)[0]
            text = f"--- sample, {name}\n{tokenizer.decode(prompt)}|{tokenizer.decode(new)}\n"
            print(text, end="", flush=True)
            file.write(text)
