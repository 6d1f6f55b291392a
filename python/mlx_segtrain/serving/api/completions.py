"""The route for the completions that a GRPO run has generated."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from ...training.completions import NAME, read_step
from .bodies import JsonRoute
from .dependencies import Used
from .forms import Answer
from .routes import problems

#: Maximum number of completions in a response, and of characters in each text.
MOST, LONGEST = 256, 20_000

router = APIRouter(route_class=JsonRoute, responses=problems(400, 401, 403, 404, 429))


class CompletionsAnswer(Answer):
    """The completions of one step, with the keys of completions.jsonl (docs/grpo.md)."""

    last: int = Field(description="The latest step that has completions, or 0 if no step has any.")
    step: int
    completions: list[dict[str, Any]]


@router.get("/api/jobs/{id}/completions", tags=["jobs"])
async def completions(
    id: str,
    service: Used,
    step: Annotated[
        int | None,
        Query(
            ge=1, description="The step whose completions are returned. Default: the latest step."
        ),
    ] = None,
) -> CompletionsAnswer:
    """Returns the completions that a GRPO run generated in one step, with their rewards."""
    folder = service.jobs.get(id).output_path
    last, found = 0, []
    if folder is not None:
        path = Path(folder) / NAME
        with suppress(OSError):
            if not path.is_symlink():
                last, found = await run_in_threadpool(read_step, path, step, MOST)
    shown = [{key: _cut(x) for key, x in own.items()} for own in found]
    return CompletionsAnswer(last=last, step=last if step is None else step, completions=shown)


def _cut(value: Any) -> Any:
    """Returns the value, shortened if it is too long for people to read."""
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST]}…"
    if isinstance(value, list | dict) and len(text := json.dumps(value)) > 4 * LONGEST:
        return f"{text[:LONGEST]}…"
    return value
