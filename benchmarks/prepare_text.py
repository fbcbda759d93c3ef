"""data-prep against its floor: sentencepiece alone over the same column, nothing handled and nothing written.

    python benchmarks/prepare_text.py FILE.parquet TOKENIZER [ROUNDS]

FILE has a column "text", and instruction, input and output for the instruction rows (Alpaca's schema).
"""

import sys
import tempfile
from pathlib import Path

from measure import SCRIPTS, Command, compare, remove

FLOOR = """
import sys, pyarrow.parquet as parquet, sentencepiece
encoder = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2] + "/tokenizer.model")
for batch in parquet.ParquetFile(sys.argv[1]).iter_batches(2000, columns=["text"]):
    encoder.encode(batch["text"].to_pylist(), add_bos=True, num_threads=int(sys.argv[3]))
"""


def main(file: Path, tokenizer: Path, rounds: int) -> None:
    """Measures one and two workers, text and instruction rows."""
    with tempfile.TemporaryDirectory() as home:
        run: list[str | Path] = [SCRIPTS / "data-prep", "run", "--input", file, "--tokenizer-name-or-path", tokenizer]
        run += ["--output-prefix", f"{home}/out", "--append-eod"]
        instruction = [*run, "--handler-name", "GeneralInstructionHandler"]
        commands: dict[str, Command] = {
            "sentencepiece alone, 1 thread": [sys.executable, "-c", FLOOR, file, tokenizer, "1"],
            "sentencepiece alone, 2 threads": [sys.executable, "-c", FLOOR, file, tokenizer, "2"],
            "text, 1 worker": [*run, "--workers", "1"],
            "text, 2 workers": [*run, "--workers", "2"],
            "instruction rows, 1 worker": [*instruction, "--workers", "1"],
            "instruction rows, 2 workers": [*instruction, "--workers", "2"],
        }
        compare(commands, rounds=rounds, clean=lambda: remove(*Path(home).iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 5)
