"""`clt features` against `clt extract` of as many tokens: whole commands by turns. Exits 1 above 1.3 of its time.

    python benchmarks/features.py RUN --json benchmarks/results/features.json [--tokens 400000] [--rounds 4]

RUN is a finished run, e.g. the quickstart's. It is copied, and neither the copy nor the extracted store is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import where  # noqa: E402

BAR = 1.3


def seconds(*arguments: str) -> float:
    """Of one `clt` command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "clt.cli", *arguments], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {"features": [], "extract": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as directory:
            run, store = Path(directory, "run"), Path(directory, "store")
            shutil.copytree(arguments.run, run, ignore=shutil.ignore_patterns("features", "graphs"))
            sizes = [f"data.train_tokens={arguments.tokens}", "data.heldout_tokens=1000", f"data.store={store}"]
            found["extract"].append(seconds("extract", str(run / "config.yaml"), *sizes))
            found["features"].append(
                seconds("features", str(run), "--part", "train", "--tokens", str(arguments.tokens))
            )
    ratio = sum(found["features"]) / sum(found["extract"])
    result = {**where(), "tokens": arguments.tokens, "seconds": found, "features_over_extract": ratio}
    arguments.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(ratio > BAR)


if __name__ == "__main__":
    main()
