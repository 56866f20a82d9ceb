"""The `clt` command. Each subcommand imports what it needs when it runs, so that help and errors are quick."""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from clt.arguments import add_config, need_serving, read_config
from clt.config import Config, environment_overrides
from clt.data.commands import extract, inspect
from clt.errors import UserError, printable, tell
from clt.explore.commands import browse, features, graph
from clt.export.commands import convert, export, import_, push
from clt.parsing import to_yaml
from clt.train.commands import evaluate


def exit_on_user_error(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work`. A UserError, or a file that the system refuses, ends the process with one message and status 2.

    Ctrl-C ends the process with status 130 and no message.
    """
    try:
        return work(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except OSError as error:
        from clt.data.shards import is_full_disk

        if is_full_disk(error):
            message = f"the disk is full: {error}; free space and run the same command again, finished work is kept"
        elif error.filename is not None:
            message = f"{error.filename}: {error.strerror}; give this user access to it, or name another place"
        else:
            raise
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    tell(f"{rank}error: {message}")
    sys.exit(2)


def run_rank(work: Callable[..., int], *arguments: Any) -> NoReturn:
    """Call `work` as `exit_on_user_error` does, and end this process with its status.

    One of several ranks runs what is registered for the exit, but does not free its modules: threads of gloo still run,
    and one that frees a tensor while the interpreter ends would abort the process. If C code aborts before that, the
    rank prints where each thread was.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(exit_on_user_error(work, *arguments))
    faulthandler.enable()
    try:
        status = exit_on_user_error(work, *arguments)
    except SystemExit as error:
        status = int(error.code or 0)
    except Exception:  # noqa: BLE001 - printed, and the status is what the interpreter would give
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def run_arguments(doc: str | None) -> tuple[Config, bool]:
    """train_ddp.py's command line: the config and whether to stop before training."""
    parser = ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config(parser)
    parser.add_argument("--prepare", action="store_true", help="check the config, extract the stores, and stop")
    arguments = parser.parse_intermixed_args()
    return exit_on_user_error(read_config, arguments.config), arguments.prepare


def serve(parser: ArgumentParser, argv: Sequence[str]) -> None:
    add_config(parser)
    parser.add_argument("--config", dest="preset", help="test, production, large-scale, or a YAML file over CONFIG")
    parser.add_argument("--ssl-certfile", help="TLS certificate (uvicorn's option)")
    parser.add_argument("--ssl-keyfile", help="TLS key (uvicorn's option)")
    arguments = parser.parse_intermixed_args(argv)
    need_serving("serve")
    from clt.server import run

    config = read_config(arguments.config, arguments.preset, environment_overrides())
    run.serve(config, ssl_certfile=arguments.ssl_certfile, ssl_keyfile=arguments.ssl_keyfile)


def plan(parser: ArgumentParser, argv: Sequence[str]) -> None:
    add_config(parser)
    parser.add_argument("--gpus", type=int, help="GPUs (default: as few as fit)")
    parser.add_argument("--memory", type=float, default=80, help="memory of a GPU in 1e9 bytes (%(default)s)")
    what = "peak of a GPU in dense bf16 (an H100's %(default)s)"
    parser.add_argument("--tflops", type=float, default=989, help=what)
    parser.add_argument("--share", type=float, default=0.4, help="share of the peak that products reach (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers of a language model whose config is not on this machine")
    parser.add_argument("--width", type=int, help="its residual width")
    arguments = parser.parse_intermixed_args(argv)
    config, names = read_config(arguments.config), ("gpus", "memory", "tflops", "share")
    for name in (*names, "layers", "width"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < 1e9:
            raise UserError(f"--{name} is {value}; wanted a positive number")
    if (arguments.layers is None) != (arguments.width is None):
        raise UserError("--layers and --width go together: give both, or neither")
    from clt.lm.shape import ModelShape, read_shape
    from clt.plan import Machine, plan

    shape = ModelShape(len(config.lm.layers or range(arguments.layers)), arguments.width) if arguments.layers else None
    machine = Machine(**{name: getattr(arguments, name) for name in names})
    text, refusal = plan(config, shape or read_shape(config.lm), machine)
    print(printable(text))
    if refusal is not None:
        raise UserError(refusal)


def print_config(parser: ArgumentParser, argv: Sequence[str]) -> None:
    add_config(parser)
    print(to_yaml(read_config(parser.parse_intermixed_args(argv).config), docs=True), end="")


COMMANDS: dict[str, tuple[Callable[[ArgumentParser, Sequence[str]], None], str]] = {
    "extract": (extract, "write the activation stores of a config"),
    "inspect": (inspect, "sizes and statistics of an activation store"),
    "eval": (evaluate, "evaluate a run's checkpoint again, or any transcoders on the text of a config"),
    "import": (import_, "read a transcoder in another tool's format"),
    "convert": (convert, "turn a topk or batchtopk run into a JumpReLU transcoder"),
    "export": (export, "write a transcoder in another tool's format"),
    "features": (features, "write what each feature of a run fires on, and what it writes"),
    "push": (push, "put a run's transcoder, or an export, on the Hugging Face hub"),
    "browse": (browse, "look at the features of a run in a browser"),
    "graph": (graph, "which features of a run lead to the next token, by circuit-tracer"),
    "serve": (serve, "serve activations over HTTP"),
    "plan": (plan, "what a config will cost in memory, disk and time, and the layouts that fit"),
    "config": (print_config, "print a config with every default resolved"),
}
"""By name, what adds a command's arguments to a parser, parses them and runs it; and what it does."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `clt` command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog="clt", description="Train and study cross-layer transcoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=what) for name, (_, what) in COMMANDS.items()}
    name = parser.parse_args(argv[:1]).command
    run, _ = COMMANDS[name]
    exit_on_user_error(run, parsers[name], argv[1:])


if __name__ == "__main__":
    main()
