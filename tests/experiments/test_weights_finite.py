"""Weights for inference are finite, or the parameter that is not is named."""

import ml_dtypes
import numpy as np
import pytest

from experiments.train import weights
from parallel.sharding import Sharding
from qwen3 import hf
from tests.tiny import DENSE, random_params


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_parameter_that_is_not_finite_is_named(tmp_path, value):
    params = random_params(DENSE)
    array = params["layers"][1]["mlp"]["w_down"].asnumpy().copy()
    array[3, 2] = value
    params["layers"][1]["mlp"]["w_down"] = type(params["embed"])(array)
    hf.save(tmp_path, DENSE, params)
    with pytest.raises(ValueError, match=r"the parameter layers.1.mlp.w_down has values that are NaN or infinite"):
        weights.inference(hf_dir=str(tmp_path)).params(Sharding())


def test_large_values_are_finite_in_every_dtype():
    """Also where their sum is not."""
    for dtype in ("float32", ml_dtypes.bfloat16, "float16"):
        large = np.full(100, ml_dtypes.finfo(dtype).max if dtype == ml_dtypes.bfloat16 else np.finfo(dtype).max, dtype)
        assert weights._finite(large) and weights._finite(-large)
        for value in (np.nan, np.inf, -np.inf):
            large[7] = value
            assert not weights._finite(large)
    assert weights._finite(np.arange(3))
