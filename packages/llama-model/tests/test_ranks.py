"""The pool itself: a test that can hang or pass in silence is worth nothing."""

import os
import time

import pytest
from ranks import RankError, Ranks


def number(offset):
    from torch import distributed

    return distributed.get_rank() + offset


def fail_on_one():
    from torch import distributed

    if distributed.get_rank() == 1:
        raise ValueError("the reason")
    distributed.barrier()


def die_on_one():
    from torch import distributed

    if distributed.get_rank() == 1:
        os._exit(7)
    distributed.barrier()


def hang():
    time.sleep(600)


def test_results_come_by_rank_and_failures_with_tracebacks():
    with Ranks(2, timeout_s=30) as pool:
        assert pool.run(number, 5) == [5, 6]
        assert pool.run(number, 6) == [6, 7]
        for case, words in ((fail_on_one, "ValueError: the reason"), (die_on_one, "ended with code 7")):
            begin = time.monotonic()
            with pytest.raises(RankError, match=words) as caught:
                pool.run(case)
            assert "rank 1 of 2" in str(caught.value)
            assert time.monotonic() - begin < 25
        pool.timeout_s = 6
        with pytest.raises(RankError, match="in hang"):
            pool.run(hang)
