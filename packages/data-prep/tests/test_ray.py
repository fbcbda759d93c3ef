"""The shards of a data set on a Ray cluster of this machine: the bytes of one process, whatever happens to a worker."""

import os
import signal

import pytest
from data_prep import DataError, executors, prepare
from data_prep.errors import UsageError
from test_parts import files_of, written


@pytest.fixture(scope="module")
def cluster():
    """One for all tests: it takes seconds to start."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_the_bytes_are_those_of_one_process_though_workers_are_lost(cluster, folder, tmp_path, monkeypatch):
    inputs = [written(tmp_path / f"a{kind}", 200) for kind in (".jsonl", ".csv", ".parquet")]
    options = {"tokenizer": folder, "append_eod": True}
    prepare(inputs, tmp_path / "one", **options)
    make, marks = executors.make_shard, tmp_path / "marks"
    marks.mkdir()

    def killed_once(plan):
        """As by the kernel, with the files of the shard half written; the next one to try it makes it."""
        if plan.shard_index in (0, 5) and not (marks / str(plan.shard_index)).exists():
            from data_prep.indexed_writer import IndexedWriter

            (marks / str(plan.shard_index)).touch()
            IndexedWriter.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        return make(plan)

    monkeypatch.setattr(executors, "make_shard", killed_once)
    prepare(inputs, tmp_path / "two", executor="ray", workers=2, **options)
    assert sorted(path.name for path in marks.iterdir()) == ["0", "5"]
    assert files_of(tmp_path, "two") == files_of(tmp_path, "one")
    assert not list(tmp_path.glob(".two*"))


def test_a_worker_that_is_always_lost_is_an_error(cluster, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "RETRIES", 1)
    monkeypatch.setattr(executors, "make_shard", lambda plan: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a shard lost its worker 2 times"):
        prepare([written(tmp_path / "a.txt", 9)], tmp_path / "out", tokenizer=folder, executor="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_broken_input_is_named_as_without_ray(cluster, folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * 99 + "{\n", "utf-8")
    with pytest.raises(DataError, match=r"in\.jsonl, line 100 is not JSON"):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=folder, executor="ray")
    (tmp_path / "in.jsonl").write_text("\n", "utf-8")
    with pytest.raises(DataError, match="holds no document"):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=folder, executor="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_shards": 2}, "goes with neither --num-shards"),
        ({"pack_length": 9}, "nor --pack"),
        ({"resume": True}, "shards are made again"),
        ({"workers": 0}, "--workers 0"),
    ],
)
def test_what_does_not_go_with_ray_is_a_usage_error(folder, corpus, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        prepare([corpus], tmp_path / "out", tokenizer=folder, executor="ray", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_ray_that_is_not_there_is_a_usage_error(folder, corpus, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(executors, "import_module", missing)
    with pytest.raises(UsageError, match=r"puna-data-prep\[ray\]"):
        prepare([corpus], tmp_path / "out", tokenizer=folder, executor="ray")
