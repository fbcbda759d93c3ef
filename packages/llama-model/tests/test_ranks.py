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
        with pytest.raises(RankError, match=r"rank 1 of 2: Traceback(?s:.*)ValueError: the reason"):
            pool.run(fail_on_one)
        with pytest.raises(RankError, match="rank 1 of 2: the process ended with code 7"):
            pool.run(die_on_one)


def test_a_rank_that_hangs_is_ended_and_says_where_it_stood():
    with Ranks(1, timeout_s=20) as pool:
        pool.run(number, 0)
        pool.timeout_s = 0.5
        with pytest.raises(RankError, match="in hang"):
            pool.run(hang)
