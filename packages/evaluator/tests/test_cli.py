"""The console script: table, report, exit codes, one line for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluator.cli import main

SCRIPT = str(Path(sys.executable).parent / "evaluator")


@pytest.fixture
def command(folder, mmlu, tmp_path):
    return ["run", "mmlu", folder, "--task-data-path", mmlu, "--output", tmp_path / "new/report.json"]


def said(capsys, command, code=0):
    assert main([str(word) for word in command]) == code
    out, err = capsys.readouterr()
    if code:
        assert not out
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    return err if code else out


def test_a_report_and_a_table(command, tmp_path, capsys):
    out = said(capsys, [*command, "--device", "cpu"])
    report = json.loads((tmp_path / "new/report.json").read_text("utf-8"))
    assert report["num_questions"] == 4
    assert f"{report['accuracy']:.1%}" in out.splitlines()[-2]
    assert "exists: give --overwrite" in said(capsys, command, code=1)
    options = ["--protocol", "perplexity", "--subjects", "animals", "--dtype", "bfloat16", "--overwrite", "--json"]
    summary = json.loads(said(capsys, [*command, *options]))
    report = json.loads((tmp_path / "new/report.json").read_text("utf-8"))
    assert summary == {name: value for name, value in report.items() if name != "questions"}
    assert (report["protocol"], report["model"]["dtype"], list(report["subjects"])) == (
        "perplexity",
        "bfloat16",
        ["animals"],
    )


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({2: "none"}, 1, "none"),
        ({2: "{tmp_path}"}, 1, "checkpoint"),
        ({4: "none"}, 1, "no such folder: none"),
        ({4: "{tmp_path}"}, 1, "holds no test"),
        ({6: "{tmp_path}"}, 1, "is a folder"),
        ({7: ["--subjects", "big_city"]}, 2, "perhaps you meant 'big_cities'"),
        ({7: ["--prompt-template", "general-instructions"]}, 2, "perhaps you meant 'general-instruction'"),
        ({7: ["--tokenizer-name-or-path", "none"]}, 1, "no such tokenizer: none"),
        ({7: ["--protocol", "perplexity", "--num-few-shot", "2"]}, 2, "letter protocol"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, capsys, change, code, words):
    command = [*command, []]
    for at, word in change.items():
        command[at] = word.format(tmp_path=tmp_path) if isinstance(word, str) else word
    assert words in said(capsys, [*command[:-1], *command[-1]], code)
    assert not (tmp_path / "new/report.json").exists()


def test_overwriting_replaces_reports_only(command, tmp_path, capsys):
    for text in ("question,A,B,C,D,A\n", "[]", '{"accuracy": 1}'):
        (tmp_path / "mine").write_text(text, "utf-8")
        asked = [*command[:6], tmp_path / "mine", *command[7:], "--overwrite"]
        assert "is no evaluation report" in said(capsys, asked, 1)
        assert (tmp_path / "mine").read_text("utf-8") == text


@pytest.mark.parametrize(
    ("options", "words"), [(["--protocol", "leter"], "letter"), (["--no-such-flag"], "--no-such-flag")]
)
def test_a_bad_flag_is_a_usage_error(command, tmp_path, options, words):
    done = subprocess.run([SCRIPT, *map(str, command), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_loads_no_torch():
    module = [sys.executable, "-X", "importtime", "-m", "evaluator", "run", "--help"]
    done = subprocess.run(module, capture_output=True, text=True, check=True)
    assert "--task-data-path" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "numpy", "sentencepiece"}


def test_no_megatron_core_is_needed(command, tmp_path):
    code = "import sys; sys.modules['megatron'] = None; from evaluator.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "new/report.json").exists()
