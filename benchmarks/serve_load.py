"""A server under load, also of requests that are broken: answers, latency, memory.

    python -m benchmarks.serve_load [--seconds 20 --clients 16 --malformed 0.2]

Starts ``python -m lamp_fast.serve`` over a run of the tiny CLIP (zero-shot, digits) on this machine
and asks it from this process, which takes its own share of the cores: what is printed is a floor of
what the server does. Each client sends its next request when the last one is answered. A share of
them is malformed: no picture, a multipart body that ends early, one byte too many, no HTTP at all,
a client that hangs up. Memory is the server's own in each quarter of the time.
"""

import asyncio
import collections
import dataclasses
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from benchmarks.measuring.timing import device_name, this_device
from lamp_fast import cli
from lamp_fast.classifier import Classifier
from lamp_fast.data.sources import load_source
from lamp_fast.fields import Bounds, validate

# MiB; small, so that bodies beyond it cost this process little.
BODY = 1


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """Ask a server of its own from several clients at once."""

    seconds: Annotated[float, Bounds(1, 3600)] = 20.0
    """How long."""
    clients: Annotated[int, Bounds(1, 400)] = 16
    """How many at once."""
    malformed: Annotated[float, Bounds(0, 1)] = 0.2
    """The share of requests that are broken."""
    queue: Annotated[int, Bounds(1, 100_000)] = 256
    """The server's."""


def malformed_requests(picture: bytes) -> list[bytes]:
    """What a client may send, up to where it stops."""
    form = b"Content-Type: multipart/form-data; boundary=edge\r\n"
    part = b'--edge\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
    return [
        _post(b"Content-Type: image/png\r\n", b"no picture"),
        _post(b"Content-Type: image/png\r\n", picture[: len(picture) // 2]),
        _post(b"Content-Type: text/html\r\n", b"x"),
        _post(form, part + picture),
        _post(form, b"\0" * 1000),
        _post(b"Content-Type: image/png\r\n", b"x" * (BODY * 2**20 + 1)),
        _post(b"Content-Type: image/png\r\n", picture).replace(b"?top=1", b"?top=" + b"9" * 300),
        b"\x16\x03\x01\x02 no HTTP\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nhangs up",
    ]


def _post(headers: bytes, body: bytes) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST /classify?top=1 HTTP/1.1\r\nHost: x\r\n" + headers + length + b"\r\n" + body


class Client:
    """Asks over a connection that it keeps while it can."""

    def __init__(self, port: int) -> None:
        self.port, self.streams = port, None

    async def ask(self, request: bytes, *, hang_up: bool = False) -> int:
        """The status of the answer; 0 where the server closed the connection without one."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        try:
            writer.write(request)
            await writer.drain()
            if hang_up:
                self.close()
                return -1
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            return 0
        status = int(head.split()[1])
        if status != 200:  # what is left of a broken request is no next one
            self.close()
        return status

    def close(self) -> None:
        """The next request takes a new connection."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def load(port: int, server: int, config: LoadConfig, picture: bytes) -> dict:
    """Ask for some time.

    Returns:
        Statuses of well-formed and of malformed requests with their counts, seconds of each
        answered picture, and bytes of the server's memory over time.
    """
    good = _post(b"Content-Type: image/png\r\n", picture)
    broken = malformed_requests(picture)
    seen = {"good": collections.Counter(), "malformed": collections.Counter()}
    latencies, memory = [], []
    until = time.monotonic() + config.seconds

    async def client(number: int) -> None:
        draw, own = np.random.default_rng(number), Client(port)
        while time.monotonic() < until:
            if draw.random() < config.malformed:
                request = broken[draw.integers(len(broken))]
                status = await own.ask(request, hang_up=request.endswith(b"hangs up"))
                seen["malformed"][status] += 1
                continue
            begun = time.monotonic()
            status = await own.ask(good)
            seen["good"][status] += 1
            if status == 200:
                latencies.append(time.monotonic() - begun)
        own.close()

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(resident_bytes(server))
            await asyncio.sleep(0.2)

    await asyncio.gather(watch(), *map(client, range(config.clients)))
    return {**seen, "latencies": latencies, "memory": memory}


def resident_bytes(process: int) -> int:
    """Memory of a process, by the kernel."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


async def count_batches(port: int) -> float:
    """The mean number of pictures a batch, by the server's own metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    total, batches = (
        float(re.search(rf"^lamp_batch_pictures_{name} (\S+)", text, re.MULTILINE)[1])
        for name in ("sum", "count")
    )
    return total / max(batches, 1)


def main(config: LoadConfig) -> int:
    """Start, ask, print; 1 where the server died or a well-formed request was not served."""
    validate(config)
    scan = io.BytesIO()
    Image.fromarray(load_source("digits", None).test.arrays[0]).save(scan, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        Classifier.train(method="zeroshot", out=run)
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "lamp_fast.serve", str(run), "--port", "0"),
                *("--body", str(BODY), "--queue", str(config.queue)),
                *("--pictures", str(min(64, config.queue))),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            port = int(re.search(r":(\d+);", server.stdout.readline())[1])
            asyncio.run(_wait(port))
            result = asyncio.run(load(port, server.pid, config, scan.getvalue()))
            batch = asyncio.run(count_batches(port))
            died = server.poll() is not None
        finally:
            server.terminate()
            server.wait()
    latencies, memory = np.array(result["latencies"]), np.array(result["memory"])
    quarters = [int(part.max()) >> 20 for part in np.array_split(memory, 4)]
    told = {
        "device": device_name(this_device()),
        "clients": config.clients,
        "answers a second": round(len(latencies) / config.seconds, 1),
        "milliseconds, median and 99%": [
            round(1000 * float(each), 1) for each in np.quantile(latencies, [0.5, 0.99])
        ],
        "pictures a batch": round(batch, 2),
        "good": dict(sorted(result["good"].items())),
        "malformed": dict(sorted(result["malformed"].items())),
        "largest MiB by quarter": quarters,
        "died": died,
    }
    cli.say(json.dumps(told))
    return int(died or not set(result["good"]) <= {200, 503})


async def _wait(port: int) -> None:
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        except ConnectionError:
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    cli.run(LoadConfig, main, prog="python -m benchmarks.serve_load", description=__doc__)
