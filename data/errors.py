"""Errors that speak to the user: what is wrong, where, what is allowed, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from socket import gaierror


class UserError(ValueError):
    """Something in the config, the data or the environment that the user can mend.

    The command line prints its message without a traceback and leaves with exit code 2.
    """


class Unavailable(UserError):
    """Something outside of the run, such as the network, that may be there again without anybody mending it.

    The command line leaves with exit code 1: a job script may try again.
    """


BROKEN_OFF = {
    "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "botocore.HTTPClientError", "httpx.TransportError",
    "requests.ConnectionError", "requests.Timeout", "urllib3.HTTPError",
}  # fmt: skip
"""What libraries raise where they came to no answer, or not to its end: package and class."""

PASSING = {408, 425, 429}
"""Answers that say no more than "not now", beside those from 500 on."""


def away(error: BaseException | None) -> bool:
    """Return whether it was the network, or a server, that was away: told by the kinds of an error and of those that
    it came from.

    Not where there was an answer (no such name, not allowed), nor where nobody was asked since it was told to stay
    offline.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    kinds = [{f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(each).__mro__} for each in chain]
    if any(name.endswith(".OfflineModeIsEnabled") for names in kinds for name in names):
        return False
    codes = [code for each in chain for code in _codes(each)]
    if codes:
        return any(code >= 500 or code in PASSING for code in codes)
    return any(isinstance(each, ConnectionError | TimeoutError | gaierror) for each in chain) or any(
        names & BROKEN_OFF for names in kinds
    )


def _codes(error: BaseException) -> list[int]:
    """Return the status of an answer that an error tells of, as aiohttp, httpx and requests do."""
    found = getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)
    return [code for code in found if isinstance(code, int)]


def blame(error: BaseException) -> type[UserError]:
    """Return the kind of error that tells of a failed look for something that may lie elsewhere: see `away`."""
    return Unavailable if away(error) else UserError


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the allowed word most like `word`, or "" when none is close."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
