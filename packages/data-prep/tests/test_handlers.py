"""Texts exactly as upstream writes them, and the place where the loss begins."""

import numpy as np
import pytest
from conftest import ROWS
from data_prep import DataError, Tokenizer, templates
from data_prep.errors import UsageError
from data_prep.handlers import HandlerOptions, check_handler, make_handler
from data_prep.rows import Rows

SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)


def documents(block):
    ends = np.cumsum(block.lengths)
    return [block.ids[end - length : end].tolist() for end, length in zip(ends, block.lengths, strict=True)]


def handle(name, folder, records, **options):
    handler = make_handler(name, Tokenizer(folder), HandlerOptions(**options))
    blocks = handler(Rows("in", "row", range(1, len(records) + 1), records))
    assert list(blocks) == list(handler.outputs)
    return [documents(blocks[output]) for output in handler.outputs]


def test_the_template_is_upstreams():
    assert templates.GENERAL_INSTRUCTION.prompt("Walk.", "in Peru") == (
        f"\n{SYSTEM}\n### Instruction:\nWalk.\nin Peru\n### Response:\n"
    )
    assert templates.GENERAL_INSTRUCTION.prompt("Walk.") == f"\n{SYSTEM}\n### Instruction:\nWalk.\n\n### Response:\n"
    assert templates.GENERAL_INSTRUCTION.response("Yes.") == "Yes.\n"
    assert templates.get("general-instruction") is templates.GENERAL_INSTRUCTION
    with pytest.raises(UsageError, match="perhaps you meant 'general-instruction'"):
        templates.get("general_instructions")


@pytest.mark.parametrize("eod", [False, True])
@pytest.mark.parametrize("kind", ["folder", "symbols", "spanning", "json_folder"])
def test_labels_are_the_ids_behind_the_last_response_marker(kind, eod, request):
    folder = request.getfixturevalue(kind)
    encode = Tokenizer(folder).encode
    ids, mask, labels = handle("GeneralInstructionHandler", folder, ROWS, append_eod=eod)
    for row, own, ones, label in zip(ROWS, ids, mask, labels, strict=True):
        text = f"\n{SYSTEM}\n### Instruction:\n{row['instruction']}\n{row['input']}\n### Response:\n{row['output']}\n"
        prompt = len(encode(text[: text.rindex("### Response:\n") + len("### Response:\n")]))
        assert own == encode(text, eos=eod)
        assert ones == [1] * len(own)
        assert label == [-100] * prompt + own[prompt:]


def test_an_input_column_may_be_missing(folder):
    row = {"instruction": "Walk.", "output": "Yes."}
    assert handle("GeneralInstructionHandler", folder, [row]) == handle(
        "GeneralInstructionHandler", folder, [row | {"input": ""}]
    )


def test_alpacas_conversation_is_upstreams(folder):
    start = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    )
    rows = [
        ({"instruction": "Walk.", "input": "", "output": "Yes."}, "Walk.\n\n###None\n\n### Response: ASSISTANT: Yes."),
        (
            {"instruction": "Walk.", "input": "in Peru", "output": None},
            "Walk.\n\n### Input:\nin Peru\n\n### Response: ASSISTANT: None",
        ),
    ]
    (found,) = handle("AlpacaPretrainHandler", folder, [row for row, _ in rows], append_eod=True)
    assert found == [Tokenizer(folder).encode(start + rest, eos=True) for _, rest in rows]


def test_each_key_is_a_data_set_and_empty_texts_are_none(folder):
    rows = [{"a": "the llama", "b": ""}, {"a": "walks", "b": "over"}]
    first, second = handle("GeneralPretrainHandler", folder, rows, json_keys=("a", "b"))
    encode = Tokenizer(folder).encode
    assert (first, second) == ([encode("the llama"), encode("walks")], [encode("over")])


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("GeneralPretrainHandler", {"body": "a"}, "row 1 has no column 'text': it has body"),
        ("GeneralPretrainHandler", {"text": None}, "row 1: 'text' is null, not text"),
        ("GeneralPretrainHandler", {"text": 5}, "row 1: 'text' is int, not text"),
        ("GeneralPretrainHandler", {"text": "\ud800"}, "row 1: 'text' holds half of a surrogate pair"),
        ("GeneralInstructionHandler", {"instruction": "a", "input": None, "output": "b"}, "'input' is null"),
        ("GeneralInstructionHandler", {"instruction": "a", "input": ""}, "no column 'output'"),
        ("AlpacaPretrainHandler", {"output": "a"}, "no column 'instruction'"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(folder, name, record, words):
    with pytest.raises(DataError, match=words):
        handle(name, folder, [record])


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("GeneralPretrainHandle", ("text",), "perhaps you meant 'GeneralPretrainHandler'"),
        ("xyz", ("text",), "there are GeneralPretrainHandler"),
        ("GeneralInstructionHandler", ("body",), "columns of its own"),
        ("GeneralPretrainHandler", ("a", "a"), "one twice"),
        ("GeneralPretrainHandler", (), "no column"),
    ],
)
def test_what_no_handler_does_is_refused(name, keys, words):
    with pytest.raises(UsageError, match=words):
        check_handler(name, HandlerOptions(json_keys=keys))
