"""What becomes of an engine's reply."""

import json

import numpy as np
import pytest

from dapo_megatron.engines.wire import SamplingParams, decode_completions, decode_sampled, generate_request
from dapo_megatron.errors import EngineError
from dapo_megatron.records import VersionSpan


def reply(kind="stop", version="3", **more):
    sampled = [[-0.1, 151935, None], [-16.5, 0, "text"]]
    meta = {"finish_reason": {"type": kind}, "output_token_logprobs": sampled, "weight_version": version}
    return {"meta_info": meta | more}


def test_completions_become_arrays_and_an_aborted_one_none():
    spans = [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}]
    data = json.dumps([reply(), reply("abort"), reply("length", weight_versions=spans)]).encode()
    first, aborted, last = decode_sampled(data, "url")
    assert aborted is None and (first.finish_reason, last.finish_reason) == ("stop", "length")
    assert (first.token_ids.dtype, first.logprobs.dtype) == (np.int32, np.float32)
    assert first.token_ids.tolist() == [151935, 0] and first.logprobs.tolist() == [float(np.float32(-0.1)), -16.5]
    assert first.version_spans == [VersionSpan(3, 0, 2)]
    assert last.version_spans == [VersionSpan(2, 0, 1), VersionSpan(3, 1, 2)]
    assert [c and c.token_ids for c in decode_completions(data, "url")] == [[151935, 0], None, [151935, 0]]


@pytest.mark.parametrize("data", [b"", b"[{}]", json.dumps(reply(version="default")).encode()])
def test_what_is_no_reply_is_one_line(data):
    with pytest.raises(EngineError, match="engine url"):
        decode_sampled(data, "url")


@pytest.mark.parametrize("versions", [("default", "3"), ("3", "default")])
def test_a_response_that_nobodys_weights_began_or_ended_is_refused(versions):
    spans = [{"version": version, "start": i, "end": i + 1} for i, version in enumerate(versions)]
    with pytest.raises(EngineError, match="engine url serves weights of version 'default'"):
        decode_sampled(json.dumps(reply(weight_versions=spans)).encode(), "url")


@pytest.mark.parametrize("count", [1, 3])
def test_all_samples_of_a_request_are_cached_under_one_name(count):
    params = SamplingParams(max_new_tokens=9)
    body = generate_request([5, 6], params, count, "name")
    assert body == generate_request([5, 6], params, count) | {"extra_key": "name"}
