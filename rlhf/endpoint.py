"""An OpenAI-compatible chat-completions endpoint: asked with retries, and counted.

The key goes into the Authorization header and nowhere else: no file, no log, no error message, no
redirect to another host.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from rlhf.errors import ConfigError

RETRIES = 5  # after the first try
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds, doubled from try to try
LONGEST_ASKED_WAIT = 120.0  # of a Retry-After header
GIVE_UP = 5  # questions in a row that failed after all their tries
LARGEST = 4_000_000  # bytes of an answer
TRANSIENT = (408, 409, 425, 429)  # and all of 5xx
MAX_TOKENS = 2048  # of a reply, thinking included


@dataclass(frozen=True)
class Usage:
    """What asking took.

    Attributes:
        calls: requests that were sent, retries included.
        retries: of those, the ones sent again.
        failures: questions that got no reply after all tries, or were not asked any more.
        prompt_tokens, completion_tokens: as the endpoint counted them; one that timed out is not in
            them, and may have cost something.
    """

    calls: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Failed(Exception):
    """One try failed; `again`: another may not; `wait`: seconds that the endpoint asked for."""

    def __init__(self, why: str, *, again: bool, wait: float | None = None) -> None:
        super().__init__(why)
        self.again, self.wait = again, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key elsewhere, so it is an error like any other status."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """Asks one model; safe to use from several threads.

    Args:
        url: such as http://localhost:8000/v1; /chat/completions is added.
        model: its name there.
        key: sent as a bearer token; None: no such header.
        key_variable: where the key came from, for messages.
        timeout: seconds for one reply.

    Raises:
        ConfigError: no http(s) URL, one with a password in it, or a key that no header can hold.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
    ) -> None:
        self.url, self.model = checked_url(url), model
        self.timeout = timeout
        self.problem = ""  # what the last failure was
        self._key, self._key_variable = _checked_key(key, key_variable), key_variable
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._optional: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
        self._usage, self._failed_in_a_row = Usage(), 0
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def reach(self) -> None:
        """Refuse an address where nothing answers, and a key that is not taken.

        Raises:
            ConfigError: so.
        """
        try:
            self._send("/models", None, timeout=min(self.timeout, 15.0))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 401:
                raise ConfigError(
                    f"--judge-url={self.url}: the key in {self._key_variable} is not accepted "
                    "(401). Put a valid one there."
                    if self._key
                    else f"--judge-url={self.url}: it asks for a key (401). Put it into the "
                    f"environment variable {self._key_variable}, or name another one with "
                    "--judge-key-env."
                ) from None
        except (OSError, http.client.HTTPException, _Failed) as error:
            raise ConfigError(
                f"--judge-url={self.url}: no endpoint answers there: {self._clean(_reason(error))}."
                " Start the server, or give the address up to /v1."
            ) from None

    def ask(self, messages: list[dict[str, str]]) -> str | None:
        """The reply; None where there is none after all tries, or the endpoint was given up."""
        for attempt in range(RETRIES + 1):
            if self._stopped.is_set():
                break
            try:
                reply = self._try(messages, again=attempt > 0)
            except _Failed as failed:
                self.problem = self._clean(str(failed))
                if not failed.again or attempt == RETRIES:
                    break
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.75, 1.25)
                self._stopped.wait(wait if failed.wait is None else failed.wait)
            else:
                with self._lock:
                    self._failed_in_a_row = 0
                return reply
        with self._lock:
            self._usage = replace(self._usage, failures=self._usage.failures + 1)
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= GIVE_UP:
                self._stopped.set()
        return None

    @property
    def given_up(self) -> bool:
        """Whether so many questions failed in a row that no more are asked."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Ask nothing more; who waits for another try wakes up."""
        self._stopped.set()

    def take_usage(self) -> Usage:
        """What asking took since this was last called."""
        with self._lock:
            usage, self._usage = self._usage, Usage()
        return usage

    # ------------------------------------------------------------ one try

    def _try(self, messages: list[dict[str, str]], *, again: bool) -> str:
        with self._lock:
            self._usage = replace(
                self._usage, calls=self._usage.calls + 1, retries=self._usage.retries + again
            )
            optional = dict(self._optional)
        body = {"model": self.model, "messages": messages, **optional}
        try:
            text = self._send("/chat/completions", body, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            raise self._status(error, optional) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(_reason(error), again=True) from None
        try:
            reply = json.loads(text)
            content = reply["choices"][0]["message"].get("content") or ""
            spent = reply.get("usage") or {}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Failed(
                f"its reply is no chat completion: {self._clean(text)[:120]!r}", again=True
            ) from None
        with self._lock:
            self._usage = replace(
                self._usage,
                prompt_tokens=self._usage.prompt_tokens + _count(spent, "prompt_tokens"),
                completion_tokens=self._usage.completion_tokens
                + _count(spent, "completion_tokens"),
            )
        return self._without_key(str(content))

    def _status(self, error: urllib.error.HTTPError, sent: dict[str, Any]) -> _Failed:
        """What a status other than 2xx means."""
        try:
            said = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        wait = _seconds(error.headers.get("Retry-After"))
        error.close()
        why = f"HTTP {error.code}: {self._clean(said)[:200]}".rstrip(": ")
        if error.code == 400 and (name := next((n for n in sent if f"{n}" in said), None)):
            with self._lock:  # some models take no such setting
                self._optional.pop(name, None)
                if name == "max_tokens":
                    self._optional["max_completion_tokens"] = MAX_TOKENS
            return _Failed(why, again=True, wait=0.0)
        return _Failed(why, again=error.code in TRANSIENT or error.code >= 500, wait=wait)

    def _send(self, path: str, body: Mapping[str, Any] | None, *, timeout: float) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "rlhf"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        deadline = time.monotonic() + timeout
        with self._opener.open(request, timeout=timeout) as reply:
            received = b""
            while part := reply.read1(65536):
                received += part
                if len(received) > LARGEST:
                    raise _Failed(f"its reply is longer than {LARGEST:,} bytes", again=False)
                if time.monotonic() > deadline:  # a timeout of the socket is one between two bytes
                    raise TimeoutError(f"no whole reply in {timeout:g} s")
        return received.decode("utf-8", "replace")

    def _clean(self, text: str) -> str:
        """Without the key, which some endpoints repeat, and without what could steer a terminal."""
        return "".join(c if c.isprintable() else " " for c in self._without_key(text))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def checked_url(url: str) -> str:
    """The address to which /chat/completions is added.

    Raises:
        ConfigError: it is none.
    """
    if any(sign in url for sign in "@?#"):
        raise ConfigError(
            "--judge-url: it holds a name, a password or a query, which would be written down. Put "
            "the key into an environment variable (--judge-key-env)."
        )
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        str(parts.hostname).encode("idna")  # as the socket will
    except ValueError:  # half an IPv6 address, a port or a host that is none
        sound = False
    if not sound or not (url.isascii() and url.isprintable()) or " " in url:
        raise ConfigError(f"--judge-url={url}: no address. Write http://HOST:PORT/v1.")
    return url.rstrip("/").removesuffix("/chat/completions")


def price(usage: Usage, price_in: float | None, price_out: float | None) -> float | None:
    """What was paid, from prices per million tokens; None where no price is known."""
    if price_in is None and price_out is None:
        return None
    spent = usage.prompt_tokens * (price_in or 0) + usage.completion_tokens * (price_out or 0)
    return spent / 1e6


def _checked_key(key: str | None, variable: str) -> str | None:
    key = key.strip() if key else None
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{variable}: what it holds is no key: it has a space or a line end.")
    return key or None


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header; a date is not understood."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_ASKED_WAIT) if math.isfinite(seconds) else None


def _count(spent: Any, name: str) -> int:
    value = spent.get(name) if isinstance(spent, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
