"""A chat endpoint that speaks OpenAI's protocol: one reply for one body, with tries, waits and a budget.

Tried again are replies that say so (429, 5xx and the like), silence and broken connections; the wait is what the
endpoint asks for (`Retry-After`), else doubles from half a second. Left out: streaming, and other protocols.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another try
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0  # between tries, where the endpoint names none
SHOWN_CHARS = 200  # of an error's text


class NoReplyError(Exception):
    """Why an endpoint gave no reply, in words."""


@dataclass(slots=True)
class Endpoint:
    """`url` with /chat/completions, asked from one event loop. `budget_requests` and `budget_tokens` None: no limit."""

    url: str
    key: str | None
    tries: int
    request_s: float
    budget_requests: int | None
    budget_tokens: int | None
    requests: int = field(default=0, init=False)  # sent, each try for itself
    tokens: int = field(default=0, init=False)  # of prompts and replies, as the endpoint counts them
    _client: httpx.AsyncClient | None = field(default=None, init=False)
    _draw: random.Random = field(default_factory=random.Random, init=False)  # of its own: Python's is the run's

    async def reply(self, body: Mapping[str, Any], until: float) -> str:
        """What the endpoint says to this body; no wait goes beyond `until`, a time of the loop's clock.

        Raises NoReplyError: what happened.
        """
        # Escaped, since what a model wrote may hold half a character, which UTF-8 can't say.
        content = json.dumps(body)
        problem = ""
        for attempt in range(self.tries):
            self._check_budget()
            self.requests += 1
            wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * self._draw.uniform(0.5, 1.0)
            try:
                response = await self._connected().post(self.url, content=content)
            except httpx.TimeoutException:
                problem = f"{self.url} gave no reply within {self.request_s:g} s"
            except httpx.RequestError as error:
                problem = f"{self.url} can't be reached ({str(error) or type(error).__name__})"
            except httpx.InvalidURL as error:
                raise NoReplyError(f"{self.url} is no address: {error}") from None
            else:
                if response.status_code == 200:
                    return self._said(response)
                problem = f"{self.url} answers HTTP {response.status_code}{_text(response)}"
                if response.status_code not in AGAIN:
                    raise NoReplyError(problem)
                wait_s = max(wait_s, _asked_to_wait_s(response))
            if attempt + 1 < self.tries:
                if asyncio.get_running_loop().time() + wait_s >= until:
                    raise NoReplyError(f"{problem}; the next try, in {wait_s:.0f} s, would be after timeout_s")
                await asyncio.sleep(wait_s)
        raise NoReplyError(f"{problem}; {self.tries} tries")

    async def close(self) -> None:
        """Close the connections; a later reply opens new ones."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            headers = {"Content-Type": "application/json"}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            # How many at once is the caller's business. Redirects are not followed: the key is for this address.
            self._client = httpx.AsyncClient(headers=headers, timeout=self.request_s, limits=httpx.Limits())
        return self._client

    def _check_budget(self) -> None:
        if self.budget_requests is not None and self.requests >= self.budget_requests:
            raise NoReplyError(f"its budget is spent: budget_requests={self.budget_requests}")
        if self.budget_tokens is not None and self.tokens >= self.budget_tokens:
            raise NoReplyError(f"its budget is spent: budget_tokens={self.budget_tokens}, {self.tokens} used")

    def _said(self, response: httpx.Response) -> str:
        try:
            found = response.json()
            said = found["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise NoReplyError(f"{self.url} answers with no chat completion{_text(response)}") from None
        usage = found.get("usage")
        total = usage.get("total_tokens") if isinstance(usage, dict) else None
        if type(total) is int and total >= 0:
            self.tokens += total
        elif self.budget_tokens is not None:
            raise NoReplyError(
                f"{self.url} counts no tokens (usage.total_tokens): give budget_requests, not budget_tokens"
            )
        if not isinstance(said, str):
            raise NoReplyError(f"{self.url} answers with a message without text{_text(response)}")
        return said


def _text(response: httpx.Response) -> str:
    text = " ".join(response.text[: 10 * SHOWN_CHARS].split())
    return f": {text[:SHOWN_CHARS]}" if text else ""


def _asked_to_wait_s(response: httpx.Response) -> float:
    """Seconds of `Retry-After`, a number or a date; 0 where it says nothing that can be read."""
    asked = response.headers.get("Retry-After", "")
    try:
        return max(float(asked), 0.0) if asked.replace(".", "", 1).isdigit() else _seconds_to(asked)
    except ValueError:
        return 0.0


def _seconds_to(date: str) -> float:
    when = parsedate_to_datetime(date)
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max((when - datetime.now(UTC)).total_seconds(), 0.0)
