"""What is made before the first row, whose buffer it is, and how a server ends that does not serve yet."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clt.config import Config
from clt.errors import UserError
from clt.parsing import to_yaml
from clt.server.run import close_buffer, open_buffer, tag
from tests.server.conftest import BACKGROUND, ROOT, eventually

MakeConfig = Callable[..., Config]


def test_settings_that_do_not_change_the_rows_may_differ(config: MakeConfig, tmp_path: Path) -> None:
    """Of two servers on one buffer, or of a server and the one before it."""
    (tmp_path / "link").symlink_to(tmp_path)
    made = tag(config(f"data.store={tmp_path}/store"))
    for same in (f"data.store={tmp_path}/link/../{tmp_path.name}/store", "data.prefetch=9", "server.max_batch=7"):
        assert made == tag(config(f"data.store={tmp_path}/store", same)), same
    for other in ("data.store=/elsewhere", "server.rows=9", "server.open_share=0.1"):
        found = tag(config(f"data.store={tmp_path}/store", other))
        assert (found[:64], found[64:] != made[64:]) == (made[:64], True), other


def test_a_buffer_is_shared_kept_after_a_crash_and_removed_by_the_last(own_config: Config) -> None:
    first, second = open_buffer(own_config), open_buffer(own_config)
    assert first.segment == second.segment
    assert first.open_blocks == 8
    other = dataclasses.replace(own_config, server=dataclasses.replace(own_config.server, rows=600))
    with pytest.raises(UserError, match="a server with other settings runs on /dev/shm/clt-"):
        open_buffer(other)
    with first._change() as new:
        new["mark"] = (0, 0, 210)
    close_buffer(own_config, first)
    assert second.path.exists()
    second.leave()  # and then everything was killed
    again = open_buffer(own_config)
    assert again.segment == second.segment, "its rows are as good as before"
    close_buffer(own_config, again)
    assert not again.path.exists()
    later = open_buffer(other)
    assert later.block_rows == 32, "a power of two, and sixteen blocks at least"
    assert later.progress["mark"].tolist() == [0, 0, 210], "it goes on in the text, in a buffer of another size"
    close_buffer(other, later)


@pytest.mark.parametrize(
    ("command", "number", "status", "before"),
    [
        ("clt.cli serve {}", signal.SIGTERM, 0, []),
        ("clt.cli serve {}", signal.SIGINT, 130, BACKGROUND),
        ("uvicorn clt.server.app:app --port 0", signal.SIGINT, -signal.SIGINT, BACKGROUND),
        ("uvicorn clt.server.app:app --port 0 --workers 2", signal.SIGKILL, -signal.SIGKILL, []),
    ],
)
def test_a_server_that_is_stopped_while_it_prepares_leaves_nobody_at_work(
    config: MakeConfig, tmp_path: Path, command: str, number: int, status: int, before: list[str]
) -> None:
    long, file = tmp_path / "long.jsonl", tmp_path / "c.yaml"
    long.write_text(Path(config().text.source).read_text() * 100)  # a quarter of a minute's work, to be caught at
    keys = [f"text.source={long}", "text.heldout_documents=6000", "data.heldout_tokens=100000", "lm.batch_windows=1"]
    keys += ["server.port=21114"]  # the system gives no connection a port below 32768, so that it is free
    made = config("server.rows=150", "server.statistics_tokens=100", *keys)
    file.write_text(to_yaml(made))
    words = [*before, sys.executable, "-m", *command.format(file).split()]
    env = os.environ | {"CLT_CONFIG": str(file)}
    process = subprocess.Popen(words, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    eventually(lambda: process.poll() is not None or (Path(made.data.store) / "server" / "lock").exists())
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]  # ends when nobody has its stderr any more
    assert process.returncode == status, told
    assert "Traceback" not in told
    assert not (Path(made.data.store) / "heldout" / "index.json").exists(), "it was stopped too late"
