"""circuit-tracer's page over the graphs in a directory, for this machine alone.

Its own server answers every machine in the network, and with any file that the user can read.
"""

from __future__ import annotations

from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from clt.data.index import write_json
from clt.errors import tell
from clt.explore.browse import HOST, read_json
from clt.files import read_object
from clt.local import Local, check_address, refused

_MOST_BYTES = 1 << 20  # of what the page saves


def make_app(directory: Path, page: Path) -> Starlette:
    """page: the folder of circuit-tracer's page, which asks for files of `directory` under two names."""

    async def save(request: Request) -> Response:
        """Keep what the user has pinned and grouped, as circuit-tracer's server does."""
        given = await read_json(request, _MOST_BYTES)
        file = directory / f"{request.path_params['slug']}.json"
        if file.name not in {path.name for path in directory.glob("*.json")} or "qParams" not in given:
            raise HTTPException(404, f"no graph {file.stem}, or nothing to save")
        write_json(file, read_object(file, {}, "make the graph again") | {"qParams": given["qParams"]})
        return JSONResponse({})

    routes = [
        Route("/save_graph/{slug}", save, methods=["POST"]),
        Mount("/data", StaticFiles(directory=directory)),
        Mount("/graph_data", StaticFiles(directory=directory)),
        Mount("/", StaticFiles(directory=page, html=True)),
    ]
    return Starlette(False, routes, [Middleware(Local)], {HTTPException: refused})


def serve(directory: Path, page: Path, slug: str, port: int) -> None:
    """Show the graphs until Ctrl-C. Raises UserError when the port is taken."""
    app = make_app(directory, page)
    check_address(HOST, port, ("the address", "--port"))
    tell(f"http://{HOST}:{port}/?slug={slug} (Ctrl-C ends it)")
    uvicorn.run(app, host=HOST, port=port, ws="none", log_level="warning", access_log=False, server_header=False)
