"""Whether the two tokenizers of a folder, tokenizer.model and tokenizer.json, agree on the data of a run."""

from pathlib import Path

from data_prep.tokenizer import Tokenizer

_MOST = 5_000
"""Distinct chunks that are compared."""


def disagreement(tokenizer: Tokenizer, folder: Path) -> str | None:
    """The words that say how tokenizer.json differs on the chunks that `tokenizer` has met; None if it does not.

    Only where `tokenizer` is SentencePiece's and has a cache of chunks: what it holds are the words of the data.
    """
    file = folder / "tokenizer.json"
    if tokenizer.encoder != "sentencepiece" or not file.is_file():
        return None
    met = tokenizer.learnt(_MOST)
    if not met:
        return None
    import tokenizers

    try:
        other = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        return f"{file} cannot be compared with tokenizer.model: {str(error)[:120]}"
    rows = other.encode_batch_fast([text for text, _ in met], add_special_tokens=False)
    others = [(text, ids, row.ids) for (text, ids), row in zip(met, rows, strict=True) if row.ids != ids]
    if not others:
        return None
    text, ids, row = min(others, key=lambda other: len(other[0]))
    words = f"{len(others):,} of {len(met):,} distinct words of this data"
    return f"{file} gives other ids to {words}, as {text!r}: {row}; written are those of tokenizer.model, {ids}"
