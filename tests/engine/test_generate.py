"""The client against a real server: groups that travel together, and the log-probs of what comes back."""

import asyncio

import pytest

from dapo_megatron.errors import DapoError
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.wire import SamplingParams

PROMPT = [5, 9, 33, 2, 60]


@pytest.fixture
def url(engine_url):
    """A server with a version, as after a push."""
    control = EngineControl(engine_url, 60)
    control.set_version(7)
    control.close()
    return engine_url


def generate(url, requests, concurrency=64, timeout_s=60.0):
    """Results, or errors, of requests made at once."""

    async def run():
        async with EngineClient([url], concurrency=concurrency, timeout_s=timeout_s) as client:
            together = CoalescingClient(client)
            return await asyncio.gather(*(together.generate(*r) for r in requests), return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize("concurrency", [64, 3])
def test_a_group_is_sampled_and_scored(url, concurrency):
    sampling = SamplingParams(max_new_tokens=12, stop_token_ids=[1])
    group = generate(url, [(PROMPT, sampling)] * 8, concurrency)
    assert len({tuple(g.token_ids) for g in group}) > 1  # samples, not copies
    control = EngineControl(url, 60)
    for g in group:
        assert len(g.token_ids) == len(g.logprobs) <= 12
        assert g.finish_reason == ("stop" if g.token_ids[-1] == 1 else "length")
        assert [(s.version, s.start, s.end) for s in g.version_spans] == [(7, 0, len(g.token_ids))]
        (scored,) = control.prompt_logprobs([PROMPT + g.token_ids])
        assert g.logprobs == pytest.approx(scored[len(PROMPT) - 1 :], abs=1e-4)


def test_different_requests_get_their_own_answers(url):
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0)
    alone = [generate(url, [(PROMPT[:n], greedy)])[0].token_ids for n in (2, 3, 4)]
    together = generate(url, [(PROMPT[:n], greedy) for n in (2, 3, 4) for _ in range(2)])
    assert [g.token_ids for g in together] == [ids for ids in alone for _ in range(2)]


def test_a_refused_request_and_a_dead_server_are_errors(url):
    too_long = [(list(range(2, 62)) * 10, SamplingParams(max_new_tokens=4))] * 2
    assert all(
        isinstance(e, DapoError) and "refused /generate of 600 tokens" in str(e) for e in generate(url, too_long)
    )
    nobody = generate("http://127.0.0.1:9", [(PROMPT, SamplingParams(max_new_tokens=4))] * 2, timeout_s=1.0)
    assert all(isinstance(e, DapoError) and "within 1 s" in str(e) for e in nobody)
