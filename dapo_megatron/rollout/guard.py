"""The border to a user's rollout function: what it raises and what it returns is looked at before anything is trained.

A function that raises is called again for the same sample, or ends the run, as rollout.on_error says. One that returns
what cannot be trained ends the run: it would do so every time. Either way one line names function, prompt and sample.
"""

import asyncio
import logging
import traceback
from typing import Any, get_args

import msgspec
import numpy as np

from dapo_megatron.algorithm.reward import Verdict
from dapo_megatron.config import RolloutConfig
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.records import Prompt, Response, VersionSpan
from dapo_megatron.rollout import token_data
from dapo_megatron.rollout.call_deadline import CallDeadline
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.rollout.function import RolloutFunction
from dapo_megatron.rollout.token_data import Unfit, is_finite

log = logging.getLogger(__name__)


class GuardedRollout:
    """Calls the rollout function and checks what it makes."""

    def __init__(self, function: RolloutFunction, config: RolloutConfig, vocab: int):
        """`vocab` is the number of token ids that the model knows."""
        self._function, self._config, self._vocab = function, config, vocab
        self.errors = 0
        """Samples for which the function raised, each call counted."""

    async def __call__(self, prompt: Prompt, engine: Engine) -> Response:
        """One response.

        Raises:
            ConfigError: the function raised too often, or its response cannot be trained.
        """
        where = f"rollout.function={self._config.function}, prompt '{prompt.id}', sample {engine.sample}"
        tries = 1 if self._config.on_error == "stop" else 1 + self._config.max_reissues
        for attempt in range(1, tries + 1):
            try:
                async with asyncio.timeout(self._config.function_timeout_s) as timeout:
                    engine.deadline = CallDeadline(timeout)
                    try:
                        response = await self._function(prompt, engine)
                    finally:
                        engine.deadline.close()
            except DapoError:  # the engine's own, which has retries of its own
                raise
            except (Exception, SystemExit, asyncio.CancelledError) as e:  # a user's code may raise anything
                if isinstance(e, asyncio.CancelledError) and _is_cancelled():
                    raise
                if timeout.expired():
                    limit = f"rollout.function_timeout_s={self._config.function_timeout_s:g}"
                    raise ConfigError(f"{where}: no response within {limit} s") from None
                self.errors += 1
                reason = f"{where}: it raised {_in_one_line(e, self._function)}"
                if attempt == tries:
                    again = f" {tries} times" if tries > 1 else ""
                    raise ConfigError(f"{reason}{again}: mend it") from None
                log.warning("%s; the sample is issued again", reason)
            else:
                return checked(response, prompt, engine.sample, self._vocab, where)
        raise AssertionError("unreachable")


def checked(response: Any, prompt: Prompt, sample: int, vocab: int, where: str) -> Response:
    """The response with arrays for its lists, if it can be trained.

    Raises:
        ConfigError: `where`, and what is wrong with it.
    """
    if not isinstance(response, Response):
        raise ConfigError(f"{where}: it returned {type(response).__name__}, a Response is expected")
    try:
        found = _with_arrays(response, vocab)
    except Unfit as e:
        raise ConfigError(f"{where}: {e}") from None
    if problem := _identity_problem(found, prompt, sample) or _spans_problem(found) or _verdict_problem(found):
        raise ConfigError(f"{where}: {problem}")
    return _plain(found, prompt, sample)


def _is_cancelled() -> bool:
    """Whether the task is: a CancelledError may also be that of a task which the user's code cancelled, and awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _plain(r: Response, prompt: Prompt, sample: int) -> Response:
    """Python's own types, which can be written down, for numpy's, an enumeration's or a subclass's; what scoring fills
    in is left to it."""
    verdicts: tuple[Verdict, ...] = get_args(Verdict)
    return Response(
        prompt_id=prompt.id,
        sample=sample,
        token_ids=r.token_ids,
        loss_mask=r.loss_mask,
        rollout_logprobs=r.rollout_logprobs,
        version_spans=r.version_spans,
        finish_reason="stop" if r.finish_reason == "stop" else "length",
        text=r.text.encode("utf-8", "replace").decode("utf-8"),  # lone surrogates cannot be written down
        verdict=None if r.verdict is None else verdicts[verdicts.index(r.verdict)],
        accuracy_reward=None if r.accuracy_reward is None else float(r.accuracy_reward),
        turns=int(r.turns),
        token_arrays={str(name): column for name, column in r.token_arrays.items()},
    )


def _with_arrays(r: Response, vocab: int) -> Response:
    columns = {
        "token_ids": token_data.token_ids(r.token_ids, vocab),
        "loss_mask": token_data.loss_mask(r.loss_mask),
        "rollout_logprobs": token_data.logprobs(r.rollout_logprobs),
    }
    if not isinstance(r.token_arrays, dict):
        raise Unfit(f"token_arrays is a {type(r.token_arrays).__name__}, a dictionary is expected")
    if not all(isinstance(name, str) for name in r.token_arrays):
        raise Unfit("token_arrays has names that are no text")
    extra = {name: token_data.numbers(f"token_arrays[{name!r}]", value) for name, value in r.token_arrays.items()}
    n = len(columns["token_ids"])
    if n == 0:
        raise Unfit("the response has no tokens")
    for name, column in [*columns.items(), *((f"token_arrays[{name!r}]", column) for name, column in extra.items())]:
        if len(column) != n:
            raise Unfit(f"{name} has {len(column)} entries for {n} tokens")
    return msgspec.structs.replace(r, token_arrays=extra, **columns)


def _identity_problem(r: Response, prompt: Prompt, sample: int) -> str | None:
    if (r.prompt_id, r.sample) != (prompt.id, sample):
        return f"the response says it is of prompt '{r.prompt_id}', sample {r.sample}"
    return None


def _spans_problem(r: Response) -> str | None:
    spans, n = r.version_spans, len(r.token_ids)
    if not isinstance(spans, list) or not all(isinstance(s, VersionSpan) for s in spans):
        return "version_spans is not a list of VersionSpan"
    if not spans:
        return "version_spans is empty: which policy version sampled the tokens? (Sampled.version_spans says)"
    if any(type(x) is not int for s in spans for x in (s.version, s.start, s.end)):
        return "version_spans has entries that are no integers"
    covered = 0
    for span in sorted(spans, key=lambda s: s.start):
        if span.version < 0 or not covered <= span.start <= span.end <= n:
            return f"version_spans names version {span.version} for tokens {span.start} to {span.end} of {n}"
        covered = max(covered, span.end)
    return None if covered else "version_spans is empty: it covers no token"


def _verdict_problem(r: Response) -> str | None:
    if r.finish_reason not in ("stop", "length"):
        return f"finish_reason is {r.finish_reason!r}, stop or length is expected"
    if not isinstance(r.text, str):
        return f"text is a {type(r.text).__name__}, text is expected"
    if r.verdict is not None and r.verdict not in get_args(Verdict):
        return f"verdict is {r.verdict!r}, one of {', '.join(get_args(Verdict))} or None is expected"
    reward = r.accuracy_reward
    if reward is not None and not is_finite(reward.item() if isinstance(reward, np.number) else reward):
        return f"accuracy_reward is {reward!r}, a finite number or None is expected"
    if isinstance(r.turns, bool) or not isinstance(r.turns, int | np.integer) or r.turns < 1:
        return f"turns is {r.turns!r}, a number from 1 on is expected"
    return None


def _in_one_line(error: BaseException, function: RolloutFunction) -> str:
    """The exception, and the innermost line of the function's own file that it came through."""
    text = " ".join(traceback.format_exception_only(error)[-1].split())[:300]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    own = [f for f in frames if f.filename == file] or frames
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text
