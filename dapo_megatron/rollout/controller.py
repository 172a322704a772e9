"""The controller process: prompts -> engines -> verdicts -> groups -> batches, on the trainer's request.

    trainer asks       the controller answers when
    RestoreState       at once: keeps a part of its state out of a checkpoint
    Hello              data are read, graders run; its state is the checkpoint's
    NextBatch(k, v)    step k is full; with max_policy_lag its groups are generated while others are trained
    FetchPart(k, ...)  at once: every replica fetches its own part of batch k
    FetchState(k, p)   at once: a part of the state that belongs to batch k, for the checkpoint
    BeginEvaluation    at once; with max_policy_lag, held-out prompts are sampled beside the training's
    Evaluate(k, v)     every held-out prompt has its responses
    Goodbye            at once, and ends

With max_policy_lag 0 nothing is generated between a batch and the next request, so every response but those of carried
groups (at most one version older) is sampled by the version that it trains.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.wire import write_parts
from dapo_megatron.config import RunConfig
from dapo_megatron.data.prompts import LoadedPrompts, load_prompts
from dapo_megatron.data.snapshot import snapshot_parts
from dapo_megatron.data.tokenizer import check_tags, load_tokenizer
from dapo_megatron.engines.seeds import sampling_seed
from dapo_megatron.engines.stop_tokens import stop_token_ids
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.errors import DapoError, EngineError
from dapo_megatron.grading.pool import GradingPool
from dapo_megatron.messages import (
    Batch,
    BeginEvaluation,
    Done,
    Evaluate,
    Evaluation,
    Failed,
    FetchPart,
    FetchState,
    Goodbye,
    Hello,
    NextBatch,
    Part,
    Reply,
    Request,
    RestoreState,
    Welcome,
)
from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.samples import SampleWriter
from dapo_megatron.process import Reporter
from dapo_megatron.records import Group, Prompt, Response, ScoredGroup
from dapo_megatron.rollout.bank import RolloutBank, responses_digest
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.concurrency import all_or_first_error
from dapo_megatron.rollout.engine import Engine, Sampler
from dapo_megatron.rollout.evaluation import evaluate
from dapo_megatron.rollout.function import load_rollout
from dapo_megatron.rollout.guard import GuardedRollout
from dapo_megatron.rollout.ledger import Ledger
from dapo_megatron.rollout.metrics import response_metrics
from dapo_megatron.rollout.producer import Producer, StepGroups
from dapo_megatron.rollout.scoring import score_group
from dapo_megatron.rollout.served import ServedBatch
from dapo_megatron.rpc import RpcServer
from dapo_megatron.weights.hf_config import read_model

log = logging.getLogger(__name__)


class Controller:
    """Holds what outlives a request; `serve` is the process."""

    def __init__(self, config: RunConfig, reporter: Reporter, sampler: Sampler, grading: GradingPool):
        self.config, self.reporter, self.sampler, self.grading = config, reporter, sampler, grading
        self.folder = reporter.folder
        shape = read_model(config.model.path)
        self.tokenizer = load_tokenizer(config.model.path)
        check_tags(self.tokenizer, config.grading.thinking)
        self.params = SamplingParams(
            max_new_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=stop_token_ids(config.model.path, self.tokenizer),
        )
        self.rollout = GuardedRollout(load_rollout(config.rollout.function), config.rollout, shape.vocab)
        self.prompts = self._load(config.data.train, None)
        self.held_out = self._load(config.data.eval, config.data.eval_limit) if config.data.eval else None
        self._session: _Session | None = None
        self._restored: list[bytes] = []
        """What has come of the state that the run goes on from."""
        self._version = 0
        """That is live, by what the trainer has said."""
        self._evaluation: tuple[int, asyncio.Task[dict[str, float]]] | None = None
        """Step, and the evaluation that goes on beside its successor."""

    async def serve(self, link: RpcServer) -> None:
        """Answer the trainer until it says goodbye. Every DapoError is sent to it, and then raised here."""
        while True:
            request = await link.receive()
            try:
                await link.reply(await self._answer(request))
            except DapoError as e:
                await link.reply(Failed(e.kind, str(e)))
                raise
            if isinstance(request, Goodbye):
                return

    async def close(self) -> None:
        """Stop generating."""
        if self._evaluation is not None:
            self._evaluation[1].cancel()
            await asyncio.gather(self._evaluation[1], return_exceptions=True)  # nobody asks for it any more
        if self._session is not None:
            await self._session.producer.close()
            self._session.bank.end()

    async def _answer(self, request: Request) -> Reply:
        match request:
            case RestoreState(payload):
                self._restored.append(payload)
                return Done()
            case Hello(step, resumes):
                snapshot, self._restored = b"".join(self._restored), []
                return self._begin(snapshot if resumes else None, step)
            case NextBatch(step, version):
                self._version = version
                return await self._batch(self._begun(), step, version)
            case FetchPart(step, update, replica, part):
                served = self._served(step)
                return Part(await asyncio.to_thread(served.encoded, update, replica, part))
            case FetchState(step, part):
                return Part(self._served(step).state_part(part))
            case BeginEvaluation(step, version):
                self._version = version
                self._evaluation = step, asyncio.create_task(self._evaluate(step, version))
                return Done()
            case Evaluate(step, version):
                self.reporter.phase("evaluate", f"step {step}")
                if self._evaluation is not None and self._evaluation[0] == step:
                    return Evaluation(await self._evaluation[1])
                self._version = version
                return Evaluation(await self._evaluate(step, version))
            case Goodbye():
                return Done()

    async def _evaluate(self, step: int, version: int) -> dict[str, float]:
        held_out = self.held_out.prompts if self.held_out else []
        sample_group = partial(self.sample_group, purpose=f"evaluation {step}")
        return await evaluate(self.config, held_out, self.params, sample_group, version)

    def _begin(self, snapshot: bytes | None, step: int) -> Welcome:
        if self._session is not None:
            raise DapoError("a trainer said hello to a controller that serves another one: start the run anew")
        cut = step if snapshot is not None else None
        config, prompts = self.config, self.prompts.prompts
        buffer = GroupBuffer(prompts, seed=config.seed, shuffle=config.data.shuffle, state=snapshot, step=step)
        ledger = Ledger(self.folder.ledger, cut_to_step=cut)
        samples = SampleWriter(self.folder, resume_step=cut)
        bank = RolloutBank(self.folder, responses_digest(config), config.rollout.bank_bytes, step)
        banking = asyncio.Lock()
        make_group = partial(self._banked_group, bank, banking)
        producer = Producer(config, buffer, make_group, ledger, lambda: self.grading.trouble, bank.holds)
        self._session = _Session(producer, samples, bank, banking)
        longer = (p.input_ids for p in prompts if len(p.input_ids) > 1)
        return Welcome(list(itertools.islice(longer, config.resharding.verify_prompts)))

    def _served(self, step: int) -> ServedBatch:
        served = self._begun().served
        if served is None or served.step != step:
            raise DapoError(f"a trainer rank asked for batch {step}, which is not the one that is trained")
        return served

    def _begun(self) -> "_Session":
        if self._session is None:
            raise DapoError("the trainer asked for a batch before it said hello: start the run anew")
        return self._session

    async def _batch(self, session: "_Session", step: int, version: int) -> Batch:
        began, session.served = time.monotonic(), None
        await self._open_bank(session, step, version)
        produced = await session.producer.step(step, version, lambda text: self.reporter.phase("generate", text))
        self.reporter.phase("idle")
        produced.metrics |= {
            m.GENERATE_SECONDS: time.monotonic() - began,
            m.ROLLOUT_ERRORS: float(self.rollout.errors),
            m.ASKED_AGAIN: float(self.sampler.asked_again),
            m.GROUPS_FROM_BANK: float(session.bank.taken),
            m.GROUPS_NOT_BANKED: float(session.bank.missed),
        }
        if self.config.rollout.max_policy_lag:
            await self._open_bank(session, step + 1, version + 1)
            session.producer.run_ahead()
        served, metrics = await asyncio.to_thread(self._build, session, produced, step, version)
        session.served = served
        return Batch(served.counts, metrics, served.state_parts)

    def _build(
        self, session: "_Session", produced: StepGroups, step: int, version: int
    ) -> tuple[ServedBatch, dict[str, float]]:
        """The batch of what was produced, and its metrics; takes seconds."""
        config = self.config
        batch = build_step_batch(
            produced.groups,
            step=step,
            version=version,
            seed=config.seed,
            mini_batch_groups=config.trainer.mini_batch_prompts,
            aggregation=config.algorithm.aggregation,
            rules=packing_rules(config),
        )
        served = ServedBatch(batch, snapshot_parts(produced.state))
        if config.observe.dump_batches:
            write_parts(self.folder.batch(step), served.all_encoded())
        session.samples.write(step, produced.seen[: config.observe.groups_per_step])
        found = response_metrics(produced.groups, produced.seen, version, keeps_kv=config.keeps_kv)
        return served, produced.metrics | found | batch.metrics

    async def _open_bank(self, session: "_Session", step: int, version: int) -> None:
        """Let the bank keep what is finished from now on for `step`, which `version` will train."""
        if session.banked_step != step:
            session.banked_step = step
            versions = range(version - self.config.rollout.max_policy_lag, version + 1)
            async with session.banking:
                await asyncio.to_thread(session.bank.begin_step, step, versions)

    async def _banked_group(self, bank: RolloutBank, banking: asyncio.Lock, prompt: Prompt, order: int) -> ScoredGroup:
        async with banking:
            group = bank.take(order, prompt)
        if group is None:
            group = await self.make_group(prompt, order)
            async with banking:
                bank.add(group)
        return group

    async def make_group(self, prompt: Prompt, order: int) -> ScoredGroup:
        """Generate, grade and score the responses to one prompt."""
        group = await self.sample_group(prompt, order, self.params, self.config.rollout.group_size)
        return score_group(group, self.config)

    async def sample_group(
        self, prompt: Prompt, order: int, params: SamplingParams, size: int, *, purpose: str = "training"
    ) -> Group:
        """Generate and grade `size` responses to one prompt; `purpose` keeps the seeds of two uses apart."""
        seed = partial(sampling_seed, self.config.seed, purpose, order, prompt.id)
        return Group(
            order, prompt, await all_or_first_error(self._respond(prompt, params, i, seed) for i in range(size))
        )

    async def _respond(
        self, prompt: Prompt, params: SamplingParams, sample: int, seed: Callable[[int, int], int]
    ) -> Response:
        """`seed` is of (sample, request)."""
        own_seed = partial(seed, sample) if self.config.engine.deterministic else None
        response = await self.rollout(prompt, Engine(self.sampler, self.tokenizer, params, sample, own_seed))
        self._check_versions(response)
        if response.verdict is None and response.accuracy_reward is not None:
            response.verdict = "right" if response.accuracy_reward > 0 else "wrong"
        if response.verdict is None:
            response.verdict = await self.grading.grade(response.text, prompt.ground_truth, *prompt.alternatives)
        if response.verdict == "unknown":
            log.warning("no verdict on prompt %s, sample %d: its grader was stopped", prompt.id, sample)
        return response

    def _check_versions(self, response: Response) -> None:
        # With a lag, the next version may go live before the trainer asks for the batch that it trains.
        lag = self.config.rollout.max_policy_lag
        oldest, newest = self._version - lag, self._version + min(1, lag)
        for span in response.version_spans:
            if not oldest <= span.version <= newest:
                raise EngineError(
                    f"a response to prompt {response.prompt_id} was sampled by policy version {span.version}, the "
                    f"trainer has pushed none but {max(0, oldest)} to {newest} lately: somebody else has changed an "
                    "engine"
                )

    def _load(self, paths: list[str], limit: int | None) -> LoadedPrompts:
        loaded = load_prompts(paths, self.config.data, self.tokenizer, limit=limit)
        log.info("%s: %d prompts, %d too long and dropped", ", ".join(paths), len(loaded.prompts), loaded.dropped)
        return loaded


class _Session:
    """What begins with the trainer's hello."""

    def __init__(self, producer: Producer, samples: SampleWriter, bank: RolloutBank, banking: asyncio.Lock):
        """`banking` is held by whoever uses the bank: it is opened by a thread, for step after step."""
        self.producer, self.samples, self.bank, self.banking = producer, samples, bank, banking
        self.banked_step = 0
        self.served: ServedBatch | None = None
