"""The routes of /v1/files: data for fine-tuning, and the results of jobs.

An upload goes to the disk as it comes, and takes its place by a rename once it is whole; it is never in
memory. It is looked at when a job uses it (`companion.local.supervisor`), not here.
"""

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import BinaryIO, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from .store import Store, new_id, reported
from .wire import ApiError, parse

LARGEST_FILE = 512 << 20  # bytes, as with OpenAI
LARGEST_FIELD = 1 << 16  # bytes


class FilesQuery(BaseModel):
    """What GET /v1/files may ask for."""

    after: str | None = None
    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


def routes(store: Store) -> APIRouter:
    """The routes, on this store."""
    router = APIRouter(prefix="/v1/files")

    @router.post("")
    async def create(request: Request) -> dict:
        return await _receive(request, store)

    @router.get("")
    def list_files(request: Request) -> dict:
        asked = parse(FilesQuery, dict(request.query_params))
        try:
            return store.files(asked.purpose, asked.after, asked.limit, asked.order == "asc")
        except LookupError:
            raise _missing(asked.after, "after") from None

    @router.get("/{file_id}")
    def retrieve(file_id: str) -> dict:
        return _known(store, file_id)

    @router.get("/{file_id}/content")
    def content(file_id: str) -> FileResponse:
        _known(store, file_id)
        return FileResponse(store.content(file_id), media_type="application/octet-stream")

    @router.delete("/{file_id}")
    def delete(file_id: str) -> dict:
        if not store.delete_file(file_id):
            raise _missing(file_id)
        return {"object": "file", "id": file_id, "deleted": True}

    return router


def _known(store: Store, file_id: str) -> dict:
    if file := store.file(file_id):
        return file
    raise _missing(file_id)


def _missing(file_id: str | None, param: str = "id") -> ApiError:
    return ApiError(f"No such File object: {file_id}", status=404, param=param)


class Upload:
    """A multipart body, taken in piece by piece: the content of `file` to `out`, other fields to memory."""

    def __init__(self, boundary: bytes, out: BinaryIO) -> None:
        self.out = out
        self.size: int | None = None  # bytes of the file so far; None until it begins
        self.filename = "file"
        self.fields: dict[str, bytearray] = {}
        self.whole = False
        self._headers: list[tuple[bytearray, bytearray]] = []
        self._name = ""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_begin": lambda: self._headers.append((bytearray(), bytearray())),
                "on_header_field": lambda data, start, end: self._headers[-1][0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._headers[-1][1].extend(data[start:end]),
                "on_headers_finished": self._begin,
                "on_part_data": self._take,
                "on_end": lambda: setattr(self, "whole", True),
            },
        )

    def write(self, piece: bytes) -> None:
        """Take in the next piece of the body."""
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise ApiError(f"We could not parse the multipart body of your request: {error}") from None

    def _begin(self) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in self._headers}
        _, options = parse_options_header(headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.size is not None:
                raise ApiError("There is more than one 'file' in the body.", param="file")
            self.size = 0
            self.filename = options.get(b"filename", b"file").decode(errors="replace")
        else:
            self.fields[self._name] = bytearray()

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.size += end - start
            if self.size > LARGEST_FILE:
                raise ApiError(
                    f"The file is larger than {LARGEST_FILE >> 20} MB, the most that is taken.",
                    status=413,
                    param="file",
                )
            self.out.write(data[start:end])
        else:
            field = self.fields[self._name]
            field += data[start:end]
            if len(field) > LARGEST_FIELD or len(self.fields) > 16:
                raise ApiError("The fields of the body are too large.", status=413)

    def check(self) -> None:
        """Raise ApiError where the body is not what files.create sends."""
        if not self.whole:
            raise ApiError("The multipart body of your request is cut off.")
        if self.size is None:
            raise _lacks("file")
        if "purpose" not in self.fields:
            raise _lacks("purpose")
        purpose = self.fields["purpose"].decode(errors="replace")
        if purpose != "fine-tune":
            message = f"'{purpose[:40]}' is no purpose of files here: they are taken for 'fine-tune'."
            raise ApiError(message, param="purpose", code="invalid_value")
        if any(name.startswith("expires_after") for name in self.fields):
            message = "Unsupported parameter: 'expires_after'. Files stay here until they are deleted."
            raise ApiError(message, param="expires_after", code="unsupported_parameter")


def _lacks(param: str) -> ApiError:
    message = f"Missing required parameter: '{param}'."
    return ApiError(message, param=param, code="missing_required_parameter")


async def _receive(request: Request, store: Store) -> dict:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError("The body must be multipart/form-data, as files.create sends it.")
    file_id = new_id("file-")
    content = store.content(file_id)
    new = content.with_name(f"{file_id}.new")
    try:
        with reported(store.folder):
            upload = await _written(request, options[b"boundary"], new)
            upload.check()
            os.replace(new, content)
        file = {
            "object": "file",
            "id": file_id,
            "bytes": upload.size,
            "created_at": int(time.time()),
            "filename": upload.filename,
            "purpose": "fine-tune",
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }
        try:
            await asyncio.to_thread(store.add_file, file)
        except BaseException:
            content.unlink(missing_ok=True)
            raise
        return file
    finally:
        new.unlink(missing_ok=True)


async def _written(request: Request, boundary: bytes, new: Path) -> Upload:
    """The upload, its content written to `new`."""
    pieces = request.stream()
    try:
        with new.open("wb") as out:
            upload = Upload(boundary, out)
            async for piece in pieces:
                await asyncio.to_thread(upload.write, piece)
        return upload
    except ClientDisconnect:
        raise ApiError("The client has gone.", status=499) from None
    except (ApiError, OSError):
        with contextlib.suppress(ClientDisconnect):
            async for _ in pieces:  # to its end, since a client that still writes would not read the refusal
                pass
        raise
