"""Which files are read, and which part of them.

A source is a file of a known kind, as it is, compressed, or in a zip. Its records lie along an axis: bytes for files of
lines, rows for tables, else records; a part of a source is a piece of that axis.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from data_prep.errors import DataError, UsageError
from data_prep.opening import PACKED, check_head, members, opened

KINDS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt")
LINES = (".jsonl", ".txt")
TABLES = (".parquet", ".arrow")


@dataclass(frozen=True, slots=True)
class Source:
    """A file to be read, or a part of it.

    Attributes:
        path: The file on disk.
        kind: One of `KINDS`, or "lines" and "list" for the two forms of a `.json` and `.jsonl` file.
        packing: One of `opening.PACKED`, or "".
        member: Its name in a zip; None if it is none.
        size: Bytes on disk (of a zip's member: its share).
        begin: Where to begin on the source's axis.
        end: Where to end; None for its end.
        aligned: A record begins at `begin`; otherwise reading begins with the first that does so there or later.
        times: How many times it is read; a fraction stands for that share of its records, evenly spread.
    """

    path: Path
    kind: str
    packing: str = ""
    member: str | None = None
    size: int = 0
    begin: int = 0
    end: int | None = None
    aligned: bool = False
    times: float = 1.0

    @property
    def name(self) -> str:
        """As messages name it."""
        return f"{self.path}/{self.member}" if self.member else str(self.path)


def sources_of(inputs: Sequence[Path], weights: Sequence[float] = ()) -> tuple[list[Source], list[str]]:
    """What is read, in order, and the files of a folder or zip, and the folders in a folder, that are left out.

    A folder or zip stands for its files of the most frequent known kind, by name.

    Args:
        inputs: Files and folders.
        weights: For each of them how many times it is read; empty for once each.

    Raises:
        DataError: An input is missing, or of no known kind.
        UsageError: A weight is none, or there are not as many as inputs.
    """
    if weights and len(weights) != len(inputs):
        raise UsageError(f"--input-weights names {len(weights)} numbers for {len(inputs)} inputs")
    if odd := [weight for weight in weights if not 0 < weight < 1e6]:
        raise UsageError(f"--input-weights {odd[0]:g}: give how many times an input is read, above 0")
    chosen: list[Source] = []
    skipped: list[str] = []
    for path, times in zip(inputs, weights or [1.0] * len(inputs), strict=True):
        found, left = _of_path(path)
        chosen += [replace(source, times=times) for source in found]
        skipped += left
    return chosen, skipped


def _of_path(path: Path) -> tuple[list[Source], list[str]]:
    if not path.exists():
        raise DataError(f"no such input: {path}")
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        folders = sorted(f"{each}/" for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        named, left = _main_kind(path, inside, zips=True, folders=folders)
        parts = [_of_path(path / name) for name in named]
        return [each for found, _ in parts for each in found], left + [each for _, more in parts for each in more]
    if path.suffix == ".zip":
        inside = sorted(name for name in members(path) if not PurePosixPath(name).name.startswith("."))
        named, left = _main_kind(path, inside, zips=False)
        share = path.stat().st_size // len(named)
        return [_source(path, *kind_of(name), member=name, size=share) for name in named], left
    kind, packing = kind_of(path.name)
    if not kind:
        raise DataError(f"{path} is of no known kind: {', '.join(KINDS)}, or one of them in {', '.join(PACKED)}, .zip")
    return [_source(path, kind, packing, member=None, size=path.stat().st_size)], []


def kind_of(name: str) -> tuple[str, str]:
    """(kind, packing) of a file by its name; an empty kind if it is none."""
    suffix, packing = os.path.splitext(name)[1].lower(), ""
    if suffix in PACKED:
        packing = suffix
        suffix = os.path.splitext(name[: -len(packing)])[1].lower()
    return (suffix, packing) if suffix in KINDS else ("", "")


def _main_kind(
    path: Path, names: Sequence[str], *, zips: bool, folders: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The names of the most frequent kind, and the others as messages name them."""
    kinds = {name: ".zip" if zips and name.endswith(".zip") else kind_of(name)[0] for name in names}
    count = Counter(kind for kind in kinds.values() if kind)
    if not count:
        hint = f": give the folder inside of it, {folders[0]}" if folders else ""
        raise DataError(f"{path} holds no {', '.join(KINDS)} file{hint}")
    main = max((*KINDS, ".zip"), key=lambda kind: count[kind])
    left = [f"{path}/{name}" for name in names if kinds[name] != main]
    return [name for name in names if kinds[name] == main], [*left, *folders]


def _source(path: Path, kind: str, packing: str, *, member: str | None, size: int) -> Source:
    """Looks at the beginning: whether it is data at all, and whether JSON is one list or an object a line."""
    source = Source(path, kind, packing, member, size)
    if packing:
        with path.open("rb") as raw:
            check_head(source.name, raw.read(200))
    with opened(path, member, packing) as stream:
        head = stream.read(1 << 12)
        check_head(source.name, head, text=kind == ".txt")
        if kind not in (".json", ".jsonl"):
            return source
        while not head.removeprefix(b"\xef\xbb\xbf").strip() and (more := stream.read(1 << 20)):
            head = more
    return replace(source, kind="list" if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" else "lines")


def part_of(sources: Sequence[Source], index: int, count: int) -> list[Source]:
    """One of `count` parts of what is read; the parts, in order, are the whole.

    Parts are cut by bytes: plain files of lines and tables anywhere, other files not, which belong to the part that
    their beginning lies in; so does what is not read exactly once.

    Args:
        sources: The whole.
        index: Of the part, from 0.
        count: Of parts.
    """
    total = sum(max(source.size, 1) for source in sources)
    low, high = (total * index) // count, (total * (index + 1)) // count
    parts: list[Source] = []
    at = 0
    for source in sources:
        size = max(source.size, 1)
        begin, end = max(low, at), min(high, at + size)
        if not _divisible(source):
            parts += [source] if low <= at < high else []
        elif begin < end:
            parts.append(_cut(source, begin - at, end - at, size))
        at += size
    return parts


def _divisible(source: Source) -> bool:
    plain = not source.packing and source.member is None and source.times == 1
    return plain and source.kind in ("lines", ".txt", *TABLES)


def _cut(source: Source, begin: int, end: int, size: int) -> Source:
    if source.kind not in TABLES:
        return replace(source, begin=begin, end=end, size=end - begin)
    from data_prep.tables import count_rows

    rows = count_rows(source)
    return replace(source, begin=rows * begin // size, end=rows * end // size, size=end - begin)


def passes(source: Source) -> Iterator[tuple[int, float]]:
    """(number of the pass, share of the records) for each time a source is read."""
    whole = int(source.times)
    yield from ((number, 1.0) for number in range(whole))
    if source.times > whole:
        yield whole, source.times - whole
