"""Whether a data set is what its index and its manifest say: sizes, offsets, ids, hashes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed_dataset import IndexedDataset, find_prefixes
from data_prep.indexed_writer import sha256_of
from data_prep.instruction import IGNORED, OUTPUTS
from data_prep.manifest import Manifest, read_manifest

_PACKED, _MARK = "_packed_input_ids_document", "_packed_"


def verify(prefix: str | Path) -> list[str]:
    """What is wrong with a data set, each as a sentence; an empty list if nothing is.

    Args:
        prefix: As for `IndexedDataset`; `P` alone means all its keys.

    Raises:
        DataError: There is no data set.
    """
    prefixes = find_prefixes(prefix) or [Path(prefix)]
    problems = [problem for path in prefixes for problem in _pair(path)]
    if prefixes != [Path(prefix)]:  # of `P` all keys were asked for
        problems += _lost(prefixes)
    packed = [path for path in prefixes if path.name.endswith(_PACKED)]
    return problems + [problem for path in packed for problem in _instruction(path)]


def unchecked(prefix: str | Path) -> list[Path]:
    """The pairs of files without a manifest, which alone says which ids and hashes are right."""
    prefixes = find_prefixes(prefix) or [Path(prefix)]
    return [path for path in prefixes if read_manifest(path) is None]


def _lost(prefixes: Sequence[Path]) -> Iterator[str]:
    """The keys of instruction data that are missing beside others."""
    names = {path.name for path in prefixes}
    stems = sorted({name.partition(_MARK)[0] for name in names if _MARK in name})
    wanted = (f"{stem}{output}" for stem in stems for output in OUTPUTS)
    yield from (f"{name} is missing" for name in wanted if name not in names)


def _pair(prefix: Path) -> Iterator[str]:
    try:
        data, manifest = IndexedDataset(prefix), read_manifest(prefix)
    except DataError as error:
        if not all(Path(f"{prefix}{suffix}").exists() for suffix in (".idx", ".bin")):
            raise
        yield str(error)
        return
    name = data.prefix.name
    lengths, size = data.sequence_lengths, Path(f"{data.prefix}.bin").stat().st_size
    sizes = lengths.astype(np.int64) * data.dtype.itemsize
    total = int(sizes.sum())
    if (lengths < 0).any():
        yield f"{name}.idx: a sequence has a negative length"
    if not (data.offsets == np.cumsum(sizes) - sizes).all():
        yield f"{name}.idx: a sequence does not begin where the one before it ends"
    if size != total:
        yield f"{name}.bin: {size} bytes, but the index accounts for {total}"
    if (np.diff(data.document_indices) < 0).any():
        yield f"{name}.idx: a document ends before it begins"
    if manifest:
        yield from _against_manifest(data, manifest)


def _against_manifest(data: IndexedDataset, manifest: Manifest) -> Iterator[str]:
    name, tokens = data.prefix.name, int(data.sequence_lengths.sum(dtype=np.int64))
    found = {"documents": len(data.document_indices) - 1, "sequences": len(data), "tokens": tokens}
    for what, number in found.items():
        if number != getattr(manifest, what):
            yield f"{name}: {number} {what}, but the manifest says {getattr(manifest, what)}"
    for suffix, said in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
        if sha256_of(Path(f"{data.prefix}{suffix}")) != said:
            yield f"{name}{suffix}: its bytes are not those that the manifest names (sha256)"
    label = IGNORED if name.endswith("_packed_labels_document") else 0
    for begin, end in data.pieces():
        ids = data.span(begin, end)
        wrong = np.flatnonzero(((ids < 0) | (ids >= manifest.vocab_size)) & (ids != label))
        if len(wrong):
            number = begin + _sequence_at(data.sequence_lengths[begin:end], wrong[0])
            yield f"{name}.bin: sequence {number} holds an id that is not in the vocabulary of {manifest.vocab_size}"
            return


def _sequence_at(lengths: np.ndarray, token: int) -> int:
    """Which of some sequences in a row a token lies in."""
    return int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), token, side="right"))


def _instruction(prefix: Path) -> Iterator[str]:
    """Labels are the ids or carry no loss, the mask is ones (or numbers the documents of packs), all go together."""
    try:
        ids, manifest = IndexedDataset(prefix), read_manifest(prefix)
    except DataError:  # `_pair` has said it
        return
    stem = str(prefix).removesuffix(_PACKED)
    for key in ("labels", "attention_mask"):
        try:
            other = IndexedDataset(f"{stem}_packed_{key}_document")
        except DataError:  # `_pair` or `_lost` has said it
            continue
        if not np.array_equal(ids.sequence_lengths, other.sequence_lengths):
            yield f"{other.prefix.name}: its sequences are not as long as those of the ids"
            continue
        wrong = _first_wrong(ids, other, packed=bool(manifest and manifest.options.get("pack_length")))
        if wrong is not None:
            yield f"{other.prefix.name}: sequence {wrong} does not go with the ids"


def _first_wrong(ids: IndexedDataset, other: IndexedDataset, *, packed: bool) -> int | None:
    """The first sequence of labels or of a mask that does not go with the ids."""
    is_mask = other.prefix.name.endswith("_packed_attention_mask_document")
    for begin, end in ids.pieces():
        own, theirs, lengths = ids.span(begin, end), other.span(begin, end), ids.sequence_lengths[begin:end]
        if not is_mask:
            bad = (theirs != own) & (theirs != IGNORED)
        elif packed:
            bad = _no_numbers(theirs, lengths)
        else:
            bad = theirs != 1
        if bad.any():
            return begin + _sequence_at(lengths, int(np.flatnonzero(bad)[0]))
    return None


def _no_numbers(mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[tokens] bool: where the mask of packs does not number their documents, from 1 on in each pack."""
    step = np.diff(mask, prepend=0)
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    step[starts] = mask[starts]
    bad: np.ndarray = (step != 0) & (step != 1)
    bad[starts] = mask[starts] != 1
    return bad
