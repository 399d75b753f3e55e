"""The fields of the JSON that comes from outside, declared once with their types and ranges: a model's files and an adapter's.

    found = checked(GenerationJson, data, path)        # found.temperature; found.model_fields_set names the keys that were given

Conversations (qwen3/messages.py) and requests (experiments/serve/requests.py) are declared in the same way. Each error names where the
value comes from, its key, the value, and what it should be; the words follow from the declaration. A null is a missing key. A key that
is not declared has no effect here and is not checked.
"""

import typing
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST = 2**31 - 1  # of an int32
# The most of each size. Nothing is allocated or looped over by a number that no model has: the limits lie far above all released models.
LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_layers": 4096,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**16,
    "ffn_size": 2**24,
    "max_position": LARGEST,
    "num_experts": 2**14,
    "experts_per_token": 2**14,
    "moe_ffn_size": 2**24,
    "decoder_sparse_step": 4096,
    "moe_block_size": 2**20,
    "num_labels": 2**14,
}
REAL_LIMITS = {
    "rms_norm_eps": 1.0,
    "initializer_range": 1e3,
    "rope_theta": 1e15,
    "router_aux_coef": 1e6,
    "router_z_coef": 1e6,
    "moe_capacity_factor": 1e6,
}
YARN_LIMIT = 1e6  # of each number of YaRN, except original_max_position
LORA_LIMITS = {"rank": 2**16, "alpha": 1e9}


class FieldError(ValueError):
    """A value that is not as declared. key: the outermost field that it is in, "" for the whole."""

    def __init__(self, message, key):
        super().__init__(message)
        self.key = key


class Fields(BaseModel):
    """A JSON object. Types are strict: "5" and true are no numbers, and 5.0 is no whole number."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data):
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def checked(kind, data, where):
    """The Fields `kind` of a JSON value. where: its file or place, for errors. Raises FieldError."""
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise _told(kind, data, error.errors(include_url=False, include_context=False)[0], where) from None


def short(value, most=60):
    """repr() of a value from outside, cut to a length that fits a message."""
    try:
        text = repr(value if not isinstance(value, str | list | tuple) else value[: most + 1])
    except (RecursionError, ValueError):  # nested too deeply, or a number of more digits than Python prints
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= most else text[: most - 3] + "..."


def _told(kind, data, error, where):
    """The FieldError of pydantic's first error: the words are those of the innermost declared field that it is in."""
    path, words, value = [], "an object", data
    for part in error["loc"]:
        field = kind.model_fields.get(part) if kind else None
        inner = isinstance(part, int) and path and isinstance(value, list) and part < len(value)
        if not field and not inner:
            break
        path.append(part)
        if field:
            words, kind = field.description or words, _model(field.annotation)
            value = value.get(part) if isinstance(value, dict) else None
        else:
            value = value[part]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    outer = str(path[0]) if path else ""
    prefix = f"{where}: " if where else ""
    if error["type"] == "extra_forbidden":
        return FieldError(f"{prefix}there is no field {short(error['loc'][-1])}; leave it out", str(error["loc"][0])[:64])
    if error["type"] == "missing" and len(path) == len(error["loc"]):
        return FieldError(f"{prefix}{key} is missing; give {words}", outer)
    if error["type"] == "value_error":  # raised by a validator of ours, in its own words
        return FieldError(f"{prefix}{key}: {error['msg'].removeprefix('Value error, ')}", outer)
    if not path:
        return FieldError(f"{prefix}{short(value)} must be {words}", outer)
    return FieldError(f"{prefix}{key}={short(value)} must be {words}", outer)


def _model(annotation):
    """The Fields class in a type such as list[Message], or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model, typing.get_args(annotation))), None)


def whole(least, most, words=None):
    return Annotated[int, Field(ge=least, le=most, description=words or f"a whole number from {least} to {most}")]


def real(least, most, *, above=False):
    """A finite number from `least` (above: larger than it) to `most`."""
    words = f"a number above {least:g}, up to {most:g}" if above else f"a number from {least:g} to {most:g}"
    return Annotated[float, Field(**{"gt" if above else "ge": least}, le=most, allow_inf_nan=False, description=words)]


def told(kind, words):
    """A type with the words that say it in errors."""
    return Annotated[kind, Field(description=words)]


Text = told(str, "text")
Yes = told(bool, "true or false")
TokenId = whole(0, LARGEST)
TokenIds = told(TokenId | list[TokenId], f"a token id, from 0 to {LARGEST}, or a list of them")
Object = told(dict[str, Any], "an object")


class Rope(Fields):
    """`rope_scaling` of transformers 4, `rope_parameters` of 5."""

    rope_theta: real(1, REAL_LIMITS["rope_theta"], above=True) = None
    rope_type: Text = None
    type: Text = None
    factor: real(0, YARN_LIMIT, above=True) = None
    original_max_position_embeddings: whole(1, LARGEST) = None
    beta_fast: real(0, YARN_LIMIT, above=True) = None
    beta_slow: real(0, YARN_LIMIT, above=True) = None
    attention_factor: real(0, YARN_LIMIT, above=True) = None
    mscale: real(0, YARN_LIMIT) = None
    mscale_all_dim: real(0, YARN_LIMIT) = None
    truncate: Yes = None


class ConfigJson(Fields):
    """config.json. A key that is missing has transformers' default for the model type, which qwen3/config.py fills in."""

    model_type: Text = None
    architectures: told(list[str], "a list of texts") = None
    vocab_size: whole(1, LIMITS["vocab_size"]) = None
    hidden_size: whole(1, LIMITS["hidden_size"]) = None
    num_hidden_layers: whole(1, LIMITS["num_layers"]) = None
    num_attention_heads: whole(1, LIMITS["num_heads"]) = None
    num_key_value_heads: whole(1, LIMITS["num_kv_heads"]) = None
    head_dim: whole(1, LIMITS["head_dim"]) = None
    intermediate_size: whole(1, LIMITS["ffn_size"]) = None
    hidden_act: Text = None
    rms_norm_eps: real(0, REAL_LIMITS["rms_norm_eps"], above=True) = None
    initializer_range: real(0, REAL_LIMITS["initializer_range"]) = None
    max_position_embeddings: whole(1, LIMITS["max_position"]) = None
    tie_word_embeddings: Yes = None
    attention_dropout: real(0, 1) = None
    attention_bias: Yes = None
    use_sliding_window: Yes = None
    layer_types: told(list[str], "a list of texts") = None
    quantization_config: Object = None
    id2label: Object = None
    num_labels: whole(1, LIMITS["num_labels"]) = None
    rope_theta: real(1, REAL_LIMITS["rope_theta"], above=True) = None
    rope_scaling: told(Rope, "an object") = None
    rope_parameters: told(Rope, "an object") = None
    num_experts: whole(1, LIMITS["num_experts"]) = None
    num_local_experts: whole(1, LIMITS["num_experts"]) = None
    num_experts_per_tok: whole(1, LIMITS["experts_per_token"]) = None
    moe_intermediate_size: whole(1, LIMITS["moe_ffn_size"]) = None
    norm_topk_prob: Yes = None
    decoder_sparse_step: whole(1, LIMITS["decoder_sparse_step"]) = None
    mlp_only_layers: told(
        Annotated[list[whole(0, LIMITS["num_layers"])], Field(max_length=LIMITS["num_layers"])], "a list of numbers of layers"
    ) = None
    router_aux_loss_coef: real(0, REAL_LIMITS["router_aux_coef"]) = None
    router_z_loss_coef: real(0, REAL_LIMITS["router_z_coef"]) = None
    router_bias: Yes = None
    qk_norm: Yes = None
    qkv_bias: Yes = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None


class Sampling(Fields):
    """How tokens are drawn, as generation_config.json and requests say it. top_k 0 or -1: from all tokens."""

    temperature: real(0, 100) = None
    top_p: real(0, 1, above=True) = None
    min_p: real(0, 1) = None
    top_k: whole(-1, LARGEST) = None
    repetition_penalty: real(1e-3, 1e3) = None


class GenerationJson(Sampling):
    """generation_config.json."""

    do_sample: Yes = None
    max_new_tokens: whole(1, LARGEST) = None
    eos_token_id: TokenIds = None


class Token(Fields):
    """A token with its settings, as tokenizer_config.json has it."""

    content: Text


TokenText = told(str | Token, 'text, or an object with "content"')


class NamedTemplate(Fields):
    name: Text
    template: Text


class TokenizerJson(Fields):
    """tokenizer_config.json."""

    eos_token: TokenText = None
    pad_token: TokenText = None
    chat_template: told(str | list[NamedTemplate], "one Jinja text") = None
    added_tokens_decoder: told(
        dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], Token], 'an object of ids, such as {"5": {"content": "<x>"}}'
    ) = {}


class AdapterJson(Fields):
    """adapter_config.json of PEFT."""

    peft_type: Text = None
    r: whole(1, LORA_LIMITS["rank"])
    lora_alpha: real(0, LORA_LIMITS["alpha"], above=True)
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")] = 0.0
    use_rslora: Yes = False
    init_lora_weights: told(bool | str, "true, false, or the name of a kind") = True
    bias: Text = "none"
    base_model_name_or_path: Text = ""


class IndexJson(Fields):
    """model.safetensors.index.json."""

    weight_map: told(dict[str, str], "an object that maps tensor names to file names")
    metadata: Object = {}
