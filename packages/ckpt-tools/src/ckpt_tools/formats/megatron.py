"""Folders `mp_rank_TT[_PPP]` with `model_optim_rng.pt`: megatron-core's layout, and both of AscendSpeed's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.checkpoint import Contents, closing_on_error
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats import rank_plans, ranks
from ckpt_tools.formats.companions import TRACKER
from ckpt_tools.formats.megatron_args import args_for
from ckpt_tools.formats.naming import ASCENDSPEED, ASCENDSPEED_FLAT, MEGATRON_CORE, Naming
from ckpt_tools.layout import Layout
from ckpt_tools.planning import Plan, Planned
from ckpt_tools.shard_rules import EMBEDDING
from ckpt_tools.storage.files import File

FILE = "model_optim_rng.pt"
WRITTEN = rf"{TRACKER}|(iter_0000001|release)(/mp_rank_\d+(_\d+)?(/{FILE})?)?"
"""The paths that plans give to the tracker and to weights, and their folders."""

RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
CHUNK = re.compile(r"model(\d+)")
VERSION = {"checkpoint_version": 3.0}


def recognise(folder: Path) -> bool:
    """Whether the folder holds one file for each rank."""
    return any(RANK_FOLDER.match(child.name) for child in folder.glob("mp_rank_*") if child.is_dir())


def open_megatron(folder: Path) -> Contents:
    """The contents of an `iter_…` or `release` folder.

    Raises:
        CheckpointError: A rank is missing or broken.
        UsageError: It is of a layout that is not read.
    """
    files: list[File] = []
    with closing_on_error(files):
        opened = [ranks.open_rank(*rank, path, files, _roots) for rank, path in sorted(_rank_files(folder).items())]
        return ranks.contents(folder, files, opened)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    found: dict[tuple[int, int], Path] = {}
    for child in sorted(folder.glob("mp_rank_*")):
        named = RANK_FOLDER.fullmatch(child.name)
        if not named:
            raise UsageError(f"{child} is no rank of tensors and pipeline stages (experts are not read): move it away")
        rank = int(named[1]), int(named[2] or 0)
        if rank in found:
            raise CheckpointError(f"{found[rank].parent} and {child} are of one rank: move one of them away")
        found[rank] = child / FILE
    return found


def _roots(tree: Mapping[Any, Any]) -> list[str]:
    """The key of the model, or those of a virtual pipeline's chunks: `model0`, `model1` and so on."""
    count = sum(1 for key in tree if type(key) is str and CHUNK.fullmatch(key))
    return [f"model{chunk}" for chunk in range(count)] or ["model"]


def plan_megatron_core(config: LlamaConfig, layout: Layout, dtypes: Mapping[str, str]) -> Planned:
    """The files of megatron-core's layout, with the `args` that Megatron-LM and MindSpeed-LLM read."""
    padded = rank_plans.padded_vocab_size(config, layout, 1)
    head = {"args": args_for(config, layout, padded, dtypes[EMBEDDING]), **VERSION, "iteration": 1}
    return _plan(config, layout, MEGATRON_CORE, head)


def plan_ascendspeed(config: LlamaConfig, layout: Layout, dtypes: Mapping[str, str]) -> Planned:
    """The files of AscendSpeed's nested layout, as its converter writes them."""
    return _plan(config, layout, ASCENDSPEED, VERSION)


def plan_ascendspeed_flat(config: LlamaConfig, layout: Layout, dtypes: Mapping[str, str]) -> Planned:
    """The files of AscendSpeed's older layout."""
    return _plan(config, layout, ASCENDSPEED_FLAT, VERSION)


def _plan(config: LlamaConfig, layout: Layout, naming: Naming, head: Mapping[str, Any]) -> Planned:
    if layout.naming is not None:
        raise UsageError(f"naming is for the format deepspeed: the names of {naming.label} are its own")
    stages = layout.pipeline_model_parallel_size
    is_core = naming is MEGATRON_CORE
    iteration, tracker = ("iter_0000001", b"1") if is_core else ("release", b"release\n")
    files = rank_plans.RankFiles(
        naming=naming,
        path=lambda tp, pp: f"{iteration}/{ranks.rank_name(tp, pp, stages)}/{FILE}",
        root="model",
        head=head,
        default_divisor=1 if is_core else 128,
    )
    notes = rank_plans.order_notes(config, layout, naming)
    return Planned(rank_plans.plan_files(config, layout, files), {TRACKER: tracker}, notes)


PLANS: Mapping[str, Plan] = {
    MEGATRON_CORE.label: plan_megatron_core,
    ASCENDSPEED.label: plan_ascendspeed,
    ASCENDSPEED_FLAT.label: plan_ascendspeed_flat,
}
"""The formats of this kind that are written."""
