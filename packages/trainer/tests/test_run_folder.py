"""The run's folder: what is refused, what a kill leaves, what reads back; the picture of a loss curve."""

import json
import shutil

import pytest
from trainer import TrainConfig, hashes, metrics, open_run, output, report
from trainer.checkpoints import Checkpoints
from trainer.cli import main
from trainer.config_file import read_yaml
from trainer.engines import StepResult
from trainer.errors import ConfigError, TrainerError
from trainer.progress import Progress
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
    output.create(config_of(made.path))
    with metrics.sinks(made.metrics_file, None, is_first_rank=True) as sinks:
        for step in range(1, 6):
            line = metrics.record(step, step * 4, result(6.0 / step), rates())
            sinks.write(line | ({"valid_loss": 2.0} if step == 5 else {}))
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


def config_of(path, **options):
    needed = dict(data_path=(path.parent / "data",), load_weights=path.parent / "model", train_iters=10, lr=1e-3)
    return TrainConfig(**needed | dict(seq_length=16, global_batch_size=8, output_dir=path) | options)


def test_output_that_exists_needs_overwrite_and_must_be_a_run(run, tmp_path):
    with pytest.raises(ConfigError, match=f"--resume {run.path} to go on with it, --overwrite to replace it"):
        output.check_output(config_of(run.path))
    output.check_output(config_of(run.path, overwrite=True))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="is no training run"):
        output.check_output(config_of(tmp_path / "thesis", overwrite=True))
    with pytest.raises(ConfigError, match="is a file"):
        output.check_output(config_of(tmp_path / "thesis" / "chapter.tex", overwrite=True))
    with pytest.raises(ConfigError, match="which the run would replace"):
        output.check_output(config_of(run.path, overwrite=True, load_weights=run.path))


def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(tmp_path):
    config = config_of(tmp_path / "run")
    output.create(config)
    output.check_output(config)
    output.create(config)
    (tmp_path / "run.replaced" / "checkpoints" / "iter_0000001").mkdir()
    with pytest.raises(ConfigError, match="--overwrite to replace it"):
        output.check_output(config)


def test_a_folder_of_the_users_is_never_taken_for_a_replaced_run(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run.replaced")
    with pytest.raises(ConfigError, match=r"run\.replaced is in the way"):
        output.check_output(config_of(run.path, overwrite=True))
    output.forget_replaced(run)
    assert (tmp_path / "run.replaced").exists()


def test_the_run_that_is_replaced_waits_for_the_first_checkpoint(run, tmp_path):
    aside = tmp_path / "run.replaced"
    for _ in range(2):  # the second time over a run that ended before its first checkpoint
        output.check_output(config_of(run.path, overwrite=True))
        output.create(config_of(run.path))
        assert not run.metrics_file.exists()
        assert len(Run(aside).metrics()) == 5
    commit(run, 10)
    output.create(config_of(run.path))  # over one that ended before it could forget
    assert Run(aside).tracker.exists()
    output.forget_replaced(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_to_a_run_stays_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to("run")
    output.create(config_of(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert run.checkpoints.is_dir()
    assert (tmp_path / "run.replaced").is_dir()


def test_going_on_in_place_drops_the_records_of_steps_that_are_done_again(run):
    again = config_of(run.path, resume=run.path, train_iters=20)
    output.go_on(again, 3)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    written = TrainConfig(**read_yaml(run.config_file))
    assert (written.train_iters, written.resume) == (20, None)
    assert written.load_weights == run.path.parent / "model", "what the run began from stays"


def test_an_earlier_checkpoint_goes_on_elsewhere_only(run, tmp_path):
    for iteration in (10, 20):
        commit(run, iteration)
    output.check_output(config_of(run.path, resume=run.checkpoint(20)))
    with pytest.raises(ConfigError, match="has a later checkpoint, iter_0000020"):
        output.check_output(config_of(run.path, resume=run.checkpoint(10)))
    output.check_output(config_of(tmp_path / "other", resume=run.checkpoint(10)))


def test_a_report_of_nothing_is_refused(capsys):
    assert main(["report"]) == 2
    assert "at least one run" in capsys.readouterr().err


class FakeEngine:
    """Writes a file; in the background until it is told to be done."""

    def __init__(self, write=lambda folder: (folder / "weights").write_bytes(b"1"), done=True):
        self._write, self.done = write, done

    def write(self, folder, *, in_background):
        self._write(folder)
        return self

    def finished(self, *, wait):
        return self.done or wait


def checkpoints_of(run, engine=None, keep_last=0):
    return Checkpoints(
        run, engine or FakeEngine(), keep_last=keep_last, in_background=False, is_first_rank=True, barrier=lambda: None
    )


def commit(run, iteration, engine=None, keep_last=0):
    checkpoints = checkpoints_of(run, engine, keep_last)
    checkpoints.begin(iteration, lambda folder: None)
    return checkpoints.finish(wait=True)


def test_a_checkpoint_appears_whole_and_the_tracker_names_it(run):
    folder = commit(run, 10)
    assert folder.name == "iter_0000010"
    assert run.tracker.read_text("utf-8") == "10"
    assert [path.name for path in run.checkpoints.iterdir() if path.is_dir()] == ["iter_0000010"]


def test_a_checkpoint_in_the_background_appears_when_it_is_done(run):
    engine = FakeEngine(done=False)
    checkpoints = checkpoints_of(run, engine)
    checkpoints.begin(10, lambda folder: None)
    assert checkpoints.finish(wait=False) is None
    assert run.latest() is None
    engine.done = True
    assert checkpoints.finish(wait=False) == run.latest()
    assert checkpoints.finish(wait=True) is None


def test_a_save_that_fails_leaves_the_checkpoint_before_it(run):
    commit(run, 10)

    def fails(folder):
        (folder / "weights").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        commit(run, 20, FakeEngine(fails))
    assert run.tracker.read_text("utf-8") == "10"
    assert not run.checkpoint(20).exists()
    commit(run, 20)  # what it left is no hindrance
    assert run.tracker.read_text("utf-8") == "20"


def test_the_last_checkpoints_are_kept(run):
    for iteration in (10, 20, 30):
        commit(run, iteration, keep_last=2)
    assert run.iterations() == [20, 30]
    assert not list(run.checkpoints.glob(".iter_*"))


@pytest.mark.parametrize("damage", ["a bit", "a file less", "shorter"])
def test_a_damaged_checkpoint_is_noticed(run, damage):
    folder = commit(run, 10)
    assert hashes.damage(folder, 0, 1) is None
    file = folder / "weights"
    changes = {
        "a bit": lambda: file.write_bytes(b"2"),
        "a file less": file.unlink,
        "shorter": lambda: file.write_bytes(b""),
    }
    changes[damage]()
    assert "weights" in hashes.damage(folder, 0, 1)
    assert "weights" not in (hashes.damage(folder, 1, 2) or ""), "each rank reads its share"


def test_a_file_that_the_manifest_does_not_list_is_noticed(run):
    folder = commit(run, 10)
    (folder / "manifest.json").write_text('{"files": {}}', "utf-8")
    assert "weights is none of the files" in hashes.damage(folder, 0, 1)
    (folder / "manifest.json").write_text('{"files": []}', "utf-8")
    assert "weights" in hashes.damage(folder, 0, 1)
    (folder / "manifest.json").write_text("[]", "utf-8")
    with pytest.raises(TrainerError, match="is damaged"):
        hashes.damage(folder, 0, 1)


@pytest.mark.parametrize(
    ("field", "value"), [("iteration", "4"), ("iteration", 4.5), ("iteration", -4), ("consumed_samples", None),
                         ("schedule", [1]), ("engine", "x"), ("iteration", True)],
)  # fmt: skip
def test_progress_of_another_type_is_refused(tmp_path, field, value):
    fields = dict(iteration=4, consumed_samples=8, kind="pretrain", dtype="float32", schedule={}, engine={}, order={})
    Progress(**fields).write(tmp_path)
    assert Progress.read(tmp_path) == Progress(**fields)
    Progress(**fields | {field: value}).write(tmp_path)
    with pytest.raises(TrainerError, match=rf"trainer_state\.json is damaged: {field} is"):
        Progress.read(tmp_path)


def test_an_export_never_replaces_what_the_run_needs(run, tmp_path):
    model, new = tmp_path / "model", tmp_path / "new"
    model.mkdir()
    for out, target in ((new, model), (new, tmp_path), (run.path, run.path)):
        with pytest.raises(ConfigError, match="would replace"):
            output.check_output(config_of(out, export_hf=target, overwrite=True))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="exists"):
        output.check_output(config_of(new, export_hf=tmp_path / "thesis"))
    with pytest.raises(ConfigError, match="is no model's folder"):
        output.check_output(config_of(new, export_hf=tmp_path / "thesis", overwrite=True))
    output.check_output(config_of(new, export_hf=tmp_path / "hf"))


def test_ranks_leave_their_hashes_to_the_manifest(run):
    def write(folder):
        for rank in (0, 1):
            (folder / f"part{rank}").write_bytes(b"x" * rank)
            hashes.leave_hashes(folder, rank, [folder / f"part{rank}"])

    folder = commit(run, 10, FakeEngine(write))
    assert sorted(json.loads((folder / "manifest.json").read_text("utf-8"))["files"]) == ["part0", "part1"]


def test_the_report_has_both_ends_and_a_picture(run, tmp_path):
    row = report.summary(run)
    assert (row["loss_first"], row["loss_last"], row["valid_loss"], row["steps"]) == (6.0, 1.2, 2.0, 5)
    assert "1.2" in report.table([row])
    report.plot(run, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_running_mean_is_unbiased_at_its_start():
    assert report._smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
