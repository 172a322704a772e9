"""A response that is in flight while a push comes: its versions, and whose keys and values its tokens see."""

import asyncio
import threading

import httpx
import numpy as np
import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.engine.conftest import ENGINE
from tests.tiny import hf_folder, run_config

from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.engines.wire import SamplingParams, decode_completions, generate_request
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.resharding.verify import Verifier

PROMPT = [5, 9, 33, 2, 60, 17, 8, 3, 44, 21]
LONG = SamplingParams(max_new_tokens=450, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)
WAIT_S = 100.0


class InFlight(threading.Thread):
    """A streamed response, cached under a name; `begun` is set when its first tokens have come."""

    def __init__(self, url, cache_key):
        super().__init__(daemon=True)
        self.url, self.cache_key, self.begun, self.last = url, cache_key, threading.Event(), b""
        self.start()

    def run(self):
        body = generate_request(PROMPT, LONG, 1, self.cache_key) | {"stream": True}
        with httpx.stream("POST", f"{self.url}/generate", json=body, timeout=WAIT_S) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    self.last = line.removeprefix("data: ").encode()
                    self.begun.set()

    def result(self):
        self.join(WAIT_S)
        (completion,) = decode_completions(self.last, self.url)
        return completion


async def sampled(config, url):
    async with EngineClient(
        lambda: of_urls([url]), concurrency=8, timeout_s=60, fresh_prefixes=config.keeps_kv
    ) as client:
        (found,) = await client.generate(PROMPT, SHORT)
        return found


def over_a_push(config, url, version):
    """(spans of a response in flight; how far its log-probs are from the old weights' and from the new ones';

    how far those of a later response to the same prompt are from the new ones', asked for by the client, and under the
    name of the one in flight).
    """
    actor = actor_on_rank(config)
    pusher = Pusher(config, actor, lambda: of_urls([url]))
    pusher.connect()
    pusher.push(version)
    verifier = Verifier(config, actor, pusher, [PROMPT])
    parameters = [p for module in actor.modules for p in module.parameters()]
    old = [p.detach().clone() for p in parameters]
    response = InFlight(url, cache_key=f"in flight over {version}")
    assert response.begun.wait(WAIT_S)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * p.std() * torch.randn_like(p))
    pusher.push(version + 1)
    metrics = verifier.verify(version + 1)
    later = asyncio.run(sampled(config, url))
    (careless,) = EngineControl(url, 60).sample([PROMPT], SHORT, response.cache_key)
    response = response.result()

    def distance(completion):
        tokens = list(map(int, completion.token_ids))
        (ours,) = verifier._trainers_logprobs([PROMPT + tokens])
        return np.abs(ours[len(PROMPT) - 1 : len(PROMPT) - 1 + len(tokens)] - np.array(completion.logprobs))

    new, later, careless = distance(response), distance(later).max(), distance(careless).max()
    with torch.no_grad():
        for p, before in zip(parameters, old, strict=True):
            p.copy_(before)
    return response.version_spans, distance(response), new, later, careless, metrics


@pytest.mark.parametrize(
    ("mode", "transport", "version"),
    [
        ("retract", "broadcast", 200),
        ("keep_kv", "broadcast", 300),
        ("retract", "disk", 400),
        ("keep_kv", "disk", 500),
    ],
)
def test_a_response_goes_on_over_a_push(tmp_path, engine_url, mode, transport, version):
    path = hf_folder(tmp_path / "model", "qwen3", tied=True, seed=5)
    config = run_config(path, engine=ENGINE, resharding={"in_flight": mode, "transport": transport})
    config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    ((spans, old, new, later, careless, metrics),) = run_ranks(1, over_a_push, config, engine_url, version)
    cut = spans[0].end
    assert [(s.version, s.start, s.end) for s in spans] == [(version, 0, cut), (version + 1, cut, len(old))]
    assert 0 < cut < len(old) == LONG.max_new_tokens
    assert old[:cut].max() <= 1e-4 and old[cut:].max() > 1e-2
    if mode == "retract":  # all keys and values were computed anew
        assert new[cut:].max() <= 1e-4 and careless <= 1e-4
    else:
        assert new[cut:].max() > 1e-2 and careless > 1e-3
    assert later <= 1e-4 and metrics["sync/logprob_difference"] <= 1e-4
