"""The `data-prep` console script: its verbs, and nothing of what they do."""

import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep import commandline
from data_prep.errors import UsageError
from data_prep.upstream import without_upstreams

CHECK_FAILED = 3

Prefix = Annotated[Path, tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `data-prep VERB ...`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["run"]:
        try:
            args = without_upstreams(args)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    commands: dict[str, Callable[..., int]] = {"run": run, "merge": merge, "inspect": inspect, "verify": verify}
    return commandline.run("data-prep", "Turns raw text into Megatron indexed datasets.", commands, args)


def run(
    *,
    input: list[Path],
    tokenizer_name_or_path: Path,
    output_prefix: str,
    handler_name: str = "GeneralPretrainHandler",
    json_keys: list[str] = ["text"],  # noqa: B006  (the parser shows it; it is never changed)
    append_eod: bool = False,
    prompt_type: str | None = None,
    map_keys: str | None = None,
    input_weights: list[float] = [],  # noqa: B006
    special_tokens_in_text: Literal["match", "ignore"] = "match",
    dtype: Literal["int32", "uint16"] = "int32",
    pack: bool = False,
    seq_length: int | None = None,
    skip_bad_records: bool = False,
    num_shards: int = 1,
    shard_index: int = 0,
    workers: int = 1,
    resume: bool = False,
    log_interval: int = 0,
    overwrite: bool = False,
    executor: Literal["local", "ray"] = "local",
    json: bool = False,
) -> int:
    """Writes a data set from raw files.

    Example: data-prep run --input corpus.jsonl --tokenizer-name-or-path llama-2-7b-hf --output-prefix data/corpus

    Args:
        input: Files or folders: parquet, arrow, jsonl, json, csv, txt (a line is a document), compressed or zipped too.
        tokenizer_name_or_path: Hugging Face folder, or a tokenizer's file.
        output_prefix: Prefix of the files to write.
        handler_name: GeneralPretrainHandler, AlpacaPretrainHandler, GeneralInstructionHandler, MOSSInstructionHandler,
            AlpacaStyleInstructionHandler, SharegptStyleInstructionHandler or OpenAIInstructionHandler.
        json_keys: Columns to read (GeneralPretrainHandler).
        append_eod: End each document with </s>.
        prompt_type: alpaca, llama2, default or empty: what stands around the messages (handlers of conversations).
        map_keys: Your columns, as JSON: {"prompt": "question", "response": "answer"} (handlers of conversations).
        input_weights: How many times each input is read, 0.5 for every second record.
        special_tokens_in_text: Whether </s> in a text becomes the special id, or text as any other.
        dtype: uint16 halves a pretraining data set where the vocabulary fits.
        pack: Pack documents to --seq-length tokens, none of them cut.
        seq_length: Tokens of a pack; without --pack it changes nothing, as documents are never cut.
        skip_bad_records: Leave out what cannot be used, and list it, instead of stopping there.
        num_shards: Write one of so many parts; data-prep merge joins them.
        shard_index: Which part, from 0.
        workers: Processes that tokenize; the bytes are the same for any number.
        resume: Continue what a killed run with the same options left.
        log_interval: Documents between two lines of progress where there is no terminal; 0 for none.
        overwrite: Replace a data set that is there.
        executor: ray makes the shards of the data set on a Ray cluster (extra [ray]), --workers at a time.
        json: Print the manifest as JSON.
    """
    from data_prep.handlers import parse_map_keys
    from data_prep.preparation import prepare

    with commandline.unwinding_on_sigterm():
        manifest = prepare(
            input,
            output_prefix,
            tokenizer=tokenizer_name_or_path,
            handler_name=handler_name,
            json_keys=json_keys,
            append_eod=append_eod,
            prompt_type=prompt_type,
            map_keys=parse_map_keys(map_keys) if map_keys else None,
            input_weights=input_weights,
            special_tokens_in_text=special_tokens_in_text,
            dtype=dtype,
            pack_length=_pack_length(pack, seq_length),
            skip_bad_records=skip_bad_records,
            num_shards=num_shards,
            shard_index=shard_index,
            workers=workers,
            resume=resume,
            log_interval=log_interval,
            overwrite=overwrite,
            executor=executor,
        )
    if json:
        print(jsonlib.dumps(asdict(manifest)))
        return 0
    counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    print(f"{output_prefix}: {counts}, vocabulary of {manifest.vocab_size:,}")
    return 0


def _pack_length(pack: bool, seq_length: int | None) -> int | None:
    if pack and seq_length is None:
        raise UsageError("--pack needs --seq-length: the tokens of a pack")
    return seq_length if pack else None


def merge(
    prefix: Annotated[list[Path], tyro.conf.Positional],
    *,
    output_prefix: str,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Joins data sets without tokenizing again: several, or the shards of one.

    Example: data-prep merge data/books data/code --output-prefix data/all

    Args:
        prefix: The data sets, with or without their _{key}_document; or the prefix whose shards are joined.
        output_prefix: Prefix of the files to write.
        overwrite: Replace a data set that is there.
        json: Print the manifests as JSON.
    """
    from data_prep.merging import merge as merged

    with commandline.unwinding_on_sigterm():
        manifests = merged(prefix, output_prefix, overwrite=overwrite)
    if json:
        print(jsonlib.dumps([asdict(manifest) for manifest in manifests]))
        return 0
    counts = f": {manifests[0].documents:,} documents, {manifests[0].tokens:,} tokens" if manifests else ""
    print(f"{output_prefix}{counts}")
    return 0


def inspect(
    prefix: Prefix,
    *,
    document: int | None = None,
    tokenizer_name_or_path: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> int:
    """Shows what a data set holds, or one document of it and where the loss falls.

    Example: data-prep inspect data/alpaca --document 0 --tokenizer-name-or-path llama-2-7b-hf

    Args:
        prefix: The data set, with or without its _{key}_document.
        document: Number of the document to show, from 0.
        tokenizer_name_or_path: Decodes the document.
        plot: PNG file to draw the histogram of lengths into (extra [plot]).
        json: Print it as JSON.
    """
    from data_prep import inspection
    from data_prep.tokenizer import Tokenizer

    if document is None:
        facts = inspection.describe(prefix)
        if plot:
            inspection.plot(facts, plot)
        if json:
            print(jsonlib.dumps(facts))
            return 0
        drawn = [each["histogram"] for each in facts]
        texts = [_figures(each, draw=drawn.index(each["histogram"]) == at) for at, each in enumerate(facts)]
        print("\n\n".join(texts))
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
        print("\n".join(problems) or _whole(prefix, verification.unchecked(prefix)))
    return CHECK_FAILED if problems else 0


def _whole(prefix: Path, unchecked: Sequence[Path]) -> str:
    if unchecked:
        return f"{prefix}: sizes and offsets are right; {unchecked[0].name} has no manifest, to check ids and hashes by"
    return f"{prefix} is whole"


def _figures(facts: dict[str, Any], *, draw: bool) -> str:
    """Of one key; its histogram only where no key before has the same."""
    from data_prep.inspection import histogram_lines

    manifest = facts.pop("manifest") or {"manifest": "none: the data is foreign, its vocabulary is not known"}
    files, lengths, with_loss = manifest.pop("inputs", []), facts.pop("histogram"), facts.pop("with_loss")
    manifest.pop("skipped_records", None)
    rows = {**facts, "mean": f"{facts['mean']:.1f}", **{name: value for name, value in manifest.items() if value != {}}}
    if with_loss is not None:
        rows["with loss"] = f"{with_loss} ({with_loss / max(facts['tokens'], 1):.1%})"
    rows |= {f"input {number}": f"{file['name']} ({file['bytes']:,} bytes)" for number, file in enumerate(files)}
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", *histogram_lines(lengths)] if draw else lines)


def _document(found: dict[str, Any]) -> str:
    lines = []
    for number, spans in enumerate(found["sequences"]):
        lines.append(f"{found['prefix']}, document {found['document']}, sequence {number}")
        for span in spans:
            lines.append(f"--- {span['tokens']} tokens, {'with' if span['loss'] else 'without'} loss")
            lines.append(span["text"] if span["text"] is not None else " ".join(map(str, span["ids"])))
    return "\n".join(lines)
