"""`clt features`, `clt browse` and `clt graph`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from clt.arguments import check_port, find_checkpoint, need_serving, read_run
from clt.errors import UserError


def features(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("run_dir", help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint to look at (default: the newest)")
    parser.add_argument("--part", choices=["heldout", "train"], default="heldout", help="text to read (%(default)s)")
    what = "tokens of it to read, or all that there are (%(default)s)"
    parser.add_argument("--tokens", type=int, default=1_000_000, help=what)
    what = "write them there too, as SAEDashboard's files, which Neuronpedia's converter reads; must not exist"
    parser.add_argument("--neuronpedia", metavar="DIR", type=Path, help=what)
    arguments = parser.parse_args(argv)
    config, directory, step = find_checkpoint(arguments.run_dir, arguments.step)
    if arguments.tokens < 1:
        raise UserError(f"--tokens is {arguments.tokens}; wanted 1 or more")
    from clt.explore.features import make_features
    from clt.explore.neuronpedia import write_batches
    from clt.export.directory import check_absent

    if arguments.neuronpedia is not None:
        check_absent(arguments.neuronpedia)  # before the work of minutes
    found = make_features(config, directory, step, arguments.part, arguments.tokens)
    if found is None:  # rank 0 makes them
        return
    if arguments.neuronpedia is not None:
        write_batches(found, arguments.neuronpedia)
    fired, command = int((found.arrays["count"] > 0).sum()), Path(sys.executable).with_name("clt")
    if command.is_relative_to(Path.cwd()):  # an environment that launch.sh made is not on the shell's path
        command = command.relative_to(Path.cwd())
    print(
        f"{found.directory}: {found.arrays['count'].size:,} features, of which {fired:,} fire on "
        f"{found.tokens:,} tokens of {found.summary['part']} text; look at them: {command} browse {directory}"
    )


def browse(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("run_dir", type=Path, help="run directory, with what `clt features` wrote")
    parser.add_argument("--port", type=int, default=8001, help="of this machine, to serve on (%(default)s)")
    what = "write the pages there, without the prompt box, for a web host"
    parser.add_argument("--static", metavar="DIR", type=Path, help=what)
    arguments = parser.parse_args(argv)
    need_serving("browse")
    config = read_run(arguments.run_dir)
    check_port(arguments.port)
    from clt.explore.browse import browse, write_static

    if arguments.static is None:
        browse(config, arguments.run_dir, arguments.port)
    else:
        write_static(arguments.run_dir, arguments.static)
        print(f"The pages are in {arguments.static}: give them to a web host, or try `python -m http.server` there")


def graph(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("run_dir", help="run directory")
    parser.add_argument("prompt", help="text, without the special token that starts it")
    parser.add_argument("--step", type=int, help="checkpoint to look at (default: the newest)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="for the graphs (default: RUN/graphs)")
    what = "of the environment with circuit-tracer (default: the one that runs this)"
    parser.add_argument("--python", default=sys.executable, help=what)
    parser.add_argument("--no-serve", dest="serve", action="store_false", help="write the files alone")
    parser.add_argument("--port", type=int, default=8002, help="of this machine, to show it on (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.serve:
        need_serving("graph without --no-serve")
        check_port(arguments.port)
    config, run, step = find_checkpoint(arguments.run_dir, arguments.step)
    from clt.explore.graph import make_graph

    directory = arguments.out or run / "graphs"
    made = make_graph(config, run, step, arguments.prompt, directory, arguments.python)
    print(
        f"{made.active:,} features are active; the pruned graph has {made.nodes:,} nodes and {made.links:,} edges\n"
        f"replacement score {made.replacement:.3f}, completeness score {made.completeness:.3f}\n"
        f"The graph is {made.file}",
        flush=True,
    )
    if arguments.serve:
        from clt.explore.graphs import serve

        serve(directory, made.page, made.file.stem, arguments.port)
