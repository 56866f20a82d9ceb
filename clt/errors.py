"""The error that means "the user can fix this", and how messages are written."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

_SHOWN = 200  # characters of one value in a message
# All but tab and line feed of what moves a terminal's cursor, colours it or reorders its text; and lone surrogates,
# which cannot be printed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake in a config, a file or an argument, or a limit of the machine: something the user can mend.

    The message says what was found, what was wanted and the remedy. The command line prints it without a traceback
    and exits with status 2; everything else that is raised is a bug and keeps its traceback.
    """


def shown(value: Any) -> str:
    """The value for a message: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.. ({len(text)} characters)"


def mismatches(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys whose values in `found` are not those in `wanted`, as part of a message; empty when there are none."""
    odd = [key for key in wanted if found.get(key) != wanted[key]]
    return "; ".join(f"{key}: found {found.get(key)!r}, wanted {wanted[key]!r}" for key in odd)


def size_text(count: float) -> str:
    """A number of bytes, in the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def printable(text: str) -> str:
    """A text from files or servers, with the characters that control a terminal shown as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def tell(message: str) -> None:
    """Print a message on stderr."""
    print(printable(message), file=sys.stderr, flush=True)
