"""Prompts, each once: what training wrote, generation and evaluation ask."""

import difflib
from dataclasses import dataclass

from data_prep.errors import UsageError


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt around an instruction, and the response behind it."""

    name: str
    system: str

    def prompt(self, instruction: str, input: str = "") -> str:
        """Everything up to where the response begins."""
        return f"\n{self.system}\n### Instruction:\n{instruction}\n{input}\n### Response:\n"

    def response(self, output: str) -> str:
        """The response as training writes it."""
        return f"{output}\n"


# Source: AscendSpeed's GeneralInstructionHandler; the leading newline is its empty system token's.
GENERAL_INSTRUCTION = Template(
    "general-instruction",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step.",
)
ALL = {GENERAL_INSTRUCTION.name: GENERAL_INSTRUCTION}


def get(name: str) -> Template:
    """The template of that name.

    Raises:
        UsageError: There is none; the message names the nearest, or all.
    """
    if name in ALL:
        return ALL[name]
    near = difflib.get_close_matches(name, ALL, 1, cutoff=0.4)
    advice = f"perhaps you meant {near[0]!r}" if near else f"there are {', '.join(ALL)}"
    raise UsageError(f"unknown prompt template {name!r}: {advice}")
