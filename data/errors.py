"""Errors that speak to the user: what is wrong, where, what is allowed, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the config, the data or the environment that the user can mend.

    The command line prints its message without a traceback and leaves with exit code 2.
    """


class Unavailable(UserError):
    """Something outside of the run, such as the network, that may be there again without anybody mending it.

    The command line leaves with exit code 1: a job script may try again.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the allowed word most like `word`, or "" when none is close."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
