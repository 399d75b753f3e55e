"""Model configuration: one frozen dataclass for Qwen3, Qwen3-MoE and Qwen2/2.5, the released sizes, and the conversion from and to
Hugging Face's config.json. Source of sizes and defaults: the config.json files of the released models."""

import dataclasses
import math
from dataclasses import dataclass

from parallel.hints import divisors, nearest
from qwen3.quantization import scheme_of
from qwen3.schema import LARGEST, LIMITS, LORA_LIMITS, REAL_LIMITS, YARN_LIMIT, ConfigJson, checked, short

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen2")
ARCHITECTURES = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "qwen2": "Qwen2"}  # what transformers' names of classes begin with
OF_TEXT, OF_SCORES = "ForCausalLM", "ForSequenceClassification"  # and end with, see num_labels
DTYPES = ("float32", "float16", "bfloat16")
NORM_PLACEMENTS = ("pre", "post", "both")


def _is_number(value):
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value, or_zero=False):
    """Whether `value` is a finite number above 0. or_zero: 0 will do."""
    return _is_number(value) and (value > 0 or or_zero and value == 0)


@dataclass(frozen=True)
class RopeScaling:
    """YaRN scaling of the rotary angles (Peng et al. 2023), with the names and defaults of Hugging Face's `rope_parameters`."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"YaRN: truncate={value!r} must be true or false")
            elif value is not None and not _is_positive(value, or_zero=field.name.startswith("mscale")):
                raise ValueError(f"YaRN: {field.name}={value!r} must be a finite number above 0")
            elif value is not None and value > (most := LARGEST if field.name == "original_max_position" else YARN_LIMIT):
                raise ValueError(f"YaRN: {field.name}={value!r} must be at most {most}")
        if self.factor < 1:
            raise ValueError(f"YaRN: factor={self.factor} must be 1 or more")


# The weights that LoRA can adapt. Target: (path of the weight in a layer, or in the model for the embedding; Hugging Face's module name).
TARGETS = {
    "embed": ("embed", "embed_tokens"),
    "q": ("attention.wq", "q_proj"),
    "k": ("attention.wk", "k_proj"),
    "v": ("attention.wv", "v_proj"),
    "o": ("attention.wo", "o_proj"),
    "gate": ("mlp.w_gate", "gate_proj"),
    "up": ("mlp.w_up", "up_proj"),
    "down": ("mlp.w_down", "down_proj"),
    "router": ("moe.router", "gate"),
    "experts.gate": ("moe.w_gate", "gate_proj"),
    "experts.up": ("moe.w_up", "up_proj"),
    "experts.down": ("moe.w_down", "down_proj"),
}


@dataclass(frozen=True)
class Lora:
    """Options of a model's adapters. rank, alpha and dropout mean what they mean in PEFT. targets: names from TARGETS. init: kaiming or
    gaussian. rslora: the scale is alpha / sqrt(rank) (Kalajdzievski 2023) instead of alpha / rank. Raises ValueError for values that
    cannot be built."""

    rank: int
    alpha: float
    targets: tuple
    dropout: float = 0.0
    init: str = "kaiming"
    rslora: bool = False

    def __post_init__(self):
        if type(self.rank) is not int or not 1 <= self.rank <= LORA_LIMITS["rank"]:
            raise ValueError(f"lora.rank={short(self.rank)} must be a whole number from 1 to {LORA_LIMITS['rank']}")
        if not _is_positive(self.alpha) or self.alpha > LORA_LIMITS["alpha"]:
            raise ValueError(f"lora.alpha={short(self.alpha)} must be a number above 0, up to {LORA_LIMITS['alpha']:g}")
        undropped = [name for name in self.targets if name == "router" or name.startswith("experts.")]
        if self.dropout and undropped:
            raise ValueError(
                f"lora.dropout={self.dropout} cannot be used with lora.targets {', '.join(undropped)}: PEFT has no dropout there; use"
                " --config.lora.dropout=0, or other lora.targets"
            )

    @property
    def scale(self):
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class Qwen3Config:
    """Shapes and constants of one model. Sizes count elements; `ffn_size` is the size of a dense feed-forward layer.

    Raises ValueError, naming the key, for values that cannot be built.
    """

    model_type: str = "qwen3"
    vocab_size: int = 151936
    hidden_size: int = 1024
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    ffn_size: int = 3072
    tie_embeddings: bool = True
    num_labels: int = 0  # scores that a head gives after each token, instead of logits: 1 for a reward model; 0 = a language model
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_placement: str = "pre"  # where a layer has norms: pre, post or both, see layers/norm.py
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position: int = 40960
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    # Mixture of experts: num_experts == 0 is a dense model.
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple = ()
    router_aux_coef: float = 0.001
    router_z_coef: float = 0.0
    router_bias: bool = False  # balancing without a loss: a bias per expert on the choice, which follows the load of the expert
    moe_block_size: int = 64
    # Size of the buffers between expert parallel ranks, as a multiple of the mean load. None: sized for the worst case, so that every
    # token has a slot.
    moe_capacity_factor: float | None = None
    # Special token ids; None where the model has no such token. A tuple of eos ids: generation stops at any of them.
    bos_id: int | None = None
    eos_id: int | tuple | None = None
    pad_id: int | None = None
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    # Which parameters train: with LoRA, only its adapters; without, those that `frozen` = (include, exclude) does not freeze. A parameter
    # is frozen if its path matches a pattern of `include` and no pattern of `exclude`.
    lora: Lora | None = None
    frozen: tuple = ((), ())
    frozen_dtype: str = "float32"  # in which a training run keeps frozen matrices, but for the router's, which computes in float32
    mup_base_width: int = 0  # the hidden_size at which muP changes nothing, see qwen3/mup.py; 0 = no muP

    def __post_init__(self):
        _check(self)

    @classmethod
    def from_hf(cls, hf, *, where="config.json", **overrides):
        """The config of a Hugging Face `config.json`, as a dict. Raises ValueError naming what is wrong or not supported; where: its path,
        for such errors."""
        return cls(**{**_from_hf(hf, where), **overrides})

    def to_hf(self):
        """Returns the dict of a `config.json` from which `transformers` builds the same model."""
        return _to_hf(self)

    def replace(self, **changes):
        """Returns a copy with some fields changed. Raises ValueError for an unknown field, naming the nearest known one."""
        known = [f.name for f in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                raise ValueError(f"model config has no field {key!r}{nearest(key, known)}")
        return dataclasses.replace(self, **changes)

    @property
    def base(self):
        """The config without adapters and with nothing frozen: the model as Hugging Face files store it."""
        return dataclasses.replace(self, lora=None, frozen=((), ()), frozen_dtype="float32", mup_base_width=0)

    @property
    def eos_ids(self):
        """The ids at which generation may stop, as a tuple."""
        return self.eos_id if isinstance(self.eos_id, tuple) else () if self.eos_id is None else (self.eos_id,)

    def with_eos(self, ids):
        """The same model with more ids that end a text, after its own; ids outside the vocabulary are left out."""
        found = tuple(dict.fromkeys((*self.eos_ids, *(i for i in ids if i < self.vocab_size))))
        return self.replace(eos_id=found if len(found) > 1 else found[0] if found else None)

    @property
    def lora_targets(self):
        """The names in TARGETS whose weight this model has."""
        kinds = {"moe" if self.is_moe_layer(i) else "mlp" for i in range(self.num_layers)}
        return tuple(name for name, (path, _) in TARGETS.items() if path.split(".")[0] in {"embed", "attention", *kinds})

    def is_moe_layer(self, i):
        """Returns whether layer i (counted from 0) is a mixture of experts, and not one dense MLP."""
        return self.num_experts > 0 and i not in self.mlp_only_layers and (i + 1) % self.decoder_sparse_step == 0

    @property
    def moe_layers(self):
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    def at_layer(self, i):
        """Returns the config that the functions of layer i receive: the config of a model in which every layer is like layer i.

        An option that differs by layer gets the value of layer i here. So a layer's functions read the option without knowing the number
        of the layer, and layers with equal configs are compiled once. Applying at_layer to the result, with any number, must not change
        it. For example, with `window_every`, an option that gives every n-th layer an attention window:

            changes.update({"window_every": 1} if (i + 1) % self.window_every == 0 else {"window": 0})
        """
        if not self.num_experts:
            return self
        return self.replace(decoder_sparse_step=1, mlp_only_layers=() if self.is_moe_layer(i) else tuple(range(self.num_layers)))


def _check(c):
    def need(ok, message):
        if not ok:
            raise ValueError(f"model config: {message}")

    need(c.model_type in MODEL_TYPES, f"model_type={c.model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    experts = () if c.model_type != "qwen3_moe" else ("num_experts", "experts_per_token", "moe_ffn_size")
    for key, most in LIMITS.items():
        value = getattr(c, key)
        least = 0 if key not in experts and key.startswith(("num_experts", "experts", "moe_ffn", "num_labels")) else 1
        right = type(value) is int and least <= value <= most
        need(right, f"{key}={short(value)} must be a whole number from {least} to {most}")
    need(c.head_dim % 2 == 0, f"head_dim={c.head_dim} must be even: rotary embedding turns pairs")
    need(
        c.num_heads % c.num_kv_heads == 0,
        f"num_kv_heads={c.num_kv_heads} must divide num_heads={c.num_heads}; use {divisors(c.num_heads)}",
    )
    need(c.norm_placement in NORM_PLACEMENTS, f"norm_placement={c.norm_placement!r} is not one of {', '.join(NORM_PLACEMENTS)}")
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.type is bool:
            need(isinstance(value, bool), f"{field.name}={value!r} must be true or false")
        if field.type is float or (field.name in REAL_LIMITS and value is not None):
            most = REAL_LIMITS.get(field.name, math.inf)
            need(_is_number(value), f"{field.name}={value!r} must be a finite number")
            need(value <= most, f"{field.name}={value!r} must be at most {most:g}")
    width, most = c.mup_base_width, LIMITS["hidden_size"]
    need(type(width) is int and 0 <= width <= most, f"mup_base_width={short(width)} must be a whole number from 0 to {most}")
    need(c.rope_theta > 1, f"rope_theta={c.rope_theta} must be above 1")
    outside = [i for i in c.mlp_only_layers if type(i) is not int or not 0 <= i < c.num_layers]
    need(not outside, f"mlp_only_layers={short(list(c.mlp_only_layers))} names layers outside 0..{c.num_layers - 1}")
    factor = c.moe_capacity_factor
    need(factor is None or factor > 0, f"moe_capacity_factor={factor} must be above 0; leave it out for the worst case")
    need(c.rms_norm_eps > 0, f"rms_norm_eps={c.rms_norm_eps} must be above 0")
    for key in ("initializer_range", "router_aux_coef", "router_z_coef"):
        need(getattr(c, key) >= 0, f"{key}={getattr(c, key)} must be 0 or more")
    for key in ("param_dtype", "compute_dtype", "frozen_dtype"):
        need(getattr(c, key) in DTYPES, f"{key}={getattr(c, key)!r} is not one of {', '.join(DTYPES)}")
    if c.model_type == "qwen3_moe":
        need(
            c.experts_per_token <= c.num_experts,
            f"experts_per_token={c.experts_per_token} must be from 1 to num_experts={c.num_experts}",
        )
    else:
        need(c.num_experts == 0, f"num_experts={c.num_experts} needs model_type=qwen3_moe")
    for key in ("bos_id", "eos_id", "pad_id"):
        value = getattr(c, key)
        ids = value if key == "eos_id" and isinstance(value, tuple) else () if value is None else (value,)
        inside = all(type(i) is int and 0 <= i < c.vocab_size for i in ids)
        need(inside, f"{key}={value} is outside the vocabulary of {c.vocab_size}")


def check_compute_dtype(cfg, device):
    """Raises ValueError if `device`, MindSpore's name of the target, cannot compute in cfg.compute_dtype."""
    if device == "CPU" and cfg.compute_dtype != "float32":
        no_bf16 = "MindSpore has no bfloat16 matmul on CPU"
        why = no_bf16 if cfg.compute_dtype == "bfloat16" else "the CPU ops compute in float32 only"
        raise ValueError(f"model_args.compute_dtype={cfg.compute_dtype!r}: {why}; use --config.model_args.compute_dtype=float32")


# Fields that no released model has. config.json stores them under our names if they differ from their defaults. To add an option to the
# model, name it here: then it is saved and read, and saving warns that transformers ignores it.
_OWN_FIELDS = ("norm_placement",)
# Hugging Face's key: our field. Other keys are either handled in _from_hf or do not change the numbers that the model computes.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_size",
    "rms_norm_eps": "rms_norm_eps",
}
_HF_MOE_FIELDS = {
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "moe_ffn_size",
    "norm_topk_prob": "norm_topk_prob",
    "decoder_sparse_step": "decoder_sparse_step",
    "router_aux_loss_coef": "router_aux_coef",
}
# The values that transformers assumes for keys that config.json does not have.
_HF_DEFAULTS = {
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": 0.001,
    "rms_norm_eps": 1e-6,
}


def _from_hf(hf, where):
    found = checked(ConfigJson, hf, where)
    kind = found.model_type
    if kind not in MODEL_TYPES:
        names = ", ".join(MODEL_TYPES)
        raise ValueError(
            f"{where}: model_type={short(kind)} (architectures={short(found.architectures)}) is not supported; use one of {names}"
        )
    _refuse_unsupported(found, where)
    own = {name: getattr(found, name) for name in _usual_attention(kind)}
    out = {"model_type": kind, **{name: usual if own[name] is None else own[name] for name, usual in _usual_attention(kind).items()}}
    for key, name in _HF_FIELDS.items():
        out[name] = _get(found, key, where)
    out["num_kv_heads"] = found.num_key_value_heads or out["num_heads"]
    out["head_dim"] = found.head_dim or (128 if kind == "qwen3" else out["hidden_size"] // out["num_heads"])
    out["tie_embeddings"] = bool(found.tie_word_embeddings)
    if found.architectures and found.architectures[0].endswith(OF_SCORES):
        # transformers has two labels where config.json names none
        out["num_labels"] = len(found.id2label) if found.id2label is not None else 2 if found.num_labels is None else found.num_labels
    out["initializer_range"] = 0.02 if found.initializer_range is None else found.initializer_range
    out.update({name: hf[name] for name in _OWN_FIELDS if name in hf})
    out["max_position"] = found.max_position_embeddings or 32768
    out["rope_theta"], out["rope_scaling"] = _rope_from_hf(found, out["max_position"], where)
    if kind == "qwen3_moe":
        for key, name in _HF_MOE_FIELDS.items():
            out[name] = _get(found, key, where)
        out["num_experts"] = found.num_experts or found.num_local_experts or 128
        out["mlp_only_layers"] = tuple(found.mlp_only_layers or ())
        out["router_bias"] = bool(found.router_bias)
        out["router_z_coef"] = found.router_z_loss_coef or 0.0
    for key, name in (("bos_token_id", "bos_id"), ("eos_token_id", "eos_id"), ("pad_token_id", "pad_id")):
        out[name] = _ids(getattr(found, key), several=name == "eos_id")
    return out


def own_fields(c):
    """Returns {name: value} of the fields in _OWN_FIELDS that differ from their defaults, so from every released model."""
    return {name: getattr(c, name) for name in _OWN_FIELDS if getattr(c, name) != getattr(Qwen3Config, name)}


def _usual_attention(kind):
    """Returns qk_norm and qkv_bias of the released models of a type. config.json stores them, under our names, only for a model that
    differs."""
    return {"qk_norm": kind != "qwen2", "qkv_bias": kind == "qwen2"}


def _ids(value, several):
    """Returns one token id of a config.json value: the value, or the first of a list. several: a list of 2 or more becomes a tuple."""
    if not isinstance(value, list):
        return value
    return tuple(value) if several and len(value) > 1 else value[0] if value else None


def _get(found, key, where):
    value = getattr(found, key)
    value = _HF_DEFAULTS.get(key) if value is None else value
    if value is None:
        raise ValueError(f"{where}: {key} is missing")
    return value


def _refuse_unsupported(found, where):
    if found.use_sliding_window:
        raise ValueError(f"{where}: use_sliding_window=true is not supported; every layer here attends to the whole sequence")
    if other := sorted(set(found.layer_types or ()) - {"full_attention"}):
        raise ValueError(f"{where}: layer_types={short(other)} is not supported; only full_attention is")
    scheme_of(found.quantization_config, where)
    if found.hidden_act not in (None, "silu"):
        raise ValueError(f"{where}: hidden_act={short(found.hidden_act)} is not supported; only 'silu' is")
    if found.attention_dropout:
        raise ValueError(f"{where}: attention_dropout={found.attention_dropout} is not supported; set it to 0")
    if found.model_type != "qwen2" and found.attention_bias:
        raise ValueError(f"{where}: attention_bias=true adds a bias to o_proj, which is not supported")


def _rope_from_hf(found, max_position, where):
    """rope_theta and scaling, from the top level (transformers 4) or from `rope_parameters` (transformers 5)."""
    rope = {}
    for given in (found.rope_scaling, found.rope_parameters):
        rope.update({key: value for key in given.model_fields_set if (value := getattr(given, key)) is not None} if given else {})
    theta = rope.pop("rope_theta", None) or found.rope_theta or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"{where}: rope_type={short(kind)} is not supported; use 'default' or 'yarn'")
    if "factor" not in rope:
        raise ValueError(f"{where}: rope_type='yarn' needs a factor")
    keys = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    options = {k: rope[k] for k in keys if k in rope}
    original = rope.get("original_max_position_embeddings") or max_position
    return theta, RopeScaling(factor=float(rope["factor"]), original_max_position=original, **options)


def _to_hf(c):
    out = {"architectures": [ARCHITECTURES[c.model_type] + (OF_SCORES if c.num_labels else OF_TEXT)], "model_type": c.model_type}
    if c.num_labels:
        names = [f"LABEL_{i}" for i in range(c.num_labels)]
        out.update(id2label={str(i): name for i, name in enumerate(names)}, label2id={name: i for i, name in enumerate(names)})
    out.update({key: getattr(c, name) for key, name in _HF_FIELDS.items()})
    out.update(
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        hidden_act="silu",
        initializer_range=c.initializer_range,
        max_position_embeddings=c.max_position,
        tie_word_embeddings=c.tie_embeddings,
        attention_dropout=0.0,
        use_sliding_window=False,
        sliding_window=None,
        use_cache=True,
        torch_dtype=c.param_dtype,
        rope_theta=c.rope_theta,
        rope_scaling=None,
    )
    if c.model_type != "qwen2":
        out["attention_bias"] = False
    out.update(own_fields(c))
    if c.rope_scaling:
        yarn = {k: v for k, v in dataclasses.asdict(c.rope_scaling).items() if v is not None}
        yarn["original_max_position_embeddings"] = yarn.pop("original_max_position")
        out["rope_scaling"] = {"rope_type": "yarn", **yarn}
    if c.model_type == "qwen3_moe":
        out.update({key: getattr(c, name) for key, name in _HF_MOE_FIELDS.items()})
        out.update(num_experts=c.num_experts, mlp_only_layers=list(c.mlp_only_layers), output_router_logits=False)
        if c.router_bias:
            out["router_bias"] = True
        if c.router_z_coef:
            out["router_z_loss_coef"] = c.router_z_coef
    out.update({name: getattr(c, name) for name, usual in _usual_attention(c.model_type).items() if getattr(c, name) != usual})
    eos = list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id
    out.update(bos_token_id=c.bos_id, eos_token_id=eos, pad_token_id=c.pad_id)
    return out


_QWEN_IDS = dict(bos_id=None, eos_id=151645, pad_id=151643)


def _qwen3(hidden, layers, heads, ffn, *, tied=False, **more):
    base = dict(hidden_size=hidden, num_layers=layers, num_heads=heads, ffn_size=ffn, tie_embeddings=tied, **_QWEN_IDS)
    return Qwen3Config(**{**base, **more})


def _qwen3_moe(hidden, layers, heads, ffn, moe_ffn):
    moe = dict(model_type="qwen3_moe", num_kv_heads=4, num_experts=128, experts_per_token=8, moe_ffn_size=moe_ffn)
    return _qwen3(hidden, layers, heads, ffn, **moe)


SIZES = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 12288, 1536),
    "qwen2.5-7b": _qwen3(
        3584,
        28,
        28,
        18944,
        model_type="qwen2",
        num_kv_heads=4,
        vocab_size=152064,
        qk_norm=False,
        qkv_bias=True,
        max_position=131072,
        bos_id=151643,
        eos_id=151643,
        pad_id=None,
    ),
    "tiny": Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=384,
        max_position=2048,
        initializer_range=0.05,
    ),
    "tiny-moe": Qwen3Config(
        model_type="qwen3_moe",
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=384,
        max_position=2048,
        initializer_range=0.05,
        num_experts=8,
        experts_per_token=2,
        moe_ffn_size=192,
        router_aux_coef=0.01,
    ),
}
