"""The `data-prep` console script: its verbs, and nothing of what they do."""

import json as jsonlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep import commandline

CHECK_FAILED = 3

Prefix = Annotated[Path, tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `data-prep VERB ...`."""
    commands: dict[str, Callable[..., int]] = {"run": run, "inspect": inspect, "verify": verify}
    return commandline.run("data-prep", "Turns raw text into Megatron indexed datasets.", commands, argv)


def run(
    *,
    input: list[Path],
    tokenizer_name_or_path: Path,
    output_prefix: Path,
    handler_name: str = "GeneralPretrainHandler",
    json_keys: list[str] = ["text"],  # noqa: B006  (the parser shows it; it is never changed)
    append_eod: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Writes a data set from raw files.

    Example: data-prep run --input corpus.jsonl --tokenizer-name-or-path llama-2-7b-hf --output-prefix data/corpus

    Args:
        input: Files or folders: parquet, jsonl, json, csv, txt (a line is a document).
        tokenizer_name_or_path: Hugging Face folder, or a tokenizer's file.
        output_prefix: Prefix of the files to write.
        handler_name: GeneralPretrainHandler, AlpacaPretrainHandler or GeneralInstructionHandler.
        json_keys: Columns to read (GeneralPretrainHandler).
        append_eod: End each document with </s>.
        workers: Processes that tokenize; the bytes are the same for any number.
        overwrite: Replace a data set that is there.
        json: Print the manifest as JSON.
    """
    from data_prep.preparation import prepare

    with commandline.unwinding_on_sigterm():
        manifest = prepare(
            input,
            output_prefix,
            tokenizer=tokenizer_name_or_path,
            handler_name=handler_name,
            json_keys=json_keys,
            append_eod=append_eod,
            workers=workers,
            overwrite=overwrite,
        )
    if json:
        print(jsonlib.dumps(asdict(manifest)))
        return 0
    counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    print(f"{output_prefix}: {counts}, vocabulary of {manifest.vocab_size:,}")
    return 0


def inspect(
    prefix: Prefix, *, document: int | None = None, tokenizer_name_or_path: Path | None = None, json: bool = False
) -> int:
    """Shows what a data set holds, or one document of it and where the loss falls.

    Example: data-prep inspect data/alpaca --document 0 --tokenizer-name-or-path llama-2-7b-hf

    Args:
        prefix: The data set, with or without its _{key}_document.
        document: Number of the document to show, from 0.
        tokenizer_name_or_path: Decodes the document.
        json: Print it as JSON.
    """
    from data_prep import inspection
    from data_prep.tokenizer import Tokenizer

    if document is None:
        facts = inspection.describe(prefix)
        print(jsonlib.dumps(facts) if json else "\n\n".join(map(_figures, facts)))
        return 0
    tokenizer = Tokenizer(tokenizer_name_or_path) if tokenizer_name_or_path else None
    found = inspection.document(prefix, document, tokenizer)
    print(jsonlib.dumps(found) if json else _document(found))
    return 0


def verify(prefix: Prefix, *, json: bool = False) -> int:
    """Checks a data set: sizes, offsets, ids within the vocabulary, the manifest's hashes. Exit code 3 if one fails.

    Args:
        prefix: The data set, with or without its _{key}_document.
        json: Print the result as JSON.
    """
    from data_prep import verification

    problems = verification.verify(prefix)
    if json:
        print(jsonlib.dumps({"ok": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{prefix} is whole")
    return CHECK_FAILED if problems else 0


def _figures(facts: dict[str, Any]) -> str:
    manifest = facts.pop("manifest") or {"manifest": "none: the data is foreign, its vocabulary is not known"}
    files = manifest.pop("inputs", [])
    rows = {**facts, "mean": f"{facts['mean']:.1f}", **{name: value for name, value in manifest.items()}}
    rows |= {f"input {number}": f"{file['name']} ({file['bytes']:,} bytes)" for number, file in enumerate(files)}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _document(found: dict[str, Any]) -> str:
    lines = []
    for number, spans in enumerate(found["sequences"]):
        lines.append(f"{found['prefix']}, document {found['document']}, sequence {number}")
        for span in spans:
            lines.append(f"--- {span['tokens']} tokens, {'with' if span['loss'] else 'without'} loss")
            lines.append(span["text"] if span["text"] is not None else " ".join(map(str, span["ids"])))
    return "\n".join(lines)
