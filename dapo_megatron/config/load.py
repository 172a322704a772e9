"""A YAML recipe and dotted overrides -> a checked RunConfig; every mistake is one line."""

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dapo_megatron.config.explain import fields
from dapo_megatron.config.run import RunConfig
from dapo_megatron.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML recipe and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name), wrong value or failed cross-check.
    """
    path = Path(path)
    tree = _parse(_read(path), str(path)) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' at the top, found {type(tree).__name__}")
    return parse_config(tree, str(path), overrides)


def parse_config(tree: dict[str, Any], where: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Apply overrides to a tree of plain values, and validate it; `where` names its origin in errors.

    Raises:
        ConfigError: one line for the first mistake.
    """
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(f"{where}: {_first_mistake(e)}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: give the path of a YAML file such as demo.yaml") from None
    except OSError as e:
        raise ConfigError(f"recipe {path} cannot be read: {e.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"recipe {path} is not UTF-8 text (byte {e.start}): give a YAML file") from None


class _Loader(yaml.SafeLoader):
    """YAML where a key stands once and 1e-6 is a number, as in YAML 1.2 (PyYAML reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# A number is decimal: 1:30, 0x10 and 010 are text.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_FLOAT = r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|\.nan$"
_Loader.add_implicit_resolver(_NUMBERS[1], re.compile(_FLOAT), list("-+.0123456789"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date or a number that is none
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise ConfigError(f"override '{override}' is not of the form section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        if node.setdefault(section, {}) is None:  # an empty section in the recipe
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
    node[leaf] = _parse(text, f"override '{override}': the value")


def _first_mistake(e: ValidationError) -> str:
    error = min(e.errors(), key=lambda error: error["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names = [name for name, _, _ in fields()] + list(RunConfig.model_fields)
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
        return f"unknown option '{key}': did you mean '{near[0]}'?"
    if error["type"] == "missing":
        return f"option '{key}' is required"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"option '{key}': {error['msg']} (got {_shown(error['input'])})"


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
