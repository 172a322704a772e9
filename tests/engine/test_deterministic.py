"""A deterministic engine: what it samples depends on the request alone, bit for bit."""

import asyncio

import msgspec
import pytest
import torch

from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.seeds import sampling_seed
from dapo_megatron.engines.wire import SamplingParams
from tests.engine.conftest import serve

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="the plugin is for CPU")]

PROMPTS = [[5, 9, 33, 2, 60], [7, 7], [5, 9, 33, 2, 61]]
SAMPLES = 6
PLAIN = SamplingParams(max_new_tokens=12, temperature=0.9, stop_token_ids=[1])
NUCLEUS = SamplingParams(max_new_tokens=12, temperature=0.9, top_p=0.6, stop_token_ids=[1])


def requests(params):
    return [
        (prompt, msgspec.structs.replace(params, sampling_seed=sampling_seed(0, i, sample)))
        for i, prompt in enumerate(PROMPTS)
        for sample in range(SAMPLES)
    ]


def generate(url, asked, concurrency=64):
    """(token ids, log-probs) of each request, all made at once."""

    async def run():
        async with EngineClient([url], concurrency=concurrency, timeout_s=60) as client:
            together = CoalescingClient(client)
            return await asyncio.gather(*(together.generate(*r) for r in asked))

    return [(c.token_ids, c.logprobs) for c in asyncio.run(run())]


@pytest.fixture(scope="module")
def servers(model_path, tmp_path_factory):
    """Two servers, one after the other: what each answered, and what the second said to the same in other company."""
    found = []
    for number in range(2):
        with serve(model_path, tmp_path_factory.mktemp("logs"), deterministic=True, seed=number) as (url, _):
            control = EngineControl(url, 60)
            control.set_version(0)
            if number:
                control.fill_cache(PROMPTS, PLAIN)  # without seeds: moves the engine's own generator
                found.append(generate(url, requests(PLAIN)[::-1], concurrency=3)[::-1])
            found.append(generate(url, requests(PLAIN)))
            found.append(generate(url, requests(NUCLEUS)))
            control.close()
    return found


def test_the_same_request_has_the_same_answer_bit_for_bit(servers):
    first, nucleus, reversed_, second, second_nucleus = servers
    assert first == reversed_ == second
    assert nucleus == second_nucleus != first


def test_samples_of_a_group_differ(servers):
    for i in range(len(PROMPTS)):
        group = servers[0][i * SAMPLES : (i + 1) * SAMPLES]
        assert len({tuple(tokens) for tokens, _ in group}) == SAMPLES
