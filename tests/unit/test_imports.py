"""Imports point one way: a package may import those on lower floors, and its neighbours on its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (
    {"algorithm", "run_folder", "errors", "compat"},
    {"arrays", "config", "records", "messages", "process", "keys", "rpc", "user_code"},
    {"weights", "grading", "data"},
    {"batching", "engines", "observe", "distributed"},
    {"actor"},
    {"resharding", "checkpoint"},
    {"rollout", "trainer"},
    {"cli", "launch", "tools"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
STRANGERS = [{"trainer", "rollout"}, {"launch", "trainer"}, {"launch", "rollout"}]
KNOW_COMPAT = {
    "trainer/__main__.py",
    "trainer/warm_up.py",
    "trainer/check_model.py",
    "trainer/replay.py",
    "trainer/replay_batches.py",
    "engines/command.py",
}
FILES = [p for folder in ("dapo_megatron", "launch", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "dapo_megatron" else parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first in ("dapo_megatron", "launch", "tools"):
                yield rest.split(".")[0] if first == "dapo_megatron" else first


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    for other in imported(path):
        assert FLOOR[other] <= FLOOR[room(path)], f"{room(path)} imports {other}"
        assert {room(path), other} not in STRANGERS
        if other == "compat" and room(path) != "compat":
            assert str(path.relative_to(ROOT / "dapo_megatron")) in KNOW_COMPAT


def test_sections_of_the_config_import_nothing_but_their_base():
    for path in (ROOT / "dapo_megatron" / "config").glob("*.py"):
        if path.stem not in ("__init__", "run", "deadlines", "load", "explain", "base", "changes"):
            modules = {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
            assert {m for m in modules if m.startswith("dapo_megatron")} == {"dapo_megatron.config.base"}, path
