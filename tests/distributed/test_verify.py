"""What a verification makes of what engines hold and sample; real pushes are verified in tests/engine."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from tests.distributed.harness import run_ranks  # noqa: F401  # first: patches megatron-core on machines without CUDA
from tests.tiny import run_config

from dapo_megatron.engines.wire import Completion, SamplingParams
from dapo_megatron.errors import EngineError
from dapo_megatron.records import VersionSpan
from dapo_megatron.resharding import verify as module
from dapo_megatron.resharding.verify import Verifier, scored_sample

PROMPTS = [[5, 6, 7], [8]]


class Engine:
    """Samples one token of log-prob -1 after each prompt, and notes under which name."""

    def __init__(self, url, *versions):
        self.url, self.versions, self.keys, self.held = url, versions, [], []

    def sample(self, prompts, params, cache_key):
        self.keys.append(cache_key)
        spans = [VersionSpan(version, 0, 1) for version in self.versions]
        return [Completion([prompt[0] + 50], [-1.0], spans, "length") for prompt in prompts]


def verifier_of(tmp_path, *engines, **sections):
    pusher = SimpleNamespace(engines=engines, on_all=lambda call: [call(e) for e in engines], is_sender=True)
    actor = SimpleNamespace(layout=SimpleNamespace(rank=0), device=module.torch.device("cpu"))
    return Verifier(run_config(tmp_path, **sections), actor, pusher, PROMPTS)


def test_every_sample_must_be_of_the_version_that_was_pushed(tmp_path):
    verifier = verifier_of(tmp_path, Engine("http://a", 4), Engine("http://b", 4))
    found = [(url, prompt, completion.token_ids) for url, prompt, completion in verifier._sample(4)]
    assert found == [(f"http://{e}", p, [p[0] + 50]) for e in "ab" for p in PROMPTS]
    for others in ((3,), (4, 5), (3, 4)):
        verifier = verifier_of(tmp_path, Engine("http://a", 4), Engine("http://b", *others))
        with pytest.raises(EngineError, match=f"engine http://b sampled with version {({*others} - {4}).pop()} after"):
            verifier._sample(4)


@pytest.mark.parametrize("in_flight", ["retract", "keep_kv"])
def test_where_the_cache_is_kept_no_other_version_or_trainer_shares_it(tmp_path, in_flight):
    sections = {"rollout": {"max_policy_lag": 1}, "algorithm": {"importance_cap": 2.0}}
    engine = Engine("http://a", 3, 3)
    for _ in range(2):  # trainers
        verifier = verifier_of(tmp_path, engine, resharding={"in_flight": in_flight}, **sections)
        for version in (3, 4):
            engine.versions = (version,)
            verifier._sample(version)
    assert len(set(engine.keys)) == (4 if in_flight == "keep_kv" else 1)
    assert (engine.keys[0] is None) == (in_flight == "retract")


def compared(tmp_path, *rows, **sections):
    """Of two engines, a and b, that sampled a token of log-prob -1 after both prompts; `rows` are the trainer's."""
    verifier = verifier_of(tmp_path, Engine("http://a", 4), Engine("http://b", 4), **sections)
    return verifier._compare_logprobs(verifier._sample(4), np.array(rows), "weights are the same")


def row(prompt, logprob):
    """Log-prob of the token after each position; the sampled one stands after the prompt."""
    return [9.0] * (len(prompt) - 1) + [logprob] + [9.0] * (3 - len(prompt))


def test_the_worst_of_all_engines_is_told(tmp_path):
    off = [(4e-5, 0.0), (0.0, 2e-5)]
    found = compared(tmp_path, *(row(p, -1.0 + d) for pair in off for p, d in zip(PROMPTS, pair, strict=True)))
    assert (found.mean, found.max) == (pytest.approx(2e-5), pytest.approx(4e-5))


@pytest.mark.parametrize("bad", [0.5, math.nan])
@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("prompt", [0, 1])
def test_who_disagrees_is_named_with_the_prompt(tmp_path, bad, engine, prompt):
    rows = [row(p, -1.0 - (bad if (e, i) == (engine, prompt) else 0.0)) for e in (0, 1) for i, p in enumerate(PROMPTS)]
    with pytest.raises(EngineError) as e:
        compared(tmp_path, *rows)
    assert f"trainer and engine http://{'ab'[engine]} disagree" in str(e.value) and "of 2 tokens" in str(e.value)
    assert f"after prompt {PROMPTS[prompt]}...; weights are the same" in str(e.value) and "\n" not in str(e.value)


def test_checksums_name_the_engine_and_the_parameter(tmp_path, monkeypatch):
    monkeypatch.setattr(module.EngineControl, "checksums", lambda engine: engine.held)
    monkeypatch.setattr(module, "on_first_rank", lambda what, layout, call: call())
    monkeypatch.setattr(module, "all_agree", lambda *_: nullcontext())
    monkeypatch.setattr(module, "sum_over_ranks", lambda *_: None)
    a, b = Engine("http://a", 4), Engine("http://b", 4)
    verifier = verifier_of(tmp_path, a, b)
    assert verifier._compare_weights() == 0.0  # neither has such a call
    asked = []
    expected = {"x": ["1", "2"], "y": ["3", "4"], "not named so": ["5", "6"]}
    monkeypatch.setattr(verifier, "_expected_checksums", lambda tp_size: asked.append(tp_size) or expected)
    a.held = b.held = [{"x": "1", "y": "3"}, {"x": "2", "y": "4"}]
    assert verifier._compare_weights() == 2.0 and asked == [2]
    b.held = [b.held[0], {"x": "2", "y": "0"}]
    with pytest.raises(EngineError, match="engine http://b holds other weights .* in 1 of 2 parameters: y "):
        verifier._compare_weights()


def test_prompts_are_sampled_as_a_rollout_does_and_past_the_models_own_end(tmp_path):
    sections = {"rollout": {"temperature": 0.7}, "resharding": {"verify_tokens": 5}}
    assert verifier_of(tmp_path, **sections).params == SamplingParams(5, 0.7, ignore_eos=True)


def test_every_token_but_the_first_is_scored():
    sample = scored_sample(3, [5, 6, 7])
    assert (sample.token_ids, sample.prompt_length, sample.loss_mask) == ([5, 6, 7], 1, [True, True])
