"""The error that means "the user can fix this"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 200  # characters of one value in a message


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
