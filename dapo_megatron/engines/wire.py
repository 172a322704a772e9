"""What goes to and comes from SGLang's /generate, as types; field names are SGLang's."""

from typing import Any, Literal

import msgspec
import numpy as np

from dapo_megatron.errors import EngineError
from dapo_megatron.records import VersionSpan


class SamplingParams(msgspec.Struct, frozen=True):
    """How one response is sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: list[int] = []
    ignore_eos: bool | msgspec.UnsetType = msgspec.UNSET
    """Go on after the model's own end tokens; unset, it is not sent."""
    sampling_seed: int | msgspec.UnsetType = msgspec.UNSET
    """Of this response alone; unset, it is not sent. Copies of one request with a seed would be clones."""


class Completion(msgspec.Struct):
    """What the engine sampled after the input: one entry a token, the stop token included."""

    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[VersionSpan]
    finish_reason: Literal["stop", "length"]


class Sampled(msgspec.Struct, eq=False):
    """A completion of n tokens as arrays: what rollouts get."""

    token_ids: np.ndarray
    """[n] int32, the stop token included."""
    logprobs: np.ndarray
    """[n] float32, natural log."""
    version_spans: list[VersionSpan]
    finish_reason: Literal["stop", "length"]
    waited_s: float = 0.0
    """Seconds until its request had a slot, and room on an engine."""


class _FinishReason(msgspec.Struct):
    type: str


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _FinishReason
    output_token_logprobs: list[tuple[float, int, Any]]
    weight_version: str
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    meta_info: _Meta


_decoder = msgspec.json.Decoder(_Reply | list[_Reply])


def generate_request(
    input_ids: list[int], params: SamplingParams, count: int, cache_key: str | None = None
) -> dict[str, Any]:
    """Body of a request for `count` samples after one input.

    Copies instead of SGLang's n: with that, a server first prefills the prompt, alone, and then answers.
    """
    inputs = input_ids if count == 1 else [input_ids] * count
    body = {"input_ids": inputs, "sampling_params": msgspec.to_builtins(params), "return_logprob": True}
    return body | cached_under(cache_key)


def cached_under(cache_key: str | None) -> dict[str, str]:
    """What makes a request find and leave keys and values under a name; None: where all do."""
    return {} if cache_key is None else {"extra_key": cache_key}


def decode_completions(data: bytes, url: str) -> list[Completion | None]:
    """Decode the reply of the server at `url`, of one sample or of several; None for an aborted one.

    Raises:
        EngineError: no such reply, or a weight version that is no number.
    """
    try:
        replies = _decoder.decode(data)
    except msgspec.DecodeError as e:
        raise EngineError(f"engine {url} gave a reply to /generate that cannot be read ({e})") from None
    return [_completion(reply.meta_info, url) for reply in (replies if isinstance(replies, list) else [replies])]


def decode_sampled(data: bytes, url: str) -> list[Sampled | None]:
    """The same as arrays; takes a millisecond for 5,000 tokens, so not on an event loop."""
    return [None if c is None else _sampled(c) for c in decode_completions(data, url)]


def _sampled(c: Completion) -> Sampled:
    token_ids, logprobs = np.array(c.token_ids, np.int32), np.array(c.logprobs, np.float32)
    return Sampled(token_ids, logprobs, c.version_spans, c.finish_reason)


def _completion(meta: _Meta, url: str) -> Completion | None:
    if meta.finish_reason.type == "abort":
        return None
    tokens = meta.output_token_logprobs
    # Servers before 0.5.2x report one version for the whole response.
    spans = meta.weight_versions or [_Span(meta.weight_version, 0, len(tokens))]
    for span in spans:
        if not span.version.isdigit():
            raise EngineError(f"engine {url} serves weights of version '{span.version}': no version was pushed to it")
    return Completion(
        token_ids=[token for _, token, _ in tokens],
        logprobs=[logprob for logprob, _, _ in tokens],
        version_spans=[VersionSpan(int(s.version), s.start, s.end) for s in spans],
        finish_reason="length" if meta.finish_reason.type == "length" else "stop",
    )
