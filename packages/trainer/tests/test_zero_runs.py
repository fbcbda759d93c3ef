"""Runs of zero mode through the console script, in an environment in which no compiler is found."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ckpt_tools import open_checkpoint
from trainer import open_run

STEPS = 6
OPTIONS = [
    *("--train-iters", str(STEPS), "--seq-length", "24", "--global-batch-size", "4", "--eval-iters", "1"),
    *("--lr", "0.01", "--min-lr", "0.001", "--lr-warmup-iters", "2", "--split", "80,20,0", "--log-interval", "2"),
    *("--save-interval", "3", "--adam-beta2", "0.95", "--adam-eps", "1e-6"),
]
SAME = ("step", "consumed_samples", "loss", "loss_tokens", "lr", "grad_norm")
DYING = """
import os, signal, sys
import torch
from trainer.cli import main

whole, saves = torch.save, 0

def half(content, path, *args, **kwargs):
    # The second checkpoint's last file of this rank: half of it is written when the rank is killed.
    global saves
    saves += 1
    whole(content, path, *args, **kwargs)
    if saves == int(os.environ["DIES_AT"]):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
sys.exit(main())
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    empty = tmp_path_factory.mktemp("no-programs")
    for compiler in ("gcc", "cc", "c++", "clang", "ninja"):
        assert shutil.which(compiler, path=str(empty)) is None
    return os.environ | {"PATH": str(empty), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trainer(env):
    def run(*arguments, code=0):
        command = [str(Path(sys.executable).parent / "trainer"), "pretrain", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
        assert done.returncode == code, done.stderr
        return done

    return run


def where(workspace, out):
    return ["--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", out]


def columns(run, first=0):
    return np.array([[line[name] for name in SAME] for line in run.metrics()][first:])


@pytest.fixture(scope="module")
def straight(workspace, trainer):
    """An uninterrupted run on two processes, and what it printed."""
    out = workspace / "zero-straight"
    done = trainer(*where(workspace, out), *OPTIONS, "--mode", "zero", "--nproc-per-node", "2")
    return open_run(out), done


def test_a_run_says_what_it_is_and_nothing_of_its_library(straight):
    _, done = straight
    assert "layout   2 processes: TP 1 x DP 2, ZeRO stage 2" in done.stderr
    assert "deepspeed" not in (done.stdout + done.stderr).lower()
    first_words = {line.split()[0] for line in done.stderr.splitlines()}
    assert first_words == {"model", "layout", "batch", "data", "vocab", "kernels", "step", "checkpoint"}


def test_a_run_goes_from_mode_to_mode_and_is_exported(workspace, trainer, straight, tmp_path):
    expected, _ = straight
    ptd = ("--mode", "ptd", "--nproc-per-node", "1", "--export-hf", tmp_path / "hf")
    trainer("--resume", expected.checkpoint(3), "--output-dir", tmp_path / "ptd", *ptd)
    np.testing.assert_allclose(columns(open_run(tmp_path / "ptd")), columns(expected, 3), rtol=1e-5, atol=2e-6)
    zero = ("--mode", "zero", "--zero-stage", "3", "--nproc-per-node", "2", "--export-hf", tmp_path / "hf3")
    longer = ("--train-iters", "8", "--lr-decay-iters", str(STEPS))
    trainer("--resume", tmp_path / "ptd", "--output-dir", tmp_path / "zero", *zero, *longer)
    assert columns(open_run(tmp_path / "zero"))[:, 0].tolist() == [7, 8]
    with open_checkpoint(expected.path) as one, open_checkpoint(tmp_path / "hf") as other:
        for name in one.names():
            np.testing.assert_allclose(one.read(name), other.read(name), atol=1e-5)
    with open_checkpoint(tmp_path / "zero") as one, open_checkpoint(tmp_path / "hf3") as other:
        assert all(np.array_equal(one.read(name), other.read(name)) for name in one.names())


@pytest.mark.parametrize("dying_rank", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_a_save_leaves_the_one_before(
    workspace, trainer, straight, env, tmp_path, dying_rank
):
    expected, _ = straight
    script, out = tmp_path / "dying.py", tmp_path / "run"
    script.write_text(DYING, "utf-8")
    arguments = [*map(str, where(workspace, out)), *OPTIONS, "--mode", "zero"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    files = 2 if dying_rank == 0 else 1  # of a checkpoint: the first rank writes the weights, too
    ranks = []
    for rank in range(2):
        dies = {"DIES_AT": str(2 * files if rank == dying_rank else 0)}
        mine = env | address | dies | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(script), "pretrain", *arguments]
        ranks.append(subprocess.Popen(command, env=mine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    try:
        assert ranks[dying_rank].wait(120) == -signal.SIGKILL
    finally:  # as a launcher would: the other one waits for it
        for process in ranks:
            process.kill()
            process.wait()
    assert open_run(out).iterations() == [3]
    assert (out / "checkpoints" / ".iter_0000006.unfinished").is_dir()
    for part in ("weights", "main_weights", "exp_avg", "exp_avg_sq"):
        open_checkpoint(out, part=part).close()
    trainer("--resume", out, "--nproc-per-node", "2")
    assert (columns(open_run(out)) == columns(expected)).all()
    assert open_run(out).iterations() == [3, 6]
