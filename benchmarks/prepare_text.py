"""data-prep against its floor: sentencepiece alone over the same texts, nothing handled and nothing written.

    python benchmarks/prepare_text.py FOLDER [ROUNDS]

FOLDER holds alpaca_like.parquet (Alpaca's columns: text, and instruction, input and output), llama2-tokenizer, and
perhaps goldens.json: the sha256 of what upstream writes for them. Everything runs from it: whole commands against the
floor; the bytes against the goldens, for several numbers of workers; text on which the cache is of little help; and the
memory of all processes together for ten times the input.
"""

import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_prep import Tokenizer
from measure import SCRIPTS, Command, compare, remove

FLOOR = """
import sys, pyarrow.parquet as parquet, sentencepiece
encoder = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2] + "/tokenizer.model")
for batch in parquet.ParquetFile(sys.argv[1]).iter_batches(2000, columns=["text"]):
    encoder.encode(batch["text"].to_pylist(), add_bos=True, num_threads=int(sys.argv[3]))
"""
FAST_FLOOR = """
import sys, pyarrow.parquet as parquet, tokenizers
encoder = tokenizers.Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
for batch in parquet.ParquetFile(sys.argv[1]).iter_batches(2000, columns=["text"]):
    [row.ids for row in encoder.encode_batch_fast(batch["text"].to_pylist())]
"""


AT_ONCE = "from data_prep import cli, pool; pool.START_AFTER_S = 0; raise SystemExit(cli.main())"
"""data-prep whose helpers start with the first batch, however little there is to do."""


def main(folder: Path, rounds: int) -> None:
    """Prints all tables."""
    file, tokenizer = folder / "alpaca_like.parquet", folder / "llama2-tokenizer"
    with tempfile.TemporaryDirectory() as home:
        whole_commands(file, tokenizer, Path(home), rounds)
        golden_bytes(folder, Path(home))
        hard_texts(file, tokenizer, rounds)
        memory(file, tokenizer, Path(home))


def run(file: Path, tokenizer: Path, home: Path, *more: str) -> list[str | Path]:
    """The command."""
    command: list[str | Path] = [SCRIPTS / "data-prep", "run", "--input", file, "--tokenizer-name-or-path", tokenizer]
    return [*command, "--output-prefix", home / "out", *more]


def whole_commands(file: Path, tokenizer: Path, home: Path, rounds: int) -> None:
    """Text and instruction rows, one and two workers, from the interpreter's start to the renamed files."""
    instruction = ("--handler-name", "GeneralInstructionHandler", "--append-eod")
    commands: dict[str, Command] = {
        "sentencepiece alone, 1 thread": [sys.executable, "-c", FLOOR, file, tokenizer, "1"],
        "sentencepiece alone, 2 threads": [sys.executable, "-c", FLOOR, file, tokenizer, "2"],
        "tokenizers alone": [sys.executable, "-c", FAST_FLOOR, file, tokenizer],
        "text, 1 worker": run(file, tokenizer, home, "--workers", "1"),
        "text, 2 workers": run(file, tokenizer, home, "--workers", "2"),
        "instruction rows, 1 worker": run(file, tokenizer, home, *instruction, "--workers", "1"),
        "instruction rows, 2 workers": run(file, tokenizer, home, *instruction, "--workers", "2"),
    }
    compare(commands, rounds=rounds, clean=lambda: remove(*home.iterdir()))


def golden_bytes(folder: Path, home: Path) -> None:
    """The sha256 of every file that upstream writes, for one, two and three workers."""
    if not (folder / "goldens.json").exists():
        print("\nno goldens.json: bytes not compared with upstream's")
        return
    for golden in json.loads((folder / "goldens.json").read_text("utf-8"))["goldens"]:
        for workers in ("1", "2", "3"):
            remove(*home.iterdir())
            options = ["--handler-name", golden["handler"], *golden["flags"], "--workers", workers]
            words = run(folder / golden["input"], folder / "llama2-tokenizer", home, *options)[1:]
            command = [sys.executable, "-c", AT_ONCE, *map(str, words)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for suffix, expected in golden["outputs"].items():
                found = hashlib.sha256((home / f"out{suffix}").read_bytes()).hexdigest()
                if found != expected["sha256"]:
                    raise SystemExit(f"{golden['handler']}, {workers} workers: {suffix} is not upstream's")
            print(
                f"{golden['handler']}, {workers} workers: {len(golden['outputs'])} files are upstream's, byte for byte"
            )
    remove(*home.iterdir())


def hard_texts(file: Path, tokenizer: Path, rounds: int) -> None:
    """Our encoder against the library's, in one process and in turn, on text that repeats itself less."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    prose = pq.read_table(file, columns=["text"])["text"].to_pylist()[:8000]
    print(f"\n{'CPU s of the encoder alone':<34}  library    ours  speed  hit rate")
    for name, texts in {"Alpaca": prose, **corpora()}.items():
        ours, theirs = [], []
        for _ in range(rounds):
            encoder = Tokenizer(tokenizer)
            batches = [texts[at : at + 500] for at in range(0, len(texts), 500)]
            theirs.append(cpu(partial(model.encode, num_threads=1), batches))
            ours.append(cpu(partial(columns, encoder), batches))
        counts = encoder.counts
        assert counts is not None
        rate = f"{1 - counts.misses / counts.chunks:.1%}" if counts.chunks else "none"
        ids = [id for batch in batches[:3] for row in model.encode(batch) for id in row]
        assert [id for batch in batches[:3] for id in columns(encoder, batch).tolist()] == ids, "ids differ"
        speed = min(theirs) / min(ours)
        print(f"{name:<34}  {min(theirs):>7.2f} {min(ours):>7.2f} {speed:>6.2f}  {rate:>8}")


def columns(encoder: Tokenizer, texts: list[str]) -> np.ndarray:
    """Ids of a batch, as a handler asks for them."""
    return encoder.encode_column(pa.array(texts, pa.string())).ids


def cpu(encode: Callable[[list[str]], object], batches: list[list[str]]) -> float:
    """CPU seconds of this process."""
    begin = time.process_time()
    for batch in batches:
        encode(batch)
    return time.process_time() - begin


def corpora() -> dict[str, list[str]]:
    """Source code, many languages, and chunks of which none comes twice."""
    chance = random.Random(1)
    library = sorted(Path(random.__file__).parent.glob("*.py"))
    code = [file.read_text("utf-8", errors="ignore") for file in library]
    scripts = [(0x4E00, 3000), (0x0E01, 58), (0x0905, 50), (0x0430, 32), (0x03B1, 24), (0xAC00, 2000), (0x0627, 36)]
    languages = []
    for _ in range(4000):
        first, count = chance.choice(scripts)
        words = ("".join(chr(first + chance.randrange(count)) for _ in range(chance.randint(1, 12))) for _ in range(90))
        languages.append(("" if first in (0x4E00, 0x0E01) else " ").join(words))
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    distinct = [" ".join("".join(chance.choices(letters, k=8)) for _ in range(120)) for _ in range(4000)]
    return {"source code (Python's library)": code, "many languages (random)": languages, "all distinct": distinct}


def memory(file: Path, tokenizer: Path, home: Path) -> None:
    """Peak of the sum of all processes' resident memory, for the file and for ten times as much."""
    print(f"\n{'MiB of all processes together':<34}     peak")
    table = pq.read_table(file, columns=["text"])
    large = home / "large.parquet"
    with pq.ParquetWriter(large, table.schema) as writer:
        for _ in range(10):
            writer.write_table(table)
    del table
    for name, source in (("the file, 2 workers", file), ("ten times as much, 2 workers", large)):
        words = run(source, tokenizer, home, "--workers", "2", "--overwrite")[1:]
        print(f"{name:<34}  {peak([sys.executable, '-c', AT_ONCE, *map(str, words)]):>7.0f}")
    remove(*home.iterdir())


def peak(command: list[str]) -> float:
    """MiB: the largest sum of resident memory of a command and its children, looked at fifty times a second."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    highest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, sum(map(resident, family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return highest / (1 << 20)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def resident(pid: int) -> int:
    """Bytes of a process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
