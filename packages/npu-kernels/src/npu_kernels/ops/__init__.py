"""One file per op: its signature, its reference (the semantics) and its backends.

Dimensions: b batch, s sequence (queries), t sequence (keys), S slots of a cache, h hidden, n query heads, g query
groups (key and value heads), r = n / g, d channels of a head, f feed-forward, v vocabulary.
"""
