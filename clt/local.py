"""What a server without a token refuses: everything that does not come from its own machine and its own page."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from clt.errors import UserError

_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]  # that such a server answers to


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def check_address(host: str, port: int, keys: tuple[str, str]) -> None:
    """Raise UserError, with the names of the two settings, when nothing can listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        told = os.strerror(error.errno or 0)
        raise UserError(f"{keys[0]}={host} {keys[1]}={port}: {told}; choose others") from error


class Local:
    """Passes on requests of this machine's programs and of the server's own page.

    Others are answered 400 (a foreign Host) or 403. Links of other sites may lead to the paths in `public`.
    """

    def __init__(self, app: ASGIApp, public: Sequence[str] = ("/",)) -> None:
        self.app, self.public = TrustedHostMiddleware(app, _NAMES, www_redirect=False), public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._refusal(scope)):
            error = HTTPException(403, reason)
            return await (await refused(Request(scope), error))(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        if (here := scope.get("server")) is not None and not is_loopback(here[0]):
            return "this server has no token and so serves its own machine alone"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")  # of pages in a browser on this machine
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        if foreign or (site in ("cross-site", "same-site") and scope["path"] not in self.public):
            return "requests from pages of other sites are refused"
        return None


async def refused(request: Request, error: Exception) -> Response:
    """The reason as JSON."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
