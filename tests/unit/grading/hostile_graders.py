"""Graders as a user might write them, good and bad; imported by worker processes."""

import asyncio
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


def waits(text: str, truth: str) -> bool:
    time.sleep(1.0)
    return True


def computes(text: str, truth: str) -> bool:
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    return True


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


def takes_memory(text: str, truth: str) -> bool:
    return len(bytearray(int(truth) * 2**20)) > 0


class Unpicklable(Exception):
    """Cannot be rebuilt from its arguments: it would break the pipe of a pool that sends exceptions."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raises(text: str, truth: str) -> bool:
    raise Unpicklable("broken", "grader")


def reports_its_modules(text: str, truth: str) -> bool:
    return text in sys.modules


not_callable = 3


def returns(text: str, truth: str) -> object:
    return eval(text)  # the test says what


async def grades_later(text: str, truth: str) -> bool:
    await asyncio.sleep(0.01)
    return text == truth


async def scores_later(text: str, truth: str) -> float:
    return -1.0


async def hangs_later(text: str, truth: str) -> bool:
    await asyncio.sleep(3600)
    return True


def raises_on_one_truth(text: str, truth: str) -> bool:
    return {"34": True, "35": False}[truth]


def takes_one(text: str) -> bool:
    return True


def takes_three(text: str, truth: str, prompt: str) -> bool:
    return True


def takes_names_only(*, text: str, truth: str) -> bool:
    return True


def takes_two_of_three(text: str, truth: str, tolerance: float = 1e-6) -> bool:
    return text == truth


class CallableGrader:
    def __call__(self, text: str, truth: str) -> bool:
        return text == truth


an_object = CallableGrader()
