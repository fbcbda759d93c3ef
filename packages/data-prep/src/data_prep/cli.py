"""The `data-prep` console script: its verbs, and nothing of what they do."""

import json as jsonlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep import commandline

Prefix = Annotated[Path, tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `data-prep VERB ...`."""
    commands: dict[str, Callable[..., int]] = {"run": run, "inspect": inspect}
    return commandline.run("data-prep", "Turns raw text into Megatron indexed datasets.", commands, argv)


def run(
    *,
    input: list[Path],
    tokenizer_name_or_path: Path,
    output_prefix: Path,
    handler_name: str = "GeneralPretrainHandler",
    json_keys: list[str] = ["text"],  # noqa: B006  (the parser shows it; it is never changed)
    append_eod: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Writes a data set from raw files.

    Args:
        input: Files or folders: parquet, jsonl, json, csv, txt.
        tokenizer_name_or_path: Hugging Face folder, or a tokenizer's file.
        output_prefix: Prefix of the files to write.
        handler_name: GeneralPretrainHandler, AlpacaPretrainHandler or GeneralInstructionHandler.
        json_keys: Columns to read (GeneralPretrainHandler).
        append_eod: End each document with </s>.
        overwrite: Replace a data set that is there.
        json: Print the manifest as JSON.
    """
    from data_prep.preparation import prepare

    manifest = prepare(
        input,
        output_prefix,
        tokenizer=tokenizer_name_or_path,
        handler_name=handler_name,
        json_keys=json_keys,
        append_eod=append_eod,
        overwrite=overwrite,
    )
    _show(asdict(manifest), json)
    return 0


def inspect(
    *, prefix: Prefix, document: int | None = None, tokenizer_name_or_path: Path | None = None, json: bool = False
) -> int:
    """Shows what a data set holds, or one document of it.

    Args:
        prefix: The data set.
        document: Its number, from 0.
        tokenizer_name_or_path: Decodes the document.
        json: Print it as JSON.
    """
    from data_prep.errors import UsageError
    from data_prep.indexed import IndexedDataset
    from data_prep.manifests import read_manifest
    from data_prep.tokenizing import Tokenizer

    data = IndexedDataset(prefix)
    if document is None:
        lengths = data.sequence_lengths
        manifest = read_manifest(prefix)
        facts = {
            "prefix": str(data.prefix),
            "sequences": len(data),
            "documents": len(data.document_indices) - 1,
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max(initial=0)),
            "dtype": data.dtype.name,
            "manifest": asdict(manifest) if manifest else None,
        }
        _show(facts, json)
        return 0
    if not 0 <= document < len(data):
        raise UsageError(f"--document {document} is none of the {len(data)} in {data.prefix}")
    ids = [int(number) for number in data[document]]
    text = Tokenizer(tokenizer_name_or_path).decode([i for i in ids if i >= 0]) if tokenizer_name_or_path else None
    _show({"document": document, "ids": ids, "text": text}, json)
    return 0


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(jsonlib.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
