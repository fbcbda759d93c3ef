"""The console script: what it prints, its exit codes, one line for each mistake."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROWS, TEXTS
from data_prep import IndexedDataset, inspection, templates
from data_prep.cli import main

SCRIPT = str(Path(sys.executable).parent / "data-prep")


@pytest.fixture
def prepared(folder, rows, tmp_path, capsys):
    """An instruction data set."""
    command = ["run", "--input", rows, "--tokenizer-name-or-path", folder, "--output-prefix", tmp_path / "out"]
    assert main([*map(str, command), "--handler-name", "GeneralInstructionHandler", "--append-eod"]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def said(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return err if code in (1, 2) else out


def test_run_prints_the_manifest(folder, corpus, tmp_path, capsys):
    command = ["run", "--input", corpus, "--tokenizer_name_or_path", folder, "--output-prefix", tmp_path / "out"]
    assert f"{len(TEXTS)} documents" in said(capsys, *command)
    manifest = json.loads(said(capsys, *command, "--overwrite", "--json"))
    assert manifest == json.loads((tmp_path / "out_text_document.manifest.json").read_text("utf-8"))


def test_inspect_shows_figures(prepared, capsys):
    facts = json.loads(said(capsys, "inspect", prepared, "--json"))
    assert [Path(each["prefix"]).name for each in facts] == [
        f"out_packed_{key}_document" for key in ("attention_mask", "input_ids", "labels")
    ]
    assert {each["documents"] for each in facts} == {len(ROWS)}
    assert "GeneralInstructionHandler" in said(capsys, "inspect", prepared)


def test_inspect_draws_lengths(prepared, tmp_path, capsys):
    labels = f"{prepared}_packed_labels_document"
    (facts,) = json.loads(said(capsys, "inspect", labels, "--json", "--plot", tmp_path / "lengths.png"))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    lengths = IndexedDataset(labels).sequence_lengths
    edges, counts = facts["histogram"].values()
    assert len(edges) == len(counts) + 1 <= 22
    assert counts == [sum(begin <= length < end for length in lengths) for begin, end in pairwise(edges)]
    assert sum(counts) == len(ROWS)
    assert facts["with_loss"] == sum(int((ids != -100).sum()) for ids in IndexedDataset(labels))
    text = said(capsys, "inspect", labels)
    assert f"with loss          {facts['with_loss']} (" in text
    bars = [line for line in text.splitlines() if "#" in line]
    assert [int(line.split()[-1]) for line in bars] == [count for count in counts if count]


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([], ([0, 1], [0])),
        ([0, 0], ([0, 1], [2])),
        ([1, 2, 3], ([0, 1, 2, 3, 4], [0, 1, 1, 1])),
        ([5] * 200 + [1000], ([0, 1, 2, 3, 4, 5, 6, 1001], [0, 0, 0, 0, 0, 200, 1])),
    ],
)
def test_histograms(lengths, found):
    assert tuple(inspection.histogram(np.array(lengths, np.int32)).values()) == found


def test_inspect_without_matplotlib_is_a_usage_error(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = said(capsys, "inspect", prepared, "--plot", tmp_path / "a.png", code=2)
    assert "puna-data-prep[plot]" in words


def test_merge_prints_the_manifests(prepared, tmp_path, capsys):
    output = tmp_path / "twice"
    command = ["merge", prepared, prepared, "--output-prefix", output]
    assert said(capsys, *command).startswith(f"{output}: {2 * len(ROWS)} documents, ")
    manifests = json.loads(said(capsys, *command, "--overwrite", "--json"))
    assert [manifest["documents"] for manifest in manifests] == [2 * len(ROWS)] * 3
    assert "is whole" in said(capsys, "verify", output)
    assert "exists" in said(capsys, *command, code=1)


def test_inspect_shows_where_the_loss_falls(prepared, folder, capsys):
    command = ["inspect", prepared, "--document", 1, "--tokenizer-name-or-path", folder]
    (spans,) = json.loads(said(capsys, *command, "--json"))["sequences"]
    before, answer = spans
    text = templates.GENERAL_INSTRUCTION.prompt(ROWS[1]["instruction"], ROWS[1]["input"]) + ROWS[1]["output"] + "\n"
    assert (before["loss"], answer["loss"]) == (False, True)
    assert before["text"] + answer["text"] == text
    assert answer["text"] == "above the llama\n"
    assert f"--- {answer['tokens']} tokens, with loss\nabove the llama\n" in said(capsys, *command)
    assert str(answer["ids"][0]) in said(capsys, "inspect", prepared, "--document", 1)


def test_inspect_refuses_another_tokenizer(prepared, symbols, capsys):
    command = ["inspect", prepared, "--document", 1, "--tokenizer-name-or-path", symbols]
    assert "another vocabulary" in said(capsys, *command, code=1)


def test_verify_finds_what_is_wrong(prepared, capsys):
    assert "is whole" in said(capsys, "verify", prepared)
    file = Path(f"{prepared}_packed_labels_document.bin")
    labels = np.fromfile(file, np.int32)
    labels[-1] = 5
    labels.tofile(file)
    problems = json.loads(said(capsys, "verify", prepared, "--json", code=3))["problems"]
    assert len(problems) == 2
    assert "sha256" in problems[0]
    assert f"sequence {len(ROWS) - 1} does not go with the ids" in problems[1]
    labels[0], labels[-1] = 10**6, 2
    labels.tofile(file)
    assert "not in the vocabulary" in said(capsys, "verify", prepared, code=3)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_verify_says_what_is_cut(prepared, capsys, suffix):
    file = Path(f"{prepared}_packed_input_ids_document{suffix}")
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in said(capsys, "verify", prepared, code=3)


def test_verify_checks_the_index(prepared, capsys):
    file = Path(f"{prepared}_packed_input_ids_document.idx")
    content = bytearray(file.read_bytes())
    content[34 + 4 * len(ROWS)] += 4  # the first offset
    file.write_bytes(content)
    assert "does not begin where" in said(capsys, "verify", f"{prepared}_packed_input_ids_document", code=3)
    Path(f"{prepared}_packed_labels_document.idx").unlink()
    assert "packed_labels_document is missing" in said(capsys, "verify", prepared, code=3)
    Path(f"{prepared}_packed_input_ids_document.idx").unlink()
    assert "packed_input_ids_document is missing" in said(capsys, "verify", prepared, code=3)


def test_verify_says_what_it_could_not_check(prepared, capsys):
    Path(f"{prepared}_packed_labels_document.manifest.json").unlink()
    assert "packed_labels_document has no manifest" in said(capsys, "verify", prepared)


def test_a_prefix_that_is_a_folder_is_refused(folder, corpus, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    options = ("--input", corpus, "--tokenizer-name-or-path", folder, "--output-prefix", f"{tmp_path}/data/")
    assert "is a folder: end it with a name" in said(capsys, "run", *options, code=2)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"--input": "none.jsonl"}, 1, "no such input: none.jsonl"),
        ({"--tokenizer-name-or-path": "none"}, 1, "no such tokenizer: none"),
        ({"--handler-name": "GeneralPretrainHandlr"}, 2, "perhaps you meant 'GeneralPretrainHandler'"),
        ({"--workers": "0"}, 2, "--workers 0"),
    ],
)
def test_mistakes_are_one_line(folder, corpus, tmp_path, capsys, change, code, words):
    options = {"--input": corpus, "--tokenizer-name-or-path": folder, "--output-prefix": tmp_path / "out"} | change
    command = [str(word) for option in options.items() for word in option]
    error = said(capsys, "run", *command, code=code)
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["run", "--input", "x"], "--output-prefix"), (["inspect", "x", "--documents", "1"], "--document")],
)
def test_a_bad_flag_is_a_usage_error(tmp_path, arguments, words):
    done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_document_that_is_not_there_is_a_usage_error(prepared, capsys):
    assert "none of the 3" in said(capsys, "inspect", prepared, "--document", 3, code=2)
    assert "no such data set" in said(capsys, "inspect", "none", "--document", 0, code=1)


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path):
    (tmp_path / "in.txt").write_text("the llama walks over the grassland\n" * 5000, "utf-8")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [SCRIPT, "run", "--input", "in.txt", "--tokenizer-name-or-path", str(folder), "--output-prefix", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (done.returncode, done.stderr) == (1, "error: File too large: out\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


AT_ONCE = "from data_prep import cli, pool; pool.START_AFTER_S = 0; raise SystemExit(cli.main())"
"""The console script, whose helpers start with the first batch."""


def helpers_of(pid):
    """The processes that a run has started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()


def stopped(folder, home, workers, stop, program=AT_ONCE):
    """The exit code and stderr of a run that `stop` met at work, once all its processes have left stderr."""
    (home / "in.txt").write_text("the llama walks over the grassland\n" * 2_000_000, "utf-8")
    command = [sys.executable, "-c", program, "run", "--input", "in.txt", "--tokenizer-name-or-path", str(folder)]
    with subprocess.Popen(
        [*command, "--output-prefix", "out", "--workers", workers],
        cwd=home,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        part = home / ".out_text_document.bin.part"
        while running.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        assert len(helpers_of(running.pid)) == int(workers) - 1
        stop(running.pid)
        try:
            err = running.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    return running.returncode, err


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("stop", "code", "words"),
    [
        (lambda run: os.killpg(run, signal.SIGINT), 130, "interrupted\n"),  # as a terminal does: to all processes
        (lambda run: os.kill(run, signal.SIGTERM), 143, ""),
        (lambda run: [os.kill(run, signal.SIGTERM), os.killpg(run, signal.SIGTERM)], 143, ""),  # as `timeout` does
    ],
    ids=["SIGINT", "SIGTERM", "timeout"],
)
def test_a_run_that_is_stopped_leaves_nothing(folder, tmp_path, workers, stop, code, words):
    assert stopped(folder, tmp_path, workers, stop) == (code, words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_worker_that_the_kernel_kills_is_one_line_and_leaves_nothing(folder, tmp_path):
    def kill(run):
        os.kill(int(helpers_of(run)[0]), signal.SIGKILL)

    code, err = stopped(folder, tmp_path, "2", kill)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: a worker process died (out of memory, or killed)")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_killed_run_leaves_no_worker(folder, tmp_path):
    assert stopped(folder, tmp_path, "2", lambda run: os.kill(run, signal.SIGKILL))[0] == -signal.SIGKILL


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_run_killed_by_the_kernel_is_continued(folder, tmp_path, capsys, monkeypatch, workers):
    journal = tmp_path / ".out_text_document.journal.json"

    def kill_later(run):
        while not journal.exists():
            time.sleep(0.01)
        os.kill(run, signal.SIGKILL)

    often = "from data_prep import preparation; preparation.JOURNAL_S = 0.05; " + AT_ONCE
    assert stopped(folder, tmp_path, workers, kill_later, often)[0] == -signal.SIGKILL
    assert not list(tmp_path.glob("out*"))
    monkeypatch.chdir(tmp_path)
    command = ["run", "--input", "in.txt", "--tokenizer-name-or-path", folder, "--output-prefix"]
    assert "2,000,000 documents" in said(capsys, *command, "out", "--resume")
    assert "2,000,000 documents" in said(capsys, *command, "whole")
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    for suffix in (".bin", ".idx", ".manifest.json"):
        files = (tmp_path / f"{name}_text_document{suffix}" for name in ("out", "whole"))
        assert len({file.read_bytes() for file in files}) == 1, suffix


def test_help_loads_no_reader_and_no_encoder():
    command = [sys.executable, "-X", "importtime", "-m", "data_prep", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--handler-name" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "numpy", "pyarrow", "sentencepiece", "tokenizers"}


def test_the_console_script_works(folder, corpus, tmp_path):
    command = ["run", "--input", corpus, "--tokenizer-name-or-path", folder, "--output-prefix", "out", "--workers", "2"]
    done = subprocess.run([SCRIPT, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert re.search(r"documents/s, .* MB/s, .* tokens/s; cache hit rate \d+\.\d+% of \d+ chunks", done.stderr)
    assert (tmp_path / "out_text_document.idx").exists()
    done = subprocess.run([SCRIPT, "inspect", "none"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: no such data set: none.idx\n")
