"""What a rollout function gives for its tokens, lists or arrays, made arrays. Pure.

Most of it is right, so each column is looked at as a whole first; entry by entry only to name the one that is wrong.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Column = list[Any] | np.ndarray
LARGEST = float(np.finfo(np.float32).max) * (1 - 1e-7)
"""Beyond it, a number overflows float32."""


class Unfit(Exception):
    """Cannot be trained; says which column or entry, and what is expected."""


def token_ids(value: object, vocab: int) -> np.ndarray:
    """[n] int32 of ids below `vocab`.

    Raises:
        Unfit: no list or array, or an entry that is no id.
    """

    def are_ids(ids: Column) -> bool:
        if isinstance(ids, np.ndarray):
            return ids.dtype.kind in "iu" and bool(ids.min() >= 0 and ids.max() < vocab)
        return set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab

    def is_id(entry: object) -> bool:
        return type(entry) is int and 0 <= entry < vocab

    found = _column("token_ids", value)
    _require(found, are_ids, is_id, "token {}", f"ids from 0 to {vocab - 1} are expected")
    return np.array(found, np.int32)


def loss_mask(value: object) -> np.ndarray:
    """[n] bool.

    Raises:
        Unfit: no list or array, or an entry that is neither true nor false.
    """

    def are_bools(mask: Column) -> bool:
        return mask.dtype.kind == "b" if isinstance(mask, np.ndarray) else set(map(type, mask)) == {bool}

    found = _column("loss_mask", value)
    _require(found, are_bools, lambda entry: isinstance(entry, bool), "loss_mask[{}]", "true or false is expected")
    return np.array(found, np.bool_)


def logprobs(value: object) -> np.ndarray:
    """[n] float32, finite.

    Raises:
        Unfit: no list or array, or an entry that is no finite number.
    """
    found = _column("rollout_logprobs", value)
    _require(found, _are_finite, is_finite, "rollout_logprobs[{}]", "a finite number is expected")
    return np.array(found, np.float32)


def numbers(name: str, value: object) -> np.ndarray:
    """[n] finite numbers: a list, or an array of objects, as float32, another array as it is.

    Raises:
        Unfit: no list or array, or an entry that is no finite number.
    """
    found = _column(name, value)
    if isinstance(found, np.ndarray) and found.dtype.kind in "biu":
        return found.copy()
    _require(found, _are_finite, is_finite, f"{name}[{{}}]", "a finite number is expected")
    typed = found.dtype if isinstance(found, np.ndarray) and found.dtype.kind == "f" else None
    return np.array(found, typed or np.float32)


def is_finite(value: object) -> bool:
    """An ordinary number: no bool, and none that overflows float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _are_finite(column: Column) -> bool:
    if isinstance(column, np.ndarray):
        return column.dtype.kind == "f" and float(np.abs(column).max()) <= LARGEST
    return set(map(type, column)) == {float} and float(np.abs(np.array(column)).max()) <= LARGEST


def _column(name: str, value: object) -> Column:
    if not isinstance(value, np.ndarray) and hasattr(value, "tolist"):  # torch
        value = value.tolist()
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise Unfit(f"{name} is an array of shape {value.shape}, one entry a token is expected")
    if isinstance(value, list) and any(issubclass(kind, np.generic) for kind in set(map(type, value))):
        value = [entry.item() if isinstance(entry, np.generic) else entry for entry in value]  # [*array, 5]
    if not isinstance(value, list | np.ndarray):
        raise Unfit(f"{name} is a {type(value).__name__}, a list or an array of one entry a token is expected")
    return value


def _require(
    column: Column, all_fit: Callable[[Column], bool], fits: Callable[[Any], bool], place: str, expected: str
) -> None:
    if not len(column) or all_fit(column):
        return
    for i, entry in enumerate(column.tolist() if isinstance(column, np.ndarray) else column):
        if not fits(entry):
            raise Unfit(f"{place.format(i)} is {repr(entry)[:40]}, {expected}")
