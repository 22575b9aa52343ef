"""An OpenAI-compatible endpoint on this machine: what a judge asks it is kept, and the test says what it answers."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A request's body -> (status, headers, the reply's body); a str stands for a message of that text.
Answer = Callable[[Mapping[str, Any]], str | tuple[int, Mapping[str, str], Any]]
TOKENS = 100  # of each completion, prompt and reply together


@dataclass
class Endpoint:
    """What was asked of it."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the 5 of the library a connection is dropped where many come at once


@contextmanager
def chat_endpoint(answer: Answer) -> Iterator[Endpoint]:
    """A server that answers POST /v1/chat/completions until the block ends."""
    lock, at_once = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, at_once)
                endpoint.bodies.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
            answered = answer(body) if self.path == "/v1/chat/completions" else (404, {}, {"error": "no such path"})
            with lock:
                at_once -= 1
            if isinstance(answered, str):
                answered = (200, {}, completion(answered))
            status, headers, reply = answered
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str | None) -> dict[str, Any]:
    """A reply's body."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total_tokens": TOKENS}}


def block(body: Mapping[str, Any], name: str) -> str:
    """What stands between the tags of this name, found as a careful judge does: by the mark in the system's message."""
    mark = re.search(r"tags with the mark (\w+)", body["messages"][0]["content"])
    assert mark
    asked = body["messages"][1]["content"]
    opening, closing = f"<{name} {mark[1]}>\n", f"\n</{name} {mark[1]}>"
    assert asked.count(opening) == asked.count(closing) == 1
    return asked[asked.index(opening) + len(opening) : asked.index(closing)]


def right_or_wrong(body: Mapping[str, Any]) -> str:
    """A judge that finds an answer right if it is the reference."""
    return json.dumps({"score": int(block(body, "completion") == block(body, "answer"))})
