"""A rollout that writes down what it has generated, and a grader by which groups of an untrained model are mixed."""

import os
import zlib

import msgspec

from dapo_megatron.rollout import single_turn

GENERATED = "GENERATED_BY_THE_TEST"
"""Environment variable: the file of what was generated, one line a response."""


async def rollout(prompt, engine):
    response = await single_turn.rollout(prompt, engine)
    line = msgspec.json.encode((prompt.id, engine.sample, len(response.token_ids))) + b"\n"
    with open(os.environ[GENERATED], "ab", buffering=0) as file:
        file.write(line)
    return response


def grade(text, truth):
    """Right for a third of the responses, by their text."""
    return zlib.crc32(f"{truth}/{text}".encode()) % 3 == 0
