"""The helper itself: what the ranks return, and what is shown of one that fails or hangs. Nothing here joins a process group."""

import os
import time

import numpy as np
import pytest

from tests.processes import run


def echo(word):
    return {"rank": int(os.environ["RANK_ID"]), "word": word, "halves": np.full(2, 0.5, np.float16)}


def fail():
    if os.environ["RANK_ID"] == "1":
        raise RuntimeError("planned")
    time.sleep(1000)


def hang():
    time.sleep(1000)


def test_each_rank_returns_its_dict():
    for rank, found in enumerate(run("tests.test_processes:echo", 2, "a word")):
        assert found["rank"] == rank and found["word"] == "a word"
        assert found["halves"].dtype == np.float16 and found["halves"].tolist() == [0.5, 0.5]


def test_a_rank_that_fails_is_named_with_its_traceback():
    with pytest.raises(AssertionError, match=r"(?s)test_processes:fail on 2 processes:\nerror: rank 1 .*RuntimeError: planned"):
        run("tests.test_processes:fail", 2)


def test_ranks_that_hang_are_ended_and_show_where():
    with pytest.raises(AssertionError, match=r"(?s)error: rank 0 .*Timeout.*in hang"):
        run("tests.test_processes:hang", 1, timeout_s=1)
