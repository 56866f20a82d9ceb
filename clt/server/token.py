"""The bearer token of a server and of its clients."""

from __future__ import annotations

import os
from pathlib import Path

from clt.errors import UserError


def read_token(file: str | None) -> str | None:
    """The bearer token: environment variable CLT_SERVER_TOKEN, else the first line of `file`, else None."""
    token, where = os.environ.get("CLT_SERVER_TOKEN"), "CLT_SERVER_TOKEN"
    if token is None and file is not None:
        if not Path(file).is_file():
            raise UserError(f"token_file {file} does not exist; write the token into it, e.g. `openssl rand -hex 32`")
        token, where = (Path(file).read_text().splitlines() or [""])[0].strip(), f"token_file {file}"
    if token is not None and not (len(token) >= 16 and token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            f"the token in {where} is not 16 or more printable characters, e.g. from `openssl rand -hex 32`"
        )
    return token
