import zlib

import numpy as np
import pytest

from tests.ops import test_references


@pytest.fixture(autouse=True)
def own_numbers(request, monkeypatch):
    """What a test draws depends on its name alone, and not on the tests before it."""
    monkeypatch.setattr(test_references, "rng", np.random.default_rng(zlib.crc32(request.node.nodeid.encode())))
