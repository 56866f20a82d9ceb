"""A dataclass of sections from YAML files and `section.key=value` strings; errors name the key and the nearest one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from clt.errors import UserError, shown
from clt.ranges import fit, hints

_DEPTH = 8  # a config has three levels
_DIGITS = 64  # more than any number of 64 bits needs
_PROBLEM = 300  # characters of a parser's message, which may quote the file


class _StrictLoader(yaml.SafeLoader):
    """YAML in which each value is what it looks like and each key stands once. Whatever else there is, is an error.

    YAML 1.1 reads 010 as 8, 80:00 as 4800, `no` as false and 2024-01-01 as a date, and lets the last of two equal keys
    win. Aliases and tags have no use in a config, and a few lines of aliases can stand for gigabytes.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"the alias *{event.anchor} is not read here: write the value out")
        if event.tag is not None:
            _refuse(event, f"the tag {event.tag} is not read here: leave it out")
        self.depth += 1
        if self.depth > _DEPTH:
            _refuse(event, f"found more than {_DEPTH} levels, wanted section.key: take out brackets or indentation")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        elif isinstance(node, yaml.ScalarNode) and node.style is None:
            _check_plain(node)
        return node


def _refuse(at: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            _refuse(key, "a list or mapping is a key here, wanted a name")
        if key.value in seen:
            _refuse(key, f"the key {shown(key.value)} is in line {seen[key.value]} too: keep one of them")
        seen[key.value] = key.start_mark.line + 1


def _check_plain(node: yaml.ScalarNode) -> None:
    """Refuse an unquoted value that YAML 1.1 takes for something else than Python, and a reader, would."""
    text, kind = node.value, node.tag.rpartition(":")[2]
    if kind in ("str", "null") or (kind == "bool" and text.lower() in ("true", "false")):
        return
    if kind in ("int", "float") and len(text) <= _DIGITS:
        with contextlib.suppress(ValueError):
            int(text, 0) if kind == "int" else float(text)
            return
    wanted = "true or false" if kind == "bool" else f"a decimal number of at most {_DIGITS} digits"
    _refuse(node, f"YAML 1.1 reads {text[:_DIGITS]} as {kind}: write {wanted}, or put it in quotes if it is text")


def _load(text: str, what: str) -> Any:
    """What the YAML text holds. Raises UserError, said to be of `what`, naming the line."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{what} cannot be read as YAML: {line}{' '.join(problem.split())[:_PROBLEM]}") from error


def merge_file(config: Any, path: str | Path) -> None:
    """Set what a YAML file holds, as `merge` does."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}; wanted a file of UTF-8 text") from error
    merge(config, _load(text, f"config {path}"), str(path))


def merge_text(config: Any, text: str, where: str) -> None:
    """Set one `section.key=value`, as `merge` does."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {shown(text)} is not of the form section.key=value, e.g. train.steps=100")
    tree = _load(value, f"the value of override {shown(text)}")
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
        raise UserError(f"{name} in {where} is {shown(tree)}; wanted a mapping with keys of {', '.join(names(node))}")
    return {str(key): value for key, value in (tree or {}).items()}


def _check_known(config: Any, node: Any, name: str, key: str, where: str) -> None:
    if name in names(node):
        return
    everywhere = [f"{section}.{field}" for section in names(config) for field in names(getattr(config, section))]
    near = difflib.get_close_matches(name, names(node), 1) or difflib.get_close_matches(name, everywhere, 1)
    near = near or [known for known in everywhere if known.endswith(f".{name}")]
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names(node))}"
    raise UserError(f"unknown key {shown(key)} in {where}: {hint}")


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
