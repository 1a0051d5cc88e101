"""A client of OpenAI-compatible servers: several in turn, bounded time, retries, and a key that no message holds.

Neither what a server answers nor its reason phrase goes into a message: a server may echo the key. Redirects are not
followed and proxies not used: the key goes to the named servers alone.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, responses
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

MAX_WAIT = 60.0  # seconds between two attempts, whatever Retry-After says
MAX_ANSWER = 2**20  # bytes
EXPECTED_URL = "http://host:port, without a password, that answers GET /v1/models"


class RequestFailed(Exception):
    """A request without a usable answer; the text names the server and why, and never the key."""

    def __init__(self, server: "Server", why: str, again: bool, retry_after: float | None = None) -> None:
        super().__init__(f"{server}: {why}")
        self.again = again
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is; `prefix` is the path in front of /v1."""

    scheme: str
    host: str
    port: int | None
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{f':{self.port}' if self.port else ''}{self.prefix}"


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
        """`timeout`: seconds an attempt may take; `backoff`: seconds before the second, doubled before each other."""
        self._servers, self._key = servers, key
        self._timeout, self._retries, self._backoff = timeout, retries, backoff

    def ask(self, body: Mapping[str, Any], turn: int) -> str:
        """The text that the server whose turn it is answers to a chat; after a failure the next one is asked.

        Raises:
            RequestFailed: no attempt gave an answer, or one can't be expected.
        """
        attempt = 0
        while True:
            server = self._servers[(turn + attempt) % len(self._servers)]
            try:
                return _text(server, self._request(server, "POST", "/v1/chat/completions", body))
            except RequestFailed as failure:
                if not failure.again or attempt == self._retries:
                    raise
                wait = self._backoff * 2**attempt if failure.retry_after is None else failure.retry_after
                time.sleep(min(wait, MAX_WAIT))
                attempt += 1

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
            logger.warning("%s; goes on with the others", line)
        return names

    def _read(self, response: HTTPResponse) -> bytes:
        """What the server sends within the timeout: one that sends a byte now and then is as good as silent."""
        content, deadline = b"", time.monotonic() + self._timeout
        while len(content) < MAX_ANSWER and (part := response.read1(MAX_ANSWER)):
            content += part
            if time.monotonic() > deadline:
                raise TimeoutError("the answer did not end")
        return content

    def _request(self, server: Server, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        kind = HTTPSConnection if server.scheme == "https" else HTTPConnection
        connection = kind(server.host, server.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.request(method, server.prefix + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = self._read(response)
        except HTTPException as error:  # its text can be a line that the server sent
            raise RequestFailed(server, f"{type(error).__name__}, the connection broke", again=True) from None
        except OSError as error:
            raise RequestFailed(server, f"{type(error).__name__}: {error}", again=True) from None
        finally:
            connection.close()
        if response.status != 200:
            again = response.status in (408, 429) or response.status >= 500
            raise RequestFailed(server, _status(response.status), again, _seconds(response.getheader("Retry-After")))
        try:
            return json.loads(content)
        except (ValueError, RecursionError):  # also where the connection ended early
            raise RequestFailed(server, "an answer that is not whole JSON", again=True) from None


def _text(server: Server, answer: Any) -> str:
    try:
        choice = answer["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed(server, "an answer without choices[0].message.content", again=False) from None
    if not isinstance(text, str) or end == "length":  # what is cut may lack the digits after a point
        raise RequestFailed(server, "an answer that was cut off, or has no text; raise max_tokens", again=False)
    return text


def _status(status: int) -> str:
    """The status in the standard's words: the server's own reason phrase is the server's text."""
    return f"HTTP {status} {responses.get(status, '')}" + ("; is the key right?" if status in (401, 403) else "")


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
