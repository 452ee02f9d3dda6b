"""What is told of what lies elsewhere: is it away for now, or is there something to mend?"""

from __future__ import annotations

from socket import gaierror
from typing import Any

import httpx
import pytest
import requests
from aiohttp import ClientConnectionError
from huggingface_hub.errors import OfflineModeIsEnabled

from data.errors import Unavailable, UserError, away, blame


def answered(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "https://hub")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(code, request=request))


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ConnectionRefusedError("refused"), True),
        (TimeoutError(), True),
        (gaierror(-3, "Temporary failure in name resolution"), True),
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("slow"), True),
        (requests.exceptions.ConnectTimeout("slow"), True),
        (requests.exceptions.ProxyError("no"), True),
        (ClientConnectionError("refused"), True),
        (answered(503), True),
        (answered(429), True),
        (answered(404), False),
        (answered(401), False),
        (OfflineModeIsEnabled("offline"), False),
        (FileNotFoundError("x.jsonl"), False),
        (PermissionError("x.jsonl"), False),
        (ValueError("a damaged file"), False),
    ],
)
def test_what_is_away_is_told_by_its_kind_and_by_what_it_came_from(error: Exception, found: bool) -> None:
    def raised(outer: Exception) -> Any:
        try:
            try:
                raise error
            except Exception as inner:
                raise outer from inner
        except Exception as whole:
            return whole

    assert away(error) == found == away(raised(OSError("cannot load it"))) == away(raised(ValueError("neither")))
    assert blame(error) is (Unavailable if found else UserError)


def test_an_answer_counts_more_than_a_connection_lost_before_it() -> None:
    error = answered(404)
    error.__context__ = ConnectionResetError("the first try")
    assert not away(error)


def test_a_ring_of_causes_ends() -> None:
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert not away(one)
