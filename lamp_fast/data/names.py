"""Which class names CLIP's tokenizer makes little of.

CLIP lowers the case, then splits into runs of letters, single digits and runs of other signs, and
each of these by byte-pair encoding. The vocabulary has every byte, so no name is refused; but a
name in many small pieces is one that CLIP can hardly have met.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from open_clip.tokenizer import SimpleTokenizer

from lamp_fast.data.shipped_names import shipped_names

# Of the 1,667 words in ImageNet's class names 13 have as many pieces: xoloitzcuintli, axolotl, ...
MANY_PIECES = 4
CONTEXT = 77

_LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class OddName:
    """A class name with what is odd about it."""

    name: str
    reason: str


def odd_names(names: Sequence[str], template: str) -> list[OddName]:
    """Find the names that the tokenizer splits oddly, in the order of the classes.

    A name is odd, and listed once for each reason, where

    - it gives the same tokens as an earlier class (case and spaces do not count), so that no text
      tells the two apart;
    - it holds a character that the vocabulary has no token for (the character comes apart into
      bytes), or one that no name should hold (U+FFFD, control characters);
    - one word of it, a run of letters, becomes :data:`MANY_PIECES` tokens or more;
    - most classes have a number in front of their names, as archives ship them;
    - it has no word of two letters or more, as numbers and codes have none (and no unknown
      character, which is reason enough);
    - its prompt is longer than CLIP's :data:`CONTEXT` tokens.

    Args:
        names: class names.
        template: class prompt with {} for the name.
    """
    tokenizer = SimpleTokenizer()
    found = []
    shipped = shipped_names(names)
    first: dict[tuple[int, ...], str] = {}
    for name in names:
        tokens = tuple(tokenizer.encode(name))
        same = first.setdefault(tokens, name)
        if same != name:
            found.append(OddName(name, f"the same tokens as {same!r}"))
        if name in shipped:
            better = f", as {shipped[name]!r}" if shipped[name] else ""
            found.append(OddName(name, f"a number in front; classes.json can do without{better}"))
        unknown = _unknown_characters(tokenizer, name, tokens)
        if unknown:
            found.append(OddName(name, f"unknown characters: {' '.join(unknown)}"))
        words = _LETTERS.findall(name)
        for word in words:
            pieces = [_text(tokenizer, token) for token in tokenizer.encode(word)]
            # A foreign script is one reason, not two.
            if len(pieces) >= MANY_PIECES and not set(word.lower()) & set(unknown):
                found.append(OddName(name, f"{word!r} in {len(pieces)} tokens: {' '.join(pieces)}"))
        if not unknown and not any(len(word) > 1 for word in words):
            found.append(OddName(name, "no word, only single digits, letters or signs"))
        length = len(tokenizer.encode(template.replace("{}", name))) + 2  # bot and eot
        if length > CONTEXT:
            found.append(OddName(name, f"a prompt of {length} tokens, CLIP reads {CONTEXT}"))
    return found


def _bytes(tokenizer: SimpleTokenizer, token: int) -> bytes:
    written = tokenizer.decoder[token].removesuffix("</w>")
    return bytes(tokenizer.byte_decoder[character] for character in written)


def _text(tokenizer: SimpleTokenizer, token: int) -> str:
    return _bytes(tokenizer, token).decode(errors="replace")


def _unknown_characters(tokenizer: SimpleTokenizer, name: str, tokens: Sequence[int]) -> list[str]:
    """The characters that token borders cut, and those that are no text; each once, as found."""
    pieces = [_bytes(tokenizer, token) for token in tokens]
    borders, position = set(), 0
    for piece in pieces:
        borders.add(position)
        position += len(piece)
    cut, start = [], 0
    for character in b"".join(pieces).decode(errors="replace"):
        length = len(character.encode())
        if borders & set(range(start + 1, start + length)):
            cut.append(character)
        start += length
    no_text = [
        each for each in name if each == "\ufffd" or not (each.isprintable() or each.isspace())
    ]
    return list(dict.fromkeys([*cut, *(f"U+{ord(each):04X}" for each in no_text)]))
