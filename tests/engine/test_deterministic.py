"""A deterministic engine: what it samples depends on the request alone, bit for bit."""

import asyncio

import msgspec
import pytest
import torch

from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import of_urls
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
        async with EngineClient(lambda: of_urls([url]), concurrency=concurrency, timeout_s=60) as client:
            together = CoalescingClient(client)
            return await asyncio.gather(*(together.generate(*r) for r in asked))

    return [(c.token_ids.tolist(), c.logprobs.tolist()) for c in asyncio.run(run())]


@pytest.fixture(scope="module")
def url(model_path, tmp_path_factory):
    """A server that was started for it."""
    with serve(model_path, tmp_path_factory.mktemp("logs"), deterministic=True) as (url, _):
        control = EngineControl(url, 60)
        control.set_version(0)
        control.close()
        yield url


@pytest.mark.parametrize("params", [PLAIN, NUCLEUS], ids=["plain", "nucleus"])
def test_the_same_request_has_the_same_answer_bit_for_bit(url, params):
    first = generate(url, requests(params))
    control = EngineControl(url, 60)
    control.fill_cache(PROMPTS, params)  # without seeds: moves the engine's own generator
    control.close()
    assert generate(url, requests(params)[::-1], concurrency=3)[::-1] == first


def test_samples_of_a_group_differ(url):
    found = generate(url, requests(PLAIN))
    for i in range(len(PROMPTS)):
        group = found[i * SAMPLES : (i + 1) * SAMPLES]
        assert len({tuple(tokens) for tokens, _ in group}) == SAMPLES
    assert generate(url, requests(NUCLEUS)) != found
