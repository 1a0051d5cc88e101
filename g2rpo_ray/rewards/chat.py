"""A client of OpenAI-compatible servers, with several servers, time limits and retries. No message contains the key.

HTTP is httpx's, retries are tenacity's. The limits of the time and size of a whole answer, and Retry-After, are this
module's.

Messages contain neither a server's answer nor its reason phrase, since a server may echo the key. Redirects are not
followed and proxies not used, so that only the named servers receive the key.
"""

import itertools
import json
import logging
import math
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

logger = logging.getLogger(__name__)

MAX_WAIT_S = 60.0  # between two attempts, also with Retry-After
MAX_ANSWER_BYTES = 2**20
EXPECTED_URL = "http://host:port, without a password, that answers GET /v1/models"
END_OF_TURN = re.compile(r"(?:\s*(?:<\|[a-z_]+\|>|</s>|<end_of_turn>|<eos>))+\s*\Z", re.IGNORECASE)
NO_REASONING = "serve the model without --reasoning-parser, or raise max_tokens"
T = TypeVar("T")


class RequestFailed(Exception):
    """A request without a usable answer. The text has the server and the reason, never the key.

    Attributes:
        retry: True if another attempt may succeed.
        retry_after: seconds to wait that the server asked for.
    """

    def __init__(self, server: "Server", why: str, retry: bool, retry_after: float | None = None) -> None:
        super().__init__(f"{server}: {why}")
        self.retry = retry
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Server:
    """The address of a server; `prefix` is the path before /v1."""

    scheme: str
    host: str
    port: int | None
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{f':{self.port}' if self.port else ''}{self.prefix}"


Read = Callable[[Server, Any], T]
"""Converts a server's JSON answer to a result, or raises RequestFailed."""


def parse_url(url: Any) -> Server:
    """The server at `url`, with or without a final /v1. ValueError in one line, without a password in the URL."""
    try:
        parts = urlsplit(url if isinstance(url, str) and url.isascii() else "")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is not a number, a bracket that is not closed
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc:
        given = "one with a user or password" if isinstance(url, str) and "@" in url else repr(url)
        raise ValueError(f"base_urls: {given} given; expected {EXPECTED_URL}; give a key by api_key_env")
    return Server(parts.scheme, host, port, parts.path.rstrip("/").removesuffix("/v1"))


class ChatClient:
    """Sends requests to the servers in turn. Any number of threads may use it."""

    def __init__(self, servers: Sequence[Server], key: str, timeout: float, retries: int, backoff: float) -> None:
        """
        Args:
            servers: used in turn.
            key: sent as bearer token; "" for none.
            timeout: seconds for each of: connecting, waiting for the answer, receiving it.
            retries: attempts after the first.
            backoff: seconds before the second attempt, doubled for each further one.
        """
        self.max_ask_s = (1 + retries) * 3 * timeout + retries * MAX_WAIT_S
        """Maximum seconds of `ask`, with all attempts and waits."""
        self._servers, self._timeout, self._backoff = servers, timeout, backoff
        for library in ("httpx", "httpcore"):  # at lower levels they log answers, which may contain the key
            logging.getLogger(library).setLevel(logging.WARNING)
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            headers={"Accept-Encoding": "identity", **authorization},
            timeout=timeout,
            follow_redirects=False,
            trust_env=False,  # no proxies
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),  # an idle one may be closed
        )
        self._attempts = Retrying(
            stop=stop_after_attempt(1 + retries), wait=self._wait, reraise=True,
            retry=retry_if_exception(lambda error: isinstance(error, RequestFailed) and error.retry),
        )  # fmt: skip

    def ask(self, body: Mapping[str, Any], turn: int, read: "Read[T]") -> T:
        """The result of `read` on the answer of a server. After a failure the next server is used.

        Args:
            body: of the request, as JSON.
            turn: number of the request, which decides the first server.
            read: converts the answer.

        Raises:
            RequestFailed: all attempts failed, or the first failure cannot be retried.
        """
        turns = itertools.count(turn)

        def once() -> T:
            server = self._servers[next(turns) % len(self._servers)]
            return read(server, self._request(server, "POST", "/v1/chat/completions", body))

        return self._attempts.copy()(once)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: those that the server asked for, else twice the last ones."""
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after if isinstance(failure, RequestFailed) else None
        return min(self._backoff * 2 ** (state.attempt_number - 1) if asked is None else asked, MAX_WAIT_S)

    def models(self) -> list[str]:
        """Names of the served models, the first server's first. Logs a warning for each server without an answer.

        Raises:
            ValueError: one line; no server can be used.
        """
        names: list[str] = []
        failures: list[str] = []
        for server in self._servers:
            try:
                listed = self._request(server, "GET", "/v1/models")
                names += [str(model["id"]) for model in listed["data"]]
            except RequestFailed as failure:
                failures.append(str(failure))
            except (KeyError, TypeError):
                failures.append(f"{server}: no list of models in its answer")
        if len(failures) == len(self._servers):
            raise ValueError(f"base_urls: no server can be used ({'; '.join(failures)}); expected {EXPECTED_URL}")
        for line in failures:
            logger.warning("%s; the other servers are used", line)
        return names

    def _read(self, response: httpx.Response) -> bytes:
        """The answer of the server, within the timeout also if it arrives slowly."""
        content, deadline = b"", time.monotonic() + self._timeout
        for part in response.iter_raw():
            content += part
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the answer did not end")
            if len(content) >= MAX_ANSWER_BYTES:
                break
        return content

    def _request(self, server: Server, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        url = httpx.URL(scheme=server.scheme, host=server.host, port=server.port, path=server.prefix + path)
        try:
            with self._http.stream(method, url, json=body) as response:
                content = self._read(response)
        except (httpx.TimeoutException, httpx.ConnectError) as error:
            raise RequestFailed(server, f"{type(error).__name__}: {error}", retry=True) from None
        except httpx.HTTPError as error:  # its text may contain the server's
            raise RequestFailed(server, f"{type(error).__name__}, the connection broke", retry=True) from None
        if response.status_code != 200:
            status, after = response.status_code, _seconds(response.headers.get("Retry-After"))
            raise RequestFailed(server, _status(status), status in (408, 429) or status >= 500, after)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):  # also where the connection ended early
            raise RequestFailed(server, "an answer that is not whole JSON", retry=True) from None


def read_text(server: Server, answer: Any) -> str:
    """The text of an answer, without CR and final special tokens. RequestFailed if it has none or is truncated."""
    try:
        choice = answer["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed(server, "an answer without choices[0].message.content", retry=False) from None
    _refuse_reasoning(server, choice["message"])
    if end == "length":  # digits after a decimal point may be missing
        raise RequestFailed(server, "a truncated answer; raise max_tokens", retry=False)
    if not isinstance(text, str):
        raise RequestFailed(server, "an answer without text in choices[0].message.content", retry=False)
    return END_OF_TURN.sub("", text.replace("\r\n", "\n"))


def _refuse_reasoning(server: Server, message: Any) -> None:
    """Raises RequestFailed if the server's reasoning parser took the whole answer for reasoning."""
    for field in ("reasoning_content", "reasoning"):
        if isinstance(message, Mapping) and message.get(field) and not message.get("content"):
            raise RequestFailed(server, f"an answer that is only in {field}; {NO_REASONING}", retry=False)


def read_first_token(server: Server, answer: Any) -> dict[str, float]:
    """The probabilities of the likeliest first tokens of an answer, by text. RequestFailed if none are listed."""
    found: dict[str, float] = {}
    try:
        _refuse_reasoning(server, answer["choices"][0].get("message"))
        for listed in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[listed["token"]] = found.get(listed["token"], 0.0) + math.exp(min(0.0, listed["logprob"]))
    except (KeyError, IndexError, TypeError, AttributeError):
        found = {}
    if not found:
        why = "an answer without top_logprobs; serve a model that lists them (vLLM: --max-logprobs 20)"
        raise RequestFailed(server, why, retry=False)
    return found


def _status(status: int) -> str:
    """The status with the standard's reason phrase, because the server's own may echo the key."""
    return f"HTTP {status} {httpx.codes.get_reason_phrase(status)}" + (
        "; is the key right?" if status in (401, 403) else ""
    )


def _seconds(retry_after: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, a number or a date; None if it is neither."""
    try:
        seconds = float(retry_after or "nan")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(retry_after)).timestamp() - time.time()
        except ValueError:
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
