"""DeepSpeed's layout: `mp_rank_TT_model_states.pt`, a file for each tensor rank, and `latest`, which names the folder.

ZeRO stages 0 to 2 keep the whole model there, whatever their optimizer's shards hold.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.checkpoint import Contents, closing_on_error
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError
from ckpt_tools.formats import rank_plans, ranks
from ckpt_tools.formats.companions import LATEST
from ckpt_tools.formats.naming import ASCENDSPEED, NAMINGS
from ckpt_tools.layout import Layout
from ckpt_tools.planning import Planned
from ckpt_tools.storage.files import File

FORMAT = "deepspeed"
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
STAGE_3_FILES = "zero_pp_rank_*_mp_rank_*_model_states.pt"
WRITTEN = rf"{LATEST}|release(/{RANK_FILE.pattern})?"
"""The paths that `plan` gives to the tracker and to weights, and their folder."""


def recognise(folder: Path) -> bool:
    """Whether the folder holds model states of DeepSpeed."""
    return any(folder.glob("mp_rank_*_model_states.pt")) or any(folder.glob(STAGE_3_FILES))


def open_deepspeed(folder: Path) -> Contents:
    """The contents of a tag's folder (`release`, `global_step…`).

    Raises:
        CheckpointError: A rank is missing or broken.
        UsageError: The weights are ZeRO stage 3's, which are not read.
    """
    paths = {int(named[1]): path for path in folder.iterdir() if (named := RANK_FILE.fullmatch(path.name))}
    if not paths:
        raise UsageError(f"{folder} holds ZeRO stage 3's shards of the weights, which are not read yet")
    files: list[File] = []
    with closing_on_error(files):
        opened = [ranks.open_rank(tp, 0, path, files, lambda _: ["module"]) for tp, path in sorted(paths.items())]
        return ranks.contents(folder, files, opened, FORMAT)


def plan(config: LlamaConfig, layout: Layout, dtypes: Mapping[str, str]) -> Planned:
    """The files to write: those of AscendSpeed's `--deepspeed`.

    They hold exactly what `load_checkpoint(..., load_module_only=True)` of an unpatched DeepSpeed asks for.

    Raises:
        UsageError: Pipeline stages were asked for: they would all be one file.
    """
    if layout.pipeline_model_parallel_size > 1:
        raise UsageError("the format deepspeed has no pipeline stages: leave out pipeline_model_parallel_size")
    naming = NAMINGS[layout.naming or ASCENDSPEED.label]
    files = rank_plans.RankFiles(
        naming=naming,
        path=lambda tp, _: f"release/mp_rank_{tp:02d}_model_states.pt",
        root="module",
        head={"checkpoint_version": 3.0, "dp_world_size": 0},
        default_divisor=128,
    )
    notes = rank_plans.order_notes(config, layout, naming)
    return Planned(rank_plans.plan_files(config, layout, files), {LATEST: b"release\n"}, notes)
