"""`/v1/concepts`: list, upload and delete the concepts of the library."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from pydantic import BaseModel
from starlette.responses import Response

from atomdiff.concepts.library_index import ConceptInfo
from atomdiff.serving.concepts import ServedConcepts, thumbnail
from atomdiff.serving.errors import NotFoundError
from atomdiff.utils.errors import UserError

router = APIRouter(prefix="/v1/concepts", tags=["concepts"])


class Concept(BaseModel):
    """A concept of the library."""

    name: str
    kind: str
    trigger_phrase: str
    trigger_words: list[str]
    base_model: str
    bytes: int
    modified: datetime
    thumbnail: str | None


class ConceptList(BaseModel):
    """A page of the library."""

    total: int
    data: list[Concept]


@router.get("")
def list_concepts(
    http: Request,
    search: Annotated[str, Query(description="Words of the trigger phrase, or part of the name")] = "",
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ConceptList:
    """List the concepts with their trigger words, and thumbnails where the files have them."""
    library = _concepts(http).library
    library.refresh()
    found = library.infos()
    if search:
        by_words = {*library.find(search)}
        found = [info for info in found if search.lower() in info.name.lower() or info.name in by_words]
    return ConceptList(total=len(found), data=[_describe(info) for info in found[offset : offset + limit]])


@router.post("", status_code=201)
def upload_concept(
    http: Request,
    file: Annotated[UploadFile, File(description="A concept file, NAME.atoms.safetensors")],
    name: Annotated[str | None, Form(description="Name in the library. Default: that of the file")] = None,
    overwrite: Annotated[bool, Form(description="Replace a concept of this name")] = False,
) -> Concept:
    """Add a concept file to the library, once it has been checked against the base."""
    concepts, engine = _concepts(http), http.app.state.engine
    name = (name or file.filename or "").removesuffix(".atoms.safetensors")
    added = concepts.add(name, file.file.read(), engine.check_concept, overwrite=overwrite)
    return _describe(concepts.info(added))


@router.delete("/{name:path}", status_code=204)
def delete_concept(http: Request, name: str) -> Response:
    """Delete a concept's file; requests that use it are finished with it."""
    concepts = _concepts(http)
    if name not in concepts.library:
        concepts.library.refresh()
    if name not in concepts.library:
        raise NotFoundError(f"there is no concept {name!r} to delete; GET /v1/concepts lists those that there are")
    concepts.delete(name)
    return Response(status_code=204)


def _concepts(http: Request) -> ServedConcepts:
    concepts: ServedConcepts | None = http.app.state.engine.concepts
    if concepts is None:
        raise UserError("this server has no library of concepts; start it with --library FOLDER")
    return concepts


def _describe(info: ConceptInfo) -> Concept:
    return Concept(
        name=info.name,
        kind="lora" if info.is_lora else "atoms",
        trigger_phrase=info.trigger_phrase,
        trigger_words=list(info.trigger_words),
        base_model=info.base_model,
        bytes=info.size,
        modified=datetime.fromtimestamp(info.mtime_ns / 1e9, timezone.utc),
        thumbnail=thumbnail(info),
    )
