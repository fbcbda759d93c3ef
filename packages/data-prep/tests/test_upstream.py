"""AscendSpeed's and MindSpeed-LLM's command lines: accepted, or refused in one line."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from data_prep.cli import main
from data_prep.errors import UsageError
from data_prep.upstream import without_upstreams


def run(folder, corpus, home, *more):
    command = ["run", "--input", corpus, "--tokenizer-name-or-path", folder, "--output-prefix", home / "out", *more]
    return main([str(word) for word in command])


def test_a_recipes_command_line_is_taken(folder, corpus, tmp_path):
    assert run(folder, corpus, tmp_path, "--append-eod") == 0
    expected = (tmp_path / "out_text_document.bin").read_bytes()
    flags = (
        "--tokenizer-type PretrainedFromHF --tokenizer-not-use-fast --handler-name GeneralPretrainHandler --workers 4"
    )
    flags += " --log_interval 1000 --append_eod --json-keys text --seq-length 4096 --dataset-impl=mmap --streaming"
    flags += " --make-vocab-size-divisible-by 8 --pad_vocab_size_to 32000 --cache-dir x --overwrite"
    assert run(folder, corpus, tmp_path, *flags.split()) == 0
    assert (tmp_path / "out_text_document.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-type GPT2BPETokenizer: only PretrainedFromHF"),
        (["--dataset-impl=lazy"], "--dataset-impl lazy: only mmap"),
        (["--vocab-file", "x"], "--vocab-file: give --tokenizer-name-or-path"),
        (["--split-sentences"], "--split-sentences: documents are not split"),
        (["--interleave_probs", "0.5,0.5"], "--interleave-probs: give --input-weights"),
        (["--cache-dir"], "--cache-dir needs a value"),
        (["--pack"], "--pack needs --seq-length"),
        (["--map-keys", "{"], "--map-keys '{' is not JSON"),
    ],
)
def test_what_is_not_there_is_one_line(folder, corpus, tmp_path, capsys, flags, words):
    assert run(folder, corpus, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_only_upstreams_flags_are_taken_out():
    assert without_upstreams(["run", "--input", "--streaming", "a", "--output_prefix", "b"]) == [
        "run",
        "--input",
        "a",
        "--output_prefix",
        "b",
    ]
    with pytest.raises(UsageError):
        without_upstreams(["run", "--merge_file=x"])


def test_lines_of_progress_come_where_there_is_no_terminal(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", 100)
    monkeypatch.setattr("data_prep.batching.BLOCK", 100)
    (tmp_path / "in.txt").write_text("the llama walks\n" * 100, "utf-8")
    assert run(folder, tmp_path / "in.txt", tmp_path, "--log-interval", 40) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert [int(line.split()[0]) // 40 for line in lines[:2]] == [1, 2]
    assert "documents/s, " in lines[0]
    assert lines[0].endswith(" left")


def test_a_bar_shows_on_a_terminal(folder, tmp_path):
    (tmp_path / "in.txt").write_text("the llama walks over the grassland\n" * 200_000, "utf-8")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    command = [sys.executable, "-m", "data_prep", "run", "--input", "in.txt", "--tokenizer-name-or-path", str(folder)]
    with subprocess.Popen([*command, "--output-prefix", "out"], cwd=tmp_path, stdout=-1, stderr=theirs) as running:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # what a terminal answers once nobody holds its other end
            while block := os.read(ours, 4096):
                said += block
        assert running.wait() == 0
    os.close(ours)
    assert re.search(rb"data-prep: +\d+%\|.*/7\.00M .*MB/s, [\d,]+ doc/s, [\d,]+ tok/s\]", said)
