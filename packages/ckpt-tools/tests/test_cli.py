"""The console script: help without torch, exit codes, one line for every mistake, JSON for machines."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from models import hf_state, small, write_hf

SCRIPT = str(Path(sys.executable).parent / "ckpt-tools")


def run(*arguments):
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def fails(code, *arguments):
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize("verb", [[], ["convert"], ["reshard"], ["inspect"], ["verify"]])
def test_help_imports_nothing_heavy(verb):
    command = [sys.executable, "-X", "importtime", "-m", "ckpt_tools", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ckpt-tools" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "ml_dtypes"}


def test_the_road_there_and_back(model, tmp_path):
    megatron, back = tmp_path / "m", tmp_path / "back"
    options = ["--tensor-model-parallel-size", 2, "--pipeline_model_parallel_size", 2]
    done = run("convert", model, megatron, "--to", "megatron-core", *options, "--make-vocab-size-divisible-by", 8)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"{megatron}: megatron-core, 30 tensors, ")
    found = json.loads(run("inspect", megatron, "--json").stdout)
    assert list(found) == [
        "format",
        "config",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "dtype",
        "parameters",
        "bytes",
        "num_layers_per_virtual_pipeline_stage",
        "num_layer_list",
        "merge_mlp",
        "naming",
    ]
    assert (found["format"], found["dtype"]) == ("megatron-core", "float16")
    assert (found["tensor_model_parallel_size"], found["pipeline_model_parallel_size"]) == (2, 2)
    assert found["config"]["vocab_size"] == 37
    assert "num_query_groups                       2" in run("inspect", megatron).stdout
    resharded = run("reshard", megatron, tmp_path / "r", "--tensor-model-parallel-size", 4, "--json")
    assert json.loads(resharded.stdout)["format"] == "megatron-core"
    assert 10e6 < json.loads(resharded.stdout)["peak_rss"] < 150e6
    assert json.loads(run("convert", tmp_path / "r", back, "--to", "hf", "--json").stdout)["tensors"] == 21
    done = run("verify", model, back)
    assert (done.returncode, done.stdout) == (0, "the same model\n")


def test_ascendspeeds_own_commands(model, tmp_path):
    """The two commands of AscendSpeed's recipe, its converter's and that of its tool for other parallel sizes."""
    converter = [
        "--input-model-dir",
        model,
        "--output-model-dir",
        tmp_path / "tp2pp2",
        "--make-vocab-size-divisible-by",
        8,
    ]
    geometry = ["--type", "70B", "--num_heads", 4, "--num_kv_heads", 2, "--hidden_size", 16, "--num_layers", 2]
    sizes = [
        "--tensor-model-parallel-size",
        2,
        "--pipeline-model-parallel-size",
        2,
        "--merge-mlp",
        "--added-token-num",
        0,
    ]
    done = run("convert", *converter, *sizes, *geometry)
    assert done.returncode == 0, done.stderr
    assert ": ascendspeed, " in done.stdout
    tool = ["--input-model-dir", tmp_path / "tp2pp2/release", "--output-model-dir", tmp_path / "tp2"]
    sizes = ["--src-tensor-model-parallel-size", 2, "--src-pipeline-model-parallel-size", 2]
    sizes += ["--tgt-tensor-model-parallel-size", 2, "--tgt-pipeline-model-parallel-size", 1, "--merge-mlp"]
    vocabulary = ["--orig-vocab-size", 37, "--make-vocab-size-divisible-by", 8]
    done = run("reshard", *tool, *sizes, *geometry, *vocabulary)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "tp2/release").iterdir()] == ["mp_rank_00", "mp_rank_01"]
    assert run("verify", tmp_path / "tp2", model).stdout == "the same model\n"
    done = run("convert", "--input-model-dir", model, "--output-model-dir", tmp_path / "zero", "--deepspeed")
    assert ": deepspeed, " in done.stdout
    assert "Megatron's order" in done.stderr


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("convert", ["--num_layers", 3], "--num-layers says 3, "),
        ("convert", ["--type", "7B"], "--type 7B (num_layers) says 32, "),
        ("convert", ["--num-kv-heads", 4], "--num-kv-heads says 4, "),
        ("convert", ["--to", "hf", "--deepspeed"], "--deepspeed is --to deepspeed, and --to hf was given too"),
        ("reshard", ["--orig-vocab-size", 32000], "--orig-vocab-size says 32000, "),
        ("reshard", ["--src-tensor-model-parallel-size", 2], "--src-tensor-model-parallel-size says 2, "),
        (
            "reshard",
            ["--tensor-model-parallel-size", 4, "--tgt-tensor-model-parallel-size", 2],
            "--tensor-model-parallel-size is 4, --tgt-tensor-model-parallel-size is 2",
        ),
    ],
)
def test_contradictions_name_both_values(verb, options, said, model, tmp_path):
    out = tmp_path / "out"
    error = fails(2, verb, "--input-model-dir", model, "--output-model-dir", out, *options)
    assert said in error
    assert not out.exists()
    assert "give SRC" in fails(2, verb, "--output-model-dir", out)
    assert "give one of them" in fails(2, verb, model, out, "--input-model-dir", model)


def test_the_table_of_tensors(model):
    lines = run("inspect", model, "--tensors").stdout.splitlines()
    assert "model.safetensors  lm_head.weight  [37, 16]  float16" in lines
    rows = json.loads(run("inspect", model, "--tensors", "--json").stdout)["tensors"]
    assert len(rows) == 21
    assert rows[0].keys() == {"file", "name", "shape", "dtype"}


def test_mixed_types_are_called_so(tmp_path):
    state = hf_state(small())
    mixed = write_hf(tmp_path / "mixed", small(), {**state, "lm_head.weight": state["lm_head.weight"].float()})
    assert json.loads(run("inspect", mixed, "--json").stdout)["dtype"] is None
    assert "dtype                                  mixed\n" in run("inspect", mixed).stdout


def test_a_difference_is_exit_code_3(model, tmp_path):
    other = write_hf(tmp_path / "other", small(), hf_state(small(), seed=1))
    done = run("verify", model, other)
    assert done.returncode == 3
    assert "embedding.word_embeddings.weight: " in done.stdout
    assert done.stderr == ""
    done = run("verify", model, other, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["same"], len(found["differences"])) == (3, False, 10)
    assert "NaN" not in done.stdout  # the bits are any at all
    assert any(difference["max_abs"] == "nan" for difference in found["differences"])
    narrow = write_hf(tmp_path / "narrow", small(vocab_size=36), hf_state(small(vocab_size=36)))
    assert "vocab_size: 37 in the first, 36 in the second" in run("verify", model, narrow).stdout


def test_mistakes_are_one_line(model, tmp_path):
    out = tmp_path / "out"
    assert "does not exist" in fails(1, "inspect", tmp_path / "none")
    assert "not a checkpoint" in fails(1, "convert", tmp_path, out, "--to", "hf")
    assert "--overwrite" in fails(1, "convert", model, _occupied(tmp_path), "--to", "hf")
    assert "do not divide" in fails(
        2, "convert", model, out, "--to", "megatron-core", "--tensor-model-parallel-size", 3
    )
    assert "use convert --to" in fails(2, "reshard", model, out)
    fails(2, "convert", model, out)
    fails(2, "convert", model, out, "--to", "peft")
    fails(2, "convert", model, out, "--to", "hf", "--no-such-option")
    fails(2, "inspect")
    for tolerance in ("nan", "-1", "inf"):
        assert "it must be a finite number" in fails(2, "verify", model, model, "--tolerance", tolerance)
    assert not out.exists()


def _occupied(tmp_path):
    folder = tmp_path / "occupied"
    folder.mkdir()
    (folder / "file").touch()
    return folder


def test_a_terminal_shows_a_bar(model, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [SCRIPT, "convert", str(model), str(tmp_path / "out"), "--to", "hf"]
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, text=True, check=True)
    assert "B/s" in os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert done.stdout.startswith(str(tmp_path / "out"))
