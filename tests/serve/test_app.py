"""The application over a real run: the answers of predict, and a line for whatever else comes."""

import asyncio
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from asgi import ask, lifespan, multipart
from PIL import Image

from lamp_fast import cli, predict
from lamp_fast.classifier import Classifier
from lamp_fast.data.sources import load_source
from lamp_fast.serve.settings import ServeConfig

for needed in ("starlette", "python_multipart", "prometheus_client"):
    pytest.importorskip(needed)

PNG = {"content-type": "image/png"}
HIERARCHY = "class,parity\nzero,even\none,odd\ntwo,even\nthree,odd\nfour,even\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def run(folder):
    Classifier.train(method="zeroshot", out=folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture(scope="module")
def levels(folder):
    file = folder / "levels.csv"
    file.write_text(HIERARCHY)
    return file


@pytest.fixture(scope="module")
def classifier(run, levels):
    return Classifier.load(run, device="cpu", hierarchy=levels)


@pytest.fixture(scope="module")
def files(folder):
    """Scans as PNG files, by name."""
    scans = load_source("digits", None).test
    place = folder / "pictures"
    place.mkdir()
    for index in range(5):
        Image.fromarray(scans.arrays[index]).save(place / f"{index}.png")
    return {file.name: file.read_bytes() for file in sorted(place.iterdir())}


@pytest.fixture(scope="module")
def picture(files):
    return files["0.png"]


def served(classifier, steps, **limits):
    """What ``steps`` makes of the application."""
    from lamp_fast.serve.app import build_app

    async def main():
        config = ServeConfig(run=".", **limits)
        app = build_app(classifier, classifier.trained_names, config)
        async with lifespan(app):
            return await asyncio.wait_for(steps(app), 60)

    return asyncio.run(main())


def asked(classifier, *arguments, limits=(), **keywords):
    """The reply to one request."""
    return served(classifier, lambda app: ask(app, *arguments, **keywords), **dict(limits))


class Gate:
    """Lets the classifier compute only once it is opened, and tells when it would."""

    def __init__(self, classifier, monkeypatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        original = classifier.classify_each

        def waiting(pictures, names, **options):
            if pictures:
                self.reached.set()
                assert self.opened.wait(20)
            return original(pictures, names, **options)

        monkeypatch.setattr(classifier, "classify_each", waiting)

    async def hold(self, app, picture):
        """A request that is computed until the gate is opened."""
        held = asyncio.create_task(ask(app, "/classify", body=picture, headers=PNG))
        assert await asyncio.to_thread(self.reached.wait, 20)
        return held


@pytest.mark.parametrize(
    ("query", "flags"),
    [
        ({}, []),
        ({"top": 2, "prior": '{"zero":1,"one":2,"two":3,"three":4,"four":5}'}, None),
        ({"level": "parity", "top": "1"}, ["--level", "parity", "--top", "1"]),
        ({"reject": "0.5"}, ["--reject", "0.5"]),
        ({"prior": "uniform"}, ["--prior", "uniform"]),
    ],
)
def test_answers_are_those_of_predict(query, flags, classifier, run, levels, files, tmp_path):
    """To the bit: one request of n pictures is a batch of n, as is ``--batch n``."""
    headers, body = multipart([*files.items(), ("no.png", b"no picture")])
    reply = asked(classifier, "/classify", body=body, headers=headers, query=query)
    assert reply.status == 200, reply.content
    if flags is None:
        shares = tmp_path / "shares.json"
        shares.write_text(query["prior"])
        flags = ["--top", "2", "--prior", str(shares)]
    place, out = run.parent / "pictures", tmp_path / "answers.json"
    arguments = [str(run), str(place), "--json", str(out), "--hierarchy", str(levels)]
    config = cli.parse(
        predict.PredictConfig, [*arguments, "--device", "cpu", "--batch", "6", *flags]
    )
    assert predict.main(config) == 0
    expected = json.loads(out.read_text())
    for row in expected["pictures"]:
        row["file"] = row["file"].removeprefix(f"{place}/")
    assert reply.json["pictures"] == expected["pictures"]
    for key in reply.json.keys() - {"pictures", "unreadable"}:
        assert reply.json[key] == expected[key]
    assert [row["file"] for row in reply.json["unreadable"]] == ["no.png"]
    assert reply.json["unreadable"][0]["reason"].startswith("'no.png': cannot be read as a picture")


def test_a_picture_as_the_body(classifier, picture):
    reply = asked(classifier, "/classify", body=picture, headers=PNG)
    (row,) = reply.json["pictures"]
    (expected,) = classifier.classify([picture])
    assert row["file"] == "body"
    assert [each["class"] for each in row["predictions"]] == list(expected.names)


def test_names_of_pictures_are_text_alone(classifier, picture, run):
    """A path of this machine is neither opened nor told."""
    inside = str(run / "config.json")
    headers, body = multipart([("../../etc/passwd", picture), (inside, b"x"), ("", picture)])
    reply = asked(classifier, "/classify", body=body, headers=headers)
    rows = reply.json["pictures"] + reply.json["unreadable"]
    assert [row["file"] for row in rows] == ["../../etc/passwd", "body", inside]
    assert "not a" in reply.json["unreadable"][0]["reason"]
    query = {"prior": inside}
    reply = asked(classifier, "/classify", body=picture, headers=PNG, query=query)
    assert (reply.status, "JSON object of shares" in reply.error) == (400, True)


def bomb():
    """A PNG of 10^10 pixels by its head."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


FORM = {"content-type": "multipart/form-data; boundary=edge"}
PART = b'--edge\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n'


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        ({"body": b""}, 415, "content-type ''"),
        ({"body": b"x", "headers": {"content-type": "text/html"}}, 415, "'text/html': expected im"),
        ({"body": b"", "headers": PNG}, 400, "'body': is empty"),
        ({"body": b"no picture", "headers": PNG}, 422, "'body': cannot be read as a picture (not"),
        ({"body": bomb(), "headers": PNG}, 422, "refused as a decompression bomb"),
        ({"body": b"x", "headers": PNG, "query": {"tpo": 1}}, 400, "parameter 'tpo': expected one"),
        ({"body": b"x", "headers": PNG, "query": b"top=1&top=2"}, 400, "'top': is there twice"),
        ({"body": b"x", "headers": PNG, "query": {"top": "two"}}, 400, "top 'two': expected a wh"),
        ({"body": b"x", "headers": PNG, "query": {"top": 0}}, 400, "top 0: expected at least 1"),
        ({"body": b"x", "headers": PNG, "query": {"top": "9" * 5000}}, 400, "top"),
        (
            {"body": b"x", "headers": PNG, "query": {"level": "genus"}},
            400,
            "one of parity",
        ),
        ({"body": b"x", "headers": PNG, "query": {"prior": '{"zero": 1}'}}, 400, "lacks class"),
        ({"body": b"x", "headers": PNG, "query": {"prior": "{" * 9000}}, 400, "not JSON"),
        ({"body": b"x", "headers": PNG, "query": {"coverage": "nan"}}, 400, "coverage nan"),
        ({"body": b"x", "headers": PNG, "query": {"reject": "often"}}, 400, "reject often"),
        ({"body": b"x", "headers": PNG, "query": {"coverage": 0.9}}, 400, "coverage"),
        ({"body": b"x", "headers": PNG, "query": b"%ff%00=%"}, 400, "parameter"),
        ({"body": b"x" * 5000, "headers": PNG}, 413, "the body has more than 4,194 bytes"),
        ({"body": [b"x" * 999] * 9, "headers": PNG}, 413, "the body has more than"),
        ({"body": b"x", "headers": {**PNG, "content-length": "9" * 99}}, 413, "the body has more"),
        ({"body": b"x", "headers": {**PNG, "content-length": "-1"}}, 400, "content-length '-1'"),
        ({"body": b"x", "headers": PNG, "ends": False}, 400, "the request ended early"),
        ({"body": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing bound"),
        ({"body": b"no edge at all", "headers": FORM}, 400, "multipart: "),
        ({"body": PART + b"\r\nhalf a pict", "headers": FORM}, 400, "multipart: ends early"),
        ({"body": PART + b"A: b\r\n" * 99 + b"\r\n\r\n", "headers": FORM}, 400, "multipart: "),
        ({"body": PART + b"A: " + b"b" * 4000, "headers": FORM}, 400, "multipart: "),
        ({"body": b"--edge\r\n\r\nx\r\n--edge--", "headers": FORM}, 400, 'field "name" must be'),
        ({"body": b"--edge--\r\n", "headers": FORM}, 400, ""),
        (
            {
                "body": PART.replace(b'; filename="b"', b"") + b"\r\n/etc/passwd\r\n--edge--\r\n",
                "headers": FORM,
            },
            400,
            "'a' is no file",
        ),
        (
            {"body": multipart([("a", b"x")] * 4)[1], "headers": FORM},
            413,
            "more than 3 pictures in a request",
        ),
        ({"method": "GET"}, 405, "Method Not Allowed"),
        ({"path": "/../run/config.json"}, 404, "Not Found"),
    ],
)
def test_what_is_refused(request_, status, told, classifier):
    path = request_.get("path", "/classify")
    request_ = {"method": "POST", **request_}
    request_.pop("path", None)
    limits = {"body": 0.004, "pictures": 3}
    reply = asked(classifier, path, limits=limits, **request_)
    assert (reply.status, told in reply.error) == (status, True), reply.content


def test_whatever_comes_is_an_answer_or_a_line(classifier, files):
    """Whole requests with bytes changed, cut out and doubled; the server goes on."""
    draw = np.random.default_rng(0)
    headers, body = multipart(list(files.items())[:2])

    def damaged(content):
        content = bytearray(content)
        for _ in range(draw.integers(1, 6)):
            place = int(draw.integers(0, len(content) or 1))
            kind = draw.integers(0, 3)
            if kind == 0:
                content[place : place + 1] = bytes([draw.integers(0, 256)])
            elif kind == 1:
                del content[place : place + int(draw.integers(1, 60))]
            else:
                content[place:place] = content[place : place + 40]
        return bytes(content)

    async def steps(app):
        requests = [
            ask(app, "/classify", body=damaged(body) or b"x", headers=headers) for _ in range(60)
        ]
        kind = headers["content-type"].encode()
        requests += [
            ask(app, "/classify", body=body, headers={"content-type": damaged(kind)})
            for _ in range(20)
        ]
        for reply in await asyncio.gather(*requests):
            assert reply.status in (200, 400, 413, 415, 422)
            assert reply.status == 200 or reply.error
        return await ask(app, "/classify", body=body, headers=headers)

    assert len(served(classifier, steps, queue=1000, memory=100_000).json["pictures"]) == 2


def test_a_full_queue_is_503_and_is_over_when_it_is(classifier, picture, monkeypatch):
    gate = Gate(classifier, monkeypatch)

    async def steps(app):
        held = await gate.hold(app, picture)
        tasks = [
            asyncio.create_task(ask(app, "/classify", body=picture, headers=PNG)) for _ in range(8)
        ]
        # Three of them wait, and the others find no room.
        while sum(task.done() for task in tasks) < 5:
            await asyncio.sleep(0.01)
        refused = [task.result() for task in tasks if task.done()]
        refused.append(await ask(app, "/health"))
        gate.opened.set()
        replies = await asyncio.gather(held, *tasks)
        return refused, replies, await ask(app, "/health")

    limits = {"queue": 3, "pictures": 3, "batch": 1, "wait": 0, "body": 1.0}
    refused, replies, after = served(classifier, steps, **limits)
    statuses = [reply.status for reply in replies]
    assert (statuses.count(200), statuses.count(503)) == (4, 5)
    for reply in refused:
        assert (reply.status, reply.error) == (503, "too many pictures are waiting")
        assert int(reply.headers["retry-after"]) >= 1
    assert (after.status, after.json["status"]) == (200, "ok")


def test_memory_is_bounded_by_what_requests_say(classifier, picture, monkeypatch):
    gate = Gate(classifier, monkeypatch)

    async def steps(app):
        # It does not say how long it is, and holds all that there is.
        held = await gate.hold(app, picture)
        refused = await ask(app, "/classify", body=picture, headers=PNG)
        gate.opened.set()
        return await held, refused, await ask(app, "/classify", body=picture, headers=PNG)

    first, refused, after = served(classifier, steps, body=1.0, memory=1.0)
    assert (first.status, refused.status, after.status) == (200, 503, 200)
    assert "bytes are held" in refused.error
    assert refused.headers["retry-after"] == "1"


def test_a_body_that_does_not_come_is_408(classifier):
    reply = asked(
        classifier, "/classify", body=b"x", headers=PNG, ends=None, limits={"timeout": 0.05}
    )
    assert (reply.status, reply.error) == (408, "the body took longer than 0.05 seconds")


def test_a_failure_is_500_and_the_server_goes_on(classifier, picture, monkeypatch):
    async def steps(app):
        with monkeypatch.context() as patch:
            patch.setattr(classifier, "classify_each", lambda *_, **__: 1 / 0)
            failed = await ask(app, "/classify", body=picture, headers=PNG)
        return failed, await ask(app, "/classify", body=picture, headers=PNG)

    failed, after = served(classifier, steps)
    assert (failed.status, failed.error) == (500, "the server failed; its log says more")
    assert after.status == 200


def test_metrics_count(classifier, files, picture):
    async def steps(app):
        headers, body = multipart([*files.items(), ("no.png", b"no picture")])
        await ask(app, "/classify", body=body, headers=headers)
        await ask(app, "/classify", body=picture, headers=PNG)
        await ask(app, "/classify", body=b"x", headers=PNG)
        await ask(app, "/nowhere")
        return await ask(app, "/metrics")

    reply = served(classifier, steps)
    assert reply.headers["content-type"].startswith("text/plain; version=")
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in reply.content.decode().splitlines()
        if not line.startswith("#")
    }
    assert values['lamp_requests_total{path="/classify",status="200"}'] == 2
    assert values['lamp_requests_total{path="/classify",status="422"}'] == 1
    assert values['lamp_requests_total{path="other",status="404"}'] == 1
    assert values['lamp_pictures_total{outcome="answered"}'] == 6
    assert values['lamp_pictures_total{outcome="unreadable"}'] == 2
    assert values["lamp_batch_pictures_count"] == 3
    assert values["lamp_batch_pictures_sum"] == 8
    assert values["lamp_waiting_pictures"] == values["lamp_held_bytes"] == 0


def test_pictures_of_several_requests_are_one_batch(classifier, files):
    async def steps(app):
        replies = await asyncio.gather(
            *(ask(app, "/classify", body=each, headers=PNG) for each in files.values())
        )
        return replies, await ask(app, "/metrics")

    replies, metrics = served(classifier, steps, batch=len(files), wait=60_000)
    assert b"lamp_batch_pictures_count 1.0" in metrics.content
    expected = classifier.classify(list(files.values()))
    got = [
        tuple(each["class"] for each in reply.json["pictures"][0]["predictions"])
        for reply in replies
    ]
    assert got == [each.names for each in expected]


def test_what_it_tells_of_its_classes(classifier):
    rows = asked(classifier, "/classes").json["classes"]
    assert rows == [{"name": name, "trained": True} for name in classifier.trained_names]


@pytest.mark.slow
def test_as_a_user_starts_it(run, picture):
    """Over a socket: an answer, a request by hand that is none, and a Ctrl-C with one waiting."""
    server = subprocess.Popen(
        [sys.executable, "-m", "lamp_fast.serve", str(run), "--port", "0", "--wait", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", server.stdout.readline())[1])
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n")
            assert raw.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/classify?top=1", picture, PNG)
        assert len(json.load(connection.getresponse())["pictures"]) == 1
        connection.request("POST", "/classify", picture, PNG)
        time.sleep(0.3)
        server.send_signal(signal.SIGINT)
        assert connection.getresponse().status == 200
        out, complaint = server.communicate(timeout=60)
        assert (server.returncode, out, complaint) == (0, "ended\n", "")
    finally:
        server.kill()
        server.communicate()
