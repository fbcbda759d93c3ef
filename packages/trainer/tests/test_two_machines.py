"""The multi-node start line between two network namespaces joined by a cable (veth): two machines but for the disk.

Compared with the same run on one machine, then the cable is cut. Making namespaces needs root (CAP_SYS_ADMIN).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

LIMIT_S = 200
STEPS = 5
CABLE, PORT = "puna0", "29561"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
NAMES = tuple(f"puna-{os.getpid()}-{number}" for number in range(2))
OPTIONS = [
    *("--train-iters", "20000", "--seq-length", "24", "--global-batch-size", "4", "--micro-batch-size", "1"),
    *("--lr", "0.001", "--lr-decay-style", "constant", "--split", "80,20,0", "--eval-iters", "0"),
    *("--distributed-timeout-minutes", "0.25", "--log-interval", "1000"),
]


def why_not():
    """Why this machine cannot play two; None where it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    tried = ip("netns", "add", f"{NAMES[0]}-tried", check=False)
    if tried.returncode:
        return f"`ip netns add` is not permitted: {tried.stderr.strip()}"
    ip("netns", "delete", f"{NAMES[0]}-tried")
    return None


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


def inside(machine, *command):
    return ["ip", "netns", "exec", NAMES[machine], *command]


@contextlib.contextmanager
def two_machines():
    """Two namespaces with an address each at the ends of a cable."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ends = [("name", CABLE, "netns", name) for name in NAMES]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "delete", name, check=False)


def torchrun(machine, workspace, out):
    """The start line of one machine."""
    line = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(machine)),
        *("--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", PORT),
        *("-m", "trainer", "pretrain", *where(workspace, out), *OPTIONS),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    return subprocess.Popen(inside(machine, *line), stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def where(workspace, out):
    paths = {"data-path": workspace / "text", "load-weights": workspace / "hf", "output-dir": out}
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


def losses(out, process):
    """Those of the first steps, waited for."""
    deadline = time.monotonic() + LIMIT_S
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text("utf-8").count("\n") < STEPS:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step came"
        time.sleep(0.1)
    lines = metrics.read_text("utf-8").splitlines()[:STEPS]
    return [json.loads(line)["loss"] for line in lines]


def sent(machine):
    """Bytes that have left a machine."""
    counter = inside(machine, "cat", f"/sys/class/net/{CABLE}/statistics/tx_bytes")
    return int(subprocess.run(counter, capture_output=True, text=True, check=True).stdout)


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    process.wait()


@pytest.fixture(scope="module")
def cut_run(workspace):
    """The losses, the bytes sent by each machine, and what the first one's launcher said after the cable was cut."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    out = workspace / "two-machines"
    with contextlib.ExitStack() as stack:
        stack.enter_context(two_machines())
        processes = [torchrun(machine, workspace, out) for machine in range(2)]
        for process in processes:
            stack.callback(end, process)
        found = losses(out, processes[0])
        traffic = [sent(machine) for machine in range(2)]
        ip("-n", NAMES[1], "link", "set", CABLE, "down")
        said = processes[0].communicate(timeout=LIMIT_S)[1]
        return found, traffic, said, processes[0].returncode


def test_two_machines_train_as_one_does(workspace, cut_run):
    out = workspace / "one-machine"
    line = [sys.executable, "-m", "trainer", "pretrain", *where(workspace, out), *OPTIONS, "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    try:
        expected = losses(out, process)
    finally:
        end(process)
    found, traffic, _, _ = cut_run
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(found)) == STEPS  # the control: equal because they learn alike, not because nothing moves
    parameters = sum(path.stat().st_size for path in (workspace / "hf").glob("*.safetensors"))
    assert min(traffic) > STEPS * parameters / 2  # every step's gradients went through the cable


def test_a_machine_that_is_cut_off_ends_the_other_with_one_line(workspace, cut_run):
    _, _, said, code = cut_run
    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: rank 0 of 2 on ")
    assert "--distributed-timeout-minutes 0.25" in errors[0] or "lost another process" in errors[0]
    assert f"--resume {workspace / 'two-machines'}" in errors[0]
