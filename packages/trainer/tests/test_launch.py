"""How processes end: ranks that die or fail, launchers that are killed or asked to stop, ours and torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainer import TrainConfig, launch, lost
from trainer.errors import TrainerError

JOB = Path(__file__).with_name("rank_job.py")
OURS = "import sys; from trainer import launch; sys.exit(launch.start(sys.argv[2:], 2, [sys.argv[1]]))"
LAUNCHERS = {
    "ours": [sys.executable, "-c", OURS],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
LIMIT_S = 120


@contextlib.contextmanager
def job(launcher, home, *options):
    """A launcher whose two ranks are running."""
    command = [*LAUNCHERS[launcher], str(JOB), str(home), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    try:
        until(lambda: all((home / f"running-{rank}").exists() for rank in range(2)) or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        yield process
    finally:
        process.kill()
        for pid in pids(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()


def until(true):
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def pids(home):
    """Of the ranks and of their helpers."""
    return [int(text) for path in home.glob("*-[01]") if (text := path.read_text("utf-8")).isdigit()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def assert_all_gone(home):
    found = pids(home)
    assert len(found) == 4
    until(lambda: all(gone(pid) for pid in found))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_others(tmp_path, launcher):
    # torchrun ends the others before they can feel it
    with job(launcher, tmp_path, *(["gloo"] if launcher == "ours" else [])) as process:
        os.kill(int((tmp_path / "running-1").read_text("utf-8")), signal.SIGKILL)
        said = process.communicate(timeout=LIMIT_S)[1]
        assert process.returncode == {"ours": 137, "torchrun": 1}[launcher]
        if launcher == "ours":
            assert said == "error: rank 1 was ended by SIGKILL (is the machine out of memory?)\n"
        assert "lost another" not in said
        assert_all_gone(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_fails_ends_the_others_and_its_error_is_the_one_shown(tmp_path, launcher):
    with job(launcher, tmp_path, "gloo") as process:
        (tmp_path / "fail").touch()
        said = process.communicate(timeout=LIMIT_S)[1]
        assert process.returncode == 1
        if launcher == "ours":
            assert said == "rank 1: error: boom\n"
        else:
            assert "traceback : error: boom" in said  # in torchrun's own report
        assert "lost another" not in said
        assert_all_gone(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_launcher_takes_ranks_and_their_helpers_along(tmp_path, launcher):
    with job(launcher, tmp_path) as process:
        assert not any(gone(pid) for pid in pids(tmp_path))
        process.kill()
        assert_all_gone(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_request_to_stop_reaches_every_rank_once_and_lets_it_save(tmp_path, launcher):
    with job(launcher, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == {"ours": 143, "torchrun": 1}[launcher]
        assert [(tmp_path / f"saved-{rank}").read_text("utf-8") for rank in range(2)] == ["once "] * 2
        assert_all_gone(tmp_path)


def test_a_second_request_ends_ranks_that_do_not_heed_the_first(tmp_path):
    stubborn = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(600)"
    code = f"import sys; from trainer import launch; sys.exit(launch.start([sys.argv[1]], 1, ['-c', {stubborn!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "there")])
    until((tmp_path / "there").exists)
    process.terminate()
    time.sleep(1)  # so that the system does not fold the two into one
    assert process.poll() is None  # it waits for the rank
    process.terminate()
    assert process.wait(LIMIT_S) == 128 + signal.SIGKILL


CONFIG = TrainConfig(
    data_path=(Path("-"),), model_config=Path("-"), output_dir=Path("RUN"), train_iters=1, seq_length=1,
    global_batch_size=1, lr=1.0, distributed_timeout_minutes=3,
)  # fmt: skip
SAID = {
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:29500": (
        r"lost another process \(Connection closed by peer \[10.0.0.2\]:29500\): look for"
    ),
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 180000ms for recv": (
        r"nothing of the others within --distributed-timeout-minutes 3 \(Timed out waiting 180000ms for recv"
    ),
    "The client socket has timed out after 180000ms while trying to connect to (10.0.0.1, 29500).": "minutes 3",
}


@pytest.mark.parametrize("said", SAID)
def test_a_lost_process_is_one_line(monkeypatch, said):
    monkeypatch.setattr(lost, "OTHERS_FIRST_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainerError, match=SAID[said]) as raised, lost.named(CONFIG):
        raise RuntimeError(said)
    assert str(raised.value).startswith("rank 0 of 2 on ")
    assert "--resume RUN" in str(raised.value)


def test_other_errors_pass_as_they_are(monkeypatch):
    for rank in ("0", None):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK")
        error = RuntimeError("shapes do not fit" if rank else "Connection closed by peer")
        with pytest.raises(RuntimeError) as raised, lost.named(CONFIG):
            raise error
        assert raised.value is error


def test_a_run_that_is_done_is_0():
    assert launch.start(["-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"], 2, []) == 0
