"""Values that no model can have are refused by the config itself, wherever they come from."""

import pytest

from qwen3.config import Qwen3Config, RopeScaling


@pytest.mark.parametrize(
    "field, value, said",
    [
        *[
            (name, bad, f"{name}={bad!r} must be a finite number")
            for name in ("rms_norm_eps", "rope_theta")
            for bad in (float("inf"), True)
        ],
        ("rms_norm_eps", "1e-6", "rms_norm_eps='1e-6' must be a finite number"),
        ("initializer_range", -0.1, "initializer_range=-0.1 must be 0 or more"),
        ("router_aux_coef", float("nan"), "router_aux_coef=nan must be a finite number"),
        *[(name, "false", f"{name}='false' must be true or false") for name in ("tie_embeddings", "qk_norm", "norm_topk_prob")],
        ("qkv_bias", 1, "qkv_bias=1 must be true or false"),
    ],
)
def test_numbers_are_finite_and_bools_are_bools(field, value, said):
    with pytest.raises(ValueError, match=said):
        Qwen3Config(**{field: value})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"factor": -2.0}, "YaRN: factor=-2.0 must be a finite number above 0"),
        ({"factor": 0.5}, "YaRN: factor=0.5 must be 1 or more"),
        ({"factor": float("inf")}, "YaRN: factor=inf must be a finite number above 0"),
        ({"original_max_position": True}, "YaRN: original_max_position=True must be a finite number above 0"),
        ({"beta_fast": "32"}, "YaRN: beta_fast='32' must be a finite number above 0"),
        ({"truncate": "no"}, "YaRN: truncate='no' must be true or false"),
    ],
)
def test_yarn_has_ranges_too(changes, said):
    RopeScaling(4.0, 2048, mscale=0.0)
    with pytest.raises(ValueError, match=said):
        RopeScaling(**{"factor": 4.0, "original_max_position": 2048, **changes})
