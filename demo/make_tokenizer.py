"""Trains a LLaMA-style SentencePiece tokenizer on the demo's data and saves it as a Hugging Face folder.

    python demo/make_tokenizer.py DATA OUT

BPE with byte fallback, `<s>` = 1, `</s>` = 2. OUT holds tokenizer.model, and a tokenizer.json that gives the very same
ids: merges in the order of SentencePiece's scores (ordered by id, as converters do it, they split differently), `▁`
put before a text by the normalizer, and the user-defined symbol kept whole by a pre-tokenizer.
"""

import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import sentencepiece
from data_prep import templates
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

VOCAB_SIZE = 2048
REPEAT_ROWS = 4
"""The instruction rows are given several times: names become a few pieces each. (One piece each learns worse.)"""

SPACE = "▁"


def training_texts(data: Path) -> list[str]:
    """The training share of the prose, and the instructions as fine-tuning will write them."""
    num_train = int((data / "split.txt").read_text("utf-8").split(",")[0])
    lines = (data / "corpus.jsonl").read_text("utf-8").splitlines()
    prose = [json.loads(line)["text"] for line in lines[:num_train]]
    template = templates.GENERAL_INSTRUCTION
    rows = pq.read_table(data / "instructions.parquet").to_pylist()
    taught = [template.prompt(row["instruction"], row["input"]) + template.response(row["output"]) for row in rows]
    return prose + REPEAT_ROWS * taught


def constant_prompt() -> str:
    """The sentences that open every instruction row: one symbol of their own, which halves a row's length."""
    return templates.GENERAL_INSTRUCTION.prompt("").strip().split("\n")[0]


def train(texts: list[str], constant: str) -> bytes:
    """The serialized SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        character_coverage=0.99995,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        user_defined_symbols=["\n", constant.replace(" ", SPACE)],
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # more would make the result depend on the machine
        minloglevel=2,
    )
    return model.getvalue()


def fast_tokenizer(model: bytes, constant: str) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library, built from SentencePiece's pieces and scores."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces, vocab),
            unk_token="<unk>",  # noqa: S106
            byte_fallback=True,
            fuse_unk=True,
            ignore_merges=True,  # the isolated symbol is one piece, though no merge leads to it
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    symbol = constant.replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(symbol, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _merges(pieces: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: the order in which SentencePiece merges."""
    merges = []
    for piece, number in vocab.items():
        if pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number) or _is_user_defined(piece):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-pieces.get_score(number), vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _is_user_defined(piece: str) -> bool:
    return piece == "\n" or len(piece) > 64


def main(data: Path, out: Path) -> None:
    """The folder, checked: both encoders agree on every text that they were made for."""
    texts, constant = training_texts(data), constant_prompt()
    model = train(texts, constant)
    fast = fast_tokenizer(model, constant)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in dict.fromkeys(texts):
        if fast.encode(text).ids != [1, *pieces.encode(text)]:
            raise SystemExit(f"error: tokenizer.json and tokenizer.model disagree on {text[:60]!r}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model)
    fast.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    print(f"{VOCAB_SIZE} pieces; tokenizer.json equals tokenizer.model on {len(set(texts))} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
