"""The `clt` command. Each subcommand imports what it needs when it runs, so that help and errors are quick."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt.config import DEFAULT_CONFIG, Config, environment_overrides, load_config
from clt.errors import UserError, printable, tell
from clt.parsing import to_yaml

if TYPE_CHECKING:
    from clt.model.transcoder import CrossLayerTranscoder
    from clt.train.evaluation import Evaluation, Replace


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


def run_arguments(doc: str | None) -> tuple[Config, bool]:
    """train_ddp.py's command line: the config and whether to stop before training."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_config(parser)
    parser.add_argument("--prepare", action="store_true", help="check the config, extract the stores, and stop")
    arguments = parser.parse_intermixed_args()
    return exit_on_user_error(_config, arguments), arguments.prepare


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `clt` command."""
    parser = argparse.ArgumentParser(prog="clt", description="Train and study cross-layer transcoders.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=run)
        return command

    _add_config(add("extract", _extract, "write the activation stores of a config"))

    command = add("inspect", _inspect, "sizes and statistics of an activation store")
    command.add_argument("store", help="directory with an index.json")
    command.add_argument("--verify", action="store_true", help="recompute every shard's checksum")

    command = add("eval", _eval, "evaluate a run's checkpoint again, or any transcoders on the text of a config")
    words = "run directory; with --transcoder or --compare a YAML file, then overrides section.key=value"
    command.add_argument("config", nargs="*", metavar="RUN", help=words)
    command.add_argument("--step", type=int, help="of RUN, the checkpoint to evaluate (default: the newest)")
    command.add_argument("--nnsight", action="store_true", help="replace the MLPs through nnsight, not forward hooks")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--transcoder", metavar="DIR", nargs=1, help="a run, a checkpoint or an imported transcoder")
    which.add_argument("--compare", metavar="DIR", nargs="+", help="several of them, side by side")
    command.add_argument("--out", help="directory for their evaluation.json and comparison.png (default: evaluation)")

    command = add("import", _import, "read a transcoder in another tool's format")
    command.add_argument("source", help="directory, or user/name[/folder][@revision] on the Hugging Face hub")
    command.add_argument("directory", metavar="DIR", help="to write; must not exist")
    _add_config(command)

    command = add("convert", _convert, "turn a topk or batchtopk run into a JumpReLU transcoder")
    command.add_argument("run_dir", help="run directory")
    command.add_argument("--step", type=int, help="checkpoint to convert (default: the newest)")
    command.add_argument("--to", choices=["jumprelu"], required=True, help="the rule of the result")
    command.add_argument("--rows", type=int, default=32_768, help="training rows to set thresholds on (%(default)s)")

    command = add("export", _export, "write a transcoder in another tool's format")
    command.add_argument("source", metavar="RUN", help="run directory, or a checkpoint in one")
    command.add_argument("--to", choices=["circuit-tracer", "saelens"], required=True, help="the format")
    command.add_argument("directory", metavar="DIR", help="to write; must not exist")
    dtypes = ["float32", "bfloat16", "float16"]
    command.add_argument("--dtype", choices=dtypes, default="float32", help="of the matrices (%(default)s)")

    command = add("features", _features, "write what each feature of a run fires on, and what it writes")
    command.add_argument("run_dir", help="run directory")
    command.add_argument("--step", type=int, help="checkpoint to look at (default: the newest)")
    command.add_argument("--part", choices=["heldout", "train"], default="heldout", help="text to read (%(default)s)")
    what = "tokens of it to read, or all that there are (%(default)s)"
    command.add_argument("--tokens", type=int, default=1_000_000, help=what)
    what = "write them there too, as SAEDashboard's files, which Neuronpedia's converter reads; must not exist"
    command.add_argument("--neuronpedia", metavar="DIR", type=Path, help=what)

    command = add("push", _push, "put a run's transcoder, or an export, on the Hugging Face hub")
    command.add_argument("source", metavar="RUN", help="directory of a finished run, or what `clt export` has written")
    command.add_argument("name", metavar="USER/NAME", help="its name on the hub")
    command.add_argument("--license", help="of the weights, as the hub calls it, e.g. mit (default: none is stated)")
    command.add_argument("--private", action="store_true", help="make a new repository private")

    command = add("browse", _browse, "look at the features of a run in a browser")
    command.add_argument("run_dir", help="run directory, with what `clt features` wrote")
    command.add_argument("--port", type=int, default=8001, help="of this machine, to serve on (%(default)s)")
    what = "write the pages there, without the prompt box, for a web host"
    command.add_argument("--static", metavar="DIR", type=Path, help=what)

    command = add("graph", _graph, "which features of a run lead to the next token, by circuit-tracer")
    command.add_argument("run_dir", help="run directory")
    command.add_argument("prompt", help="text, without the special token that starts it")
    command.add_argument("--step", type=int, help="checkpoint to look at (default: the newest)")
    command.add_argument("--out", metavar="DIR", type=Path, help="for the graphs (default: RUN/graphs)")
    what = "of the environment with circuit-tracer (default: the one that runs this)"
    command.add_argument("--python", default=sys.executable, help=what)
    command.add_argument("--no-serve", dest="serve", action="store_false", help="write the files alone")
    command.add_argument("--port", type=int, default=8002, help="of this machine, to show it on (%(default)s)")

    command = add("serve", _serve, "serve activations over HTTP")
    _add_config(command)
    command.add_argument("--config", dest="preset", help="test, production, large-scale, or a YAML file over CONFIG")
    command.add_argument("--ssl-certfile", help="TLS certificate (uvicorn's option)")
    command.add_argument("--ssl-keyfile", help="TLS key (uvicorn's option)")

    command = add("plan", _plan, "what a config will cost in memory, disk and time, and the layouts that fit")
    _add_config(command)
    command.add_argument("--gpus", type=int, help="GPUs (default: as few as fit)")
    command.add_argument("--memory", type=float, default=80, help="memory of a GPU in 1e9 bytes (%(default)s)")
    command.add_argument(
        "--tflops", type=float, default=989, help="peak of a GPU in dense bf16 (an H100's %(default)s)"
    )
    command.add_argument("--share", type=float, default=0.4, help="share of the peak that products reach (%(default)s)")
    command.add_argument("--layers", type=int, help="layers of a language model whose config is not on this machine")
    command.add_argument("--width", type=int, help="its residual width")

    _add_config(add("config", _print_config, "print a config with every default resolved"))

    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "config") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option, which argparse does not take
        arguments.config += rest
    exit_on_user_error(arguments.run, arguments)


def _add_config(parser: argparse.ArgumentParser) -> None:
    what = f"a YAML file [{DEFAULT_CONFIG.name}], then overrides section.key=value"
    parser.add_argument("config", nargs="*", metavar="CONFIG", help=what)


def _config(arguments: argparse.Namespace, preset: str | None = None, environment: Sequence[str] = ()) -> Config:
    words = arguments.config
    path, overrides = (words[0], words[1:]) if words and "=" not in words[0] else (DEFAULT_CONFIG, words)
    return load_config(path, overrides, preset, environment)


def _print_config(arguments: argparse.Namespace) -> None:
    print(to_yaml(_config(arguments), docs=True), end="")


def _extract(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from clt.data.extract import extract_all

    for part, index in zip(("train", "heldout"), extract_all(config)):
        print(f"{config.data.store}/{part}: {index.rows} rows in {len(index.shards)} shards")


def _inspect(arguments: argparse.Namespace) -> None:
    from clt.data.describe import describe, verify

    print(printable(describe(arguments.store)))
    if arguments.verify:
        verify(arguments.store)
        print("every shard's checksum is as the index says")


def _plan(arguments: argparse.Namespace) -> None:
    config, names = _config(arguments), ("gpus", "memory", "tflops", "share")
    for name in (*names, "layers", "width"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < 1e9:
            raise UserError(f"--{name} is {value}; wanted a positive number")
    if (arguments.layers is None) != (arguments.width is None):
        raise UserError("--layers and --width go together: give both, or neither")
    from clt.lm.shape import Shape, read_shape
    from clt.plan import Machine, plan

    shape = Shape(len(config.lm.layers or range(arguments.layers)), arguments.width) if arguments.layers else None
    machine = Machine(**{name: getattr(arguments, name) for name in names})
    text, refusal = plan(config, shape or read_shape(config.lm), machine)
    print(printable(text))
    if refusal is not None:
        raise UserError(refusal)


def _browse(arguments: argparse.Namespace) -> None:
    _need_serving("browse")
    run, port = Path(arguments.run_dir), arguments.port
    config = _run_config(run)
    _check_port(port)
    from clt.explore import browse

    if arguments.static is None:
        browse.browse(config, run, port)
    else:
        browse.write_static(run, arguments.static)
        print(f"The pages are in {arguments.static}: give them to a web host, or try `python -m http.server` there")


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise UserError(f"--port is {port}; wanted a port number, 1 to 65535")


def _graph(arguments: argparse.Namespace) -> None:
    if arguments.serve:
        _need_serving("graph without --no-serve")
        _check_port(arguments.port)
    config, run, step = _checkpoint(arguments.run_dir, arguments.step)
    from clt.explore.graph import make_graph

    directory = arguments.out or run / "graphs"
    graph = make_graph(config, run, step, arguments.prompt, directory, arguments.python)
    print(
        f"{graph.active:,} features are active; the pruned graph has {graph.nodes:,} nodes and {graph.links:,} edges\n"
        f"replacement score {graph.replacement:.3f}, completeness score {graph.completeness:.3f}\n"
        f"The graph is {graph.file}",
        flush=True,
    )
    if arguments.serve:
        from clt.explore.graphs import serve

        serve(directory, graph.page, graph.file.stem, arguments.port)


def _need_serving(command: str) -> None:
    for package in ("starlette", "uvicorn"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"clt {command} needs {error.name}: pip install 'clt-trainer[serve]'") from error


def _run_config(directory: Path) -> Config:
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} has no config.yaml; wanted the run.dir of a training run")
    return load_config(directory / "config.yaml")


def _serve(arguments: argparse.Namespace) -> None:
    _need_serving("serve")
    from clt.server.run import serve

    config = _config(arguments, arguments.preset, environment_overrides())
    serve(config, ssl_certfile=arguments.ssl_certfile, ssl_keyfile=arguments.ssl_keyfile)


def _eval(arguments: argparse.Namespace) -> None:
    directories = arguments.transcoder or arguments.compare
    if directories:
        for option in ("step", "nnsight"):
            if getattr(arguments, option):
                raise UserError(f"--{option} is of a run; leave it out with --transcoder and --compare")
        if odd := [name for name in directories if "=" in name or name.endswith((".yaml", ".yml"))]:
            raise UserError(f"{odd[0]} is no transcoder; put CONFIG and overrides before --compare")
        if not arguments.config:
            raise UserError(
                "found no CONFIG; wanted the YAML file with the language model and the text, before --compare"
            )
        from clt.train import compare

        out = Path(arguments.out or "evaluation")
        compare.check_new(out)
        compare.conclude(compare.evaluate_transcoders(_config(arguments), directories), out)
        return
    if len(arguments.config) != 1 or arguments.out:
        raise UserError(f"found {' '.join(arguments.config) or 'nothing'}; wanted one run directory, or --transcoder")
    run = _Run(arguments.config[0], arguments.step)
    from clt.lm.replacement import nnsight_logits
    from clt.train.report import conclude

    evaluation = run.evaluate(run.transcoder, run=nnsight_logits if arguments.nnsight else None)
    report = f"report_step_{run.step:08d}"
    conclude(run.directory, evaluation, f"{report}/evaluation.json", report)


def _convert(arguments: argparse.Namespace) -> None:
    run = _Run(arguments.run_dir, arguments.step)
    from clt.export.convert import evenly, to_jumprelu
    from clt.model.spec import BY_K
    from clt.train.report import table
    from clt.train.run import open_store

    if (rule := run.transcoder.spec.activation) not in BY_K:
        raise UserError(f"{run.directory} is a {rule} run; wanted one of clt.activation={' or '.join(BY_K)}")
    directory = run.directory / f"jumprelu_step_{run.step:08d}"
    if directory.exists():
        raise UserError(f"{directory} exists already; delete it to convert again")
    if arguments.rows < 1:
        raise UserError(f"--rows is {arguments.rows}; wanted 1 or more")
    store = open_store(run.config, "train")
    x = evenly(store, arguments.rows)[:, 0].to(run.transcoder.b_dec)
    converted = to_jumprelu(run.transcoder, x)
    for name, transcoder in ((rule, run.transcoder), ("jumprelu", converted)):
        numbers = run.evaluate(transcoder).numbers
        del numbers["dead_fraction"]  # is of the training run
        print(f"{name}:\n{table(numbers)}\n")
    converted.save_pretrained(directory)
    print(f"The transcoder is in {directory}; thresholds were set on {len(x):,} training rows")


def _import(arguments: argparse.Namespace) -> None:
    config = _config(arguments) if arguments.config else None
    from clt.export.importer import import_transcoder

    remarks = import_transcoder(arguments.source, Path(arguments.directory), config)
    print("\n".join([*remarks, f"The transcoder is in {arguments.directory}"]))


def _export(arguments: argparse.Namespace) -> None:
    from clt.export.export import export, summary

    facts = export(Path(arguments.source), arguments.to, Path(arguments.directory), arguments.dtype)
    print(f"{summary(facts)}\nThe export is in {arguments.directory}")


def _features(arguments: argparse.Namespace) -> None:
    config, directory, step = _checkpoint(arguments.run_dir, arguments.step)
    if arguments.tokens < 1:
        raise UserError(f"--tokens is {arguments.tokens}; wanted 1 or more")
    from clt.explore.features import make_features
    from clt.explore.neuronpedia import write_batches

    features = make_features(config, directory, step, arguments.part, arguments.tokens)
    if features is None:  # rank 0 makes them
        return
    if arguments.neuronpedia is not None:
        write_batches(features, arguments.neuronpedia)
    fired, command = int((features.arrays["count"] > 0).sum()), Path(sys.executable).with_name("clt")
    if command.is_relative_to(Path.cwd()):  # an environment that launch.sh made is not on the shell's path
        command = command.relative_to(Path.cwd())
    print(
        f"{features.directory}: {features.arrays['count'].size:,} features, of which {fired:,} fire on "
        f"{features.tokens:,} tokens of {features.summary['part']} text; look at them: {command} browse {directory}"
    )


def _checkpoint(run: str, step: int | None) -> tuple[Config, Path, int]:
    """The config and the directory of a run, and `step` or that of its newest checkpoint. Raises UserError."""
    directory = Path(run)
    config = _run_config(directory)
    from clt.train import checkpoint

    steps = checkpoint.steps(directory / "checkpoints")
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        raise UserError(f"{directory} has no checkpoint of step {step}; found {steps or 'none'}")
    return config, directory, step


def _push(arguments: argparse.Namespace) -> None:
    from clt.export.push import push

    address = push(Path(arguments.source), arguments.name, arguments.license, private=arguments.private)
    print(f"{arguments.source} is at {address}")


class _Run:
    """A checkpoint of a run, and what evaluates it. Raises UserError when something is missing or does not fit."""

    def __init__(self, directory: str, step: int | None) -> None:
        self.config, self.directory, self.step = _checkpoint(directory, step)
        import torch

        from clt.data.check import check_files
        from clt.data.index import STATISTICS
        from clt.data.statistics import Statistics
        from clt.train import checkpoint
        from clt.train.distributed import World, accumulate_in_float32
        from clt.train.evaluation import Evaluator
        from clt.train.optim import autocast_dtype
        from clt.train.run import open_store

        accumulate_in_float32()  # as in training
        world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        path = self.directory / "checkpoints" / f"step_{self.step:08d}"
        self.transcoder = checkpoint.load_transcoder(path).to(world.device)
        heldout = open_store(self.config, "heldout")
        found = (heldout.index.n_layers, heldout.index.d_acts)
        if found != (wanted := (self.transcoder.n_layers, self.transcoder.d_acts)):
            raise UserError(
                f"{heldout.path} holds activations of (L, D) = {found}, the checkpoint was trained on {wanted}; "
                "extract the stores from the run's language model again"
            )
        if self.config.eval.replacement_tokens:
            check_files(heldout.index, self.config)
        # Of the training set only its mean outputs are wanted; its shards may be gone.
        mean_output = Statistics.load(Path(self.config.data.store) / "train" / STATISTICS).target_mean
        dtype = autocast_dtype(self.config.train.precision, world.device)
        self._evaluate = Evaluator(self.config, heldout, mean_output, world, dtype)
        self._last_fired = checkpoint.read_tensor(path, "last_fired").to(world.device)

    def evaluate(self, transcoder: CrossLayerTranscoder, run: Replace | None = None) -> Evaluation:
        """The figures of a transcoder of this run; run: as for `evaluate_replacement`."""
        return self._evaluate(transcoder, self._last_fired, self.step, run=run)


if __name__ == "__main__":
    main()
