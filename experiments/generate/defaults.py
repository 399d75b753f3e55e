"""What a model's own files say about generation: one rule for experiments.generate and experiments.serve."""

from pathlib import Path

from qwen3 import chat, hf_files
from qwen3.json_files import exists, read_json
from qwen3.schema import GenerationJson, Sampling, checked

SAMPLING = tuple(Sampling.model_fields)


def read(folder):
    """The checked fields of a folder's generation_config.json; none are set where it has no such file."""
    path = Path(folder) / hf_files.GENERATION
    return checked(GenerationJson, read_json(path) if exists(path) else {}, path)


def sampling(found):
    """The sampling options {name: value} of a GenerationJson. With do_sample a missing temperature is 1, as in transformers;
    do_sample=false is greedy; without do_sample the file says nothing about it. The repetition penalty applies in any case."""
    options = {name: value for name in SAMPLING if (value := getattr(found, name)) is not None}
    if "top_k" in options:
        options["top_k"] = max(options["top_k"], 0)
    if found.do_sample:
        return {"temperature": 1.0, **options}
    greedy = {} if found.do_sample is None else {"temperature": 0.0}
    return {**greedy, **{name: value for name, value in options.items() if name == "repetition_penalty"}}


def for_requests(found):
    """The options of a GenerationJson that a request may leave out: those of sampling(), and max_new_tokens where the file has it."""
    more = {} if found.max_new_tokens is None else {"max_new_tokens": found.max_new_tokens}
    return {**sampling(found), **more}


def stop_ids(found, cfg, tokenizer):
    """The set of ids that end a text: those of generation_config.json, else of config.json; the tokenizer's eos and end of document; and
    the ids that end a turn in its chat template."""
    own = found.eos_token_id
    own = set(cfg.eos_ids if own is None else own if isinstance(own, list) else [own])
    if wrong := sorted(i for i in own if i >= cfg.vocab_size):
        raise ValueError(f"{hf_files.GENERATION}: eos_token_id={wrong[0]} is outside the vocabulary of {cfg.vocab_size}; mend the file")
    return own | {tokenizer.eos_id, tokenizer.eod_id, *chat.turn_ends(tokenizer)}
