"""The stage `hf`: a released model from its Hugging Face folder, judged by numbers that another machine computed.

The goldens are an .npz file: `about`, a JSON text; `logits` [rows, tokens, V] of fixed token ids; `ids`, the greedy continuation of a
prompt; and `gaps`, how far the second logit was below the first at each of them, as a share of the largest logit.
"""

import functools
import hashlib
import json
import os
import shutil
from functools import partial

import mindspore as ms
import numpy as np

from experiments.accept.kernels import error_of
from experiments.accept.outcome import Failed, NotHere
from experiments.train import weights
from parallel.random import hash_uniform
from parallel.sharding import Sharding
from parallel.specs import count
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.generate import generate
from qwen3.model import forward, param_specs

ROWS, TOKENS, NEW_TOKENS = 2, 8, 16
PROMPT = "The capital of France is"
# Largest error of the logits by the dtypes of the two models, as a share of the largest. Half precision: an estimate, from 30 to 60 layers
# of sums that round to 8 or 11 bits.
FULL, HALF = 2e-4, 5e-2


def hf_checks(job):
    return {
        "load": partial(_loads, job),
        "logits": partial(_logits, job),
        "greedy text": partial(_greedy, job),
        "round trip through its files": partial(_round_trip, job),
    }


def _needs_model(job):
    if not job.hf_dir:
        raise NotHere("no model was given; --hf_dir=FOLDER names the Hugging Face folder of a Qwen3 or Qwen2.5 model")


@functools.cache
def _model(hf_dir):
    opened = weights.inference(hf_dir)
    return opened, opened.params(Sharding())


def _loads(job):
    _needs_model(job)
    opened, params = _model(job.hf_dir)
    cfg = opened.cfg
    facts = {"family": cfg.model_type, "parameters": count(param_specs(cfg)), "layers": cfg.num_layers, "dtype": cfg.param_dtype}
    assert len(tree_paths(params)) == len(tree_paths(param_specs(cfg)))
    return facts


@functools.cache
def _numbers(hf_dir):
    """Returns {about, logits, ids, gaps} of this machine, and the text of the ids, "" without a tokenizer."""
    opened, params = _model(hf_dir)
    cfg, text = opened.cfg, ""
    place = np.arange(ROWS * TOKENS, dtype=np.uint64).reshape(ROWS, TOKENS)
    logits = _logits_of(params, cfg, (hash_uniform(0, 3, place) * cfg.vocab_size).astype(np.int32))
    prompt = [int(i) % cfg.vocab_size for i in (11, 3, 7, 29)]
    if opened.tokenizer is not None:
        tokenizer = opened.load_tokenizer()
        prompt = list(tokenizer.encode(PROMPT))
    (ids,) = generate(params, [prompt], cfg, NEW_TOKENS)
    if opened.tokenizer is not None:
        text = tokenizer.decode(ids)
    each = _logits_of(params, cfg, np.array([[*prompt, *ids[:-1]]], np.int32))[0, len(prompt) - 1 :]
    top = np.sort(each, 1)
    about = {"format": 1, "model": _digest(cfg), "dtype": cfg.param_dtype, "device": ms.get_context("device_target")}
    found = {"about": json.dumps(about), "logits": logits, "ids": np.array(ids, np.int32)}
    return {**found, "gaps": (top[:, -1] - top[:, -2]) / np.abs(each).max(1)}, text


def _logits_of(params, cfg, tokens):
    logits, _ = forward(params, ms.Tensor(tokens), cfg)
    return logits.asnumpy().astype(np.float32)


def _digest(cfg):
    """Returns a digest of what makes a model: its config without dtypes."""
    values = {key: value for key, value in cfg.to_hf().items() if "dtype" not in key}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _goldens(job, mine):
    """Returns the goldens and their `about`. Raises Failed if they are of another model."""
    try:
        with np.load(job.goldens, allow_pickle=False) as file:
            found = {key: file[key] for key in ("about", "logits", "ids", "gaps")}
        about = json.loads(str(found["about"]))
        dtype = about["dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failed(f"{job.goldens} is not a file of --write_goldens: {error}") from None
    if about["model"] != json.loads(mine["about"])["model"]:
        raise Failed(f"{job.goldens} is of another model than --hf_dir: their configs differ")
    return found, dtype


def _tolerance(*dtypes):
    return FULL if set(dtypes) == {"float32"} else HALF


def _logits(job):
    _needs_model(job)
    mine, _ = _numbers(job.hf_dir)
    if not np.isfinite(mine["logits"]).all():
        raise Failed("some logits are NaN or infinite")
    if job.write_goldens:
        aside = f"{job.write_goldens}.new.npz"
        np.savez_compressed(aside, **mine)
        os.replace(aside, job.write_goldens)
    if not job.goldens:
        if job.write_goldens:
            return {"written": os.path.basename(job.write_goldens), "largest logit": float(np.abs(mine["logits"]).max())}
        raise NotHere("all logits are finite, and nothing judges them; --goldens=FILE does, made elsewhere with --write_goldens=FILE")
    want, dtype = _goldens(job, mine)
    error, tolerance = error_of(want["logits"], mine["logits"]), _tolerance(dtype, _model(job.hf_dir)[0].cfg.param_dtype)
    facts = {"error": error, "tolerance": tolerance, "positions": ROWS * TOKENS, "dtype of the goldens": dtype}
    if not error <= tolerance:
        raise Failed("the logits are not those of the goldens", facts)
    return facts


def _greedy(job):
    """Ids may differ from the goldens' only from a place on where the two best logits were nearer to each other than the tolerance."""
    _needs_model(job)
    mine, text = _numbers(job.hf_dir)
    facts = {"text": f"{PROMPT}{text}"} if text else {"ids": mine["ids"].tolist()}
    if not job.goldens:
        raise NotHere(f"nothing judges what it wrote; --goldens=FILE does. It wrote: {text or mine['ids'].tolist()}")
    want, dtype = _goldens(job, mine)
    n = min(len(mine["ids"]), len(want["ids"]))
    other = np.flatnonzero(mine["ids"][:n] != want["ids"][:n])
    facts["tokens that are equal"] = int(other[0]) if len(other) else n
    if len(other):
        gap, tolerance = float(want["gaps"][other[0]]), _tolerance(dtype, _model(job.hf_dir)[0].cfg.param_dtype)
        facts |= {"gap at the first other": gap, "tolerance": tolerance}
        if gap > tolerance:
            raise Failed(f"token {other[0] + 1} is {mine['ids'][other[0]]} and {want['ids'][other[0]]} in the goldens", facts)
    return facts


def _round_trip(job):
    """Saves the model and reads it again: every parameter has to be the one in the released files, bit for bit."""
    _needs_model(job)
    opened, folder = hf.Reader(job.hf_dir), os.path.join(job.scratch, "model")
    size = sum(os.path.getsize(path) for path in _files(job.hf_dir))
    if shutil.disk_usage(job.scratch).free < 1.2 * size + 2**30:
        raise NotHere(f"the disk of --out has no room for a copy of {size / 2**30:.1f} GiB")
    cfg, params = hf.load(job.hf_dir)
    hf.save(folder, cfg, params)
    del params
    saved = hf.Reader(folder)
    if list(saved.paths) != list(opened.paths):
        raise Failed(f"the saved folder has other parameters: {sorted(set(saved.paths) ^ set(opened.paths))[:4]}")
    wrong = [path for path in opened.paths if opened.read(path).tobytes() != saved.read(path).tobytes()]
    shutil.rmtree(folder)
    if wrong:
        raise Failed(f"{len(wrong)} parameters are not the released ones: {', '.join(wrong[:4])}")
    return {"parameters compared": len(opened.paths), "different bytes": 0}


def _files(folder):
    return [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")]
