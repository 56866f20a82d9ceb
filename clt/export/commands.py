"""`clt import`, `clt convert`, `clt export` and `clt push`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from clt.arguments import add_config, find_checkpoint, read_config


def import_(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("source", help="directory, or user/name[/folder][@revision] on the Hugging Face hub")
    parser.add_argument("directory", metavar="DIR", help="to write; must not exist")
    add_config(parser)
    arguments = parser.parse_intermixed_args(argv)
    config = read_config(arguments.config) if arguments.config else None
    from clt.export.importer import import_transcoder

    remarks = import_transcoder(arguments.source, Path(arguments.directory), config)
    print("\n".join([*remarks, f"The transcoder is in {arguments.directory}"]))


def convert(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("run_dir", help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint to convert (default: the newest)")
    parser.add_argument("--to", choices=["jumprelu"], required=True, help="the rule of the result")
    parser.add_argument("--rows", type=int, default=32_768, help="training rows to set thresholds on (%(default)s)")
    arguments = parser.parse_args(argv)
    checkpoint = find_checkpoint(arguments.run_dir, arguments.step)
    from clt.export.convert import convert_run

    convert_run(*checkpoint, arguments.rows)


def export(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("source", metavar="RUN", help="run directory, or a checkpoint in one")
    parser.add_argument("--to", choices=["circuit-tracer", "saelens"], required=True, help="the format")
    parser.add_argument("directory", metavar="DIR", help="to write; must not exist")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the matrices (%(default)s)")
    arguments = parser.parse_args(argv)
    from clt.export.export import export, summary

    facts = export(Path(arguments.source), arguments.to, Path(arguments.directory), arguments.dtype)
    print(f"{summary(facts)}\nThe export is in {arguments.directory}")


def push(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("source", metavar="RUN", help="directory of a finished run, or what `clt export` has written")
    parser.add_argument("name", metavar="USER/NAME", help="its name on the hub")
    parser.add_argument("--license", help="of the weights, as the hub calls it, e.g. mit (default: none is stated)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    arguments = parser.parse_args(argv)
    from clt.export.push import push

    address = push(Path(arguments.source), arguments.name, arguments.license, private=arguments.private)
    print(f"{arguments.source} is at {address}")
