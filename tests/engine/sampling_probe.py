"""Runs in an engine's environment: what SGLang's sampler makes of seeds, before and after the plugin is loaded.

Prints JSON: whether a batch knows the seeds of its requests, the hashes that they are turned into, and tokens sampled.
"""

import json

import torch
from sglang.srt.layers import sampler
from sglang.srt.plugins import load_plugins
from sglang.srt.sampling import sampling_batch_info
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

SEEDS = [5, None, 2**31 - 1, 5]
POSITIONS = [0, 1, 77, 0]


class Plain(dict):
    """What it holds is an attribute, and every other one is off: options of a server, a request without any."""

    __getattr__ = dict.get


def batch():
    """Requests as the scheduler holds them."""
    requests = [Plain(sampling_params=SamplingParams(sampling_seed=seed)) for seed in SEEDS]
    return Plain(reqs=requests, device="cpu")


def seeds():
    """The seeds that a batch knows."""
    info = SamplingBatchInfo.from_schedule_batch(batch(), 64)
    return None if info.sampling_seed is None else info.sampling_seed.tolist()


def hashes():
    """[row][column] of two columns; what is wrong, where there is no kernel."""
    known = torch.tensor([5, -1, 2**31 - 1, 5])
    try:
        return sampler.murmur_hash32(known.to(torch.uint64), torch.tensor(POSITIONS), torch.arange(2)).tolist()
    except (AttributeError, RuntimeError) as e:
        return type(e).__name__


def sampled(torch_seed):
    """Tokens of one step, by the method that the sampler calls."""
    torch.manual_seed(torch_seed)
    info = SamplingBatchInfo.from_schedule_batch(batch(), 64)
    probs = torch.full((4, 64), 1 / 64)
    tokens, _ = sampler.Sampler._sample_from_probs(Plain(), probs, info, torch.tensor(POSITIONS), True)
    return tokens.tolist()


def main():
    sampling_batch_info.get_exec = lambda: Plain(deterministic=Plain(), features=Plain(), kernel=Plain())
    found = {}
    for when in ("before", "after"):
        if when == "after":
            load_plugins()
        found[when] = {"seeds": seeds(), "hashes": hashes(), "sampled": [sampled(s) for s in range(8)]}
    print(json.dumps(found))


main()
