"""What an option of an experiment meets: a field that is added to the config for it (docs/ablations.md)."""

import dataclasses
import warnings
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import pytest

from layers import op_table
from ops import attention, registry
from parallel.graph.jit import jit
from parallel.mesh import Mesh
from parallel.sharding import Sharding
from parallel.specs import ParamSpec, ones
from qwen3 import fused, generate, model
from qwen3.config import Qwen3Config, RopeScaling
from qwen3.model import build, choose_kernels
from tests.tiny import DENSE, MIXED, MOE, assert_close, error, packed_batch, random_params


@dataclass(frozen=True)
class Sharper(Qwen3Config):
    """Qwen3 with scores of attention times `sharpness`, in every `sharp_every`-th layer."""

    sharpness: float = 1.0
    sharp_every: int = 1

    def at_layer(self, i):
        sharp = (i + 1) % self.sharp_every == 0
        return super().at_layer(i).replace(sharpness=self.sharpness if sharp else 1.0, sharp_every=1)


def sharper(cfg, **more):
    return Sharper(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}, **more)


@pytest.fixture
def built(monkeypatch):
    """Attention's reference takes `sharpness`, and the table gives it."""
    plain = attention.reference

    def reference(scale, in_order=False, sharpness=1.0):
        return plain(scale * sharpness, in_order)

    def options_of(cfg):
        return {"attention": {"sharpness": cfg.sharpness}} if getattr(cfg, "sharpness", 1.0) != 1.0 else {}

    monkeypatch.setattr(attention, "reference", reference)
    for module in (op_table, __import__("qwen3.model", fromlist=["model"])):
        monkeypatch.setattr(module, "options_of", options_of)


def logits(cfg, kernels=None):
    params, batch = random_params(cfg), packed_batch(cfg)
    return build(cfg, kernels=kernels).forward(params, batch["tokens"], batch["positions"], batch["segment_ids"])[0]


@pytest.mark.extended(but=("dense*",))
@pytest.mark.parametrize("base", [DENSE, MIXED], ids=["dense", "mixed"])
def test_an_option_reaches_the_ops_of_its_layers_alone(built, base):
    layers = base.num_layers
    every, none = logits(sharper(base, sharpness=1.5)), logits(sharper(base))
    assert_close(logits(base), none, 1e-6)
    last = logits(sharper(base, sharpness=1.5, sharp_every=layers))
    assert error(none, last) > 1e-3 and error(every, last) > 1e-3
    first_layers = base.replace(num_layers=layers - 1) if base is DENSE else base.replace(num_layers=layers - 1, mlp_only_layers=(1,))
    params, batch = random_params(base), packed_batch(base)  # the layers before the last compute what they compute without the option
    params = {**params, "layers": params["layers"][:-1]}
    given = batch["tokens"], batch["positions"], batch["segment_ids"]
    assert_close(
        build(first_layers).forward(params, *given)[0],
        build(sharper(first_layers, sharpness=1.5, sharp_every=layers)).forward(params, *given)[0],
        1e-6,
    )


def test_an_implementation_without_the_option_is_not_chosen_and_refused_by_name(built):
    cfg = sharper(DENSE, sharpness=1.5)
    assert choose_kernels({}, DENSE).attention == "cpu" and choose_kernels({}, cfg).attention == "reference"
    message = "ops.attention=cpu has no option 'sharpness', which this model needs; use --config.ops.attention=reference"
    with pytest.raises(ValueError, match=message):
        choose_kernels({"attention": "cpu"}, cfg)
    message = "ops.attention=cpu: cpu of attention has no option 'sharpness', which this model needs"
    with pytest.raises(ValueError, match=message):  # kernels that were chosen for another model
        logits(cfg, registry.choose({}, "CPU", "float32"))


def test_a_ring_of_ranks_refuses_the_option(built):
    with pytest.raises(ValueError, match="ops.attention=reference: reference_parts of attention has no option 'sharpness'"):
        build(sharper(DENSE, sharpness=1.5), Sharding(Mesh(cp=2)))


def test_a_field_that_the_fused_ops_do_not_know_turns_them_off():
    assert build(DENSE).op.fused_decode and build(MOE).op.fused_decode and build(sharper(DENSE)).op.fused_decode
    assert not build(sharper(DENSE, sharpness=1.5)).op.fused_decode
    some = build(sharper(DENSE, sharpness=1.5, sharp_every=2)).op
    assert [own.fused_decode for own in some.of_layer] == [True, False]


def test_the_loop_names_the_field_that_differs():
    with pytest.raises(
        ValueError, match="train.layer_loop=scan needs layers of one kind, and sharpness differs between layers; use unroll"
    ):
        build(sharper(DENSE, sharpness=1.5, sharp_every=2), None, True)


def test_layers_of_one_config_share_their_ops():
    op = build(DENSE).op
    assert set(map(id, op.of_layer)) == {id(op)}
    mixed = build(MIXED).op.of_layer
    assert mixed[0] is mixed[2] and mixed[0] is not mixed[1]
    assert [own.cfg for own in mixed] == [MIXED.at_layer(i) for i in range(3)]


@pytest.mark.parametrize("cfg", [DENSE, MOE, MIXED, MOE.replace(decoder_sparse_step=2)], ids=["dense", "moe", "mixed", "sparse"])
def test_the_config_of_a_layer_is_that_of_each_of_its_layers(cfg):
    for i in range(cfg.num_layers):
        own = cfg.at_layer(i)
        assert {own.at_layer(j) for j in range(cfg.num_layers)} == {own}
        assert {own.is_moe_layer(j) for j in range(cfg.num_layers)} == {cfg.is_moe_layer(i)}


OTHER = {  # another value than the default, for fields where it is not simply one more or the opposite
    **dict(model_type="qwen3_moe", norm_placement="post", rope_scaling=RopeScaling(4.0, 2048), mlp_only_layers=(1,), router_z_coef=0.5),
    **dict(num_heads=8, num_kv_heads=4, head_dim=64, rope_theta=5e5, rms_norm_eps=1e-5, initializer_range=0.1, router_aux_coef=0.2),
    **dict(num_experts=4, experts_per_token=2, moe_ffn_size=32, bos_id=1, eos_id=(2, 3), pad_id=4, param_dtype="bfloat16"),
}
OF_A_RUN = (
    "compute_dtype",
    "lora",
    "frozen",
    "frozen_dtype",
    "moe_block_size",
    "moe_capacity_factor",
    "mup_base_width",
    "param_dtype",
)  # not of the model in the file


def test_every_field_of_the_model_survives_a_config_json():
    """A new field that is not saved fails here: name it in _OWN_FIELDS of qwen3/config.py."""
    changed = {}
    for field in dataclasses.fields(Qwen3Config):
        value = OTHER.get(field.name, not field.default if isinstance(field.default, bool) else None)
        changed[field.name] = field.default + 1 if value is None and isinstance(field.default, int) else value
    cfg = Qwen3Config(**{key: value for key, value in changed.items() if key not in OF_A_RUN})
    for field in dataclasses.fields(Qwen3Config):
        if field.name not in OF_A_RUN:
            assert getattr(cfg, field.name) != field.default, f"{field.name} needs a value in OTHER"
    assert Qwen3Config.from_hf(cfg.to_hf()) == cfg
    dense = Qwen3Config()
    assert Qwen3Config.from_hf(dense.to_hf()) == dense


def test_graph_mode_takes_the_ops_of_each_layer(built):
    cfg = sharper(DENSE, sharpness=1.5, sharp_every=2)
    params, batch = random_params(cfg), packed_batch(cfg)
    given = batch["tokens"], batch["positions"], batch["segment_ids"]
    forward = build(cfg).forward
    assert_close(forward(params, *given)[0], jit(forward)(params, *given)[0], 1e-5)


def scaled_residual(cfg, op, p, x, y):
    """add_ffn with a learned scale of what is added."""
    return op.add(x, y * p["residual_scale"], "rows embed")


def with_scales(make):
    def specs(cfg, *args):
        tree = make(cfg, *args)
        for one in tree["layers"] if "layers" in tree else [tree]:
            one["residual_scale"] = ParamSpec((cfg.hidden_size,), ("embed",), ones())
        return tree

    return specs


@pytest.fixture
def edited(monkeypatch):
    """The model after an edit of a function and of the specs, as if its file had been changed."""
    caches = (build, fused.agrees, generate._extend, generate._extend_pages, generate.decode_loop)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(model, "add_ffn", scaled_residual)
    monkeypatch.setattr(model, "layer_specs", plain := with_scales(model.layer_specs))
    monkeypatch.setattr(fused, "layer_specs", plain)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.extended(but=("dense",))
@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_an_edit_of_a_function_of_the_model_reaches_generation(edited, cfg):
    """In a dense model the fused op of the feed-forward half does not know of the scale, and is turned off; in a mixture of experts the
    scale is in ops that decoding shares with training."""
    params = random_params(cfg)
    assert "residual_scale" in params["layers"][0] and np.abs(params["layers"][0]["residual_scale"].asnumpy() - 1).max() > 0.1
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = generate.generate(params, prompts, cfg, 6)
    assert any("fused ops of decoding do not compute this model's layer" in str(one.message) for one in said) == (cfg is DENSE)
    for prompt, told in zip(prompts, found):
        scores = model.forward(params, ms.Tensor(np.array([prompt + told], np.int32)), cfg)[0].asnumpy()[0]
        np.testing.assert_array_equal(scores[len(prompt) - 1 : -1].argmax(1), told)


@pytest.mark.parametrize("cfg", [DENSE, MOE, *(MIXED.at_layer(i) for i in (0, 1))], ids=["dense", "moe", "mixed, moe", "mixed, dense"])
def test_without_an_edit_the_fused_ops_are_used(cfg):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused.build_to_decode(cfg).op.fused_decode
