"""The data benchmark: the loader on a large .bin/.idx pair, how long a training step waits for it, and preprocessing compared with the
tokenizer alone."""

import json
import os
import tempfile
import time

import numpy as np

from experiments import flags as command_line
from experiments.configs import tiny
from experiments.data import encode, pairs, readers, sources
from experiments.data.loader import Loader
from experiments.data.megatron import IndexedDataset, Writer
from experiments.data.rows import PairRows
from experiments.train.program import build_program
from experiments.train.weights import random
from qwen3.tokenizer import Tokenizer, train_bpe

VOCAB, EOD, MEAN_LENGTH = 512, 0, 1000  # of the generated pair; document lengths are uniform from 1 to twice the mean
BATCH, SEQ_LEN, BATCHES = 16, 2048, 256
TEXT_BYTES, PIECE = 4_000_000, 2000  # characters of text to tokenise, and of each document


def bench_data(bin_gb, steps):
    """Returns figures as a dict. All files are in a temporary folder. loader_*: rows of SEQ_LEN tokens, one process, one thread."""
    figures = {"what": "data", "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "made")
        figures["bin_bytes"] = make_pair(prefix, int(bin_gb * 1e9))
        figures.update(bench_loader(prefix))
        figures.update(bench_wait(prefix, steps))
        figures.update(bench_preprocess(folder))
    return figures


def make_pair(prefix, size):
    """Writes a pair of documents of random ids, whose .bin has about `size` bytes. Returns its size in bytes."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, 1 << 22, dtype=np.uint16)
    with Writer(prefix, np.uint16) as out:
        left = size // 2
        while left > 0:
            for length in rng.integers(1, 2 * MEAN_LENGTH, 1024).tolist():
                start = int(left * 7919 % (len(ids) - length))
                document = ids[start : start + length].copy()
                document[-1] = EOD
                out.add_document([document])
                left -= length
                if left <= 0:
                    break
    return os.path.getsize(f"{prefix}.bin")


def rows_of(prefix, seq_len):
    indexed = IndexedDataset(prefix)
    return PairRows(indexed, (0, len(indexed)), seq_len, EOD, vocab_size=VOCAB)


def bench_loader(prefix):
    """Measures the loader with rows in random order from all of the pair, including the first access to pages of the file."""
    before, start = memory_mb(), time.perf_counter()
    with Loader(rows_of(prefix, SEQ_LEN), BATCH, seed=0) as loader:
        next(loader)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(loader)
        took = time.perf_counter() - start
        used = memory_mb() - before
    return {
        "loader_first_batch_s": first,
        "loader_rows_per_s": BATCHES * BATCH / took,
        "loader_tokens_per_s": BATCHES * BATCH * SEQ_LEN / took,
        "loader_mem_mb": used,
    }


def bench_wait(prefix, steps):
    """Measures how much of a training step of configs/tiny.py is spent waiting for the loader."""
    config = tiny.get_config()
    config.model_args.vocab_size = VOCAB
    cfg = command_line.model_config(config)
    program = build_program(cfg, config)
    state = program.init(random(cfg, config))
    waited = 0.0
    with Loader(rows_of(prefix, config.train.seq_len), config.train.batch_size, config.train.seed) as loader:
        for at in range(steps + 2):
            if at == 2:
                waited, start = 0.0, time.perf_counter()
            asked = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - asked
            state, _ = program.step(state, batch, 1e-3, at)
        took = time.perf_counter() - start
    return {"step_time_s": took / steps, "loader_wait_s": waited / steps, "loader_share_of_step": waited / took}


def bench_preprocess(folder):
    """Measures documents per second on one core: preprocessing jsonl to a pair, and for the same texts the tokenizer with one batch call
    and with one call per text."""
    texts = _texts()
    train_bpe(texts[:500], 4096).save(os.path.join(folder, "tokenizer"))
    tokenizer, job = Tokenizer.load(os.path.join(folder, "tokenizer")), encode.Job(os.path.join(folder, "tokenizer"))
    path = os.path.join(folder, "texts.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # never restored, because this is the process's last work
    seconds = {
        "batch": _time(lambda: tokenizer.encode_batch(texts)),
        "loop": _time(lambda: [tokenizer.encode(text) for text in texts]),
        "preprocess": _time(lambda: _preprocess(path, os.path.join(folder, "out"), job)),
    }
    rates = {name: len(texts) / took for name, took in seconds.items()}
    return {
        "preprocess_docs_per_s": rates["preprocess"],
        "tokenizer_batch_docs_per_s": rates["batch"],
        "tokenizer_loop_docs_per_s": rates["loop"],
        "preprocess_over_batch": rates["preprocess"] / rates["batch"],
    }


def _preprocess(path, prefix, job):
    batches = encode.encode(readers.records(path), job)
    pairs.write(prefix, batches, {"text": np.uint16}, os.path.getsize(path), pairs.Skipped(False))


def _texts():
    """Returns texts of PIECE characters from Python's own library."""
    out, size = [], 0
    for document in sources.find_documents():
        for start in range(0, len(document.text), PIECE):
            out.append(document.text[start : start + PIECE])
            size += len(out[-1])
            if size > TEXT_BYTES:
                return out
    return out


def _time(call):
    """Returns the shorter time of two calls, in seconds."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_mb():
    """Returns the memory of this process in 1e6 bytes, without pages of mapped files, which the system can reclaim."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("RssAnon"))
