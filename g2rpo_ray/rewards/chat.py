"""A client of OpenAI-compatible servers, with several servers, time limits and retries. No message contains the key.

HTTP is httpx's, retries are tenacity's. What neither has is by hand: a bound on the time and the size of a whole
answer, and Retry-After.

Neither what a server answers nor its reason phrase goes into a message: a server may echo the key. Redirects are not
followed and proxies not used: the key goes to the named servers alone.
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

MAX_WAIT = 60.0  # seconds between two attempts, whatever Retry-After says
MAX_ANSWER = 2**20  # bytes
EXPECTED_URL = "http://host:port, without a password, that answers GET /v1/models"
END_OF_TURN = re.compile(r"(?:\s*(?:<\|[a-z_]+\|>|</s>|<end_of_turn>|<eos>))+\s*\Z", re.IGNORECASE)
NO_REASONING = "serve the model without --reasoning-parser, or raise max_tokens if it was still thinking"
T = TypeVar("T")


class RequestFailed(Exception):
    """A request without a usable answer; the text names the server and why, and never the key."""

    def __init__(self, server: "Server", why: str, again: bool, retry_after: float | None = None) -> None:
        super().__init__(f"{server}: {why}")
        self.again = again
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
"""Makes of a server's JSON answer what is wanted of it, or raises RequestFailed."""


def parse_url(url: Any) -> Server:
    """The server at `url`, with or without /v1 at its end. ValueError in one line, which repeats no password."""
    try:
        parts = urlsplit(url if isinstance(url, str) and url.isascii() else "")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, a bracket that is not closed
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc:
        given = "one with a user or password" if isinstance(url, str) and "@" in url else repr(url)
        raise ValueError(f"base_urls: {given} given; expected {EXPECTED_URL}; a key goes into the environment")
    return Server(parts.scheme, host, port, parts.path.rstrip("/").removesuffix("/v1"))


class ChatClient:
    """Asks the servers in turn; may be used by any number of threads."""

    def __init__(self, servers: Sequence[Server], key: str, timeout: float, retries: int, backoff: float) -> None:
        """`timeout`: seconds for each of connecting, the wait for an answer, and its end; `backoff`: seconds before the
        second attempt, doubled before each other."""
        self.longest_s = (1 + retries) * 3 * timeout + retries * MAX_WAIT
        """Seconds that `ask` may take, every attempt and every wait between them as long as it may be."""
        self._servers, self._timeout, self._backoff = servers, timeout, backoff
        for library in ("httpx", "httpcore"):  # below warnings they log what servers send, where a key may be
            logging.getLogger(library).setLevel(logging.WARNING)
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            headers={"Accept-Encoding": "identity", **authorization},
            timeout=timeout,
            follow_redirects=False,
            trust_env=False,  # no proxies
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),  # an idle one may be gone
        )
        self._attempts = Retrying(
            stop=stop_after_attempt(1 + retries), wait=self._wait, reraise=True,
            retry=retry_if_exception(lambda error: isinstance(error, RequestFailed) and error.again),
        )  # fmt: skip

    def ask(self, body: Mapping[str, Any], turn: int, read: "Read[T]") -> T:
        """The result of `read` on the answer of the next server; after a failure another server is asked.

        Raises:
            RequestFailed: no attempt gave an answer, or one can't be expected.
        """
        turns = itertools.count(turn)

        def once() -> T:
            server = self._servers[next(turns) % len(self._servers)]
            return read(server, self._request(server, "POST", "/v1/chat/completions", body))

        return self._attempts.copy()(once)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: what the server asked for, else twice as long as before the last one."""
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after if isinstance(failure, RequestFailed) else None
        return min(self._backoff * 2 ** (state.attempt_number - 1) if asked is None else asked, MAX_WAIT)

    def models(self) -> list[str]:
        """Names of the models that are served, the first server's first; a warning for each server that is silent.

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
        """The answer of the server within the timeout, also if it sends a byte now and then."""
        content, deadline = b"", time.monotonic() + self._timeout
        for part in response.iter_raw():
            content += part
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the answer did not end")
            if len(content) >= MAX_ANSWER:
                break
        return content

    def _request(self, server: Server, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        url = httpx.URL(scheme=server.scheme, host=server.host, port=server.port, path=server.prefix + path)
        try:
            with self._http.stream(method, url, json=body) as response:
                content = self._read(response)
        except (httpx.TimeoutException, httpx.ConnectError) as error:
            raise RequestFailed(server, f"{type(error).__name__}: {error}", again=True) from None
        except httpx.HTTPError as error:  # its text can be a line that the server sent
            raise RequestFailed(server, f"{type(error).__name__}, the connection broke", again=True) from None
        if response.status_code != 200:
            status, after = response.status_code, _seconds(response.headers.get("Retry-After"))
            raise RequestFailed(server, _status(status), status in (408, 429) or status >= 500, after)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):  # also where the connection ended early
            raise RequestFailed(server, "an answer that is not whole JSON", again=True) from None


def read_text(server: Server, answer: Any) -> str:
    """The text of an answer, without CR and without a token that ends it. RequestFailed where there is none, or it was
    cut off."""
    try:
        choice = answer["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed(server, "an answer without choices[0].message.content", again=False) from None
    _refuse_reasoning(server, choice["message"])
    if end == "length":  # what is cut may lack the digits after a point
        raise RequestFailed(server, "an answer that was cut off; raise max_tokens", again=False)
    if not isinstance(text, str):
        raise RequestFailed(server, "an answer without text in choices[0].message.content", again=False)
    return END_OF_TURN.sub("", text.replace("\r\n", "\n"))


def _refuse_reasoning(server: Server, message: Any) -> None:
    """Raise RequestFailed where a server's parser took all of an answer for what the model thinks before it answers."""
    for field in ("reasoning_content", "reasoning"):
        if isinstance(message, Mapping) and message.get(field) and not message.get("content"):
            raise RequestFailed(server, f"an answer that is only in {field}; {NO_REASONING}", again=False)


def read_first_token(server: Server, answer: Any) -> dict[str, float]:
    """The probabilities of an answer's likeliest first tokens, by their text. RequestFailed where none are listed."""
    found: dict[str, float] = {}
    try:
        _refuse_reasoning(server, answer["choices"][0].get("message"))
        for listed in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[listed["token"]] = found.get(listed["token"], 0.0) + math.exp(min(0.0, listed["logprob"]))
    except (KeyError, IndexError, TypeError, AttributeError):
        found = {}
    if not found:
        why = "an answer without top_logprobs; serve a model that lists them (vLLM: --max-logprobs 20)"
        raise RequestFailed(server, why, again=False)
    return found


def _status(status: int) -> str:
    """The status in the standard's words: the server's own reason phrase is the server's text."""
    return f"HTTP {status} {httpx.codes.get_reason_phrase(status)}" + (
        "; is the key right?" if status in (401, 403) else ""
    )


def _seconds(retry_after: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, a number or a date; None where it says nothing usable."""
    try:
        seconds = float(retry_after or "nan")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(retry_after)).timestamp() - time.time()
        except ValueError:
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
