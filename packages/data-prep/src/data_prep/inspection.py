"""What a data set holds: its figures, and any document of it as text, with the place where the loss falls."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError, UsageError
from data_prep.indexed_dataset import IndexedDataset, find_prefixes
from data_prep.instruction import IGNORED
from data_prep.manifest import read_manifest
from data_prep.tokenizer import Tokenizer

_STEPS = 20
"""Of a histogram, at most."""


def describe(prefix: str | Path) -> list[dict[str, Any]]:
    """The figures of each pair of files that `prefix` stands for.

    Raises:
        DataError: There is none, or one is broken.
    """
    return [_figures(path) for path in find_prefixes(prefix) or [Path(prefix)]]


def _figures(prefix: Path) -> dict[str, Any]:
    data, manifest = IndexedDataset(prefix), read_manifest(prefix)
    lengths = data.sequence_lengths
    tokens = int(lengths.sum(dtype=np.int64))
    return {
        "prefix": str(data.prefix),
        "dtype": data.dtype.name,
        "documents": len(data.document_indices) - 1,
        "sequences": len(data),
        "tokens": tokens,
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "mean": tokens / len(data) if len(data) else 0.0,
        "longest": int(lengths.max(initial=0)),
        "with_loss": _with_loss(data),
        "histogram": histogram(lengths),
        "manifest": asdict(manifest) if manifest else None,
    }


def _with_loss(data: IndexedDataset) -> int | None:
    """Tokens that the loss falls on; None where the data has no labels."""
    if not data.prefix.name.endswith("_packed_labels_document"):
        return None
    return sum(int((data.span(begin, end) != IGNORED).sum()) for begin, end in data.pieces())


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """How many sequences have which length, in steps of a round number of tokens; the last holds the longest 1 %.

    Returns:
        {"edges": [steps + 1], "counts": [steps]}: a step holds the lengths from its edge on, below the next.
    """
    longest = int(lengths.max(initial=0))
    most = int(np.percentile(lengths, 99)) if len(lengths) else 0
    step = next(step for step in _round_numbers() if step * _STEPS > most)
    edges = [*range(0, most + step + 1, step)]
    if edges[-1] <= longest:
        edges.append(longest + 1)
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges, "counts": counts.tolist()}


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 and so on."""
    ten = 1
    while True:
        yield from (ten, 2 * ten, 5 * ten)
        ten *= 10


def histogram_lines(found: dict[str, list[int]], width: int = 50) -> list[str]:
    """A histogram as text: a bar for each step."""
    edges, counts = found["edges"], found["counts"]
    most, digits = max(counts, default=0) or 1, len(f"{edges[-1]:,}")
    return [
        f"{begin:>{digits},} to {end - 1:>{digits},}  {'#' * -(-count * width // most):<{width}}  {count:,}"
        for begin, end, count in zip(edges, edges[1:], counts, strict=False)
    ]


def plot(facts: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws the histograms of `describe` as one PNG.

    Raises:
        UsageError: matplotlib, the extra [plot], is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'puna-data-prep[plot]'") from None
    figure = Figure(figsize=(8, 3 * len(facts)), layout="constrained")
    for number, each in enumerate(facts, 1):
        axes = figure.add_subplot(len(facts), 1, number)
        edges, counts = each["histogram"]["edges"], each["histogram"]["counts"]
        axes.bar(range(len(counts)), counts, 0.95, align="edge")
        labels = [f"{edge:,}" for edge in edges]  # the last step is wider than the others, and drawn as wide
        axes.set_xticks(range(len(edges)), labels, rotation=45, ha="right", fontsize=8)
        axes.set(title=Path(each["prefix"]).name, xlabel="tokens of a sequence", ylabel="sequences")
    part = file.with_name(f".{file.name}.part")
    try:
        figure.savefig(part, format="png", dpi=120)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def document(prefix: str | Path, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One document, sequence by sequence, in the spans on which the loss falls or does not.

    In instruction data the labels say where; elsewhere it falls on every token.

    Returns:
        {"document", "sequences": [[{"loss", "tokens", "ids", "text"}, ...], ...]}; text is None without a tokenizer.

    Raises:
        DataError: There is no such data set, or the tokenizer is not the data's.
        UsageError: There is no such document.
    """
    data = IndexedDataset(prefix)
    count = len(data.document_indices) - 1
    if not 0 <= number < count:
        raise UsageError(f"--document {number} is none of the {count} in {data.prefix}, numbered from 0")
    if tokenizer:
        check_tokenizer(data.prefix, tokenizer)
    labels = _labels_beside(data)
    begin, end = data.document_indices[number : number + 2].tolist()
    if not 0 <= begin <= end <= len(data):
        raise DataError(f"{data.prefix}.idx is broken: document {number} is sequences {begin} to {end} of {len(data)}")
    sequences = [_spans(data[at], data[at] if labels is None else labels[at], tokenizer) for at in range(begin, end)]
    return {"document": number, "prefix": str(data.prefix), "sequences": sequences}


def check_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """Raises a DataError where the data's manifest names another vocabulary."""
    manifest = read_manifest(prefix)
    if manifest and manifest.vocab_sha256 != tokenizer.vocab_sha256:
        raise DataError(
            f"{prefix} was made with another vocabulary ({manifest.vocab_size} pieces) than {tokenizer.path} holds "
            f"({tokenizer.vocab_size}): give the tokenizer that made it"
        )


def _labels_beside(data: IndexedDataset) -> IndexedDataset | None:
    name = data.prefix.name
    if not name.endswith("_packed_input_ids_document"):
        return None
    return IndexedDataset(data.prefix.with_name(name.replace("_packed_input_ids_", "_packed_labels_")))


def _spans(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    spans = []
    for loss, run in groupby(zip(ids.tolist(), labels.tolist(), strict=True), lambda pair: pair[1] != IGNORED):
        part = [id for id, _ in run]
        text = tokenizer.decode(part) if tokenizer else None
        spans.append({"loss": loss, "tokens": len(part), "ids": part, "text": text})
    return spans
