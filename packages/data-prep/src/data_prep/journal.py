"""What a run notes beside its files, so that a killed one can be continued."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UsageError


@dataclass
class Journal:
    """How far a run is.

    Attributes:
        run: Identifies what is being made: options, tokenizer, inputs.
        source: Number of the pass over a source that is being read.
        begin: Where on its axis to go on.
        done_bytes: Read so far, for the progress bar.
        writers: `IndexedWriter.state` by output.
        packer: The open pack: `Packer`'s numbers.
        bad: The first of what was left out.
        bad_count: How much was.
        records: Read so far.
    """

    run: str
    source: int = 0
    begin: int = 0
    done_bytes: int = 0
    records: int = 0
    writers: dict[str, dict[str, int]] = field(default_factory=dict)
    packer: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0


def fingerprint(facts: Any) -> str:
    """Identifies a run: sha256 of all that its bytes depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def journal_file(prefix: Path) -> Path:
    """Where the journal of a run lies whose first pair of files is `prefix`."""
    return prefix.with_name(f".{prefix.name}.journal.json")


def write_journal(prefix: Path, journal: Journal) -> None:
    """Replaces the journal; it is whole at any moment."""
    file = journal_file(prefix)
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8") as opened:
        json.dump(asdict(journal), opened)
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)


def read_journal(prefix: Path, run: str) -> Journal | None:
    """What a killed run noted; None if it noted nothing.

    Raises:
        UsageError: It made something else.
    """
    file = journal_file(prefix)
    try:
        journal = Journal(**json.loads(file.read_text("utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    if journal.run != run:
        raise UsageError(
            f"--resume: what lies beside {prefix} was made with other options, inputs or another tokenizer: give the "
            "same ones, or leave --resume out to begin anew"
        )
    return journal


def remove_journal(prefix: Path) -> None:
    """Removes what was noted."""
    file = journal_file(prefix)
    for path in (file, file.with_name(f"{file.name}.part")):
        path.unlink(missing_ok=True)
