"""Prompts, each once: what training wrote, generation and evaluation ask.

`ALL` are whole texts: a prompt is encoded as it stands. `CHATS` are conversations as MindSpeed-LLM and LLaMA-Factory
make them, whose parts are encoded one by one: `ChatTemplate.parts` says which.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_prep.errors import UsageError


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt around an instruction, and the response behind it."""

    name: str
    system: str

    def prompt(self, instruction: str, input: str = "") -> str:
        """Everything up to where the response begins."""
        before, between, behind, _ = self.pieces
        return f"{before}{instruction}{between}{input}{behind}"

    def response(self, output: str) -> str:
        """The response as training writes it."""
        return f"{output}{self.pieces[3]}"

    def turn(self, instruction: str) -> str:
        """A further question of a conversation, up to where its response begins."""
        return f"### Instruction:\n{instruction}\n{self.marker}\n"

    @property
    def pieces(self) -> tuple[str, str, str, str]:
        """What stands before the instruction, between it and its input, behind that, and behind the response."""
        return f"\n{self.system}\n### Instruction:\n", "\n", f"\n{self.marker}\n", "\n"

    @property
    def marker(self) -> str:
        """The line before a response."""
        return "### Response:"


# Source: AscendSpeed's GeneralInstructionHandler; the leading newline is its empty system token's.
GENERAL_INSTRUCTION = Template(
    "general-instruction",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step.",
)
ALL = {GENERAL_INSTRUCTION.name: GENERAL_INSTRUCTION}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """Who says it: "user" or "assistant"."""
    content: str


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a conversation that is encoded by itself."""

    text: str
    loss: bool = False
    """It is an answer's, which the loss falls on."""
    bos: int = 0
    """How many `<s>` stand before it."""
    eos: int = 0
    """How many `</s>` stand behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """What stands around the messages of a conversation. `{content}` is the message, or the system's text.

    Source: configs/finetune/templates.json of MindSpeed-LLM, itself LLaMA-Factory's.
    """

    name: str
    user: str
    system: str = "{content}"
    default_system: str = ""
    separator: str = ""
    """Before each question but the first."""
    user_bos: bool = False
    """Each question begins with `<s>`; else none does."""
    system_in_user: bool = False
    """The system's text is part of the first question, not encoded by itself."""
    ends_answers: bool = True
    """`</s>` stands behind each answer."""

    def parts(self, turns: Sequence[Turn], system: str = "") -> list[Part]:
        """The parts of a conversation whose turns alternate, a question first.

        Args:
            turns: The messages; the last may be a question that waits for its answer.
            system: Instead of the default one.
        """
        parts: list[Part] = []
        said = self.system.replace("{content}", text) if (text := system or self.default_system) else ""
        if said and not self.system_in_user:
            parts.append(Part(said))
        for number, turn in enumerate(turns):
            if number % 2:
                parts.append(Part(turn.content, loss=True, eos=int(self.ends_answers)))
                continue
            if number and self.separator:
                parts.append(Part(self.separator))
            content = said + turn.content if self.system_in_user and not number else turn.content
            parts.append(Part(self.user.replace("{content}", content), bos=int(self.user_bos)))
        return parts


_CHATS = (
    ChatTemplate(
        name="alpaca",
        user="### Instruction:\n{content}\n\n### Response:\n",
        separator="\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n",
    ),
    ChatTemplate(
        name="llama2",
        user="[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        user_bos=True,
        system_in_user=True,
    ),
    ChatTemplate(name="default", user="Human: {content}\nAssistant:", system="{content}\n", separator="\n"),
    ChatTemplate(name="empty", user="{content}", ends_answers=False),
)
CHATS: Mapping[str, ChatTemplate] = {each.name: each for each in _CHATS}

_Kind = TypeVar("_Kind")


def get(name: str) -> Template:
    """The template of that name, whose prompt is one text.

    Raises:
        UsageError: There is none; the message names the nearest, or all.
    """
    return _of(ALL, name, "prompt template")


def get_chat(name: str) -> ChatTemplate:
    """The template of that name for conversations.

    Raises:
        UsageError: There is none; the message names the nearest, or all.
    """
    return _of(CHATS, name, "prompt type")


def _of(known: Mapping[str, _Kind], name: str, what: str) -> _Kind:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    advice = f"perhaps you meant {near[0]!r}" if near else f"there are {', '.join(known)}"
    raise UsageError(f"unknown {what} {name!r}: {advice}")
