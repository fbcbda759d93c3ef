"""Documents too long to be encoded at once, cut where no piece of the vocabulary could span the cut.

SentencePiece needs some 80 bytes of memory for each byte of a text. Where its chunks are kept apart (see `chunks`), a
text may be cut before a run of spaces or a newline; where there is none for long, between two characters that stand
side by side in no piece.
"""

from collections.abc import Iterator, Sequence

LONG = 1 << 22
"""Characters above which a text is cut."""
_SEGMENT = 1 << 20
_SOUGHT = 1 << 14
"""Characters in which a space or a newline is looked for before any other place is taken."""


def pairs_of(pieces: Sequence[str]) -> frozenset[str]:
    """All pairs of neighbours in the pieces of a vocabulary."""
    return frozenset(piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1))


def segments(text: str, pairs: frozenset[str]) -> Iterator[tuple[str, int]]:
    """(segment, number of its first ids that are not the text's) one after another.

    SentencePiece puts a space before whatever it is given: a segment that begins with one is given without it; before
    another a newline is put, which no piece spans; and the ids for what was put there are to be dropped.

    Args:
        text: The text, without special tokens.
        pairs: `pairs_of` the vocabulary, in which a newline is a piece by itself.
    """
    begin = 0
    while begin < len(text):
        end = _cut(text, begin + _SEGMENT, pairs) if begin + _SEGMENT < len(text) else len(text)
        segment = text[begin:end]
        if not begin:
            yield segment, 0
        elif segment.startswith(" "):
            yield segment[1:], 0
        else:
            yield ("" if segment.startswith("\n") else "\n") + segment, 1 if segment.startswith("\n") else 2
        begin = end


def _cut(text: str, at: int, pairs: frozenset[str]) -> int:
    """A place at `at` or behind it where the text may be cut; its end if there is none."""
    for place in range(at, min(at + _SOUGHT, len(text))):
        if text[place] == "\n" or (text[place] == " " and _begins_run(text, place)):
            return place
    for place in range(at, len(text)):
        pair = text[place - 1 : place + 1]
        if pair not in pairs and " " not in pair and "▁" not in pair:
            return place
        if text[place] == " " and _begins_run(text, place):
            return place
    return len(text)


def _begins_run(text: str, place: int) -> bool:
    """Whether a space begins a chunk that is more than itself: alone, nothing would be left to be given."""
    return text[place - 1] not in " ▁" and text[place + 1 : place + 2] not in ("", "▁")
