"""What the controller asks of a grader."""

import asyncio
from types import SimpleNamespace

from dapo_megatron.records import Prompt
from dapo_megatron.rollout.controller import Controller
from tests.tiny import response


def test_every_ground_truth_is_given_to_the_grader():
    asked = []

    async def grade(*arguments):
        asked.append(arguments)
        return "right"

    async def rollout(prompt, engine):
        return response(prompt.id, engine.sample, [5], version_spans=[], text="Answer: 2")

    controller = Controller.__new__(Controller)  # its parts read a model folder
    controller.config = SimpleNamespace(
        rollout=SimpleNamespace(max_policy_lag=0), engine=SimpleNamespace(deterministic=False)
    )
    controller.grading, controller.rollout = SimpleNamespace(grade=grade), rollout
    controller.sampler = controller.tokenizer = None
    controller._version = 0
    prompts = [Prompt("p", [1], "1", "?", 0, ["2", "4/2"]), Prompt("q", [1], "3", "?", 1)]
    responses = [asyncio.run(controller._respond(prompt, None, 0, None)) for prompt in prompts]
    assert asked == [("Answer: 2", "1", "2", "4/2"), ("Answer: 2", "3")]
    assert [response.verdict for response in responses] == ["right", "right"]
