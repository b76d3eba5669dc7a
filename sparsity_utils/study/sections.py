"""Dataclasses read from YAML: every key, type and number is checked, and a mistake is named by its dotted place."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml

from sparsity_utils.console import InputError, check


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are what they look like; in YAML 1.1 `1e-2` is a text, `010` is eight and `1:30` ninety."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A key that stands twice is a mistake: YAML would keep the last one without a word."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the key {twice[0]} stands twice in the block from line {line} on")
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """`5e6` and `1_000` are whole numbers, `1e-2` and `5.0` are not."""
        try:
            return int(node.value)
        except ValueError:
            number = float(node.value)
            return int(number) if "e" in node.value.lower() and number.is_integer() else number


NUMBER = re.compile(r"[-+]?(\d+(_\d+)*(\.(\d+(_\d+)*)?)?|\.\d+(_\d+)*)([eE][-+]?\d+)?$")
_Loader.add_implicit_resolver("number", NUMBER, list("-+.0123456789"))
_Loader.add_constructor("number", _Loader.number)


def parsed(text: str) -> Any:
    """What YAML text holds. Raises `yaml.YAMLError` for text that is none."""
    return yaml.load(text, _Loader)


def as_mapping(content: Any, where: str) -> dict:
    """`content` if it is a mapping, else InputError."""
    check(isinstance(content, dict), f"{where} should hold 'key: value' lines, not {content!r}.")
    return content


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Say of an InputError in the block what it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def read_section(cls: type, content: dict, where: str = "") -> Any:
    """The dataclass `cls` made of `content`; `where` is its dotted place, such as `study.`.

    Raises InputError for an unknown or missing key and a wrong type.
    """
    hints = typing.get_type_hints(cls)
    check_known(content, hints, where)
    for each in dataclasses.fields(cls):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        check(not required or each.name in content, f"the key {where}{each.name} is missing.")
    return cls(**{key: typed(value, hints[key], where + key) for key, value in content.items()})


def check_known(content: dict, hints: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a key that is not one of `hints`."""
    for key in content:
        check(key in hints, f"unknown key {where}{key}; known are {', '.join(hints)}.")


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: a dataclass, tuple, dict, int, float, str or None. Raises InputError for others."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read_section(hint, as_mapping(value, where), where + ".")
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, list), f"{where} is {value!r}; it should be a list.")
        return tuple(typed(item, typing.get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is dict:
        of = typing.get_args(hint)[1]
        mapping = as_mapping(value, where)
        if not (isinstance(of, type) and dataclasses.is_dataclass(of)):
            return mapping
        return {key: typed(item, of, f"{where}.{key}") for key, item in mapping.items()}
    allowed = typing.get_args(hint) or (hint,)
    for section in filter(dataclasses.is_dataclass, allowed):  # one that may be left out
        return typed(value, section, where)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    good = isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed)
    check(good, f"{where} is {value!r}; it should be of type {' or '.join(t.__name__ for t in allowed)}.")
    return value
