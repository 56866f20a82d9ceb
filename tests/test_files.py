"""What is said of files that cannot be read, and of those that are damaged."""

import errno
import os

import pytest
from safetensors import safe_open

from clt import cli
from clt.errors import UserError
from clt.files import read_object, read_token, reading


def by_json(path):
    read_object(path, {}, "delete it")


def by_safetensors(path):
    with reading(path, "delete it"), safe_open(path, "pt"):
        pass


@pytest.mark.parametrize("read", [by_json, by_safetensors])
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nothing", r"No such file or directory\): delete it"),
        ("directory", r"Is a directory\): the file itself may be whole"),
        ("file/below", r"Not a directory\): the file itself may be whole"),
        ("loop", r"Too many levels of symbolic links\): the file itself may be whole"),
        ("a" * 300, r"File name too long\): the file itself may be whole"),
        ("/proc/self/mem", r"Input/output error\): the file itself may be whole"),
    ],
)
def test_a_file_that_the_system_does_not_read_is_not_called_damaged(tmp_path, read, name, found):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=rf"{name} cannot be read \({found}"):
        read(tmp_path / name)


@pytest.mark.parametrize("read", [by_json, by_safetensors])
def test_damage_is_called_so(tmp_path, read):
    (tmp_path / "file").write_bytes(b"{" * 20)
    with pytest.raises(UserError, match=r"file is damaged \(.*\); delete it"):
        read(tmp_path / "file")


def test_the_command_line_names_a_file_that_the_system_refuses(capsys):
    def refuse(file):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), file)

    with pytest.raises(SystemExit) as end:
        cli.exit_on_user_error(refuse, "runs/a/metrics.jsonl")
    assert end.value.code == 2
    found = capsys.readouterr().err
    assert found == (
        "error: runs/a/metrics.jsonl: Read-only file system; give this user access to it, or name another place\n"
    )
    with pytest.raises(OSError, match="Read-only"):  # without a file: nothing that a user could mend
        cli.exit_on_user_error(refuse, None)


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        (b"a-token-of-the-tests-0123456789", 0o644, r"can be read by others \(-rw-r--r--\): run `chmod 600"),
        (b"too-short", 0o600, "is not 16 or more printable ASCII characters"),
        (b"a-token-of-\x0cthe-tests-0123456789", 0o600, "is not 16 or more printable ASCII characters"),
        ("a-token-of-the-tests-\u20ac".encode(), 0o600, "is not 16 or more printable ASCII characters"),
        (None, 0, "No such file or directory; write a token into it"),
    ],
)
def test_a_token_that_cannot_be_one_or_is_no_secret_is_told(tmp_path, monkeypatch, text, mode, told):
    monkeypatch.delenv("CLT_SERVER_TOKEN", raising=False)
    file = tmp_path / "token"
    if text is not None:
        file.write_bytes(text)
        file.chmod(mode)
    with pytest.raises(UserError, match=told):
        read_token(str(file))
    monkeypatch.setenv("CLT_SERVER_TOKEN", "another-token-0123456789")
    assert read_token(str(file)) == "another-token-0123456789"
