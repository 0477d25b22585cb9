"""The pictures in a request's body: bounded while they arrive, and never more than bytes."""

import math
from collections.abc import AsyncIterator

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from lamp_fast.data.handed_over import NamedFile

# What a picture is called that came without a name.
BODY = "body"


def declared_size(request: Request, limit: int) -> int:
    """How many bytes a request says that it has; ``limit`` where it does not say.

    Raises:
        HTTPException: 413, more than ``limit``; 400, no number.
    """
    given = request.headers.get("content-length")
    if given is None:
        return limit
    if not given.isascii() or not given.isdigit():
        raise HTTPException(400, f"content-length {given[:40]!r}: expected a number of bytes")
    # Leading digits alone decide about a number that is too long to be read.
    if len(given) > 18 or int(given) > limit:
        raise _too_large(limit)
    return int(given)


async def read_files(request: Request, limit: int, pictures: int) -> list[NamedFile]:
    """The files of a request, in order.

    Args:
        request: a picture as the body, of content type ``image/*``, or files as
            ``multipart/form-data``.
        limit: bytes of the body at most.
        pictures: files at most.

    Raises:
        HTTPException: 400, a body that is empty, broken or ends early; 413, too long or too many;
            415, of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind.startswith("image/"):
            content = b"".join([chunk async for chunk in _bounded(request, limit)])
            files = [NamedFile(BODY, content)]
        elif kind == "multipart/form-data":
            files = await _multipart(request, limit, pictures)
        else:
            raise HTTPException(
                415,
                f"content-type {kind[:80]!r}: expected image/*, a picture, or multipart/form-data,"
                " files",
            )
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
    for file in files:
        if not file.content:
            raise HTTPException(400, f"{file.name!r}: is empty, expected a picture")
    if not files:
        raise HTTPException(400, "the body holds no file, expected at least one picture")
    return files


async def _bounded(request: Request, limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        yield chunk


class _Files(MultiPartParser):
    """Counts parts while they arrive, and knows whether the last one has."""

    parts, ended = 0, False

    def __init__(self, request: Request, limit: int, pictures: int) -> None:
        stream = _bounded(request, limit)
        super().__init__(request.headers, stream, max_files=math.inf, max_fields=math.inf)
        self.spool_max_size = limit  # bodies are bounded: none goes to a file on the way
        self._pictures = pictures

    def on_part_begin(self) -> None:
        self.parts += 1
        if self.parts > self._pictures:
            raise HTTPException(413, f"more than {self._pictures} pictures in a request")
        super().on_part_begin()

    def on_end(self) -> None:
        self.ended = True


async def _multipart(request: Request, limit: int, pictures: int) -> list[NamedFile]:
    parser = _Files(request, limit, pictures)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"multipart: {' '.join(error.message.split())}") from None
    try:
        if not parser.ended:
            raise HTTPException(400, "multipart: ends early")
        files = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise HTTPException(400, f"multipart: {name[:80]!r} is no file, expected pictures")
            files.append(NamedFile(value.filename or BODY, await value.read()))
        return files
    finally:
        await form.close()


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body has more than {limit:,} bytes")
