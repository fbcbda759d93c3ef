"""Trains one model in every layout on 1, 2, 4 and 8 processes and compares each with Hugging Face: `nox -s matrix`.

    python tests/matrix.py [TABLE.md]

Prints a line a layout and writes the table; exit code 3 where one is beyond the limits of `test_parity`.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import rank_cases
from engine_case import GROUPS, make
from layouts import title
from ranks import RankError, Ranks
from test_parity import GRADIENT, LOSS, NORM, WEIGHT

LIMITS = (LOSS, GRADIENT, NORM, WEIGHT)
PIPELINES = {
    1: [dict()],
    2: [
        dict(pipeline_model_parallel_size=2),
        dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
        dict(pipeline_model_parallel_size=2, num_layer_list=(3, 1)),
    ],
    4: [dict(pipeline_model_parallel_size=4)],
}
OPTIMIZERS = [
    dict(),
    dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
]
RECOMPUTE = [
    dict(),
    dict(recompute_granularity="full"),
    dict(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
]


def layouts(world):
    """Every TP, SP, PP, VPP and uneven split that `world` processes allow, the rest data parallel."""
    for tp, pp in itertools.product((1, 2, 4), PIPELINES):
        if world % (tp * pp):
            continue
        tensor = [dict(tensor_model_parallel_size=tp, sequence_parallel=sp) for sp in ((False, True) if tp > 1 else ())]
        for number, parts in enumerate(itertools.product(tensor or [dict()], PIPELINES[pp], OPTIMIZERS)):
            options = dict(itertools.chain.from_iterable(part.items() for part in parts))
            options |= RECOMPUTE[(number + tp + pp) % len(RECOMPUTE)]  # in turn: `test_parity` has its pairs
            yield options | {"groups": "mha" if tp == 4 else "gqa", "micro_batch_size": 1 if world == 8 else 2}


def worst(results, case):
    """The largest differences over all ranks: loss, gradient, norm, weight."""
    expected = np.array(case.history)
    histories = np.array([history for history, _, _ in results])
    loss = np.abs(histories[..., 0] - expected[:, 0]).max()
    norm = np.abs(histories[..., 1] / expected[:, 1] - 1).max()
    return loss, max(gradient for _, gradient, _ in results), norm, max(weight for *_, weight in results)


def main(table):
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as home:
        cases = {name: make(Path(home, name), groups) for name, groups in GROUPS.items()}
        for world in (1, 2, 4, 8):
            with Ranks(world, timeout_s=300) as pool:
                for options in layouts(world):
                    case = cases[options["groups"]]
                    asked = {name: value for name, value in options.items() if name != "groups"}
                    try:
                        figures = worst(pool.run(rank_cases.train, case, asked), case)
                    except RankError as error:
                        print(error, file=sys.stderr)
                        figures = (float("nan"),) * 4
                    fits = all(figure < limit for figure, limit in zip(figures, LIMITS, strict=True))
                    failed += not fits
                    numbers = " | ".join(f"{figure:.1e}" for figure in figures)
                    rows.append(f"| {world} | {title(options)} | {numbers} | {'yes' if fits else '**no**'} |")
                    print(rows[-1], flush=True)
    limits = "Limits: loss {:g} absolute, gradient {:g} and norm {:g} relative, weight {:g} absolute.".format(*LIMITS)
    limits += " A gradient of 0 was not compared: each rank has its share only."
    head = ["| processes | layout | loss | gradient | norm | weight | within limits |", "|---|---|---|---|---|---|---|"]
    lines = [f"{len(rows)} layouts, {failed} beyond the limits. {limits}", "", *head, *rows]
    table.write_text("\n".join(lines) + "\n", "utf-8")
    return 3 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "matrix.md")))
