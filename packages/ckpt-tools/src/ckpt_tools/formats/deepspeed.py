"""DeepSpeed's layout: `mp_rank_TT_model_states.pt`, a file for each tensor rank, and `latest`, which names the folder.

ZeRO stages 0 to 2 keep the whole model there. Stage 3 has its weights, and every stage its optimizer's state, in flat
shares: see `zero_shares`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.checkpoint import Contents, Part, closing_on_error
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError
from ckpt_tools.formats import rank_plans, ranks, zero_shares
from ckpt_tools.formats.companions import LATEST
from ckpt_tools.formats.naming import ASCENDSPEED, NAMINGS
from ckpt_tools.layout import Layout
from ckpt_tools.planning import Planned
from ckpt_tools.storage.files import File

FORMAT = "deepspeed"
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
WRITTEN = rf"{LATEST}|release(/{RANK_FILE.pattern})?"
"""The paths that `plan` gives to the tracker and to weights, and their folder."""


def recognise(folder: Path) -> bool:
    """Whether the folder holds model states of DeepSpeed."""
    return any(folder.glob("mp_rank_*_model_states.pt")) or any(folder.glob("zero_pp_rank_*_mp_rank_*_model_states.pt"))


def open_deepspeed(folder: Path, part: Part = "weights") -> Contents:
    """The contents of a tag's folder (`release`, `global_step…`), or of a run of `trainer` in zero mode.

    Of ZeRO stage 3 the weights are the fp32 ones that its optimizer steps: it keeps no others.

    Raises:
        CheckpointError: A rank is missing or broken, or there is no such part.
    """
    paths = {int(named[1]): path for path in folder.iterdir() if (named := RANK_FILE.fullmatch(path.name))}
    files: list[File] = []
    with closing_on_error(files):
        if part != "weights" or not paths:
            return zero_shares.contents(folder, files, FORMAT, "main_weights" if part == "weights" else part)
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
