"""The model's behaviour: sizes, packing, cache, annotations, the layer loop, loss weights and experts."""

import re
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from layers import moe
from layers.bound_ops import BoundOps
from ops import routing
from parallel.graph.jit import jit
from parallel.sharding import RULES, Sharding
from parallel.specs import count
from parallel.step import value_and_grad
from parallel.trees import tree_map, tree_paths
from qwen3 import generate
from qwen3.config import SIZES
from qwen3.model import build, forward, layer_specs, loss_fn, metric_names, param_specs
from tests.tiny import (
    DENSE,
    FUSED,
    KINDS,
    MIXED,
    MOE,
    QWEN2,
    assert_close,
    assert_trees_close,
    documents,
    host,
    packed_batch,
    random_params,
    stack_layers,
    unstack_layers,
)

# Elements of the released files (their safetensors headers), without the copy of a tied head that some of them hold.
RELEASED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_have_the_published_number_of_parameters(name):
    assert count(param_specs(SIZES[name])) == RELEASED[name]


def test_every_released_size_is_counted():
    assert set(SIZES) == set(RELEASED) | {"tiny", "tiny-moe"}


@pytest.mark.parametrize("kind", KINDS)
def test_specs_name_dims_that_the_rules_know_with_one_size_each(kind):
    sizes = {}
    for path, spec in tree_paths(param_specs(KINDS[kind])):
        for dim, n in zip(spec.dims, spec.shape):
            assert dim in RULES, path
            assert sizes.setdefault(dim, n) == n, path


def test_specs_of_a_layer_follow_its_kind():
    layers = param_specs(MIXED)["layers"]
    assert [("moe" in p, "mlp" in p) for p in layers] == [(True, False), (False, True), (True, False)]
    assert "lm_head" in param_specs(MIXED) and "lm_head" not in param_specs(DENSE)
    assert {"q_norm", "k_norm"} <= layer_specs(DENSE, 0)["attention"].keys() and "bq" not in layer_specs(DENSE, 0)["attention"]
    assert {"bq", "bk", "bv"} <= layer_specs(QWEN2, 0)["attention"].keys() and "q_norm" not in layer_specs(QWEN2, 0)["attention"]


def two_documents(cfg, lengths=(6, 9), seed=0):
    """One row of two documents without padding: tokens, positions, segment_ids [1, S] int32."""
    tokens = np.concatenate(documents(cfg, lengths, seed)).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    segments = np.repeat([1, 2], lengths).astype(np.int32)
    return [x[None] for x in (tokens, positions, segments)]


def logits_of(params, cfg, tokens, positions, segments):
    return host(forward(params, ms.Tensor(tokens), cfg, positions=ms.Tensor(positions), segment_ids=ms.Tensor(segments))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind):
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    tokens, positions, segments = two_documents(cfg)
    before = logits_of(params, cfg, tokens, positions, segments)
    edited = tokens.copy()
    edited[0, :6] = (tokens[0, :6] + 7) % cfg.vocab_size
    after = logits_of(params, cfg, edited, positions, segments)
    assert np.abs(after[0, :6] - before[0, :6]).max() > 0.1
    np.testing.assert_allclose(after[0, 6:], before[0, 6:], rtol=0, atol=1e-6 * np.abs(before).max())
    later = tokens.copy()
    later[0, 10:] = (tokens[0, 10:] + 7) % cfg.vocab_size
    after = logits_of(params, cfg, later, positions, segments)
    np.testing.assert_allclose(after[0, :10], before[0, :10], rtol=0, atol=1e-6 * np.abs(before).max())
    assert np.abs(after[0, 10:] - before[0, 10:]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_what_it_is_in_a_row_of_its_own(kind):
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    tokens, positions, segments = two_documents(cfg)
    packed = logits_of(params, cfg, tokens, positions, segments)
    for part in (slice(0, 6), slice(6, 15)):
        alone, _ = forward(params, ms.Tensor(tokens[:, part]), cfg)
        assert_close(host(alone), packed[:, part], 1e-5)


@pytest.mark.extended(but=("none",))
@pytest.mark.parametrize("recompute", ["none", "full", "attention"])
def test_attention_by_the_lengths_of_documents_trains_as_by_segments(recompute):
    """Documents of 1 to 16 tokens, one of them a whole row, and padding; loss, metrics and gradients."""
    params, batch = random_params(MOE), packed_batch(MOE, lengths=(1, 4, 0, 7, 15, 2, 2))
    counts = [1 + np.count_nonzero(np.diff(row)) for row in host(batch["segment_ids"])]
    assert min(counts) == 1 and max(counts) > 3
    names = metric_names(MOE)
    (loss, aux), grads = value_and_grad(build(MOE).loss_fn, aux=names)(params, batch)
    by_lengths = build(MOE, Sharding(documents=max(counts)), recompute=recompute).loss_fn
    (found, found_aux), found_grads = value_and_grad(by_lengths, aux=names, compiled=True)(params, batch)
    assert_close(loss, found, 1e-6)
    assert_trees_close(aux, found_aux, 1e-5)
    assert_trees_close(grads, found_grads, 2e-5)


def test_module_level_functions_are_those_of_build():
    params, batch = random_params(MOE), packed_batch(MOE)
    a, aux = forward(params, batch["tokens"], MOE, positions=batch["positions"], segment_ids=batch["segment_ids"])
    b, again = build(MOE).forward(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    assert a.shape == (*batch["tokens"].shape, MOE.vocab_size) and a.dtype == ms.float32
    np.testing.assert_array_equal(host(a), host(b))
    assert aux.keys() == again.keys() == {"router_loss", "router_z_loss", "expert_load"}
    loss, metrics = loss_fn(params, batch, MOE)
    np.testing.assert_array_equal(host(loss), host(build(MOE).loss_fn(params, batch)[0]))
    assert tuple(metrics) == metric_names(MOE) and build(MOE) is build(MOE.replace())
    assert forward(random_params(DENSE), batch["tokens"], DENSE)[1] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_over_weighted_targets(kind):
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    batch = packed_batch(cfg)
    weights = host(batch["loss_weights"]) * np.linspace(0.1, 2, batch["tokens"].size, dtype=np.float32).reshape(batch["tokens"].shape)
    batch["loss_weights"] = ms.Tensor(weights)
    logits, aux = forward(params, batch["tokens"], cfg, positions=batch["positions"], segment_ids=batch["segment_ids"])
    z = host(logits).astype(np.float64)
    nll = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, host(batch["targets"])[..., None], -1)[..., 0]
    expected = (nll * weights).sum() / weights.sum()
    loss, metrics = loss_fn(params, batch, cfg)
    assert_close(np.float32(expected), metrics["loss"], 1e-5)
    assert_close(np.float32(weights.sum()), metrics["tokens"], 1e-6)
    if aux:
        expected += cfg.router_aux_coef * float(aux["router_loss"]) + cfg.router_z_coef * float(aux["router_z_loss"])
    assert_close(np.float32(expected), loss, 1e-5)


@pytest.mark.extended(but=("qwen2",))
@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.slow), "qwen2", "moe"])
def test_prefill_and_decode_equal_the_full_forward(kind):
    """Prompts of different lengths in one batch, teacher-forced from there on."""
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    rows, sizes, steps = documents(cfg, (10, 6, 9)), (7, 1, 4), 3
    logits, cache = generate.prefill(params, [row[:n].tolist() for row, n in zip(rows, sizes)], cfg, 12)
    full = [host(forward(params, ms.Tensor(row[None].astype(np.int32)), cfg)[0])[0] for row in rows]
    for step in range(steps + 1):
        at = np.array(sizes, np.int32) + step
        for b, row in enumerate(full):
            assert_close(row[at[b] - 1], logits[b], 2e-5, f"row {b}, step {step}")
        if step < steps:
            tokens = np.array([row[n] for row, n in zip(rows, at)], np.int32)
            logits, cache = generate.decode_step(params, cache, tokens, at, cfg)


def test_positions_past_the_end_of_the_cache_are_dropped():
    cfg, params, extend = DENSE, random_params(DENSE), build(DENSE).extend
    tokens = np.stack(documents(cfg, (6, 6))).astype(np.int32)
    positions, last = np.tile(np.arange(6, dtype=np.int32), (2, 1)), ms.Tensor(np.array([3, 1], np.int32))
    caches = [extend(params, generate.init_cache(cfg, 2, 4), ms.Tensor(tokens[:, :n]), ms.Tensor(positions[:, :n]), last) for n in (4, 6)]
    assert_trees_close(caches[0], caches[1], 1e-6)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["dense", pytest.param("mixed", marks=pytest.mark.slow)])
def test_a_step_in_few_ops_is_the_step_in_many(kind):
    """Bit for bit without experts, whose products are of as many rows as choose them. One row is past the end of the cache."""
    cfg, params, few = KINDS[kind], random_params(KINDS[kind]), FUSED
    many = replace(few, decode_attention="reference", decode_mlp="reference")
    prompts = [row.tolist() for row in documents(cfg, (7, 3, 5))]
    tokens, at, found = np.array([4, 5, 6], np.int32), np.array([7, 12, 5], np.int32), []
    for kernels in (few, many):
        _, cache = generate.prefill(params, prompts, cfg, 12, kernels)
        found.append(generate.decode_step(params, cache, tokens, at, cfg, kernels))
    assert_trees_close(found[1], found[0], 0 if kind == "dense" else 1e-6)


LOOPED = {"dense": DENSE, "moe": MOE.replace(router_bias=True)}


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_the_layer_loop_equals_unrolled_layers(kind):
    cfg = LOOPED[kind].replace(num_layers=3)
    batch, names = packed_batch(cfg), metric_names(cfg)
    unrolled = value_and_grad(build(cfg).loss_fn, aux=names)
    looped = value_and_grad(build(cfg, None, True).loss_fn, aux=names, compiled=True)
    for seed in (0, 1):  # the second values are read anew, not kept from the first call
        params = random_params(cfg, seed)
        (loss, metrics), grads = unrolled(params, batch)
        (loop_loss, loop_metrics), loop_grads = looped(stack_layers(params), batch)
        assert_close(loss, loop_loss, 1e-6)
        assert_trees_close(metrics, loop_metrics, 1e-5)
        assert_trees_close(grads, unstack_layers(loop_grads), 2e-5)


def test_the_layer_loop_refuses_layers_of_two_kinds():
    with pytest.raises(ValueError, match="train.layer_loop=scan needs layers of one kind"):
        build(MIXED, None, True)


def test_stacking_layers_is_undone_by_unstacking():
    params = random_params(MOE)
    assert_trees_close(params, unstack_layers(stack_layers(params)), 0)
    assert stack_layers(params)["layers"]["moe"]["w_up"].shape == (2, 6, 24, 16)


class Recorded(Sharding):
    """check=True. Notes the ops that are called, and spoils the signature of one of them, by its place in the order in which ops are bound.
    Its copies, for the ops within regions, share what it notes."""

    def __init__(self, wrong=None):
        super().__init__(check=True)
        self.places, self.called, self.wrong = iter(range(10**6)), {}, wrong

    def op(self, fn, signature, *, kind, **options):
        place, signature = self.place(signature)
        return self.noted(place, signature, super().op(fn, signature, kind=kind, **options))

    def region(self, fn, signature, **options):
        place, signature = self.place(signature)
        return self.noted(place, signature, super().region(fn, signature, **options))

    def fan(self, make, operand, signatures, *, kind, wrap=None):
        """A fan counts as one op for each of its signatures: these have the first operand in common."""
        places = [self.place(f"{operand}, {signature}") for signature in signatures]
        if all(place != self.wrong for place, _ in places):
            bound = super().fan(make, operand, signatures, kind=kind, wrap=wrap)
            for place, signature in places:
                bound = self.noted(place, signature, bound)
            return bound
        signature = next(signature for place, signature in places if place == self.wrong)
        return super().op(make(), signature, kind=kind, wrap=wrap)

    def place(self, signature):
        place = next(self.places)
        return place, spoiled(signature) if place == self.wrong else signature

    def noted(self, place, signature, bound):
        def noted(*args):
            self.called[place] = signature
            return bound(*args)

        return noted


def spoiled(signature):
    """The first operand's dims in reverse; where that would make no difference, without the last of them."""
    left, arrow, right = signature.partition("->")
    first, comma, rest = left.partition(",")
    dims = first.split()
    alike = len(dims) == 1 or not set(dims) & set((rest + " " + right).replace(",", " ").split())
    return " ".join(dims[:-1] if alike else dims[::-1]) + comma + rest + arrow + right


def run_every_op(cfg, params, sharding):
    model, batch = build(cfg, sharding), packed_batch(cfg, seq_len=14)
    assert model.forward(params, batch["tokens"], batch["positions"], batch["segment_ids"])[0].shape == (2, 14, cfg.vocab_size)
    assert np.isfinite(float(model.loss_fn(params, batch)[0]))
    cache = generate.init_cache(cfg, 2, 20)
    model.extend(params, cache, batch["tokens"], batch["positions"], ms.Tensor(np.array([3, 5], np.int32)))


@pytest.mark.parametrize("kind", KINDS)
def test_annotations_hold_for_every_op(kind):
    sharding = Recorded()
    run_every_op(KINDS[kind], random_params(KINDS[kind]), sharding)
    assert len(sharding.called) > 20


@pytest.mark.extended
def test_a_wrong_annotation_of_any_op_is_caught():
    cfg, right = MOE.replace(num_layers=1, qkv_bias=True), Recorded()
    params = random_params(cfg)
    run_every_op(cfg, params, right)
    for place, signature in right.called.items():
        with pytest.raises((AssertionError, ValueError), match=re.escape(repr(spoiled(signature)))):
            run_every_op(cfg, params, Recorded(wrong=place))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_zero_loss_weights_give_zero_loss_and_zero_gradients(kind):
    cfg = KINDS[kind].replace(router_aux_coef=0.0, router_z_coef=0.0)
    batch = packed_batch(cfg)
    batch["loss_weights"] = batch["loss_weights"] * 0
    (loss, metrics), grads = value_and_grad(build(cfg).loss_fn, aux=metric_names(cfg))(random_params(cfg), batch)
    assert float(loss) == 0 and float(metrics["loss"]) == 0 and float(metrics["tokens"]) == 0
    for path, grad in tree_paths(grads):
        np.testing.assert_array_equal(host(grad), 0, err_msg=path)


def test_padding_does_not_count_in_router_statistics():
    """Neither its number nor its tokens; and a batch of nothing but padding gives 0."""
    params = random_params(MOE)
    tokens, positions, segments = two_documents(MOE, (6, 5))
    wide = [np.pad(x, ((0, 1), (0, 4))) for x in (tokens, positions, segments)]
    wide[0][segments.shape[0] :] = 9

    def statistics(tokens, positions, segments):
        aux = forward(params, ms.Tensor(tokens), MOE, positions=ms.Tensor(positions), segment_ids=ms.Tensor(segments))[1]
        return {key: host(value) for key, value in aux.items()}

    plain, padded = statistics(tokens, positions, segments), statistics(*wide)
    assert_trees_close(plain, padded, 1e-6)
    np.testing.assert_allclose(plain["expert_load"].sum(1), 1, atol=1e-6)
    assert all(np.all(value == 0) for value in statistics(*(x * 0 for x in wide)).values())


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def moe_inputs(cfg, rows=11, seed=3, one_expert=False):
    """A layer's parameters in numpy, x_RD and valid_R; one_expert: every token's first choice is expert 2."""
    rng = np.random.default_rng(seed)
    p = {key: rng.normal(0, 0.4, spec.shape).astype(np.float32) for key, spec in moe.specs(cfg).items()}
    x = rng.normal(0, 1, (rows, cfg.hidden_size)).astype(np.float32)
    if one_expert:
        x[:, 0] = 5
        p["router"][0, 2] = 10
    valid = (rng.uniform(size=rows) < 0.7).astype(np.float32)
    return p, x, valid


def run_moe(cfg, p, x, valid):
    op = BoundOps(cfg, Sharding(check=True), FUSED)
    y, stats = moe.moe(cfg, op, tree_map(ms.Tensor, p), ms.Tensor(x), {"valid": ms.Tensor(valid)})
    return host(y), host(stats)


def token_by_token(cfg, p, x):
    """y, the probabilities and the chosen experts; one token and one expert at a time."""
    probs, y, chosen = softmax(x.astype(np.float64) @ p["router"]), np.zeros(x.shape), []
    for t, row in enumerate(x.astype(np.float64)):
        bias = p.get("router_bias", 0)
        best = np.argsort(-(probs[t] + bias), kind="stable")[: cfg.experts_per_token]
        total = probs[t][best].sum() if cfg.norm_topk_prob else 1
        for e in best:
            gate = row @ p["w_gate"][e]
            y[t] += probs[t][e] / total * ((gate / (1 + np.exp(-gate)) * (row @ p["w_up"][e])) @ p["w_down"][e])
        chosen.append(best)
    return y, probs, np.array(chosen)


WAYS = {
    "plain": (MOE, {}),
    "no_norm": (MOE.replace(norm_topk_prob=False), {}),
    "top_1": (MOE.replace(experts_per_token=1, norm_topk_prob=False), {}),
    "top_all": (MOE.replace(experts_per_token=6), {}),
    "one_expert": (MOE.replace(experts_per_token=1), {"one_expert": True}),
    "one_expert_first": (MOE, {"one_expert": True, "rows": 40}),
    "more_experts_than_tokens": (MOE.replace(num_experts=40), {"rows": 3}),
    "one_token": (MOE, {"rows": 1}),
    "block_of_one": (MOE.replace(moe_block_size=1), {"rows": 30}),
    "blocks_of_three": (MOE.replace(moe_block_size=3), {"rows": 30}),
    "router_bias": (MOE.replace(router_bias=True), {"rows": 30}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_assignment_is_computed(way):
    cfg, how = WAYS[way]
    p, x, valid = moe_inputs(cfg, **how)
    expected, _, chosen = token_by_token(cfg, p, x)
    if how.get("one_expert"):
        assert (chosen[:, 0] == 2).all()
    y, _ = run_moe(cfg, p, x, valid)
    assert_close(expected, y, 1e-5)


def test_router_losses_are_their_formulas():
    """Switch's balance and ST-MoE's z, over the valid tokens of all layers as Hugging Face joins them."""
    layers = [(p, x, valid, *run_moe(MOE, p, x, valid)) for p, x, valid in (moe_inputs(MOE, seed=s) for s in (1, 2, 3))]
    E, chosen, probs, lse = MOE.num_experts, [], [], []
    for p, x, valid, _, _ in layers:
        keep = valid > 0
        logits = (x.astype(np.float64) @ p["router"])[keep]
        chosen.append(np.eye(E)[token_by_token(MOE, p, x)[2][keep]].sum(1))
        probs.append(softmax(logits))
        lse.append(np.log(np.exp(logits).sum(-1)))
    op = BoundOps(MOE, Sharding(), FUSED)
    balance, z, load, _ = moe.losses(MOE, op, ms.Tensor(np.stack([stats for *_, stats in layers])))
    assert_close(E * (np.concatenate(chosen).mean(0) * np.concatenate(probs).mean(0)).sum(), balance, 1e-6)
    assert_close((np.concatenate(lse) ** 2).mean(), z, 1e-6)
    assert_close(np.stack([c.mean(0) / MOE.experts_per_token for c in chosen]), load, 1e-6)


def test_router_bias_moves_the_choice_and_not_the_weights():
    cfg = MOE.replace(router_bias=True)
    p, x, valid = moe_inputs(cfg, rows=30)
    p["router_bias"] = np.array([0, 0, 0, 0, 0, 10], np.float32)
    p["w_down"] *= np.arange(1, 7, dtype=np.float32)[:, None, None]
    y, stats = run_moe(cfg, p, x, valid)
    expected, probs, chosen = token_by_token(cfg, p, x)
    assert (chosen == 5).any(1).all() and stats[5] == valid.sum()
    assert_close(expected, y, 1e-5)
    unbiased = {k: v for k, v in p.items() if k != "router_bias"}
    assert not (token_by_token(MOE, unbiased, x)[2] == 5).any(1).all()
    p["router_bias"] = np.full(6, 0.25, np.float32)  # the same for every expert: no change at all
    assert_close(run_moe(MOE, unbiased, x, valid)[0], run_moe(cfg, p, x, valid)[0], 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_the_router_bias_is_the_load_above_the_mean(compiled):
    """And 0 where every token is padding; the other gradients are those without a bias."""
    cfg = MOE.replace(router_bias=True)
    p, x, valid = moe_inputs(cfg, rows=30)
    p["router_bias"][:] = 0.1
    biased, plain, total = BoundOps(cfg, Sharding(), FUSED), BoundOps(MOE, Sharding(), FUSED), ops.ReduceSum()

    def biased_loss(params, x, valid):
        y, _ = moe.moe(cfg, biased, params, x, {"valid": valid})
        return total(y * y)

    def plain_loss(params, x, valid):
        y, _ = moe.moe(MOE, plain, params, x, {"valid": valid})
        return total(y * y)

    params, x_valid = tree_map(ms.Tensor, p), (ms.Tensor(x), ms.Tensor(valid))
    vg = value_and_grad(biased_loss, compiled=compiled)
    loss, grads = vg(params, *x_valid)
    load = np.eye(6)[token_by_token(cfg, p, x)[2][valid > 0]].sum((0, 1))
    np.testing.assert_array_equal(6 * load - load.sum(), host(grads.pop("router_bias")))
    np.testing.assert_array_equal(host(vg(params, x_valid[0], x_valid[1] * 0)[1]["router_bias"]), 0)
    params.pop("router_bias")
    plain_value, plain_grads = value_and_grad(plain_loss)(params, *x_valid)
    assert_close(plain_value, loss, 1e-6)
    assert_trees_close(plain_grads, grads, 1e-5)


def slots(assignments, experts, limit):
    size = routing.block_size(assignments, experts, limit)
    return routing.num_blocks(assignments, experts, size) * size


def test_the_cost_of_experts_follows_top_k_and_not_their_number():
    """Rows that go through an expert's matrices, for N = T * k assignments: below 3 N with any number of experts."""
    for limit in (1, 4, 64, 128):
        for assignments in (1, 2, 7, 64, 1000, 8 * 4096):
            for experts in (1, 2, 6, 128, 512, 100_000):
                assert assignments <= slots(assignments, experts, limit) < 3 * assignments
    assert slots(64, 10**6, 64) == 64
    assert slots(8 * 4096, 128, 64) == 8 * 4096 + 128 * 63


def test_any_assignment_fits_its_blocks():
    rng = np.random.default_rng(0)
    for trial in range(300):
        experts, assignments, limit = (int(n) for n in rng.integers(1, (40, 200, 70)))
        chosen = rng.integers(0, rng.integers(1, experts + 1), assignments) if trial % 3 else np.full(assignments, experts - 1)
        load, size = np.bincount(chosen, minlength=experts), routing.block_size(assignments, experts, limit)
        assert 1 <= size <= limit
        assert np.ceil(load / size).sum() <= routing.num_blocks(assignments, experts, size)


def test_tokens_that_are_no_tensor_are_refused_by_name():
    params = random_params(DENSE)
    with pytest.raises(ValueError, match=r"forward: tokens must be a mindspore.Tensor of int32, \[B, S\]; use mindspore.Tensor\(tokens"):
        forward(params, np.zeros((1, 4), np.int32), DENSE)


def test_forward_compiles_as_it_is():
    """What it checks of its arguments is no obstacle in a graph."""
    params, tokens = random_params(DENSE), packed_batch(DENSE)["tokens"]

    def logits(params, tokens):
        return forward(params, tokens, DENSE)[0]

    assert_close(logits(params, tokens), jit(logits)(params, tokens), 1e-6)
