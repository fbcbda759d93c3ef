"""Columns of texts to ids: by chunks where that is exact and pays, by the library elsewhere."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.chunks import NO_PLACES, Encoded, OddChunkError, flat
from data_prep.encoders import Encoder, holds
from data_prep.long_texts import LONG


def encode_many(encoder: Encoder, texts: pa.Array, places: np.ndarray = NO_PLACES) -> Encoded:
    """Ids of many texts, by chunks where that is possible and pays.

    Args:
        encoder: Of which vocabulary.
        texts: [texts] string, without nulls; together below 1 GiB.
        places: [texts] int64, a byte of each text right behind a newline; empty if not asked for. Only where
            `encoder.newline_id` is known.
    """
    done = _by_chunks(encoder, texts, places) if encoder.chunks else None
    return done or _by_rows(encoder, texts, places)


def _by_chunks(encoder: Encoder, texts: pa.Array, places: np.ndarray) -> Encoded | None:
    assert encoder.chunks is not None
    sizes = pc.binary_length(texts)
    odd = pc.or_(pc.equal(sizes, 0), pc.greater(sizes, 4 * LONG))
    if encoder.spaced_tokens:
        odd = pc.or_(odd, holds(texts, encoder.spaced_tokens))
    if not pc.any(odd).as_py():
        try:
            return encoder.chunks.encode(texts, places)
        except OddChunkError:
            pass
    odd = pc.or_(odd, encoder.odd(texts))
    which = odd.to_numpy(zero_copy_only=False)
    if which.all():
        return None
    plain = encoder.chunks.encode(texts.filter(pc.invert(odd)), places[~which] if len(places) else places)
    if plain is None:
        return None
    rest = _by_rows(encoder, texts.filter(odd), places[which] if len(places) else places)
    lengths, before = np.empty(len(texts), np.int64), np.empty(len(places), np.int64)
    lengths[which], lengths[~which] = rest.lengths, plain.lengths
    if len(places):
        before[which], before[~which] = rest.before, plain.before
    ids, of_odd = np.empty(int(lengths.sum()), np.int32), np.repeat(which, lengths)
    ids[of_odd], ids[~of_odd] = rest.ids, plain.ids
    return Encoded(ids, lengths, before)


def _by_rows(encoder: Encoder, texts: pa.Array, places: np.ndarray) -> Encoded:
    content: list[str] = texts.to_pylist()
    rows = encoder.encode_rows(content)
    before = (
        [
            prefix_length(encoder, text, len(text.encode()[:place].decode()), row)
            for text, place, row in zip(content, places.tolist(), rows, strict=True)
        ]
        if len(places)
        else []
    )
    return Encoded(*flat(rows), np.array(before, np.int64))


def prefix_length(encoder: Encoder, text: str, end: int, ids: Sequence[int] | np.ndarray) -> int:
    """`len(encode(text[:end]))`, read off the ids of the whole text where that is sure.

    It is where `end` follows a newline and no piece spans newlines: the ids before one do not depend on what comes
    after it.

    Args:
        encoder: Whose ids they are.
        text: The whole text.
        end: Where the prefix ends, in characters.
        ids: `encode(text)`; what stands before or behind it, as `<s>`, is counted too if it stands before.
    """
    newline = encoder.newline_id
    if newline is not None and text[end - 1 : end] == "\n":
        at = np.flatnonzero(np.asarray(ids) == newline)
        if len(at) == text.count("\n"):
            return int(at[text.count("\n", 0, end) - 1]) + 1
    return len(encoder.encode(text[:end]))
