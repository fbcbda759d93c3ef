"""A target is the old folder or the new one, whole, whatever happens."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from ckpt_tools import (
    CheckpointError,
    Layout,
    UsageError,
    convert,
    open_checkpoint,
    reshard,
    sharding,
    verify,
    write_checkpoint,
)
from ckpt_tools.storage import atomic
from models import hf_state, small, write_hf


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def other(tmp_path):
    return write_hf(tmp_path / "other", small(), hf_state(small(), seed=1))


def test_a_target_that_exists_is_left_alone(model, other, tmp_path):
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(model, other, to="hf")
    assert leftovers(tmp_path) == []
    (tmp_path / "empty").mkdir()
    convert(model, tmp_path / "empty", to="hf")
    assert verify(model, tmp_path / "empty") == []


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "moved-aside"])
def test_overwriting_leaves_the_new_alone(model, other, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    (other / "model-00001-of-00002.safetensors").touch()
    convert(model, other, to="megatron-core", overwrite=True)
    assert verify(model, other) == []
    assert not (other / "model-00001-of-00002.safetensors").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("form", ["hf", "megatron-core"])
@pytest.mark.parametrize(
    "stranger",
    ["notes.txt", "pytorch_model.bin", "iter_0000001/distrib_optim.pt", "iter_0000002", "checkpoints", ".metadata"],
)
def test_a_checkpoint_with_anything_else_in_it_is_not_overwritten(model, tmp_path, form, stranger):
    target = tmp_path / "target"
    convert(model, target, to=form)
    (target / stranger).mkdir(parents=True)  # a folder loses as much as a file
    with pytest.raises(CheckpointError, match=f"target holds {re.escape(stranger)}, which ckpt-tools does not"):
        convert(model, target, to="hf", overwrite=True)
    assert (target / stranger).exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("inner", [".", "checkpoints"])
def test_a_training_run_is_not_overwritten(model, tmp_path, inner):
    run = tmp_path / "run"
    convert(model, run / "checkpoints", to="megatron-core")
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/iter_0000001/common.pt"):
        (run / name).touch()
    reshard(run, tmp_path / "out", Layout())
    with pytest.raises(CheckpointError, match="which ckpt-tools does not write"):
        reshard(tmp_path / "out", run / inner, Layout(), overwrite=True)
    assert verify(model, run) == []


def test_only_a_checkpoint_is_overwritten(model, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.model").touch()
    (tmp_path / "file").touch()
    for name in ("tokenizer", "file"):
        with pytest.raises(CheckpointError, match=r"is no checkpoint|would not be written again"):
            convert(model, tmp_path / name, to="hf", overwrite=True)
    for target in (model, tmp_path):
        with pytest.raises(UsageError, match="which is read"):
            convert(model, target, to="hf", overwrite=True)
    assert (tmp_path / "tokenizer/tokenizer.model").exists()


def test_files_that_were_given_may_be_replaced(tmp_path):
    config = small()
    arrays = {name: np.ones(rule.shape, np.float32) for name, rule in sharding(config).items()}
    (tmp_path / "LICENSE").touch()
    for _ in range(2):
        write_checkpoint(tmp_path / "out", config, arrays, "hf", files=[tmp_path / "LICENSE"], overwrite=True)
    with pytest.raises(CheckpointError, match="holds LICENSE"):
        write_checkpoint(tmp_path / "out", config, arrays, "hf", overwrite=True)


@pytest.mark.parametrize("target", ["file/out", "file/deeper/out"])
def test_a_target_inside_a_file(model, tmp_path, target):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file, not a folder: choose another target"):
        convert(model, tmp_path / target, to="hf")


def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("ckpt_tools.storage.output.OutputStream.finish", full)
    with pytest.raises(OSError, match="No space left"):
        convert(model, tmp_path / "out/deeper", to="megatron-core")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_names_the_file(model, tmp_path):
    resource = pytest.importorskip("resource")
    code = "from ckpt_tools.cli import main; import sys; sys.exit(main())"
    command = [sys.executable, "-c", code, "convert", str(model), str(tmp_path / "out"), "--to", "hf"]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: File too large: ")
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing(model, tmp_path, number, code):
    halting = (
        "import sys, time\n"
        "from ckpt_tools.cli import main\n"
        "from ckpt_tools.storage.output import OutputStream\n"
        "OutputStream.finish = lambda self: (print(flush=True), time.sleep(60))\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", halting, "convert", str(model), str(tmp_path / "out"), "--to", "hf"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer.stdout.readline()
    assert len(leftovers(tmp_path)) == 1
    writer.send_signal(number)
    _, said = writer.communicate(timeout=30)
    assert (writer.returncode, "Traceback" in said) == (code, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_replacement_cut_short_is_recovered(model, tmp_path):
    model.rename(tmp_path / ".hf.replaced")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.format == "hf"
    assert leftovers(tmp_path) == []


def test_what_a_killed_process_left_is_deleted(model, tmp_path):
    abandoned = tmp_path / ".out.unfinished-1"
    abandoned.mkdir()
    (abandoned / "half").touch()
    convert(model, tmp_path / "out", to="hf")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_left_alone(model, tmp_path, monkeypatch, overwrite):
    """Somebody makes the target while it is being written."""
    target = tmp_path / "target"
    finished = atomic._sync_folders

    def and_meanwhile(folder):
        finished(folder)
        if folder.parent == tmp_path:
            target.mkdir()
            (target / "thesis.txt").write_text("irreplaceable")

    monkeypatch.setattr(atomic, "_sync_folders", and_meanwhile)
    with pytest.raises(CheckpointError, match=r"thesis\.txt|in the meantime"):
        convert(model, target, to="hf", overwrite=overwrite)
    assert (target / "thesis.txt").read_text() == "irreplaceable"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("form", ["megatron-core", "deepspeed"])
def test_a_trained_checkpoint_is_not_overwritten(model, tmp_path, form):
    """Its files are called like ours, and hold an optimizer."""
    convert(model, tmp_path / "trained", to=form)
    file = next((tmp_path / "trained").rglob("*.pt"))
    torch.save({**torch.load(file, weights_only=False), "optimizer": {"step": 9}}, file)
    with pytest.raises(CheckpointError, match=r"\.pt holds optimizer, which ckpt-tools does not write"):
        convert(model, tmp_path / "trained", to=form, overwrite=True)
    assert torch.load(file, weights_only=False)["optimizer"] == {"step": 9}


def test_a_tokenizer_that_would_be_lost_is_kept(model, tmp_path):
    convert(model, tmp_path / "out", to="hf")
    (tmp_path / "out/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds tokenizer\.json, which would not be written again"):
        convert(model, tmp_path / "out", to="hf", overwrite=True)
    (model / "tokenizer.json").write_text("{}")
    convert(model, tmp_path / "out", to="hf", overwrite=True)


def test_nothing_that_is_read_is_replaced(model, other, tmp_path):
    """Through links, as the configuration, as the reference, or by a target inside the source."""
    (tmp_path / "links").mkdir()
    for file in model.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    with pytest.raises(UsageError, match=r"holds .*, which is read"):
        convert(tmp_path / "links", model, to="hf", overwrite=True)
    for option in ("config", "reference"):
        with pytest.raises(UsageError, match=r"holds .*, which is read"):
            convert(model, other, to="hf", overwrite=True, **{option: other})
    with pytest.raises(UsageError, match="lies in the source's folder"):
        convert(model, model / "checkpoints", to="megatron-core")
    assert not (model / "checkpoints").exists()


@pytest.mark.timeout(120)
def test_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    """A process that overwrites one target without pause, killed at random moments."""
    config = small(num_layers=8)
    sources = [write_hf(tmp_path / f"source{n}", config, hf_state(config, seed=n)) for n in range(2)]
    target = tmp_path / "target"
    convert(sources[0], target, to="megatron-core")
    code = (
        "import itertools\n"
        "from ckpt_tools import Layout, convert\n"
        "layout = Layout(tensor_model_parallel_size=2)\n"
        "print(flush=True)\n"
        f"for source in itertools.cycle({[str(s) for s in sources]!r}):\n"
        f"    convert(source, {str(target)!r}, to='megatron-core', layout=layout, overwrite=True)\n"
    )
    seen = set()
    for moment in random.Random(5).choices(range(2, 120), k=12):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.1 + moment / 1000)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        same = [verify(source, target) == [] for source in sources]
        assert sum(same) == 1
        seen.add(same.index(True))
    convert(sources[0], target, to="hf", overwrite=True)
    assert leftovers(tmp_path) == []
