"""Conversations: the ids of each part by itself, the loss on the answers only, and what is no conversation."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep import DataError, IndexedDataset, Tokenizer, prepare, templates
from data_prep.errors import UsageError
from data_prep.handlers import HandlerOptions, check_handler, make_handler, parse_map_keys
from data_prep.rows import BadRecordsError, Rows

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TURNS = [("Where does the llama walk?", "over the grassland"), ("  why ", ""), ("the sun is\nlow", "dry grass\n")]


def expected(tokenizer, elements):
    """MindSpeed-LLM's way once more: text is encoded piece by piece, a piece with `!` in front carries the loss."""
    ids, labels = [], []
    for element in elements:
        loss, element = element.startswith("!"), element.removeprefix("!")
        special = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id}.get(element)
        own = [special] if special else tokenizer.encode(element, bos=False)
        ids += own
        labels += own if loss else [-100] * len(own)
    return ids, labels


def elements(kind, turns, system=""):
    """What stands before and behind the messages, as MindSpeed-LLM's templates.json has it."""
    out = []
    for number, (question, answer) in enumerate(turns):
        if kind == "llama2":
            said = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and not number else ""
            out += ["BOS", f"[INST] {said}{question} [/INST]"]
        elif kind == "alpaca":
            out += ["\n\n"] if number else [system or ALPACA]
            out += [f"### Instruction:\n{question}\n\n### Response:\n"]
        elif kind == "default":
            out += ["\n"] if number else ([system + "\n"] if system else [])
            out += [f"Human: {question}\nAssistant:"]
        else:
            out += [system] if system and not number else []
            out += [question]
        out += [f"!{answer}"] + (["!EOS"] if kind != "empty" else [])
    return [element for element in out if element not in ("", "!")]


def test_a_tag_is_a_text():
    options = HandlerOptions(prompt_type="alpaca", map_keys={"tags": {"role_tag": ["x"]}})
    with pytest.raises(UsageError, match="the tag 'role_tag' is"):
        check_handler("SharegptStyleInstructionHandler", options)


def handle(folder, name, records, kind, **options):
    handler = make_handler(name, Tokenizer(folder), HandlerOptions(prompt_type=kind, **options))
    blocks = handler(Rows("in", "line", range(1, len(records) + 1), records))
    out = []
    for key in ("input_ids", "labels", "attention_mask"):
        block = blocks[f"_packed_{key}_document"]
        out.append([part.tolist() for part in np.split(block.ids, np.cumsum(block.lengths))[:-1]])
        assert block.documents.tolist() == [1] * len(records)
    assert out[2] == [[1] * len(ids) for ids in out[0]]
    return out[0], out[1]


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("kind", sorted(templates.CHATS))
@pytest.mark.parametrize("style", ["Alpaca", "Sharegpt", "OpenAI"])
def test_ids_and_labels(folder, kind, style, system):
    tokenizer = Tokenizer(folder)
    name, keys = f"{style}StyleInstructionHandler".replace("OpenAIStyle", "OpenAI"), {"system": "system"}
    if style == "Alpaca":
        keys["history"] = "before"
        records = [
            {"instruction": "a", "input": "b", "output": "c", "before": None, "system": system},
            {
                "instruction": TURNS[-1][0],
                "input": "",
                "output": TURNS[-1][1],
                "before": [list(turn) for turn in TURNS[:-1]],
                "system": system,
            },
        ]
        turns = [[("a\nb", "c")], TURNS]
    else:
        who, what, user, answer = (
            ("from", "value", "human", "gpt") if style == "Sharegpt" else ("role", "content", "user", "assistant")
        )
        column = "conversations" if style == "Sharegpt" else "messages"
        said = [{who: (user, answer)[at], what: turn[at]} for turn in TURNS for at in (0, 1)]
        first = [{who: "system", what: system}] if system else []
        records = [{column: first + said[:2]}, {column: said, "system": system}]
        turns = [TURNS[:1], TURNS]
    ids, labels = handle(folder, name, records, kind, map_keys=keys)
    wanted = [expected(tokenizer, elements(kind, each, system)) for each in turns]
    assert ids == [each for each, _ in wanted]
    assert labels == [each for _, each in wanted]
    shifted = expected(tokenizer, elements(kind, [(question, answer + "x") for question, answer in turns[0]], system))
    assert ids[0] != shifted[0]  # the control


def test_append_eod_adds_one_more(folder):
    record = {"instruction": "a", "output": "b"}
    ids, labels = handle(folder, "AlpacaStyleInstructionHandler", [record], "llama2")
    more, more_labels = handle(folder, "AlpacaStyleInstructionHandler", [record], "llama2", append_eod=True)
    assert (more[0], more_labels[0]) == ([*ids[0], 2], [*labels[0], 2])


def test_generation_asks_what_training_wrote(folder):
    tokenizer = Tokenizer(folder)
    for kind, template in templates.CHATS.items():
        asked = [templates.Turn("user", "a"), templates.Turn("assistant", "b"), templates.Turn("user", "c")]
        prompt = tokenizer.encode_parts(template.parts(asked, "Be brief."))
        whole = expected(tokenizer, elements(kind, [("a", "b"), ("c", "d")], "Be brief."))[0]
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt) :] == tokenizer.encode("d", bos=False) + [2] * template.ends_answers


def test_columns_have_the_names_they_have(folder, tmp_path):
    rows = [{"talk": [{"who": "me", "text": "the llama"}, {"who": "it", "text": "walks"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    keys = {
        "messages": "talk",
        "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "me", "assistant_tag": "it"},
    }
    options = {"tokenizer": folder, "handler_name": "SharegptStyleInstructionHandler", "prompt_type": "empty"}
    manifest = prepare([tmp_path / "a.parquet"], tmp_path / "out", map_keys=keys, **options)
    assert manifest.options == {"prompt_type": "empty", "map_keys": keys}
    (ids,) = IndexedDataset(tmp_path / "out")
    assert Tokenizer(folder).decode([1, *ids.tolist()]) == "the llama walks"
    with pytest.raises(DataError, match="no column 'conversations': it has talk"):
        prepare([tmp_path / "a.parquet"], tmp_path / "other", **options)


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("SharegptStyle", {"conversations": None}, "line 1: the messages are null, not a list"),
        ("SharegptStyle", {"conversations": []}, "0 messages, which are no pairs"),
        ("SharegptStyle", {"conversations": [{"from": "human", "value": "a"}]}, "1 messages, which are no pairs"),
        (
            "SharegptStyle",
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "message 1 is from 'gpt' where 'human' was expected",
        ),
        ("SharegptStyle", {"conversations": ["a"]}, "message 1 has no 'from'"),
        ("SharegptStyle", {"conversations": [{"from": "human", "value": None}]}, "message 1: 'value' is null"),
        ("SharegptStyle", {"talk": []}, "no column 'conversations'"),
        ("OpenAI", {"messages": [{"role": "user", "content": [1]}]}, "message 1: 'content' is list, not text"),
        ("AlpacaStyle", {"instruction": "a", "output": None}, "'output' is null"),
        ("AlpacaStyle", {"instruction": 5, "output": "b"}, "the prompt is int, not text"),
        ("AlpacaStyle", {"instruction": "a", "output": "\ud800"}, "'output' holds half of a surrogate pair"),
        ("AlpacaStyle", {"instruction": "a", "output": "b", "history": ["x"]}, "item 1 of the history is no pair"),
        ("AlpacaStyle", {"instruction": "a", "output": "b", "history": [["x", None]]}, "'output' is null"),
    ],
)
def test_what_is_no_conversation_is_named(folder, name, record, words):
    keys = {"history": "history"} if name == "AlpacaStyle" else {}
    with pytest.raises(BadRecordsError, match=words):
        handle(folder, f"{name}InstructionHandler", [record], "llama2", map_keys=keys)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("AlpacaStyle", {}, "needs a --prompt-type"),
        ("AlpacaStyle", {"prompt_type": "llama"}, "perhaps you meant 'llama2'"),
        ("AlpacaStyle", {"prompt_type": "zzz"}, "there are alpaca, llama2, default, empty"),
        ("AlpacaStyle", {"prompt_type": "alpaca", "map_keys": {"text": "a"}}, "knows no 'text', but prompt"),
        ("AlpacaStyle", {"prompt_type": "alpaca", "map_keys": {"tags": {}}}, "knows no 'tags'"),
        ("AlpacaStyle", {"prompt_type": "alpaca", "map_keys": {"prompt": ""}}, "the column for 'prompt' is ''"),
        ("OpenAI", {"prompt_type": "alpaca", "map_keys": {"tags": {"who": "a"}}}, "tags has 'who', but knows role_tag"),
        ("General", {"prompt_type": "alpaca"}, "--prompt-type is for those with Style"),
        ("General", {"map_keys": {"prompt": "a"}}, "--map-keys is for those with Style"),
    ],
)
def test_options_that_do_not_exist_are_usage_errors(name, options, words):
    with pytest.raises(UsageError, match=words):
        check_handler(f"{name}InstructionHandler", HandlerOptions(**options))


def test_map_keys_are_a_json_object():
    assert parse_map_keys(json.dumps({"prompt": "a"})) == {"prompt": "a"}
    for text in ("{", "[1]"):
        with pytest.raises(UsageError, match="--map-keys"):
            parse_map_keys(text)


def test_moss_conversations_grow_turn_by_turn(folder):
    """Upstream's text once more, as simply as it can be said."""
    chat = {
        "turn_1": {
            "Human": "<|Human|>: where?<eoh>\n",
            "MOSS": "<|MOSS|>: over the\ngrassland<eom>\n",
            "Commands": "x",
        },
        "turn_2": {"Human": "<|Human|>: why?<eoh>\n", "MOSS": "<|MOSS|>: ### Response: dry<eom>\n"},
        "turn_3": None,
    }
    tokenizer = Tokenizer(folder)
    handler = make_handler("MOSSInstructionHandler", tokenizer, HandlerOptions(append_eod=True))
    blocks = handler(Rows("in", "line", [1, 2], [{"chat": chat}, {"chat": {}}]))
    start = f"\n{templates.GENERAL_INSTRUCTION.system}\n### Instruction:\nwhere?\n### Response:\nover the\ngrassland\n"
    texts = [start, start + "### Instruction:\nwhy?\n### Response:\n### Response: dry\n"]
    block = blocks["_packed_input_ids_document"]
    ids = [part.tolist() for part in np.split(block.ids, np.cumsum(block.lengths))[:-1]]
    assert ids == [tokenizer.encode(text) for text in texts]
    assert block.documents.tolist() == [2]
    labels = np.split(blocks["_packed_labels_document"].ids, np.cumsum(block.lengths))[:-1]
    for text, own, label in zip(texts, ids, labels, strict=True):
        length = len(tokenizer.encode(text.rpartition("### Response:")[0] + "### Response:\n"))
        assert label.tolist() == [-100] * min(length, len(own)) + own[length:]


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (None, "'chat' is null"),
        ([], "'chat' is list"),
        ({"turn_1": {"Human": "a"}}, "'turn_1' of 'chat' has no text 'MOSS'"),
        ({"turn_1": {"Human": "a", "MOSS": "\ud800"}}, "'turn_1' of 'chat' holds half of a surrogate"),
    ],
)
def test_what_is_no_moss_conversation_is_named(folder, chat, words):
    handler = make_handler("MOSSInstructionHandler", Tokenizer(folder), HandlerOptions())
    with pytest.raises(BadRecordsError, match=words):
        handler(Rows("in", "line", [1], [{"chat": chat}]))
