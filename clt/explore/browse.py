"""`clt browse RUN`: a page on this machine that shows a run's features, or the same page as files for a web host."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from clt.config import Config
from clt.data.index import write_json
from clt.errors import UserError, shown, tell
from clt.explore.files import Features
from clt.explore.prompt import Prompts, parse_changes
from clt.explore.table import SORTS, Query, Table
from clt.export.records import FEATURES
from clt.files import parse_object
from clt.local import Local, check_address, refused

HOST = "127.0.0.1"
_PAGE = Path(__file__).parent / "page"
_FILES = ("index.html", "page.css", "page.js", "static.js")
_MOST_BYTES, _MOST_ROWS = 1 << 16, 500  # of a prompt with its changes; in an answer


def make_app(config: Config, run: Path) -> Starlette:
    """The page of a run and what it asks for. Raises UserError as `Features` does."""
    table = Table(Features(run / FEATURES))
    prompts, overview = Prompts(config, run, table), {"prompt": True, **table.overview(run)}
    alone = asyncio.Lock()  # prompts that wait take no thread from the other answers

    def show_overview(request: Request) -> Response:
        return JSONResponse(overview)

    def select(request: Request) -> Response:
        return JSONResponse(table.select(parse_query(dict(request.query_params), table.features.n_layers)))

    def feature(request: Request) -> Response:
        numbers = [request.path_params[name] for name in ("layer", "feature")]
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            raise HTTPException(404, f"no feature {shown('/'.join(numbers))}; wanted LAYER/FEATURE")
        return JSONResponse(show_feature(table, int(numbers[0]), int(numbers[1])))

    async def prompt(request: Request) -> Response:
        tree = await read_json(request, _MOST_BYTES)
        text = tree.get("text")
        if not isinstance(text, str):
            raise HTTPException(400, f"text is {shown(text)}; wanted the prompt")
        try:
            text.encode()  # JSON can hold halves of characters
            changes = parse_changes(tree.get("changes", []))
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        async with alone:
            if await request.is_disconnected():  # a page whose user went on
                return Response(status_code=503)
            try:
                return JSONResponse(await run_in_threadpool(prompts.answer, text, changes))
            except UserError as error:
                raise HTTPException(422, str(error)) from error

    routes = [
        Route("/", file("index.html")),
        *(Route(f"/{name}", file(name)) for name in _FILES[1:]),
        Route("/overview.json", show_overview),
        Route("/features", select),
        Route("/features/{layer}/{feature}", feature),
        Route("/prompt", prompt, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: refused, UserError: failed}
    app = Starlette(False, routes, [Middleware(Local)], handlers)
    app.router.redirect_slashes = False
    return app


def file(name: str) -> Callable[[Request], Response]:
    """Answers with a file of the page, which a browser asks for again: another version may serve the next one."""
    headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
    return lambda request: FileResponse(_PAGE / name, headers=headers)


def show_feature(table: Table, layer: int, feature: int) -> dict[str, Any]:
    """A feature's record, its row of the table, and the rows of the features that fire with it."""
    try:
        record = table.features.record(layer, feature)
    except IndexError as error:
        raise HTTPException(404, str(error)) from error
    others = [table.row(other["layer"], other["feature"]) for other in record["coactive"]]
    return {"record": record, "row": table.row(layer, feature), "others": others}


def parse_query(given: dict[str, str], n_layers: int) -> Query:
    """What the table is asked for. Raises HTTPException for an unknown parameter and a value that is none of its."""
    kinds = {
        "sort": str,
        "layer": int,
        "min": float,
        "max": float,
        "text": str,
        "logit": str,
        "start": int,
        "limit": int,
    }
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in kinds:
            raise HTTPException(400, f"unknown parameter {shown(name)}; known: {', '.join(kinds)}")
        try:
            values[name] = kinds[name](text)
        except ValueError as error:
            raise HTTPException(400, f"{name} is {shown(text)}; wanted a number") from error
    query = Query(**values)
    allowed = {
        f"sort: one of {', '.join(SORTS)}, with a - before it for the largest first": query.sort.removeprefix("-")
        in SORTS,
        f"layer: 0 to {n_layers - 1}": query.layer is None or 0 <= query.layer < n_layers,
        "min and max: 0 to 1": 0 <= query.min <= 1 and 0 <= query.max <= 1,
        "start: 0 or more": 0 <= query.start < 2**40,
        f"limit: 1 to {_MOST_ROWS}": 1 <= query.limit <= _MOST_ROWS,
    }
    if unmet := [wanted for wanted, holds in allowed.items() if not holds]:
        raise HTTPException(400, f"wanted {'; '.join(unmet)}")
    return query


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The object that a request brings. Raises HTTPException when it is none, or longer than `most` bytes."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"the request has more than {most} bytes; wanted a shorter prompt")
    try:
        return parse_object(body, {})
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON object: {error}") from error


async def failed(request: Request, error: Exception) -> Response:
    """What is wrong with the files, as JSON."""
    tell(f"error: {error}")
    return JSONResponse({"error": str(error)}, 500)


def browse(config: Config, run: Path, port: int) -> None:
    """Serve the page of a run until Ctrl-C. Raises UserError when it has no features, and when the port is taken."""
    app = make_app(config, run)
    check_address(HOST, port, ("the address", "--port"))
    tell(f"{run}: http://{HOST}:{port} (Ctrl-C ends it)")
    uvicorn.run(app, host=HOST, port=port, ws="none", log_level="warning", access_log=False, server_header=False)


def write_static(run: Path, directory: Path) -> None:
    """Write the page without its prompt box into a new directory. A web host that serves its files shows it.

    Raises UserError when the directory has files already, and as `Features` does.
    """
    table = Table(Features(run / FEATURES))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is a file, or not empty; name a new directory, or delete this one")
    directory.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copyfile(_PAGE / name, directory / name)
    (directory / FEATURES).mkdir()
    for pattern in ("*.json", "*.json.gz", "*.safetensors", "*.bin"):  # not a lock, nor what a crash left
        for path in table.features.directory.glob(pattern):
            shutil.copyfile(path, directory / FEATURES / path.name)
    write_json(directory / "overview.json", {"prompt": False, **table.overview(run)})
