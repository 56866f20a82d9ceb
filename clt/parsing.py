"""Dataclasses from YAML trees and `section.key=value` strings, with errors that name the key and the nearest one."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from clt.errors import UserError


def merge(root: Any, path: str | Path) -> None:
    """Set what a YAML file holds, sections as mappings, on the dataclass `root`, in place. Raises UserError."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    _merge(root, root, {} if tree is None else tree, str(path), "")


def override(root: Any, text: str, where: str) -> str:
    """Set one `section.key=value` on the dataclass `root`, in place; returns the key. Raises UserError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r} is not of the form section.key=value, e.g. train.steps=100")
    *sections, name = key.split(".")
    node: Any = root
    for section in sections:
        _check_known(root, node, section, where, key)
        node = getattr(node, section)
        if not dataclasses.is_dataclass(node):
            raise UserError(f"{key!r} goes too deep: {section} is a single value, not a section")
    _check_known(root, node, name, where, key)
    hint = typing.get_type_hints(type(node))[name]
    if dataclasses.is_dataclass(hint):
        raise UserError(f"{key!r} is a section; set one of its keys: {', '.join(f'{key}.{f}' for f in names(hint))}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {text!r} is not valid YAML: {error}") from error
    setattr(node, name, _coerce(hint, parsed, where, key))
    return key


def _check_known(root: Any, node: Any, name: str, where: str, key: str) -> None:
    if name in names(node):
        return
    everywhere = [f"{section}.{f}" for section in names(root) for f in names(getattr(root, section))]
    candidates = names(node) if difflib.get_close_matches(name, names(node)) else everywhere
    near = difflib.get_close_matches(name, candidates, 1) or [f for f in everywhere if f.endswith(f".{name}")]
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names(node))}"
    raise UserError(f"unknown key {key!r} in {where}: {hint}")


def _merge(root: Any, node: Any, tree: Any, where: str, prefix: str) -> None:
    if not isinstance(tree, dict):
        raise UserError(f"{prefix or 'the top level'} of {where} must be a mapping of keys, found {tree!r}")
    hints = typing.get_type_hints(type(node))
    for name, value in tree.items():
        key = f"{prefix}{name}"
        _check_known(root, node, str(name), where, key)
        if dataclasses.is_dataclass(hints[name]):
            _merge(root, getattr(node, name), {} if value is None else value, where, f"{key}.")
        else:
            setattr(node, name, _coerce(hints[name], value, where, key))


def _coerce(hint: Any, value: Any, where: str, key: str) -> Any:
    """The value as the field's type, or UserError. YAML reads 1e-3 as a string and 1 as an int: both may be floats."""
    options = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is list and isinstance(value, list):
            return [_coerce(get_args(option)[0], item, where, key) for item in value]
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if option in (int, bool, str) and type(value) is option:
            return value
    raise UserError(f"{key} in {where} is {value!r}; wanted {_describe(options)}")


def _describe(options: tuple[Any, ...]) -> str:
    words = []
    for option in options:
        if get_origin(option) is Literal:
            words += [str(choice) for choice in get_args(option)]
        else:
            words.append("null" if option is type(None) else getattr(option, "__name__", str(option)))
    return " or ".join(words)


def names(node: Any) -> list[str]:
    """The fields of a dataclass."""
    return [f.name for f in dataclasses.fields(node)]


def to_yaml(config: Any, docs: bool = False) -> str:
    """The resolved configuration as YAML that `merge` reads back; `docs` adds what each field is."""
    if not docs:
        return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    lines = []
    for section in names(config):
        node = getattr(config, section)
        lines.append(f"{section}:  # {field_docs(type(config))[section]}")
        for name in names(node):
            value = yaml.safe_dump(getattr(node, name), default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {f'{name}: {value}':<36} # {field_docs(type(node))[name]}")
    return "\n".join(lines) + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, by field name."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, after in zip(body.body, body.body[1:]):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(node.target, ast.Name)
            docs[node.target.id] = str(after.value.value)
    return docs
