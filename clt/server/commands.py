"""`clt serve`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from clt.arguments import add_config, need_serving, read_config
from clt.server.spec import environment_overrides


def serve(parser: ArgumentParser, argv: Sequence[str]) -> None:
    add_config(parser)
    parser.add_argument("--config", dest="preset", help="test, production, large-scale, or a YAML file over CONFIG")
    parser.add_argument("--ssl-certfile", help="TLS certificate (uvicorn's option)")
    parser.add_argument("--ssl-keyfile", help="TLS key (uvicorn's option)")
    arguments = parser.parse_intermixed_args(argv)
    need_serving("serve")
    from clt.server.run import serve

    config = read_config(arguments.config, arguments.preset, environment_overrides())
    serve(config, ssl_certfile=arguments.ssl_certfile, ssl_keyfile=arguments.ssl_keyfile)
