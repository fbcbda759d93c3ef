"""One data set made by many machines: its shards on a Ray cluster, then joined.

The same shards can be made without Ray, one `data-prep run --num-shards N --shard-index I` each, and joined by
`data-prep merge`. Either way the bytes are those of one process.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from data_prep.committing import check_target
from data_prep.errors import DataError, UsageError
from data_prep.handlers import kinds
from data_prep.manifest import Manifest
from data_prep.merging import merge
from data_prep.plan import Plan
from data_prep.preparation import make

SHARDS_PER_WORKER = 4
"""Shards are the unit that is done again when a worker is lost, and that evens out slow ones."""
RETRIES = 3
"""Times that a shard is begun again where the worker that made it is lost."""


def make_on_ray(plan: Plan, *, workers: int, overwrite: bool) -> Manifest:
    """`preparation.make`, on the Ray cluster of RAY_ADDRESS, or on one that is started on this machine.

    All machines see the inputs, the tokenizer and the folder of the output under the same paths, and have data-prep.

    Args:
        plan: What is made; not itself a shard.
        workers: Shards that are made at a time, if the cluster has room for them.
        overwrite: Replace a data set that is there.

    Raises:
        DataError: As `make`; or a shard lost its worker again and again. Nothing is left under the prefix.
        UsageError: Ray is not there, or the plan cannot be cut.
    """
    if plan.num_shards > 1 or plan.pack_length:
        raise UsageError("--executor ray makes the shards itself: it goes with neither --num-shards nor --pack")
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one process has to work")
    try:
        ray = import_module("ray")
    except ImportError:
        raise UsageError("--executor ray needs Ray: pip install 'puna-data-prep[ray]'") from None
    target = Path(plan.output_prefix).absolute()
    outputs = _outputs(plan)
    check_target([Path(f"{target}{output}") for output in outputs], overwrite)
    folder = target.with_name(f".{target.name}.shards")
    folder.mkdir(parents=True, exist_ok=True)
    count = SHARDS_PER_WORKER * workers
    whole = replace(
        plan,
        inputs=tuple(path.absolute() for path in plan.inputs),
        tokenizer=plan.tokenizer.absolute(),
        output_prefix=str(folder / "part"),
        num_shards=count,
    )
    try:
        documents = _run(ray, [replace(whole, shard_index=index) for index in range(count)], workers)
        if not sum(documents):
            raise DataError(f"the input holds no document: {', '.join(map(str, plan.inputs))}")
        manifests = merge([folder / "part"], str(target), overwrite=overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifests[0]


def _outputs(plan: Plan) -> Sequence[str]:
    outputs: Sequence[str] = getattr(kinds()[plan.handler_name], "outputs", ())
    return outputs or [f"_{key}_document" for key in plan.json_keys]


def _run(ray: Any, plans: Sequence[Plan], workers: int) -> list[int]:
    """Makes all shards, at most `workers` at a time; the documents of each, in any order."""
    ours = not ray.is_initialized()
    if ours:
        local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **local)
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(make_shard)
        waiting, running = list(plans), list[Any]()
        done: list[int] = []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(waiting.pop(0)))
            finished, running = ray.wait(running)
            done += _results(ray, finished)
            print(f"{len(done)} of {len(plans)} shards", file=sys.stderr)
        return done
    finally:
        if ours:
            ray.shutdown()


def _results(ray: Any, finished: Sequence[Any]) -> list[int]:
    """What shards returned; raises the error of one as this process would have met it."""
    try:
        found: list[int] = ray.get(finished)
        return found
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise DataError(str(cause) if isinstance(cause, (DataError, OSError)) else str(error)) from None
    except ray.exceptions.RayError as error:
        words = " ".join(str(error).split())[:200]
        raise DataError(f"a shard lost its worker {RETRIES + 1} times: {words}") from None


def make_shard(plan: Plan) -> int:
    """A task of the cluster: one shard; its documents. What a lost worker left of it is written over."""
    return make(plan, workers=1, resume=False, log_interval=0, overwrite=True).documents
