"""Facts that every Python installation carries, and the ways to ask for them: cities and their countries (time zone
tables), HTTP status codes and their phrases, Unix error names and their messages.
"""

import errno
import http
import importlib.resources
import os
import re
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Fact = tuple[str, str]
"""What is asked about, and the answer."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One subject: its facts, the wordings that training uses and those that are held back for the test.

    A wording is (instruction, input), with `{0}` for what is asked about. The first held-out wording is the test's.
    """

    name: str
    facts: Callable[[], list[Fact]]
    training: tuple[tuple[str, str], ...]
    held_out: tuple[str, ...]


def _cities() -> list[Fact]:
    """One city a country: the first in the table, or the first whose zone holds for most of its area."""
    country = {code: name for code, name, *_ in _zone_table("iso3166.tab")}
    found: dict[str, list[tuple[bool, str]]] = {}
    for code, _, zone, *comment in _zone_table("zone.tab"):
        continent, *rest = zone.split("/")
        name, city = country[code], rest[-1].replace("_", " ")
        if len(rest) == 1 and continent != "Antarctica" and _is_a_fair_question(city, name):
            found.setdefault(name, []).append(("most" not in "".join(comment), city))
    return [(min(cities, key=lambda pair: pair[0])[1], name) for name, cities in found.items()]


def _is_a_fair_question(city: str, country: str) -> bool:
    """No answer inside its own question, and no name that a small tokenizer would spell in bytes."""
    if not (country + city).isascii() or re.search(r"[()&.]|\bIs\b|\bNL\b", country):
        return False
    return city[:4].lower() not in country.lower() and country[:4].lower() not in city.lower()


def _zone_table(name: str) -> list[list[str]]:
    for root in map(Path, zoneinfo.TZPATH):
        if (root / name).exists():
            text = (root / name).read_text("utf-8")
            break
    else:  # a machine without the system's tables: the tzdata package has them
        text = (importlib.resources.files("tzdata") / "zoneinfo" / name).read_text("utf-8")
    return [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]


def _statuses() -> list[Fact]:
    return [(str(status.value), status.phrase) for status in http.HTTPStatus]


def _errors() -> list[Fact]:
    facts: dict[str, str] = {}
    for number, name in sorted(errno.errorcode.items()):
        if number <= 40 or 88 <= number <= 115:  # the rest is rare, and differs between systems
            facts.setdefault(os.strerror(number), name)
    return [(name, text) for text, name in facts.items()]


SUBJECTS = (
    Subject(
        "world_cities",
        _cities,
        (
            ("Which country is {0} in?", ""),
            ("Name the country where {0} is located.", ""),
            ("{0} is a city in which country?", ""),
            ("What country does {0} belong to?", ""),
            ("Tell me the country of the city {0}.", ""),
            ("I live in {0}. What is my country?", ""),
            ("Where in the world is {0}?", ""),
            ("Give the country of this city.", "{0}"),
        ),
        ("What country is the city {0} in?", "In which country would you find the city of {0}?"),
    ),
    Subject(
        "http_status",
        _statuses,
        (
            ("What does HTTP status {0} mean?", ""),
            ("Give the reason phrase of HTTP status {0}.", ""),
            ("A web server answered with {0}. What happened?", ""),
            ("Explain the HTTP code {0}.", ""),
            ("Which phrase belongs to the status {0}?", ""),
            ("Translate the status code {0} into words.", ""),
            ("My browser shows {0}. What is the reason?", ""),
            ("Give the meaning of this HTTP status code.", "{0}"),
        ),
        ("What does the HTTP code {0} mean?", "What is the meaning of the HTTP status code {0}?"),
    ),
    Subject(
        "unix_errors",
        _errors,
        (
            ("What does the error {0} mean?", ""),
            ("Give the message of the Unix error {0}.", ""),
            ("A system call failed with {0}. What happened?", ""),
            ("Explain the error code {0}.", ""),
            ("Which message belongs to {0}?", ""),
            ("Translate the error {0} into words.", ""),
            ("My program stopped with {0}. What is the reason?", ""),
            ("Give the meaning of this error code.", "{0}"),
        ),
        ("What does the error code {0} mean?", "What is the meaning of the Unix error code {0}?"),
    ),
)
