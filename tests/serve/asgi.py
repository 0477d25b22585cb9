"""Requests to an ASGI application in this process, also such as no client would send."""

import asyncio
import contextlib
import json
from dataclasses import dataclass
from urllib.parse import quote, urlencode


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)

    @property
    def error(self):
        """The line of a refusal, which holds nothing else."""
        (line,) = self.json.values()
        assert list(self.json) == ["error"]
        assert "\n" not in line
        return line


@contextlib.asynccontextmanager
async def lifespan(app):
    """The application between its start and its end."""
    told, replies = asyncio.Queue(), asyncio.Queue()
    running = asyncio.create_task(app({"type": "lifespan"}, told.get, replies.put))
    await told.put({"type": "lifespan.startup"})
    assert (await replies.get())["type"] == "lifespan.startup.complete"
    try:
        yield app
    finally:
        await told.put({"type": "lifespan.shutdown"})
        assert (await replies.get())["type"] == "lifespan.shutdown.complete"
        await running


async def ask(app, path, *, body=b"", headers=(), method=None, query=(), ends=True):
    """One request.

    Args:
        body: bytes, or chunks of them.
        headers: names and values; bytes go as they are.
        ends: False hangs up behind the body; None sends nothing more, ever.
    """
    queried = urlencode(query, quote_via=quote) if not isinstance(query, bytes) else query
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method or ("POST" if body else "GET"),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": queried if isinstance(queried, bytes) else queried.encode(),
        "root_path": "",
        "headers": [(_bytes(name).lower(), _bytes(value)) for name, value in dict(headers).items()],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
    }
    chunks = iter([body] if isinstance(body, bytes) else body)
    sent = []

    async def receive():
        chunk = next(chunks, None)
        if chunk is not None:
            return {"type": "http.request", "body": chunk, "more_body": True}
        if ends is None:
            await asyncio.Event().wait()
        if ends:
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    # What the server does not expect is answered, and then raised for the log.
    with contextlib.suppress(Exception):
        await app(scope, receive, send)
    start, *rest = sent
    fields = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], fields, b"".join(each.get("body", b"") for each in rest))


def multipart(files, boundary="edge"):
    """Headers and body of some files by name."""
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="picture"; filename="%s"\r\n\r\n%s\r\n'
        % (boundary.encode(), name.encode(), content)
        for name, content in files
    ]
    body = b"".join(parts) + b"--%s--\r\n" % boundary.encode()
    return {"content-type": f"multipart/form-data; boundary={boundary}"}, body


def _bytes(text):
    return text if isinstance(text, bytes) else text.encode()
