"""Several adapters beside one base: each row is what its own merged model gives, whatever rows of other adapters are beside it."""

import mindspore as ms
import numpy as np
import pytest

from experiments.train import adapter as adapter_files
from parallel.placement import load, place, reader
from parallel.sharding import Sharding
from parallel.trees import tree_map, tree_paths, unflatten
from qwen3 import peft
from qwen3.adapters import side_by_side
from qwen3.config import Lora
from qwen3.engine import Engine, Request
from qwen3.generate import generate
from qwen3.int8 import Quantised, int8_specs
from qwen3.model import param_specs
from tests.tiny import DENSE, MOE, QWEN2, assert_close, random_params

LORAS = {
    "poet": Lora(3, 6.0, ("q", "v", "down")),
    "coder": Lora(5, 2.0, ("k", "o", "gate", "up"), rslora=True),
}
MODELS = {"dense": DENSE, "qwen2": QWEN2, "moe": MOE}
COUNT = 12


def made(cfg, loras=None):
    """(params of the base as a tree, {name: Adapter} with random values)."""
    base, found = random_params(cfg), {}
    for i, (name, lora) in enumerate((loras or LORAS).items()):
        lora = lora if not cfg.num_experts else Lora(lora.rank, lora.alpha, (lora.targets[0], "router"), rslora=lora.rslora)
        leaves = dict(tree_paths(tree_map(lambda w: w.asnumpy(), random_params(cfg.replace(lora=lora), 7 + i))))
        found[name] = peft.Adapter(lora, lambda path, slices, leaves=leaves: leaves[path][slices], "", None)
    return base, found


def tree_of(cfg, read, specs=None):
    specs = specs or param_specs(cfg)
    return load(Sharding().mesh, place(Sharding(), specs), read, "used")


def merged(cfg, base, found):
    """[(cfg, params)] of the base and of each adapter merged into it."""
    out = [(cfg, base)]
    for each in found.values():
        merged_cfg, read = adapter_files.merged(cfg, reader(base), each)
        out.append(
            (merged_cfg, unflatten(param_specs(merged_cfg), [ms.Tensor(read(p, whole(s))) for p, s in tree_paths(param_specs(merged_cfg))]))
        )
    return out


def whole(spec):
    return tuple(slice(0, n) for n in spec.shape)


def engine_of(cfg, base, found, **options):
    joined, read, masks = side_by_side(cfg, reader(base), found)
    return Engine(tree_of(joined, read), joined, slots=4, length=64, prefill_chunk=8, page=8, adapters=masks, **options)


def prompts(count, size=9):
    return np.random.default_rng(1).integers(0, DENSE.vocab_size, (count, size)).tolist()


def answers(engine, requests):
    """[(tokens, log-probabilities)] of each."""
    numbers = [engine.submit(request) for request in requests]
    found = {number: ([], []) for number in numbers}
    while engine.busy():
        for event in engine.step():
            assert event.finish_reason in (None, "length")
            found[event.id][0].append(event.token)
            found[event.id][1].append(event.logprob)
    return [found[number] for number in numbers]


@pytest.mark.extended(but=["dense"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_one_batch_are_those_of_their_merged_models(name):
    cfg = MODELS[name]
    base, found = made(cfg)
    engine, models = engine_of(cfg, base, found), merged(cfg, base, found)
    asked = [(prompt, i % 3) for i, prompt in enumerate(prompts(7))]
    got = answers(engine, [Request(prompt, COUNT, adapter=i) for prompt, i in asked])
    want = [generate(models[i][1], [prompt], models[i][0], COUNT)[0] for prompt, i in asked]
    assert [tokens for tokens, _ in got] == want
    assert len({tuple(generate(params, [asked[0][0]], each, COUNT)[0]) for each, params in models}) == 3  # the adapters matter


def test_neighbours_of_other_adapters_change_no_bit():
    base, found = made(DENSE)
    requests = [Request(prompt, COUNT, adapter=i % 3, logprobs=0, seed=i, temperature=0.5) for i, prompt in enumerate(prompts(6))]
    together = answers(engine_of(DENSE, base, found), requests)
    alone = [answers(engine_of(DENSE, base, found), [request])[0] for request in requests[:3]]
    assert together[:3] == alone


def test_prompts_of_different_adapters_share_no_keys_and_values():
    base, found = made(DENSE)
    engine, (prompt,) = engine_of(DENSE, base, found), prompts(1, 30)
    first = [answers(engine, [Request(prompt, 4, adapter=i)])[0][0] for i in range(3)]
    assert engine.totals.reused_tokens == 0
    again = [answers(engine, [Request(prompt, 4, adapter=i)])[0][0] for i in range(3)]
    assert engine.totals.reused_tokens == 3 * 24
    assert again == first


def test_guesses_and_8_bits_go_with_adapters():
    base, found = made(DENSE)
    requests = [Request(prompt * 2, COUNT, adapter=i % 3) for i, prompt in enumerate(prompts(4))]
    want = [tokens for tokens, _ in answers(engine_of(DENSE, base, found), requests)]
    assert [tokens for tokens, _ in answers(engine_of(DENSE, base, found, speculate=3), requests)] == want
    joined, read, masks = side_by_side(DENSE, reader(base), found)
    specs = param_specs(joined)
    quantised = Quantised(read, specs, 8)
    params = tree_of(joined, quantised.read, int8_specs(specs, 8))
    # the same base, as floats that stand for the numbers in 8 bits
    floats = {path: quantised_floats(quantised, path, spec) for path, spec in tree_paths(param_specs(DENSE))}
    rounded = unflatten(param_specs(DENSE), [ms.Tensor(floats[path]) for path, _ in tree_paths(param_specs(DENSE))])
    options = {"slots": 4, "length": 64, "prefill_chunk": 8, "adapters": masks}
    asked = [Request(prompt, 1, adapter=i % 3, logprobs=5) for i, prompt in enumerate(prompts(3))]
    int8 = answers(Engine(params, joined, **options), asked)
    plain = answers(engine_of(DENSE, rounded, found), asked)
    for (tokens, logprobs), (others, other_logprobs) in zip(int8, plain):
        assert tokens == others
        assert_close(np.array(other_logprobs), np.array(logprobs), 1e-3)


def quantised_floats(quantised, path, spec):
    """The values of a parameter after quantising, as floats in the shape of its spec."""
    pair = int8_specs({"layers": [{path.rsplit(".", 1)[-1]: spec}]}, 8)["layers"][0][path.rsplit(".", 1)[-1]]
    if not isinstance(pair, dict):
        return quantised.read(path, whole(spec))
    numbers = quantised.read(f"{path}.int8", whole(pair["int8"])).astype(np.float32)
    scale = quantised.read(f"{path}.scale", whole(pair["scale"]))
    values = numbers * np.repeat(scale, numbers.shape[-1] // scale.shape[-1], -1)
    return np.ascontiguousarray(values if values.shape == spec.shape and path in ("embed", "lm_head") else np.swapaxes(values, -1, -2))


def test_what_requests_cannot_choose_is_refused():
    base, found = made(DENSE, {"poet": Lora(2, 2.0, ("q", "embed"))})
    with pytest.raises(ValueError, match="the adapter poet has targets embed, which requests cannot choose between; merge it"):
        side_by_side(DENSE, reader(base), found)
    base, found = made(DENSE)
    engine = engine_of(DENSE, base, found)
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"adapter={number} must be 0, or the number of one of the engine's 2 adapters"):
            engine.submit(Request([1], adapter=number))
    with pytest.raises(ValueError, match="adapter=1 must be 0, or the number of one of the engine's 0 adapters"):
        Engine(base, DENSE, slots=1, length=16).submit(Request([1], adapter=1))
