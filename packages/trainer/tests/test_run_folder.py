"""The run's folder: what is refused, what a kill leaves, what reads back; the picture of a loss curve."""

import json

import pytest
from trainer import checkpoints, metrics, open_run, report
from trainer.cli import main
from trainer.engines import StepResult
from trainer.errors import ConfigError, TrainerError
from trainer.run import Run


def result(loss, **changes):
    fields = dict(loss=loss, loss_tokens=8, grad_norm=1.0, lr=1e-3, loss_scale=1.0, skipped=False)
    return StepResult(**{**fields, **changes})


def rates(step_time_s=2.0, peak=None):
    throughput = metrics.Throughput(
        seq_length=100, global_batch_size=4, num_devices=2, flops_per_token=1e10, peak_flops=peak
    )
    return throughput.rates(step_time_s)


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run")
    checkpoints.create(made)
    made.config_file.write_text("lr: 1\n", "utf-8")
    with made.metrics_file.open("w", encoding="utf-8") as file:
        for step in range(1, 6):
            line = metrics.record(step, step * 4, result(6.0 / step), rates())
            metrics.write(file, line | ({"valid_loss": 2.0} if step == 5 else {}))
    return made


def test_rates_by_hand():
    # 400 positions in 2 s on 2 devices: 100 a second and device, at 1e10 FLOPs each.
    assert rates(peak=4e12) == {
        "step_time_s": 2.0,
        "tokens_per_second_per_device": 100.0,
        "samples_per_second": 2.0,
        "model_tflops_per_device": 1.0,
        "mfu": 0.25,
    }
    assert "mfu" not in rates(peak=None)


def test_an_overflow_is_null_and_shown(run):
    line = metrics.record(1, 4, result(float("nan"), grad_norm=float("inf"), skipped=True), rates())
    assert json.loads(json.dumps(line, allow_nan=False))["loss"] is None
    assert "skipped" in metrics.console_line(line, 10, 61.0)
    assert metrics.console_line(line, 10, 61.0).endswith("eta 0:01:01")


def test_metrics_read_back(run):
    assert [line["step"] for line in open_run(run.path).metrics()] == [1, 2, 3, 4, 5]


def test_a_torn_last_line_is_skipped_and_a_torn_middle_named(run):
    text = run.metrics_file.read_text("utf-8")
    run.metrics_file.write_text(text[:-10], "utf-8")
    assert len(run.metrics()) == 4
    run.metrics_file.write_text(text.replace('{"step": 2', "{oops", 1), "utf-8")
    with pytest.raises(TrainerError, match="line 2"):
        run.metrics()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(TrainerError, match="no such run"):
        open_run(tmp_path / "nothing")
    with pytest.raises(TrainerError, match="holds no metrics"):
        open_run(tmp_path)


def test_output_that_exists_needs_overwrite_and_must_be_a_run(run, tmp_path):
    with pytest.raises(ConfigError, match="--overwrite"):
        checkpoints.check_output(run, overwrite=False, reads=())
    checkpoints.check_output(run, overwrite=True, reads=())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="is no training run"):
        checkpoints.check_output(Run(tmp_path / "thesis"), overwrite=True, reads=())
    with pytest.raises(ConfigError, match="is a file"):
        checkpoints.check_output(Run(tmp_path / "thesis" / "chapter.tex"), overwrite=True, reads=())


def test_the_run_that_is_replaced_waits_for_the_first_checkpoint(run, tmp_path):
    aside = tmp_path / "run.replaced"
    for _ in range(2):  # the second time over a run that ended before its first checkpoint
        checkpoints.create(run)
        assert not run.metrics_file.exists()
        assert len(Run(aside).metrics()) == 5
    commit(run, 10, lambda folder: None)
    checkpoints.create(run)  # over one that ended before it could forget
    assert Run(aside).tracker.exists()
    checkpoints.forget_replaced(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_to_a_run_stays_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to("run")
    checkpoints.create(Run(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert run.checkpoints.is_dir()
    assert (tmp_path / "run.replaced").is_dir()


def test_a_report_of_nothing_is_refused(capsys):
    assert main(["report"]) == 2
    assert "at least one run" in capsys.readouterr().err


def commit(run, iteration, write):
    return checkpoints.commit(run, iteration, write, lambda _: None, is_first_rank=True, barrier=lambda: None)


def test_a_checkpoint_appears_whole_and_the_tracker_names_it(run):
    folder = commit(run, 10, lambda folder: (folder / "weights").write_bytes(b"1"))
    assert folder.name == "iter_0000010"
    assert run.tracker.read_text("utf-8") == "10"
    assert [path.name for path in run.checkpoints.iterdir() if path.is_dir()] == ["iter_0000010"]


def test_a_save_that_fails_leaves_the_checkpoint_before_it(run):
    commit(run, 10, lambda folder: (folder / "weights").write_bytes(b"1"))

    def fails(folder):
        (folder / "weights").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        commit(run, 20, fails)
    assert run.tracker.read_text("utf-8") == "10"
    assert not run.checkpoint(20).exists()
    commit(run, 20, lambda folder: (folder / "weights").write_bytes(b"2"))  # what it left is no hindrance
    assert run.tracker.read_text("utf-8") == "20"


def test_the_report_has_both_ends_and_a_picture(run, tmp_path):
    row = report.summary(run)
    assert (row["loss_first"], row["loss_last"], row["valid_loss"], row["steps"]) == (6.0, 1.2, 2.0, 5)
    assert "1.2" in report.table([row])
    report.plot(run, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_running_mean_is_unbiased_at_its_start():
    assert report._smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
