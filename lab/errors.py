"""The one error that a user sees: what is wrong, its value, the limit, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabError(Exception):
    """A user's mistake or a missing resource. The command line prints it as one line and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None if none comes close."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(what: str, name: object, known: Iterable[str], where: str = "") -> LabError:
    """The error for a name that is not in a table, with the nearest that is.

    >>> print(unknown("method", "lroa", ["full", "lora"]))
    unknown method 'lroa'. Did you mean 'lora'? Known: full, lora.
    """
    names = sorted(known)
    guess = nearest(str(name), names)
    hint = f" Did you mean '{guess}'?" if guess else ""
    return LabError(f"{where}unknown {what} '{name}'.{hint} Known: {', '.join(names)}.")
