"""Who may ask, and for what: token, origin, size, the query's numbers. All refusals carry a reason."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("uvicorn.error")
PUBLIC = ("/", "/healthz")
"""Paths that need no token: they tell nothing but whether the server works."""
_NO_TOKEN = (
    "this server wants its token, as Authorization: Bearer TOKEN (in Python ActivationClient(url, token), in a config "
    "data.token_file, in the environment of a run CLT_SERVER_TOKEN)"
)
_OTHER_TOKEN = (
    "the token is not this server's (its server.token_file or CLT_SERVER_TOKEN), or not of the form Bearer TOKEN"
)


def is_loopback(host: str) -> bool:
    """Whether an address (or localhost, or the path of a Unix socket) can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("/")


class Guard:
    """ASGI middleware: refuses before anything else is done.

    The lifespan's state has `token` (None asks for none) and `open` (serve other machines without a token).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._warned = app, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["state"].get("limited") and not self._warned:
            self._warned = True
            log.warning(
                "slow, half-open and too many connections are not ended, headers not limited: start uvicorn with "
                "--http clt.server.protocol:Protocol, or use clt serve"
            )
        if scope["type"] == "http" and (refusal := _refusal(scope)) is not None:
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _refusal(scope: Scope) -> JSONResponse | None:
    headers, state = Headers(scope=scope), scope["state"]
    close = {"connection": "close"}
    if headers.get("content-length", "0").strip("0") or "transfer-encoding" in headers:
        return JSONResponse({"error": "no request here has a body"}, 413, close)
    here = scope.get("server")
    if state["token"] is None:
        if not state["open"] and here is not None and not is_loopback(here[0]):
            return JSONResponse({"error": "this server has no token and so serves its own machine alone"}, 403, close)
        # Pages of other sites, in a browser on this machine; their own name may stand for its address.
        origin, host, asker = headers.get("origin"), headers.get("host", ""), headers.get("sec-fetch-site")
        try:
            site, name = host if origin is None else urlsplit(origin).netloc, urlsplit(f"//{host}").hostname
        except ValueError:
            return JSONResponse({"error": "the Host or the Origin header is no address"}, 400, close)
        if site != host or (asker in ("cross-site", "same-site") and scope["path"] not in PUBLIC):
            return JSONResponse({"error": "requests from pages of other sites are refused"}, 403, close)
        name = name or "localhost"
        if not state["open"] and not is_loopback(name):
            reason = f"a server without a token answers to this machine's own names alone, not to {name[:80]!r}"
            return JSONResponse({"error": reason}, 403, close)
    elif scope["path"] not in PUBLIC and not _is_bearer(headers.getlist("authorization"), state["token"]):
        ask = {"www-authenticate": "Bearer"}
        return JSONResponse({"error": _NO_TOKEN if "authorization" not in headers else _OTHER_TOKEN}, 401, ask)
    return None


def _is_bearer(values: list[str], token: str) -> bool:
    scheme, _, given = (values[0] if len(values) == 1 else "").partition(" ")
    # In constant time; compare_digest wants ASCII strings or bytes.
    return (
        hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode()) and scheme.lower() == "bearer"
    )


def parameters(request: Request, **limits: tuple[int, int, int | None]) -> dict[str, int | None]:
    """The query's whole numbers by name; `limits` has (least, most, default) for each that may be given.

    Raises HTTPException: 400 for what is unknown, repeated or no number, 422 for what is out of range.
    """
    values: dict[str, int | None] = {name: default for name, (_, _, default) in limits.items()}
    try:
        items = request.query_params.multi_items()
    except ValueError as error:
        raise HTTPException(400, f"the query cannot be read: {error}") from error
    names = [name for name, _ in items]
    for name, text in items:
        if name not in limits:
            raise HTTPException(400, f"unknown parameter {name[:40]!r}; known: {', '.join(limits) or 'none'}")
        if names.count(name) > 1:
            raise HTTPException(400, f"parameter {name} is given {names.count(name)} times")
        if not (text.isascii() and text.removeprefix("-").isdigit()):
            raise HTTPException(400, f"parameter {name} is {text[:40]!r}; wanted a whole number")
        least, most, _ = limits[name]
        # Compared by length first: int() of a long text is slow, and refused from 4300 digits on.
        if text.startswith("-") or len(text.lstrip("0")) > len(str(most)) or not least <= int(text[-20:]) <= most:
            raise HTTPException(422, f"parameter {name} is {text[:40]}; wanted {least} to {most}")
        values[name] = int(text[-20:])
    return values
