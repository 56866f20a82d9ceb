"""A dataclass of sections from YAML files and `section.key=value` strings; errors name the key and the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from clt.errors import UserError
from clt.ranges import fit, hints


def merge_file(config: Any, path: str | Path) -> None:
    """Set what a YAML file holds, as `merge` does."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    merge(config, tree, str(path))


def merge_text(config: Any, text: str, where: str) -> None:
    """Set one `section.key=value`, as `merge` does."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r} is not of the form section.key=value, e.g. train.steps=100")
    try:
        tree = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {text!r} is not valid YAML: {error}") from error
    section, dot, name = key.partition(".")
    merge(config, {section: {name: tree} if dot else tree}, where)


def merge(config: Any, tree: Any, where: str) -> None:
    """Set {section: {field: value}} on the dataclass `config` of sections, in place.

    Raises UserError for an unknown key and for a value of the wrong type or out of range, said to be in `where`.
    """
    for section, values in _mapping(config, tree, "the top level", where).items():
        _check_known(config, config, section, section, where)
        node = getattr(config, section)
        for name, value in _mapping(node, values, section, where).items():
            key = f"{section}.{name}"
            _check_known(config, node, name, key, where)
            setattr(node, name, fit(f"{key} in {where}", hints(type(node))[name], value))


def _mapping(node: Any, tree: Any, name: str, where: str) -> dict[str, Any]:
    """The tree if it is a mapping, {} if it is empty."""
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{name} in {where} is {tree!r}; wanted a mapping with keys of {', '.join(names(node))}")
    return {str(key): value for key, value in (tree or {}).items()}


def _check_known(config: Any, node: Any, name: str, key: str, where: str) -> None:
    if name in names(node):
        return
    everywhere = [f"{section}.{field}" for section in names(config) for field in names(getattr(config, section))]
    near = difflib.get_close_matches(name, names(node), 1) or difflib.get_close_matches(name, everywhere, 1)
    near = near or [known for known in everywhere if known.endswith(f".{name}")]
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names(node))}"
    raise UserError(f"unknown key {key!r} in {where}: {hint}")


def names(node: Any) -> list[str]:
    """The fields of a dataclass."""
    return [f.name for f in dataclasses.fields(node)]


def to_yaml(config: Any, docs: bool = False) -> str:
    """The configuration as YAML that `merge_file` reads back; `docs` adds what each section and field is."""
    if not docs:
        return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    lines = []
    for section in names(config):
        node = getattr(config, section)
        lines.append(f"{section}:  # {inspect.getdoc(node)}")
        for name in names(node):
            value = yaml.safe_dump(getattr(node, name), default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {f'{name}: {value}':<36} # {field_docs(type(node))[name]}")
    return "\n".join(lines) + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The line below each field of a dataclass, by field name."""
    return dict(re.findall(r'^    (\w+): .*\n    """(.*)"""$', inspect.getsource(cls), re.MULTILINE))
