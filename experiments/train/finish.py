"""The end of a run: evaluates on held-out rows, draws the loss curve, writes the weights and a sample of text."""

import os
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np

from experiments.data import bigram, corpus, loader
from experiments.train import adapter, run_folder
from experiments.train import weights as weights_of
from experiments.train.ema import averaged
from experiments.watch import metrics
from layers.lora import without_dropout
from parallel.checkpoint.files import CheckpointError, write_text
from parallel.trees import tree_map, tree_paths
from qwen3 import generate, hf, hf_files, peft
from qwen3.model import choose_kernels
from qwen3.text_stream import printable

ANSWERED_AT_ONCE = 50  # questions in a batch of generation


def finish(program, state, cfg, config, data, writer, workdir, mesh, saved=True):
    """Evaluates, gathers the weights, and on rank 0 writes and prints the results. All ranks call it.

    saved: whether the last checkpoint was written. If not, the run does not count as finished, and CheckpointError ends it on rank 0.

    Weights are gathered one by one while rank 0 writes them. If a sample is to be made, all are gathered first, as it needs the full model.
    """
    batches = list(loader.eval_batches(data.held_out, config.train.batch_size, mesh.index(("dp",)), mesh.dp))
    if "ema" in state:
        finish_average(program, averaged(state), batches, cfg, config, data, writer, workdir, mesh)
    nats, weights = program.evaluate(state, batches), program.spread(state)
    if mesh.rank != 0:
        if config.train.sample_tokens or config.train.save_hf:
            take_part(cfg, weights, all_of_them=config.train.sample_tokens > 0)
        return
    if config.train.sample_tokens:
        weights = tree_map(lambda leaf: leaf.asnumpy(), weights)
    if config.train.save_hf:
        save(os.path.join(workdir, result_folder(cfg)), cfg, weights, config, data.tokenizer)
    cfg = without_dropout(cfg)
    params = tree_map(ms.Tensor.from_numpy, weights) if config.train.sample_tokens else None
    if config.prefer.loss:
        report_preferences(nats, config, writer, workdir)
    elif config.rl.loss:
        report_rewards(nats, config, writer, workdir)
    elif data.held_questions:
        report_answers(nats, params, cfg, config, data, writer, workdir)
    else:
        report(nats, cfg, config, data, writer, workdir)
    if config.train.sample_tokens:
        sample(params, cfg, config, data, workdir)
    if not saved:
        raise CheckpointError(
            f"{workdir}: the results above are written, but the last checkpoint is not, and checkpoint.on_error=continue let the run go on;"
            " the same command trains again from the newest checkpoint that is there"
        )
    run_folder.finish(workdir, config.train.steps)


def finish_average(program, state, batches, cfg, config, data, writer, workdir, mesh):
    """Evaluates the average of the weights on all held-out rows, and writes it as a folder of its own. state: of ema.averaged. All ranks
    call it."""
    of_bytes = None if config.prefer.loss or data.held_questions else corpus.bytes_per_target(data.tokenizer, data.held_out)
    found, weights = metrics.held_out(program.evaluate(state, batches), of_bytes), program.spread(state)
    if mesh.rank == 0:
        writer.write(config.train.steps, {f"ema_{name}": value for name, value in _final(found).items()})
        print("average   ", ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in found.items()))
        if config.train.save_hf:
            save(os.path.join(workdir, f"{result_folder(cfg)}_ema"), cfg, weights, config, data.tokenizer)
    elif config.train.save_hf:
        take_part(cfg, weights)


def result_folder(cfg):
    """Returns the name of the folder, inside the run's, that gets the weights at the end."""
    return "adapter" if cfg.lora else "hf"


def check_results(workdir, cfg, config):
    """Raises ValueError where the weights could not be written at the end: a folder with other things in it is not replaced."""
    check = peft.check_replaceable if cfg.lora else hf_files.check_replaceable
    for name in (result_folder(cfg), *([f"{result_folder(cfg)}_ema"] if config.train.ema_decay else [])):
        if config.train.save_hf:
            check(Path(workdir, name))


def report(nats, cfg, config, data, writer, workdir):
    seen = corpus.rows_seen(data.train, config)
    baseline = bigram.held_out_nats(seen, data.held_out, cfg.vocab_size, None)
    found = metrics.held_out(nats, corpus.bytes_per_target(data.tokenizer, data.held_out))
    writer.write(config.train.steps, {**_final(found), "bigram_loss": baseline})
    metrics.plot_losses(os.path.join(workdir, "loss.png"), writer.records, baseline)
    print(f"held out   {nats:.3f} nats a token, {found['bits_per_byte']:.3f} bits a byte; a bigram model: {baseline:.3f} nats")
    print(f"           (the bigram model counted {int(seen['loss_weights'].sum()):,} targets, of the first rows of the run)")


def save_at(step, program, state, cfg, config, tokenizer, workdir, mesh):
    """Writes the weights after a step to hf_steps/step_N, or of LoRA the adapters, as at the end of the run. All ranks call it."""
    weights, folder = program.spread(state), os.path.join(workdir, "hf_steps", f"step_{step:06}")
    if mesh.rank == 0:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        save(folder, cfg, weights, config, tokenizer)
    else:
        take_part(cfg, weights)


def take_part(cfg, weights, all_of_them=False):
    """Takes part in the gathers of the weights that rank 0 saves, in the order in which it asks: of LoRA the adapters, or all of them."""
    for path, leaf in tree_paths(weights):
        if all_of_them or not cfg.lora or weights_of.is_adapter(path):
            leaf.asnumpy()


def save(folder, cfg, weights, config, tokenizer):
    """Writes the weights as a Hugging Face folder, or of LoRA the adapters in PEFT's format."""
    if cfg.lora:
        save_adapter(folder, cfg, weights, config)
    else:
        save_model(folder, cfg.base, weights, tokenizer, config.init_from)


def _final(found):
    """Renames the metrics of all held-out rows: eval_loss and so on are those of the first train.eval_rows of them."""
    return {f"final_{name.removeprefix('eval_')}": value for name, value in found.items()}


def report_answers(nats, params, cfg, config, data, writer, workdir):
    """Writes the held-out loss, and exact_match: the share of held-out questions that greedy decoding answers right in every token."""
    found = _final(metrics.held_out(nats))
    asked = data.held_questions[: config.train.exact_match_rows]
    if params is not None and asked:
        right = answers(params, cfg, asked, choose_kernels(config.ops, cfg))
        found["exact_match"] = sum(right) / len(right)
    writer.write(config.train.steps, found)
    metrics.plot_losses(os.path.join(workdir, "loss.png"), writer.records)
    share = f"; {found['exact_match']:.3f} of {len(asked)} held-out questions answered exactly" if "exact_match" in found else ""
    print(f"held out   {nats:.3f} nats a token{share}")


def report_preferences(found, config, writer, workdir):
    """Writes the metrics of the held-out pairs. found: what the evaluation of preferences returns."""
    writer.write(config.train.steps, _final(metrics.held_out(found)))
    metrics.plot_losses(os.path.join(workdir, "loss.png"), writer.records, label=f"{config.prefer.loss} loss")
    scores = f"{found['accuracy']:.3f} accuracy, reward margin {found['reward_margin']:.3f}"
    print(f"held out   {found['loss']:.3f} {config.prefer.loss} loss, {scores}")


def report_rewards(found, config, writer, workdir):
    """Writes the metrics of the most likely answers to the held-out prompts. found: what Rollouts.evaluate returns."""
    writer.write(config.train.steps, _final(metrics.held_out(found)))
    metrics.plot_losses(os.path.join(workdir, "reward.png"), writer.records, label="reward", name="reward")
    print(f"held out   {found['reward']:.3f} reward of the most likely answers, of {found['length']:.1f} tokens")


def answers(params, cfg, questions, kernels):
    """Returns for each question of conversations.questions whether greedy decoding gives its answer."""
    out = []
    for start in range(0, len(questions), ANSWERED_AT_ONCE):
        asked = questions[start : start + ANSWERED_AT_ONCE]
        length = max(len(answer) for _, answer in asked)
        stop = tuple({answer[-1] for _, answer in asked})
        new = generate.generate(params, [question for question, _ in asked], cfg, length, stop_ids=stop, kernels=kernels)
        out += [given == answer[:-1] for given, (_, answer) in zip(new, asked)]
    return out


def save_model(folder, cfg, weights, tokenizer, init_from=""):
    """Writes a Hugging Face folder. The generation_config.json of the model that training began from comes along."""
    with tempfile.TemporaryDirectory() as files:
        tokenizer.save(files)
        before = Path(os.path.expanduser(init_from)) if init_from else None
        if before and before.is_dir():
            for file in hf.carried_files(before):
                if file.name == hf_files.GENERATION:
                    hf_files.copy_file(file, Path(files))
        hf.save(folder, cfg, weights, tokenizer_dir=files, dtype=cfg.param_dtype)  # frozen parameters may be kept in another dtype
    print(f"saved      {folder}, {hf.who_opens(cfg)}")


def save_adapter(folder, cfg, weights, config):
    """Writes the adapter in PEFT's format. If PEFT cannot reproduce it, prints why; the adapter is then in the checkpoint alone."""
    base = adapter.base_of(cfg, config, weights_of.initial_params(cfg, config)[0])
    found = {path: leaf for path, leaf in tree_paths(weights) if weights_of.is_adapter(path)}
    try:
        peft.refuse_what_peft_cannot(cfg)
    except ValueError as error:
        for leaf in found.values():
            np.asarray(leaf.asnumpy() if hasattr(leaf, "asnumpy") else leaf)  # the other ranks gather each leaf too, and would wait
        print(f"saved      {error}; the checkpoint has the adapters")
        return
    peft.save(folder, cfg, found, base["path"], base["fingerprint"])
    print(f"saved      {folder}, an adapter that PEFT loads; experiments.convert merge-lora joins it to its base")


def sample(params, cfg, config, data, workdir):
    """Continues train.sample_prompt, or the start of a held-out document, by greedy decoding and by sampling; writes sample.txt."""
    tokenizer, kernels = data.tokenizer, choose_kernels(config.ops, cfg)
    asked = list(data.held_questions[0][0]) if data.held_questions else tokenizer.encode(data.held_text)[:32]
    prompt = tokenizer.encode(config.train.sample_prompt) or asked
    texts = []
    for name, options in (("greedy", {}), ("temperature 0.8, top_p 0.95", {"temperature": 0.8, "top_p": 0.95})):
        options = {"stop_ids": (tokenizer.eod_id, tokenizer.eos_id, *cfg.eos_ids), "kernels": kernels, **options}
        new = generate.generate(params, [prompt], cfg, config.train.sample_tokens, **options)[0]
        texts.append(f"--- sample, {name}\n{tokenizer.decode(prompt)}|{tokenizer.decode(new)}\n")
        print(printable(texts[-1]), end="", flush=True)
    write_text(os.path.join(workdir, "sample.txt"), "".join(texts))
