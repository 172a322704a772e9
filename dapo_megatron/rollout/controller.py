"""The controller process: prompts -> engines -> verdicts -> groups -> batches, on the trainer's request.

    trainer asks       the controller answers when
    Hello              data are read, graders run; its state is the checkpoint's
    NextBatch(k, v)    step k is full; with max_policy_lag 1 it was begun when batch k - 1 left
    Evaluate(k)        every held-out prompt has its responses
    Goodbye            at once, and ends

With max_policy_lag 0 nothing is generated between a batch and the next request, so every response but those of carried
groups (at most one version older) is sampled by the version that it trains.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import time
from pathlib import Path

import transformers

from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.rules import packing_rules
from dapo_megatron.batching.wire import encode
from dapo_megatron.config import RunConfig
from dapo_megatron.data.prompts import LoadedPrompts, load_prompts
from dapo_megatron.errors import DapoError
from dapo_megatron.grading.pool import GradingPool
from dapo_megatron.link import Batch, Done, Evaluate, Evaluation, Failed, Goodbye, Hello, LinkServer, NextBatch, Welcome
from dapo_megatron.observe.progress import write_status
from dapo_megatron.observe.samples import SampleWriter
from dapo_megatron.records import Group, Prompt
from dapo_megatron.rollout.collector import Collected, Collector
from dapo_megatron.rollout.engine import Engine, EngineClient, Sampling
from dapo_megatron.rollout.evaluation import evaluate
from dapo_megatron.rollout.function import RolloutFunction, load_rollout
from dapo_megatron.rollout.ledger import Ledger
from dapo_megatron.rollout.scoring import score_group
from dapo_megatron.weights.hf_config import read_json

log = logging.getLogger(__name__)


class Controller:
    """Holds what outlives a request; `serve` is the process."""

    def __init__(self, config: RunConfig, client: EngineClient, grading: GradingPool):
        self.config, self.client, self.grading = config, client, grading
        self.run_dir = Path(config.run_dir)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
        self.sampling = Sampling(
            max_new_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=stop_token_ids(config.model.path, self.tokenizer),
        )
        self.rollout: RolloutFunction = load_rollout(config.rollout.function)
        self.prompts = self._load(config.data.train, None)
        self.held_out = self._load(config.data.eval, config.data.eval_limit) if config.data.eval else None
        self.collector: Collector | None = None
        self.samples: SampleWriter | None = None
        self._ahead: asyncio.Task[Collected] | None = None

    async def serve(self, link: LinkServer) -> None:
        """Answer the trainer until it says goodbye. Every DapoError is sent to it, and then raised here."""
        while True:
            request = await link.receive()
            try:
                reply = await self._answer(request)
            except DapoError as e:
                await link.reply(Failed(str(e)))
                raise
            await link.reply(reply)
            if isinstance(request, Goodbye):
                return

    async def close(self) -> None:
        """Stop generating ahead."""
        if self._ahead is not None:
            self._ahead.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ahead

    async def _answer(self, request):
        match request:
            case Hello(snapshot, step):
                self._begin(snapshot, step)
                wanted = self.config.resharding.verify_prompts
                longer = (p.input_ids for p in self.prompts.prompts if len(p.input_ids) > 1)
                return Welcome(list(itertools.islice(longer, wanted)))
            case NextBatch(step, version):
                return await self._batch(step, version)
            case Evaluate(step):
                self._status("evaluate", f"step {step}")
                held_out, config = self.held_out.prompts, self.config.evaluation
                return Evaluation(await evaluate(config, held_out, self.sampling, self.sample_group))
            case Goodbye():
                return Done()

    def _begin(self, snapshot: bytes | None, step: int) -> None:
        cut = step if snapshot is not None else None
        ledger = Ledger(self.run_dir / "ledger.jsonl", cut_to_step=cut)
        self.samples = SampleWriter(self.run_dir, resume_step=cut)
        self.collector = Collector(self.config, self.prompts.prompts, self.make_group, ledger, snapshot)

    async def _batch(self, step: int, version: int) -> Batch:
        began = time.monotonic()
        collected = await (self._ahead or self._collect(step, version))
        self._ahead = None
        waited = time.monotonic() - began
        config = self.config
        batch = build_step_batch(
            collected.groups,
            step=step,
            version=version,
            seed=config.seed,
            mini_batch_groups=config.trainer.mini_batch_prompts,
            aggregation=config.algorithm.aggregation,
            rules=packing_rules(config),
        )
        self.samples.write(step, collected.seen[: config.observe.responses_per_step])
        metrics = collected.metrics | _response_metrics(collected, version) | batch.metrics
        metrics |= {"time/generate": waited, "grading/unknown": float(sum(self.grading.unknown.values()))}
        if config.rollout.max_policy_lag:
            self._ahead = asyncio.create_task(self._collect(step + 1, version))
        else:
            self._status("idle", "")
        return Batch(encode(batch), metrics, collected.state)

    async def _collect(self, step: int, version: int) -> Collected:
        return await self.collector.collect(step, version, lambda text: self._status("generate", text))

    async def make_group(self, prompt: Prompt, order: int) -> Group:
        """Generate, grade and score the responses to one prompt."""
        group = await self.sample_group(prompt, order, self.sampling, self.config.rollout.group_size)
        score_group(group, self.config)
        return group

    async def sample_group(self, prompt: Prompt, order: int, sampling: Sampling, size: int) -> Group:
        """Generate and grade `size` responses to one prompt."""

        async def one(sample: int):
            response = await self.rollout(prompt, Engine(self.client, self.tokenizer, sampling, sample))
            response.verdict = await self.grading.grade(response.text, prompt.ground_truth)
            if response.verdict == "unknown":
                log.warning("no verdict on prompt %s, sample %d: its grader was stopped", prompt.id, sample)
            return response

        return Group(order, prompt, list(await asyncio.gather(*(one(i) for i in range(size)))))

    def _load(self, path: str, limit: int | None) -> LoadedPrompts:
        data = self.config.data
        loaded = load_prompts(
            path,
            tokenizer=self.tokenizer,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            answer_pattern=data.answer_pattern,
            template=data.template,
            chat=data.chat,
            max_prompt_tokens=data.max_prompt_tokens,
            too_long=data.too_long,
            limit=limit,
        )
        log.info("%s: %d prompts, %d too long and dropped", path, len(loaded.prompts), loaded.dropped)
        return loaded

    def _status(self, phase: str, detail: str) -> None:
        write_status(self.run_dir, "controller", phase, detail)


def stop_token_ids(model_path: str, tokenizer) -> list[int]:
    """End tokens of the tokenizer and of generation_config.json (chat models have several).

    Raises:
        DapoError: there is none, or generation_config.json names something else than token ids.
    """
    ids = {tokenizer.eos_token_id} - {None}
    path = Path(model_path) / "generation_config.json"
    if path.exists():
        eos = read_json(path, "").get("eos_token_id")
        listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise DapoError(f"{path}: eos_token_id must be a token id or a list of them, it is {json.dumps(eos)}")
        ids |= set(listed)
    if not ids:
        raise DapoError(f"{model_path}: neither tokenizer nor generation_config.json names an end token")
    return sorted(ids)


def _response_metrics(collected: Collected, version: int) -> dict[str, float]:
    # Over everything generated for the step, filtered groups included: what the policy does, not what it trains on.
    responses = [r for g in (collected.seen or collected.groups) for r in g.responses]
    lengths = [len(r.token_ids) for r in responses]
    n = len(responses)
    return {
        "reward/mean": sum(r.reward for r in responses) / n,
        "reward/accuracy": sum(r.verdict == "right" for r in responses) / n,
        "reward/overlong": sum(r.overlong_penalty for r in responses) / n,
        "response/length_mean": sum(lengths) / n,
        "response/length_max": float(max(lengths)),
        "response/truncated_share": sum(r.finish_reason == "length" for r in responses) / n,
        "rollout/response_tokens": float(sum(lengths)),
        "rollout/lag_max": float(version - min(g.oldest_version for g in collected.groups)),
    }
