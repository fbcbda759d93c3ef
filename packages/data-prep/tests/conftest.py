"""Small tokenizers in the shape of LLaMA's, trained here."""

import json

import pytest
import sentencepiece
import tokenizers
from data_prep import templates
from tokenizers import decoders, models, normalizers, processors

TEXTS = [
    "the llama walks over the high grassland and eats dry grass, 1250 meters up",
    "  two leading  spaces, and\ta tab",
    "a condor circles above the llama\nwhile the sun is low\n\nand the wind is cold",
    "def walk(llama):\n    return [step for step in llama]\n",
    templates.GENERAL_INSTRUCTION.prompt("Where does the llama walk?", "in Peru") + "over the grassland\n",
]
SYMBOL = "the high puna"


DEFAULTS = {
    "model_type": "bpe",
    "vocab_size": 420,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def train(folder, texts=None, **options):
    """A LLaMA has no piece with a newline: it was trained on lines. `texts` may have others."""
    lines = [line for text in TEXTS for line in text.split("\n")]
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((texts or lines) * 20),
        model_prefix=str(folder / "tokenizer"),
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **(DEFAULTS | options),
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face folder with tokenizer.model alone."""
    return train(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def symbols(tmp_path_factory):
    """A model with user-defined symbols: the newline, and a phrase with spaces in it."""
    symbols = ["\n", SYMBOL.replace(" ", "▁")]
    return train(tmp_path_factory.mktemp("symbols") / "hf", user_defined_symbols=symbols)


@pytest.fixture(scope="session")
def spanning(tmp_path_factory):
    """A model with pieces that span newlines."""
    return train(tmp_path_factory.mktemp("spanning") / "hf", TEXTS)


@pytest.fixture(scope="session")
def pieces(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def json_folder(folder, pieces, tmp_path_factory):
    """The same vocabulary as a tokenizer.json alone, merges in the order of SentencePiece's scores."""
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = sorted(
        (-pieces.get_score(i), vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if not pieces.is_byte(i) and not pieces.is_control(i) and piece[:cut] in vocab and piece[cut:] in vocab
    )
    model = models.BPE(vocab, [merge[3:] for merge in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    home = tmp_path_factory.mktemp("json")
    tokenizer.save(str(home / "tokenizer.json"))
    return home


@pytest.fixture
def corpus(tmp_path):
    """A jsonl file of the texts and an empty one."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]), "utf-8")
    return path


ROWS = [
    {"instruction": "Where does the llama walk?", "input": "", "output": "over the grassland"},
    {"instruction": "Name a bird.", "input": "in Peru", "output": "a condor\n### Response:\nabove the llama"},
    {"instruction": "", "input": "  ", "output": ""},
]


@pytest.fixture
def rows(tmp_path):
    """Alpaca's columns, as one JSON list."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1), "utf-8")
    return path
