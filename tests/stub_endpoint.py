"""A chat-completions server for tests: what it says is a function of what it is asked.

By hand: `python tests/stub_endpoint.py 8123 longer` answers every question with the longer answer.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], str]
Body = dict[str, Any]


@dataclass
class Stub:
    """The server; `answer` may be replaced at any time.

    Attributes:
        answer: body of a question -> status, headers, text.
        asked: the bodies so far, in order of arrival.
        keys: their Authorization headers.
        paths: all that was requested.
        pause: seconds before each byte of a reply.
    """

    answer: Callable[[Body], Reply]
    url: str = ""
    models_status: int = 200
    pause: float = 0.0
    asked: list[Body] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def says(text: str, tokens: tuple[int, int] = (100, 5)) -> Reply:
    """A reply in the shape that clients expect."""
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    choices = [{"message": {"role": "assistant", "content": text}}]
    return 200, {}, json.dumps({"choices": choices, "usage": usage})


def answers_in(body: Body) -> tuple[str, str]:
    """Answer A and answer B of a question."""
    shown = body["messages"][-1]["content"]
    found = re.search(r"## Answer A\n(.*)\n\n## Answer B\n(.*)", shown, re.DOTALL)
    assert found, shown
    return found[1], found[2]


def longer(body: Body) -> Reply:
    """The longer answer is the better one."""
    a, b = map(len, answers_in(body))
    return says("[[C]]" if a == b else "[[A]]" if a > b else "[[B]]")


@contextmanager
def serving(answer: Callable[[Body], Reply] = longer, port: int = 0) -> Iterator[Stub]:
    """A server on this machine while the block runs."""
    stub, lock = Stub(answer), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.paths.append(self.path)
            self._send(stub.models_status, {}, "{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.paths.append(self.path)
                stub.asked.append(body)
                stub.keys.append(self.headers.get("Authorization"))
            self._send(*stub.answer(body))

        def _send(self, status: int, headers: dict[str, str], text: str) -> None:
            data = text.encode()
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [bytes([b]) for b in data] if stub.pause else [data]:
                    time.sleep(stub.pause)
                    self.wfile.write(part)
            except OSError:  # the client went away
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


WAYS: dict[str, Callable[[Body], Reply]] = {
    "longer": longer,
    "first": lambda body: says("[[A]]"),
    "garbage": lambda body: says("As a language model, I like both."),
    "broken": lambda body: (500, {}, "out of order"),
}

if __name__ == "__main__":
    with serving(WAYS[sys.argv[2]], int(sys.argv[1])) as running:
        print(running.url, flush=True)
        threading.Event().wait()
