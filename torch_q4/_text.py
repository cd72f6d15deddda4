"""Text from files, as a terminal may show it."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with everything escaped that a terminal would obey or that hides what is there.

    Control characters, C1's among them, line breaks, overrides of the direction of writing and
    characters without a shape come out as in a Python literal, ``\x1b``; bytes of a file's name
    that are no UTF-8 likewise. Backslashes stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds such a byte: PEP 383
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
