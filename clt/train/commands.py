"""`clt eval`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from clt.arguments import find_checkpoint, read_config
from clt.errors import UserError


def evaluate(parser: ArgumentParser, argv: Sequence[str]) -> None:
    words = "run directory; with --transcoder or --compare a YAML file, then overrides section.key=value"
    parser.add_argument("config", nargs="*", metavar="RUN", help=words)
    parser.add_argument("--step", type=int, help="of RUN, the checkpoint to evaluate (default: the newest)")
    parser.add_argument("--nnsight", action="store_true", help="replace the MLPs through nnsight, not forward hooks")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--transcoder", metavar="DIR", nargs=1, help="a run, a checkpoint or an imported transcoder")
    which.add_argument("--compare", metavar="DIR", nargs="+", help="several of them, side by side")
    parser.add_argument("--out", help="directory for their evaluation.json and comparison.png (default: evaluation)")
    arguments = parser.parse_intermixed_args(argv)
    if directories := arguments.transcoder or arguments.compare:
        return _compare(arguments, directories)
    if len(arguments.config) != 1 or arguments.out:
        raise UserError(f"found {' '.join(arguments.config) or 'nothing'}; wanted one run directory, or --transcoder")
    checkpoint = find_checkpoint(arguments.config[0], arguments.step)
    from clt.lm.replacement import nnsight_logits
    from clt.train.evaluation import SavedRun
    from clt.train.report import conclude

    run = SavedRun(*checkpoint)
    evaluation = run.evaluate(run.transcoder, nnsight_logits if arguments.nnsight else None)
    report = f"report_step_{run.step:08d}"
    conclude(run.directory, evaluation, f"{report}/evaluation.json", report)


def _compare(arguments: Namespace, directories: list[str]) -> None:
    for option in ("step", "nnsight"):
        if getattr(arguments, option):
            raise UserError(f"--{option} is of a run; leave it out with --transcoder and --compare")
    if odd := [name for name in directories if "=" in name or name.endswith((".yaml", ".yml"))]:
        raise UserError(f"{odd[0]} is no transcoder; put CONFIG and overrides before --compare")
    if not arguments.config:
        raise UserError("found no CONFIG; wanted the YAML file with the language model and the text, before --compare")
    from clt.train import compare

    out = Path(arguments.out or "evaluation")
    compare.check_new(out)
    compare.report_comparison(compare.evaluate_transcoders(read_config(arguments.config), directories), out)
