"""The six console scripts keep one grammar: help, version, exit codes, one clear line for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ["npu-kernels", "ckpt-tools", "data-prep", "llama-model", "trainer", "evaluator"]
MISSING_FILE = {
    "ckpt-tools": ["inspect", "no/such/folder"],
    "data-prep": ["inspect", "no/such/prefix"],
    "llama-model": ["generate", "no/such/folder", "--prompt", "x"],
    "trainer": ["report", "no/such/folder"],
    "evaluator": ["run", "mmlu", "no/such/folder", "--task-data-path", "no/such/data", "--output", "report.json"],
}
NOT_A_CHECKPOINT = {
    "ckpt-tools": ["inspect", "."],
    "llama-model": ["generate", ".", "--prompt", "x"],
    "evaluator": ["run", "mmlu", ".", "--task-data-path", ".", "--output", "report.json"],
}


def run(script, *arguments, cwd):
    command = [str(Path(sys.executable).parent / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def assert_one_line(done, code):
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_verbs(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert script in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_flag_is_a_usage_error(script, tmp_path):
    assert run(script, "--no-such-flag", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_arguments_is_a_usage_error(script, tmp_path):
    assert run(script, cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("script", sorted(MISSING_FILE))
def test_a_missing_file_is_one_line(script, tmp_path):
    assert_one_line(run(script, *MISSING_FILE[script], cwd=tmp_path), 1)


@pytest.mark.parametrize("script", sorted(NOT_A_CHECKPOINT))
def test_a_folder_that_is_no_checkpoint_is_one_line(script, tmp_path):
    assert_one_line(run(script, *NOT_A_CHECKPOINT[script], cwd=tmp_path), 1)


def test_a_file_of_options_that_is_missing_is_a_usage_error(tmp_path):
    assert_one_line(run("trainer", "pretrain", "--config", "no-such.yaml", cwd=tmp_path), 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_module_is_the_script(script, tmp_path):
    module = [sys.executable, "-m", script.replace("-", "_"), "--version"]
    done = subprocess.run(module, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == run(script, "--version", cwd=tmp_path).stdout
