"""Graders as a user might write them, good and bad; imported by worker processes."""

import os
import sys
import time


def first_character(text: str, truth: str) -> bool:
    return text[:1] == truth[:1]


def hangs(text: str, truth: str) -> bool:
    if text == "hang":
        time.sleep(3600)
    return text == truth


def spins(text: str, truth: str) -> bool:
    return bool(9 ** (9**9))  # one computation in C: no Python signal handler runs


def exits(text: str, truth: str) -> bool:
    if text == "exit":
        os._exit(3)
    return text == truth


def quits(text: str, truth: str) -> bool:
    sys.exit("a grader that ends the program")


def eats_memory(text: str, truth: str) -> bool:
    if text == "eat":
        return len(bytearray(8 * 2**30)) > 0
    return text == truth


class Unpicklable(Exception):
    """Cannot be rebuilt from its arguments: it would break the pipe of a pool that sends exceptions."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raises(text: str, truth: str) -> bool:
    raise Unpicklable("broken", "grader")


def reports_its_modules(text: str, truth: str) -> bool:
    return text in sys.modules


not_callable = 3
