"""AscendSpeed's and MindSpeed-LLM's flags for preprocessing, where they differ from ours: one table.

What they ask for is the case here anyway, or is refused with the way out; nothing is silently left undone.
"""

from collections.abc import Sequence

from data_prep.errors import UsageError

AS_HERE = {
    "--tokenizer-not-use-fast": 0,  # ids are those of the slow tokenizer
    "--streaming": 0,  # always
    "--make-vocab-size-divisible-by": 1,  # of the model's embedding, not of the data
    "--pad-vocab-size-to": 1,
    "--cache-dir": 1,  # nothing is cached on the disk
    "--overwrite-cache": 0,
    "--datasets": 1,  # upstream does not read it
    "--neat-pack": 0,  # every pack is
}
"""Flags that change nothing here, and how many values each takes."""
ONLY = {"--tokenizer-type": "PretrainedFromHF", "--dataset-impl": "mmap"}
"""Flags of which one value is the case here."""
REFUSED = {
    "--split-sentences": "documents are not split: give sentences as records",
    "--keep-newlines": "it belongs to --split-sentences, which is not there",
    "--vocab-file": "give --tokenizer-name-or-path a Hugging Face folder or a tokenizer.model",
    "--merge-file": "give --tokenizer-name-or-path a Hugging Face folder or a tokenizer.model",
    "--hf-datasets-params": "give the files of the data set as --input",
    "--script-data-dir": "scripts are not run: give the files of the data set as --input",
    "--interleave-probs": "give --input-weights: how many times each input is read",
    "--mix-strategy": "give --input-weights: how many times each input is read",
    "--prompt-type-path": "give one of the known names as --prompt-type",
    "--max-samples": "cut the input instead",
}


def without_upstreams(args: Sequence[str]) -> list[str]:
    """The arguments of `data-prep run` without upstream's flags that change nothing.

    Raises:
        UsageError: A flag asks for something else.
    """
    kept: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        flag, given, value = word.replace("_", "-").partition("=") if word.startswith("--") else (word, "", "")
        if flag in REFUSED:
            raise UsageError(f"{flag}: {REFUSED[flag]}")
        if flag not in AS_HERE and flag not in ONLY:
            kept.append(word)
            continue
        if not given and AS_HERE.get(flag, 1):
            if not left:
                raise UsageError(f"{flag} needs a value")
            value = left.pop(0)
        if value != ONLY.get(flag, value):
            raise UsageError(f"{flag} {value}: only {ONLY[flag]} is there")
    return kept
