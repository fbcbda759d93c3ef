"""The figures of `trainer describe` as text for people."""

from collections.abc import Sequence

from trainer.describe import Figures

GIB = 2**30
_COLUMNS = ("stage", "layers", "ranks", "parameters", "weights", "gradients", "optimizer", "activations", "total")
_SENT = ("tensor", "pipeline", "data")


def text(figures: Figures) -> str:
    """A head of named lines, then a table with a line for each pipeline stage."""
    head = _head(figures)
    width = max(map(len, head))
    lines = [f"{name:<{width}}  {value}" for name, value in head.items()]
    return "\n".join([*lines, "", *_table(figures), "", *_notes(figures)])


def _head(figures: Figures) -> dict[str, str]:
    a, tp, pp = figures["architecture"], figures["tensor_model_parallel_size"], figures["pipeline_model_parallel_size"]
    virtual = figures["virtual_pipeline_model_parallel_size"]
    padding = figures["padded_vocab_size"] - a["vocab_size"]
    sequence = " (sequence parallel)" if figures["sequence_parallel"] else ""
    chunks = f" ({virtual} chunks a stage)" if virtual > 1 else ""
    optimizer = " (distributed optimizer)" if figures["use_distributed_optimizer"] else ""
    if figures["zero_stage"] is not None:
        optimizer = f" (ZeRO stage {figures['zero_stage']})"
    head = {
        "model": f"{a['num_layers']} layers, hidden {a['hidden_size']}, feed-forward {a['ffn_hidden_size']}, "
        f"{a['num_attention_heads']} heads in {a['num_query_groups']} groups, vocabulary {a['vocab_size']}"
        + (f" + {padding} of padding" if padding else ""),
        "parameters": f"{figures['parameters']:,}, {figures['dtype']}",
        "processes": f"{figures['processes']} = tensor {tp}{sequence} x pipeline {pp}{chunks}"
        f" x data {figures['data_parallel_size']}{optimizer}",
        "a step": f"{figures['global_batch_size']:,} samples of {figures['seq_length']:,} tokens = "
        f"{figures['tokens_per_step']:,} tokens, in {figures['num_microbatches']:,} micro-batches of "
        f"{figures['micro_batch_size']}",
        "the run": f"{figures['train_iters']:,} steps, {figures['tokens_in_all']:,} tokens",
        "model FLOPs": f"{_si(figures['model_flops_per_token'])}FLOP a token, "
        f"{_si(figures['model_flops_per_step'])}FLOP a step, "
        f"{_si(figures['model_flops_per_step'] / figures['processes'])}FLOP a step and device",
        "recomputation": figures["recompute"],
    }
    if pp > 1:
        head["pipeline bubble"] = f"{figures['pipeline_bubble']:.1%} of a step's time"
    return head | (_device(figures) if "device" in figures else {})


def _device(figures: Figures) -> dict[str, str]:
    device = figures["device"]
    peak, size, seconds = (device[name] for name in ("peak_flops", "memory_bytes", "step_time_s_at_full_mfu"))
    fullest = max(stage["total_bytes"] for stage in figures["stages"])
    says = f"{_gib(fullest)} GiB a device"
    if size is not None:
        says += f" {'fit' if device['fits'] else 'DO NOT FIT'} the {_gib(size)} GiB of {device['name']}"
    lines = {"memory": says}
    if peak is not None:
        lines["time of a step"] = (
            f"{seconds:.3g} s at 100 % MFU, {2 * seconds:.3g} s at 50 % (peak {_si(peak)}FLOP/s in {figures['dtype']})"
        )
    return lines


def _table(figures: Figures) -> list[str]:
    rows: list[Sequence[str]] = [_COLUMNS + (_SENT if figures["processes"] > 1 else ())]
    for stage in figures["stages"]:
        sizes = ("weight", "gradient", "optimizer", "activation", "total")
        row = [
            str(stage["stage"]),
            ", ".join(_range(*pair) for pair in stage["layers"]),
            _ranks(stage["ranks"]),
            f"{stage['parameters']:,}",
            *(_gib(stage[f"{name}_bytes"]) for name in sizes),
        ]
        sent = [_gib(size) for size in stage["sent_bytes_per_step"].values()] if figures["processes"] > 1 else []
        rows.append(row + sent)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_left = ("layers", "ranks")
    return [
        "  ".join(
            cell.ljust(width) if name in to_the_left else cell.rjust(width)
            for name, cell, width in zip(rows[0], row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _notes(figures: Figures) -> list[str]:
    notes = [
        "GiB on each rank of a stage; activations of "
        f"{_in_flight(figures)} in flight. Weights, gradients and optimizer are exact, activations by formula."
    ]
    if figures["processes"] > 1:
        notes.append(
            "tensor, pipeline, data: GiB that a rank sends in a step in each direction of parallelism, by formula."
        )
    return notes


def _in_flight(figures: Figures) -> str:
    counts = [stage["passes_in_flight"] for stage in figures["stages"]]
    span = _range(min(counts), max(counts))
    unit = "chunk pass" if figures["virtual_pipeline_model_parallel_size"] > 1 else "micro-batch"
    return f"{span} {unit}" if max(counts) == 1 else f"{span} {unit}{'es'}"


def _ranks(copies: Sequence[Sequence[int]]) -> str:
    """The ranks of each data-parallel copy of a stage; of many copies the first two and the last."""
    shown = [_range(*copy) for copy in copies]
    return " | ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _si(number: float) -> str:
    for prefix, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
