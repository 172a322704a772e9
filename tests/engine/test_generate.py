"""The client against a real server: groups that travel together, and the log-probs of what comes back."""

import asyncio

import httpx
import pytest
import torch
import transformers

from dapo_megatron.errors import DapoError
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.engines.wire import SamplingParams

PROMPT = [5, 9, 33, 2, 60]


@pytest.fixture
def url(engine_url, model_path):
    """A server with a version, as after a push, and the folder's weights, whatever was pushed to it before."""
    answer = httpx.post(f"{engine_url}/update_weights_from_disk", json={"model_path": str(model_path)}, timeout=60)
    assert answer.json()["success"], answer.text
    control = EngineControl(engine_url, 60)
    control.set_version(7)
    control.close()
    return engine_url


@pytest.fixture(scope="module")
def logprobs(model_path):
    """(response ids, temperature) -> the log-probs after PROMPT, of transformers in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)

    @torch.no_grad()
    def scored(response, temperature):
        logits = model(torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
        return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()

    return scored


def generate(url, requests, concurrency=64, timeout_s=60.0):
    """Results, or errors, of requests made at once."""

    async def run():
        async with EngineClient(lambda: of_urls([url]), concurrency=concurrency, timeout_s=timeout_s) as client:
            together = CoalescingClient(client)
            return await asyncio.gather(*(together.generate(*r) for r in requests), return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize("concurrency", [64, 3])
def test_a_group_is_sampled_and_scored(url, logprobs, concurrency):
    sampling = SamplingParams(max_new_tokens=12, stop_token_ids=[1])
    group = generate(url, [(PROMPT, sampling)] * 8, concurrency)
    assert len({tuple(g.token_ids) for g in group}) > 1  # samples, not copies
    for g in group:
        assert len(g.token_ids) == len(g.logprobs) <= 12
        assert g.finish_reason == ("stop" if g.token_ids[-1] == 1 else "length")
        assert [(s.version, s.start, s.end) for s in g.version_spans] == [(7, 0, len(g.token_ids))]
        assert g.logprobs == pytest.approx(logprobs(g.token_ids.tolist(), 1.0), abs=1e-4)


def test_temperature_and_end_tokens_are_the_requests(url, logprobs):
    ends = [1, *range(20, 30)]  # 1 is the model's own
    sampling = SamplingParams(max_new_tokens=10, temperature=0.5, stop_token_ids=ends)
    group = generate(url, [(PROMPT, sampling)] * 16)
    for g in group:
        assert g.logprobs == pytest.approx(logprobs(g.token_ids.tolist(), 0.5), abs=1e-4)
        assert not set(g.token_ids[:-1]) & set(ends)
        assert g.finish_reason == ("stop" if g.token_ids[-1] in ends else "length")
    assert {g.token_ids[-1] for g in group} & set(ends[1:])


def test_different_requests_get_their_own_answers(url):
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0)
    alone = [generate(url, [(PROMPT[:n], greedy)])[0].token_ids.tolist() for n in (2, 3, 4)]
    together = generate(url, [(PROMPT[:n], greedy) for n in (2, 3, 4) for _ in range(2)])
    assert [g.token_ids.tolist() for g in together] == [ids for ids in alone for _ in range(2)]


def test_a_refused_request_and_a_dead_server_are_errors(url):
    too_long = [(list(range(2, 62)) * 10, SamplingParams(max_new_tokens=4))] * 2
    assert all(
        isinstance(e, DapoError) and "refused /generate of 600 tokens" in str(e) for e in generate(url, too_long)
    )
    nobody = generate("http://127.0.0.1:9", [(PROMPT, SamplingParams(max_new_tokens=4))] * 2, timeout_s=1.0)
    assert all(isinstance(e, DapoError) and "within 1 s" in str(e) for e in nobody)
