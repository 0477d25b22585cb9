"""The ASGI application: what is answered at which path, and what is refused how.

Every answer but that of ``/metrics`` is JSON; a refusal is ``{"error": "one line"}``. A client
names no file of this machine: what it calls its pictures comes back as text and is used for nothing
else.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import lru_cache
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lamp_fast
from lamp_fast.answers.prediction import Columns, Prediction
from lamp_fast.classifier import Classifier
from lamp_fast.data.handed_over import NamedFile
from lamp_fast.data.hierarchy import CLASS
from lamp_fast.errors import InputError
from lamp_fast.serve.batching import Batcher, ClosedError, FullError
from lamp_fast.serve.bodies import declared_size, read_files
from lamp_fast.serve.metrics import CONTENT_TYPE, Metrics
from lamp_fast.serve.questions import Question, read_question
from lamp_fast.serve.settings import ServeConfig

# Questions whose rules stay ready; most clients ask the same one.
_QUESTIONS = 64
# Seconds after which a request may be tried again that found no memory.
_SOON = 1


def build_app(classifier: Classifier, names: Sequence[str], config: ServeConfig) -> "Counted":
    """The application over a classifier.

    ``POST /classify`` takes pictures, see :func:`lamp_fast.serve.bodies.read_files`, and a
    :class:`Question` as query parameters. ``GET /classes``, ``/health`` and ``/metrics`` tell of
    the server.

    Args:
        classifier: asked by one thread at a time, but for checks of questions.
        names: the classes, of :meth:`Classifier.check_names`.
        config: its limits; the run is not looked at.
    """
    server = _Server(classifier, tuple(names), config)
    app = Starlette(
        routes=[
            Route("/classify", server.classify, methods=["POST"]),
            Route("/classes", server.classes),
            Route("/health", server.health),
            Route("/metrics", server.show_metrics),
        ],
        lifespan=server.lifespan,
        exception_handlers={HTTPException: _refusal, Exception: _failure},
    )
    return Counted(app, server.metrics)


class _Server:
    def __init__(self, classifier: Classifier, names: tuple[str, ...], config: ServeConfig) -> None:
        self._classifier, self._names, self._config = classifier, names, config
        self._batch = config.batch or classifier.config.machine.test_batch
        self._held = 0
        self._batcher: Batcher[Question, NamedFile, Prediction | InputError] | None = None
        self.metrics = Metrics(
            waiting=lambda: 0 if self._batcher is None else self._batcher.waiting,
            held=lambda: self._held,
        )
        self._about = lru_cache(_QUESTIONS)(self._check)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Classes are prepared before the first request; what waits at the end is answered."""
        await asyncio.to_thread(self._about, Question())
        async with Batcher(
            self._answer,
            size=self._batch,
            wait=self._config.wait / 1000,
            capacity=self._config.queue,
            observe=self.metrics.batch,
        ) as self._batcher:
            yield

    async def classify(self, request: Request) -> Response:
        """Rows as ``predict --json`` writes them; 422 where no picture could be read."""
        # What can be refused by its head is refused before its body is read.
        try:
            question = read_question(request.query_params.multi_items())
            about = await asyncio.to_thread(self._about, question)
        except InputError as error:
            raise HTTPException(400, _one_line(error)) from None
        limit = self._config.body_bytes
        try:
            with self._holding(declared_size(request, limit)):
                self._batcher.check_room(1)
                try:
                    reading = read_files(request, limit, self._config.pictures)
                    files = await asyncio.wait_for(reading, self._config.timeout)
                except asyncio.TimeoutError:
                    seconds = self._config.timeout
                    told = f"the body took longer than {seconds:g} seconds"
                    raise HTTPException(408, told, {"connection": "close"}) from None
                outcomes = await self._batcher.ask(question, files)
        except FullError as full:
            raise _busy(str(full), full.retry_after) from None
        except ClosedError:
            raise _busy("the server ends", _SOON) from None
        columns = Columns(
            level=question.level or CLASS,
            rejects=question.reject is not None,
            sets=question.coverage is not None,
        )
        pictures, unreadable = [], []
        for file, outcome in zip(files, outcomes, strict=True):
            rows = unreadable if isinstance(outcome, InputError) else pictures
            rows.append(columns.json_row(file.name, outcome))
        self.metrics.pictures(len(pictures), len(unreadable))
        if not pictures:
            raise HTTPException(422, _one_line(unreadable[0]["reason"]))
        return JSONResponse({**about, "pictures": pictures, "unreadable": unreadable})

    async def classes(self, request: Request) -> Response:
        """The names among which is answered, as ``predict --json`` tells of them."""
        trained = self._classifier.are_trained(self._names)
        rows = [
            {"name": name, "trained": known}
            for name, known in zip(self._names, trained, strict=True)
        ]
        return JSONResponse({"classes": rows})

    async def health(self, request: Request) -> Response:
        """200 where a picture would be taken now; 503 with the reason where not."""
        try:
            self._batcher.check_room(1)
        except FullError as full:
            raise _busy(str(full), full.retry_after) from None
        except ClosedError:
            raise _busy("the server ends", _SOON) from None
        return JSONResponse({"status": "ok", "version": lamp_fast.__version__})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus's text."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def _check(self, question: Question) -> dict[str, Any]:
        """What an answer tells beside its pictures.

        Raises:
            InputError: a question that cannot be served.
        """
        self._classifier.classify_each((), self._names, **question.options())
        answering = self._classifier.answering(
            self._names, question.asked, question.wanted_prior, question.level
        )
        return {
            "bias": self._classifier.bias_for(self._names),
            "level": question.level or CLASS,
            **answering.about,
        }

    def _answer(self, question: Question, files: list[NamedFile]) -> list[Prediction | InputError]:
        options = question.options()
        return list(self._classifier.classify_each(files, self._names, batch=len(files), **options))

    @contextlib.contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Reserve memory for a request's body, as long as it is needed."""
        if self._held + size > self._config.memory_bytes:
            raise _busy("too many bytes are held for other requests", _SOON)
        self._held += size
        try:
            yield
        finally:
            self._held -= size


class Counted:
    """An application whose requests are counted: paths that there are not as "other"."""

    def __init__(self, app: Starlette, metrics: Metrics) -> None:
        self._app: ASGIApp = app
        self._metrics = metrics
        self._paths = {route.path for route in app.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(path, message["status"], time.monotonic() - begun)
            await send(message)

        await self._app(scope, receive, counting)


def _busy(why: str, seconds: int) -> HTTPException:
    return HTTPException(503, why, {"retry-after": str(seconds)})


def _one_line(error: InputError | str) -> str:
    return " ".join(str(error).split())


async def _refusal(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    # Starlette raises it again behind this answer, for the log.
    return JSONResponse({"error": "the server failed; its log says more"}, 500)
