"""The reward `judge`: a language model at an OpenAI-compatible endpoint, asked for a score of each completion.

Requests wait on a network, not on a core: one thread of the run's own process keeps many in flight, beside the worker
processes. A judge that fails (no reply in time, an error, a reply that is no verdict, a spent budget) is a failed
reward, never a 0. Left out: judges that compare completions with one another, and a judge on the trainer's own model.
"""

import asyncio
import json
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pydantic
from pydantic import PositiveFloat, PositiveInt

from reasoner.config import STRICT, Node
from reasoner.errors import RewardError
from reasoner.redact import MIN_LENGTH, NAME_PARTS, Redactor
from reasoner.rewards.answers import after_thinking
from reasoner.rewards.endpoint import Endpoint, NoReplyError
from reasoner.rewards.pool import Call, Failure, Outcome
from reasoner.rewards.rubric import RIGHT_OR_WRONG, Grammar, Rubric
from reasoner.rewards.verdicts import Verdicts
from reasoner.words import plural

URL = re.compile(r"https?://[^\s@?#]+")
ENV_NAME = re.compile(r"[A-Za-z_]\w*")
KEY = re.compile(r"[!-~]+")  # what a header may carry


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class JudgeOptions:
    """`reward.parts.NAME.options` of a judge."""

    url: str = ""  # of the API, to which /chat/completions is added: http://localhost:8000/v1
    model: str = ""  # as the endpoint names it
    rubric: str = RIGHT_OR_WRONG  # with places for {completion}, {answer}, {prompt} or any column
    max_score: PositiveInt = 1  # the judge says 0 to max_score; the reward is that / max_score
    grammar: Grammar = "json"  # json: response_format holds the endpoint to it; line: a last line SCORE: N
    thinking: bool = False  # show the judge what stands in <think> too
    api_key_env: str | None = None  # the environment variable that holds the key
    concurrency: PositiveInt = 16  # requests in flight
    tries: PositiveInt = 4  # of one verdict
    request_s: PositiveFloat = 60.0  # for a reply; timeout_s is for the verdict, with all tries and waits
    reply_tokens: PositiveInt = 1024
    budget_requests: PositiveInt | None = None  # of this process; none: no limit
    budget_tokens: PositiveInt | None = None  # prompts and replies, as the endpoint counts them
    cache: str | None = "~/.cache/reasoner/judge.sqlite"  # of verdicts; none: in memory
    body: Node = pydantic.Field(default_factory=dict)  # more for the request's body; null takes a key out


@dataclass(slots=True, eq=False)
class Judge:
    """One part's judge. Its thread starts with the first call, and again after `close`; threads may share it.

    `where` is the key of its options, for errors. Raises RewardError for options that can't serve, a key that isn't
    there, and a cache that can't be opened.
    """

    where: str
    options: JudgeOptions
    rubric: Rubric = field(init=False)
    endpoint: Endpoint = field(init=False)
    known: int = field(default=0, init=False)  # verdicts that needed no request of their own
    _redactor: Redactor = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _work: "_Work | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        options = self.options
        if not URL.fullmatch(options.url):
            raise RewardError(
                f"{self.where}.url is {'no address of an API' if options.url else 'empty'}: give one such as "
                "http://localhost:8000/v1, without a password or a query"
            )
        if not options.model:
            raise RewardError(f"{self.where}.model is empty: name the model as the endpoint does")
        key = _key(self.where, options.api_key_env)
        url = options.url.rstrip("/") + "/chat/completions"
        self.rubric = Rubric(options.rubric, options.max_score, options.grammar)
        self.endpoint = Endpoint(
            url, key, options.tries, options.request_s, options.budget_requests, options.budget_tokens
        )
        self._redactor = Redactor([key] if key else [])
        self._verdicts().close()

    @property
    def cost(self) -> str:
        """What it has asked so far."""
        count, tokens = self.endpoint.requests, self.endpoint.tokens
        asked = f"{plural(count, 'request')} to {self.options.model}, {plural(tokens, 'token')}"
        return f"{asked}; {plural(self.known, 'verdict')} needed none"

    def submit(self, call: Call) -> Future[Outcome]:
        """The verdict on the call's completion as a share of max_score, or a Failure."""
        with self._lock:
            if self._work is None:
                self._work = _Work(self._verdicts())
            return asyncio.run_coroutine_threadsafe(self._outcome(call, self._work), self._work.loop)

    def close(self) -> None:
        """End the thread and the connections; calls in flight are cancelled."""
        with self._lock:
            if self._work is not None:
                self._work.end(self.endpoint)
                self._work = None

    def _verdicts(self) -> Verdicts:
        cache = self.options.cache
        return Verdicts(Path(cache).expanduser() if cache else None, f"{self.where}.cache")

    async def _outcome(self, call: Call, work: "_Work") -> Outcome:
        values = dict(call.arguments)
        if missing := sorted(self.rubric.names - values.keys()):
            return Failure(f"the row has no '{missing[0]}', for which the rubric has a place")
        if not self.options.thinking:
            said = after_thinking(values["completion"])
            if said is None:
                return 0.0  # it never came to an answer
            values["completion"] = said.strip()
        request = sha256(json.dumps([self.endpoint.url, self._body(values, "")], sort_keys=True).encode()).hexdigest()
        asked = work.asked.get(request)
        if asked is None:
            asked = work.asked[request] = asyncio.ensure_future(self._ask(request, values, call.timeout_s, work))
            asked.add_done_callback(lambda _: work.asked.pop(request))
        else:
            self.known += 1
        return await asyncio.shield(asked)  # another caller may wait for it too

    async def _ask(self, request: str, values: Mapping[str, Any], timeout_s: float, work: "_Work") -> Outcome:
        async with work.room:
            if work.refused:
                return Failure(work.refused)
            try:
                score = work.verdicts.get(request)
                if score is not None:
                    self.known += 1
                    return score / self.options.max_score
                until = work.loop.time() + timeout_s
                async with asyncio.timeout_at(until):
                    reply = await self.endpoint.reply(self._body(values, secrets.token_hex(8)), until)
                work.widen(self.options.concurrency)
                score = self.rubric.score(reply)
                work.verdicts.put(request, score)
                return score / self.options.max_score
            except TimeoutError:
                reason = f"timed out after {timeout_s:g} s"
            except sqlite3.Error as error:
                reason = f"{self.where}.cache={self.options.cache} fails: {error}"
            except (NoReplyError, ValueError) as error:
                reason = str(error)
            reason = self._redactor.text(reason)
            if (
                not work.widened
            ):  # nothing has worked so far: a wrong address or key is asked once, not a thousand times
                work.refused = reason
            return Failure(reason)

    def _body(self, values: Mapping[str, Any], mark: str) -> dict[str, Any]:
        body = {
            "model": self.options.model,
            "messages": self.rubric.messages(values, mark),
            "temperature": 0,
            "max_tokens": self.options.reply_tokens,
            **self.rubric.response_format(),
            **self.options.body,
        }
        return {name: value for name, value in body.items() if value is not None}


class _Work:
    """The thread of a judge with what lives in it: an event loop, the verdicts' file and the calls in flight."""

    def __init__(self, verdicts: Verdicts):
        self.verdicts = verdicts
        self.asked: dict[str, asyncio.Task[Outcome]] = {}  # equal requests are sent once
        self.room = asyncio.Semaphore(1)  # the first request goes alone
        self.widened = False
        self.refused = ""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def widen(self, concurrency: int) -> None:
        """Let as many in as there may be, now that one came through."""
        if not self.widened:
            self.widened = True
            for _ in range(concurrency - 1):
                self.room.release()

    def end(self, endpoint: Endpoint) -> None:
        """Cancel what is in flight and end the thread."""
        asyncio.run_coroutine_threadsafe(self._cancel(endpoint), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.verdicts.close()

    async def _cancel(self, endpoint: Endpoint) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await endpoint.close()


def _key(where: str, name: str | None) -> str | None:
    """The key in the environment variable of this name, which must be one whose values a run keeps out of its files."""
    if name is None:
        return None
    if not ENV_NAME.fullmatch(name):
        raise RewardError(f"{where}.api_key_env must be the name of an environment variable, not the key itself")
    if not any(part in name.upper() for part in NAME_PARTS):
        raise RewardError(
            f"{where}.api_key_env={name}: choose a name with KEY, TOKEN, SECRET or PASSWORD in it, whose value is kept "
            "out of everything that a run writes"
        )
    key = os.environ.get(name, "").strip()
    if not key:
        raise RewardError(f"{where}.api_key_env={name}: there is no such environment variable: export {name}=...")
    if not KEY.fullmatch(key) or len(key) < MIN_LENGTH:
        raise RewardError(
            f"{where}.api_key_env={name}: its value is no key: {MIN_LENGTH} or more characters without spaces"
        )
    return key
