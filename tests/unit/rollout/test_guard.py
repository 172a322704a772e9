"""What a user's rollout function may do wrong is one line that names it, and what it raises is tried again."""

import asyncio
import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from dapo_megatron.arrays import decode_array, encode_array
from dapo_megatron.config import RolloutConfig
from dapo_megatron.engines.wire import Sampled, SamplingParams
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.records import Prompt, Response, ScoredGroup, VersionSpan
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.rollout.function import load_rollout
from dapo_megatron.rollout.guard import GuardedRollout

PROMPT = Prompt(id="p7", input_ids=[1, 2], ground_truth="", text="", row=0)
VOCAB = 10


def good(**changes):
    fields = dict(
        prompt_id="p7",
        sample=3,
        token_ids=[4, 5, 9],
        loss_mask=[True, False, True],
        rollout_logprobs=[-0.5, 0.0, -1.0],
        version_spans=[VersionSpan(0, 0, 3)],
        finish_reason="stop",
        text="x",
    )
    return Response(**fields | changes)


def call(function, **options):
    guard = GuardedRollout(function, RolloutConfig(function="mine:roll", **options), VOCAB)
    return asyncio.run(guard(PROMPT, Engine(None, None, None, 3))), guard


def returns(value):
    async def roll(prompt, engine):
        return value

    return roll


def test_a_good_response_passes_and_lists_become_arrays():
    as_arrays = {"token_ids": np.array([4, 5, 9]), "loss_mask": torch.tensor([True, False, True])}
    unpacked = {"token_ids": [*np.array([4, 5], np.int32), 9], "rollout_logprobs": [*np.float32([-0.5, 0.0]), -1]}
    unpacked |= {"loss_mask": [*np.array([True, False]), True]}
    half = np.array([-0.5, 0.0, -1.0], np.float16)
    for given in (good(), good(**as_arrays, rollout_logprobs=half), good(**unpacked)):
        response, _ = call(returns(given))
        columns = (response.token_ids, response.loss_mask, response.rollout_logprobs)
        assert [c.dtype for c in columns] == [np.int32, np.bool_, np.float32]
        assert [c.tolist() for c in columns] == [[4, 5, 9], [True, False, True], [-0.5, 0.0, -1.0]]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "returned NoneType"),
        ({"token_ids": [1]}, "returned dict"),
        (good(token_ids=[], loss_mask=[], rollout_logprobs=[]), "no tokens"),
        (good(token_ids=None), "token_ids is a NoneType"),
        (good(token_ids=(4, 5, 9)), "token_ids is a tuple"),
        (good(loss_mask=[True]), "loss_mask has 1 entries for 3 tokens"),
        (good(rollout_logprobs=[-1.0] * 4), "rollout_logprobs has 4 entries for 3 tokens"),
        (good(token_ids=[4, 5, 10]), "token 2 is 10, ids from 0 to 9"),
        (good(token_ids=[-1, 5, 9]), "token 0 is -1"),
        (good(token_ids=[4.0, 5, 9]), "token 0 is 4.0"),
        (good(token_ids=[True, 5, 9]), "token 0 is True"),
        (good(loss_mask=[1, 0, 1]), "loss_mask[0] is 1"),
        (good(rollout_logprobs=[float("nan"), 0.0, 0.0]), "rollout_logprobs[0] is nan"),
        (good(rollout_logprobs=[0.0, float("-inf"), 0.0]), "rollout_logprobs[1] is -inf"),
        (good(rollout_logprobs=np.array([0.0, -np.inf, 0.0], np.float16)), "rollout_logprobs[1] is -inf"),
        (good(rollout_logprobs=[0.0, None, 0.0]), "rollout_logprobs[1] is None"),
        (good(version_spans=[]), "version_spans is empty"),
        (good(version_spans=None), "version_spans is not a list"),
        (good(version_spans=[VersionSpan(0, 0, 4)]), "tokens 0 to 4 of 3"),
        (good(version_spans=[VersionSpan(0, 0, 0)]), "covers no token"),
        (good(version_spans=[VersionSpan("0", 0, 3)]), "no integers"),
        (good(version_spans=[VersionSpan(0, None, 3)]), "no integers"),
        (good(version_spans=[VersionSpan(True, 0, 3)]), "no integers"),
        (good(version_spans=[VersionSpan(0, 0, 2), VersionSpan(1, 1, 3)]), "version 1 for tokens 1 to 3"),
        (good(token_ids=np.array(3)), "token_ids is an array of shape ()"),
        (good(token_ids=np.ones((3, 1), np.int32)), "token_ids is an array of shape (3, 1)"),
        (good(token_ids=np.array([4.0, 5.0, 9.0])), "token 0 is 4.0"),
        (good(token_ids=np.array([4, 5, 10])), "token 2 is 10"),
        (good(token_ids=[4, 5, 2**32 + 4]), "token 2 is 4294967300"),
        (good(token_ids=[*np.array([4, 5], np.int32), 10]), "token 2 is 10"),
        (good(rollout_logprobs=[*np.float32([np.nan, 0.0]), -1.0]), "rollout_logprobs[0] is nan"),
        (good(loss_mask=np.array([1, 0, 1])), "loss_mask[0] is 1"),
        (good(rollout_logprobs=np.array([0.0, np.nan, 0.0])), "rollout_logprobs[1] is nan"),
        (good(rollout_logprobs=np.array([0.0, -1e39, 0.0])), "rollout_logprobs[1] is -1e+39"),
        (good(rollout_logprobs=[0.0, -1e39, 0.0]), "rollout_logprobs[1] is -1e+39"),
        (good(rollout_logprobs=[10**400, 0.0, 0.0]), "rollout_logprobs[0] is 1000"),
        (good(rollout_logprobs=[True, 0.0, 0.0]), "rollout_logprobs[0] is True"),
        (good(finish_reason="abort"), "finish_reason is 'abort'"),
        (good(text=None), "text is a NoneType"),
        (good(verdict=True), "verdict is True"),
        (good(accuracy_reward=float("nan")), "accuracy_reward is nan"),
        (good(accuracy_reward=np.float32("inf")), "accuracy_reward is np.float32(inf)"),
        (good(turns=None), "turns is None"),
        (good(turns=0), "turns is 0"),
        (good(token_arrays={1: [1.0, 2.0, 3.0]}), "names that are no text"),
        (good(token_arrays=None), "token_arrays is a NoneType"),
        (good(token_arrays={"experts": [1.0, 2.0]}), "token_arrays['experts'] has 2 entries for 3 tokens"),
        (good(token_arrays={"experts": [1.0, 2.0, float("nan")]}), "token_arrays['experts'][2] is nan"),
        (good(token_arrays={"experts": 3.0}), "token_arrays['experts'] is a float"),
        (good(prompt_id="other"), "of prompt 'other'"),
        (good(sample=0), "sample 0"),
    ],
)
def test_what_cannot_be_trained_is_one_line(value, says):
    with pytest.raises(ConfigError) as e:
        call(returns(value))
    text = str(e.value)
    assert says in text and "rollout.function=mine:roll, prompt 'p7', sample 3" in text and "\n" not in text


def test_what_cannot_be_written_down_is_made_so():
    response, _ = call(returns(good(text="a\ud800b", token_arrays={"experts": np.arange(3.0)})))
    assert response.text == "a?b" and response.token_arrays["experts"].tolist() == [0.0, 1.0, 2.0]


class Text(str):
    pass


class WithNotes(Response):
    notes: object = None


def test_numbers_of_numpy_and_types_of_ones_own_become_what_can_be_written_down():
    """A reward that is a mean over something is a numpy number: the bank and a checkpoint must take it."""
    fields = good(accuracy_reward=np.mean([0.5, 1.0]), turns=np.int64(2), finish_reason=np.str_("stop"))
    fields = msgspec.structs.asdict(fields) | {"sample": np.int64(3), "prompt_id": Text("p7"), "verdict": Text("right")}
    given = WithNotes(**fields, notes=object())
    given.token_arrays = {"experts": np.array([1, 2, 3], object)}
    response, _ = call(returns(given))
    group = ScoredGroup(0, PROMPT, [response])
    back = msgspec.json.decode(
        msgspec.json.encode(group, enc_hook=encode_array), type=ScoredGroup, dec_hook=decode_array
    ).responses[0]
    assert (back.accuracy_reward, back.turns, back.sample, back.verdict) == (0.75, 2, 3, "right")
    assert (back.prompt_id, back.finish_reason, back.text) == ("p7", "stop", "x")
    assert back.token_arrays["experts"].tolist() == [1.0, 2.0, 3.0]
    assert call(returns(good(accuracy_reward=np.float32(0.5))))[0].accuracy_reward == 0.5


def flaky(failures):
    calls = []

    async def roll(prompt, engine):
        calls.append(1)
        if len(calls) <= failures:
            raise KeyError("the tool is away")
        return good()

    return roll


def test_a_task_of_its_own_that_it_cancels_and_awaits_is_its_own_error():
    """A CancelledError that nobody meant for the group would end its task without a word, and the step would wait."""

    async def roll(prompt, engine):
        tool = asyncio.ensure_future(asyncio.sleep(60))
        tool.cancel()
        await tool

    with pytest.raises(ConfigError, match="sample 3: it raised asyncio.exceptions.CancelledError .* 2 times: mend it"):
        call(roll, max_reissues=1)


def test_one_that_is_cancelled_ends():
    async def roll(prompt, engine):
        await asyncio.sleep(60)

    async def run():
        guard = GuardedRollout(roll, RolloutConfig(function="mine:roll"), VOCAB)
        task = asyncio.ensure_future(guard(PROMPT, Engine(None, None, None, 3)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert guard.errors == 0

    asyncio.run(run())


def test_what_raises_is_called_again_and_counted():
    response, guard = call(flaky(3), max_reissues=3)
    assert response.token_ids.tolist() == [4, 5, 9] and guard.errors == 3


@pytest.mark.parametrize("options", [{"max_reissues": 2}, {"on_error": "stop"}])
def test_what_raises_too_often_ends_with_the_users_own_line(options):
    with pytest.raises(ConfigError) as e:
        call(flaky(3), **options)
    text = str(e.value)
    assert "KeyError: 'the tool is away'" in text and "test_guard.py, line" in text and "\n" not in text


def test_the_line_shown_is_the_functions_own():
    async def roll(prompt, engine):
        return json.loads("{")  # this line

    with pytest.raises(ConfigError) as e:
        call(roll, on_error="stop")
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# this line" in text)
    assert f"test_guard.py, line {line})" in str(e.value)


def test_a_function_that_leaves_or_never_returns_ends_in_one_line():
    async def leaves(prompt, engine):
        sys.exit(0)

    async def waits(prompt, engine):
        await asyncio.sleep(60)

    with pytest.raises(ConfigError, match="it raised SystemExit: 0"):
        call(leaves, on_error="stop")
    with pytest.raises(ConfigError, match="no response within rollout.function_timeout_s=0.05 s"):
        call(waits, function_timeout_s=0.05)


class Sampler:
    """Each request takes its seconds, and the first of them until it has a slot."""

    def __init__(self, *takes):
        self.takes = list(takes)

    async def generate(self, input_ids, params):
        waited_s, sampling_s = self.takes.pop(0)
        await asyncio.sleep(waited_s + sampling_s)
        if sampling_s < 0:
            raise EngineError("gone")
        return Sampled(np.array([4]), np.array([0.0]), [], "stop", waited_s)


def call_with(sampler, function, limit_s):
    guard = GuardedRollout(function, RolloutConfig(function="mine:roll", function_timeout_s=limit_s), VOCAB)
    return asyncio.run(guard(PROMPT, Engine(sampler, None, SamplingParams(9), 3)))


def test_the_waits_for_a_slot_do_not_count_and_all_else_does():
    async def three_turns(prompt, engine):
        for _ in range(3):
            await engine.generate([1])
            await asyncio.sleep(0.01)
        return good()

    call_with(Sampler((0.5, 0.01), (0.0, 0.01), (0.5, 0.01)), three_turns, 0.4)
    with pytest.raises(ConfigError, match="no response within rollout.function_timeout_s=0.4 s"):
        call_with(Sampler((0.5, 0.01), (0.0, 0.6), (0.5, 0.01)), three_turns, 0.4)


def test_requests_at_once_are_all_waited_for_and_their_waits_count_once():
    async def two(prompt, engine):
        await asyncio.gather(engine.generate([1]), engine.generate([1]))
        await asyncio.sleep(rest_s)
        return good()

    rest_s = 0.0
    call_with(Sampler((0.0, 0.01), (0.6, 0.01)), two, 0.4)
    rest_s = 0.6
    with pytest.raises(ConfigError, match="no response within rollout.function_timeout_s=0.4 s"):
        call_with(Sampler((0.5, 0.01), (0.5, 0.01)), two, 0.4)


def test_a_wait_counts_once_also_where_a_request_that_did_not_wait_ends_between():
    async def three(prompt, engine):
        await asyncio.gather(*(engine.generate([1]) for _ in range(3)))
        await asyncio.sleep(0.6)
        return good()

    with pytest.raises(ConfigError, match="no response within rollout.function_timeout_s=0.4 s"):
        call_with(Sampler((0.5, 0.01), (0.0, 0.55), (0.5, 0.1)), three, 0.4)


def test_a_function_that_makes_request_after_request_has_its_deadline():
    async def talks(prompt, engine):
        for _ in range(20):
            await engine.generate([1])
        return good()

    with pytest.raises(ConfigError, match="no response within rollout.function_timeout_s=0.4 s"):
        call_with(Sampler(*20 * [(0.0, 0.1)]), talks, 0.4)


def test_a_function_that_goes_on_after_a_failed_request_has_its_deadline():
    async def roll(prompt, engine):
        with pytest.raises(EngineError):
            await engine.generate([1])
        await asyncio.sleep(60)

    with pytest.raises(ConfigError, match="no response within"):
        call_with(Sampler((0.1, -0.1)), roll, 0.2)


def test_a_request_that_outlives_its_function_disturbs_nobody():
    async def roll(prompt, engine):
        tasks.append(asyncio.ensure_future(engine.generate([1])))
        await asyncio.sleep(0)
        return good()

    async def run():
        guard = GuardedRollout(roll, RolloutConfig(function="mine:roll"), VOCAB)
        await guard(PROMPT, Engine(Sampler((0.05, 0.0)), None, SamplingParams(9), 3))
        assert (await tasks[0]).waited_s == 0.05

    tasks = []
    asyncio.run(run())


def test_the_engines_own_errors_pass():
    async def roll(prompt, engine):
        raise EngineError("gone")

    with pytest.raises(EngineError, match="gone"):
        call(roll)


def test_what_is_no_rollout_function_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "async def one(prompt): ...\ndef plain(prompt, engine): ...\nasync def more(prompt, engine, x=1): ...\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_rollout("mine:more")
    for reference, says in (
        ("mine:one", "cannot be called as one(prompt, engine)"),
        ("mine:plain", "not an 'async def'"),
        ("mine:none", "has no function none, only ['more', 'one', 'plain']"),
        ("mine", "not of the form package.module:function"),
        ("nowhere:f", "importing nowhere failed (ModuleNotFoundError"),
        ("broken:f", "ZeroDivisionError"),
    ):
        with pytest.raises(ConfigError) as e:
            load_rollout(reference)
        assert says in str(e.value) and "\n" not in str(e.value)
