"""Faults planted in copies of source files, to see that tests notice them."""

from __future__ import annotations

import re


def plant(text: str, old: str, new: str, *, times: int | None = 1) -> str:
    """Return ``text`` with ``new`` for ``old``, wherever the formatter breaks the lines of either.

    Raises:
        AssertionError: ``old`` occurs another number of times; None: not at all.
    """
    pattern = r"\s*".join(re.escape(letter) for letter in old if not letter.isspace())
    planted, count = re.subn(pattern, lambda _: new, text)
    assert count == times if times is not None else count > 0, f"the text to replace is there {count} times: {old}"
    return planted
