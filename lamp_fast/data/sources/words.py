"""Files and words that say what classes are called: templates, descriptions."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lamp_fast.cli import expand_path
from lamp_fast.data.sources import DataSource
from lamp_fast.data.sources.files import read_lines
from lamp_fast.data.templates import SETS
from lamp_fast.data.words import Words, check_template, plain_name
from lamp_fast.errors import InputError

# The columns of a file of descriptions.
CLASS, DESCRIPTION = "class", "description"


def with_words(
    source: DataSource,
    template: Sequence[str],
    descriptions: Path | None,
    words: Words | None = None,
) -> DataSource:
    """A data set whose classes are called what a user says.

    Args:
        source: the data set.
        template: see :func:`read_templates`; nothing leaves the data set's own.
        descriptions: see :func:`read_descriptions`.
        words: of a run, which kept them, in place of both.

    Raises:
        InputError: words that cannot be read, or a class without a description where others have
            one.
    """
    if words is None:
        templates = read_templates(template) or (source.template,)
        described = {} if descriptions is None else read_descriptions(descriptions)
        words = Words(templates, described)
        if without := words.undescribed(source.classnames):
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            raise InputError(
                f"--descriptions {descriptions}: class {without[0]!r}{more} has none, expected one"
                f" for each of {len(source.classnames)}"
            )
    several = len(words.templates) > 1 or words.descriptions
    return replace(
        source,
        template=words.templates[0],
        own_template=source.own_template and not template,
        words=words if several else None,
    )


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """The templates that the words of ``--template`` mean, each once.

    Args:
        given: templates, names of :data:`lamp_fast.data.templates.SETS`, or ``.txt`` files with a
            template a line.

    Raises:
        InputError: what is none of these, or a template without {} or with several.
    """
    found: list[str] = []
    for word in given:
        if word in SETS:
            found += SETS[word]()
        elif word.endswith(".txt"):
            file = expand_path(word)
            for number, line in read_lines(file):
                check_template(line, f"--template {file}: line {number}: ")
                found.append(line)
        else:
            check_template(word, "--template ")
            found.append(word)
    return tuple(dict.fromkeys(found))


def read_descriptions(file: Path) -> dict[str, tuple[str, ...]]:
    """The texts of each class of a CSV file with the columns class and description.

    Raises:
        InputError: a file that is missing or malformed, an empty cell, or a text with several {}.
    """
    found: dict[str, list[str]] = {}
    for number, row in read_rows("--descriptions", file, (CLASS, DESCRIPTION)):
        name, text = (row[column] for column in (CLASS, DESCRIPTION))
        if text.count("{}") > 1:
            raise InputError(
                f"--descriptions {file}: row {number}: {text[:60]!r}: expected {{}} once, for the"
                " class name, or not at all"
            )
        found.setdefault(plain_name(name), []).append(text)
    return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items()}


def read_rows(
    flag: str, file: Path, columns: Sequence[str] | None
) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header, their cells stripped, each with its number from 1.

    Args:
        flag: that named the file.
        file: UTF-8, comma.
        columns: that must be there, and whose cells must not be empty; None takes all.

    Raises:
        InputError: naming the flag, the file and the row.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            header, *rows = [row for row in csv.reader(stream, strict=True) if any(row)] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} {file}: cannot be read ({reason})") from None
    header = [name.strip() for name in header]
    wanted = header if columns is None else columns
    for column in wanted:
        if header.count(column) != 1:
            raise InputError(f"{flag} {file}: expected one column {column!r} in {header}")
    if not rows:
        raise InputError(f"{flag} {file}: has no rows")
    found = []
    for number, cells in enumerate(rows, 1):
        row = dict.fromkeys(header, "") | dict(zip(header, map(str.strip, cells), strict=False))
        for column in wanted:
            if not row[column]:
                raise InputError(f"{flag} {file}: row {number}: {column} is empty")
        found.append((number, row))
    return found
