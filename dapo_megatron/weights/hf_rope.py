"""The rotary options of a config.json: known by name, of the right type, and without a contradiction. Pure.

transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`; both are read.
"""

import json
from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """What is wrong with a config.json, in one line without the file's name."""


ROPE_OPTIONS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "attn_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
"""Names of (required, optional) options."""


def read_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary options of the file, from old keys or new ones, known by name and type."""
    old, new = _rope(given.get("rope_scaling")), _rope(given.get("rope_parameters"))
    if given.get("rope_scaling") and given.get("rope_parameters"):
        if {k: v for k, v in old.items() if k != "rope_theta"} != {k: v for k, v in new.items() if k != "rope_theta"}:
            raise Refusal("rope_scaling and rope_parameters differ, and readers choose differently: remove one")
    rope = old if given.get("rope_scaling") else new
    for key in ("rope_theta", "original_max_position_embeddings"):
        if given.get(key) is not None and rope.get(key, given[key]) != given[key]:
            raise Refusal(f"{key}={show(given[key])}, but {show(rope[key])} among the rotary options: remove one")
    return rope


def _rope(tree: Mapping[str, Any] | None) -> dict[str, Any]:
    rope = {k: v for k, v in (tree or {}).items() if v is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_OPTIONS or rope.get("type", kind) != kind:
        given = kind if rope.get("type", kind) == kind else [kind, rope["type"]]
        raise Refusal(f"rotary scaling {show(given)} is not supported: only {', '.join(ROPE_OPTIONS)}")
    required, optional = ROPE_OPTIONS[kind]
    for name, value in rope.items():
        if name in ("rope_type", "type") or (name == "partial_rotary_factor" and value == 1):
            continue
        if name not in (*required, *optional, "rope_theta"):
            raise Refusal(f"rotary option {name}={show(value)} is not supported with rope_type {kind}")
        if name == "truncate":
            if not isinstance(value, bool):
                raise Refusal(f"rotary option truncate is {show(value)}: give true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise Refusal(f"rotary option {name} is {show(value)}: give a number above 0")
        elif name == "factor" and value < 1:
            raise Refusal(f"rotary option factor is {show(value)}: give a number of at least 1")
    if missing := [name for name in required if name not in rope]:
        raise Refusal(f"rotary scaling {kind} needs {missing[0]}")
    if {"attention_factor", "attn_factor"} <= rope.keys():
        raise Refusal("rotary options attention_factor and attn_factor cannot both be given")
    return {k: v for k, v in rope.items() if k not in ("type", "partial_rotary_factor")} | {"rope_type": kind}


def show(value: Any) -> str:
    """A JSON value in one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
