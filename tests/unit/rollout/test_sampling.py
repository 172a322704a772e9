"""How a response is sampled: from the recipe over the controller to what an engine is asked, also for the evaluation.

The controller and its client are real, the engine is an HTTP server that keeps what it is asked.
"""

import asyncio
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_megatron.batching.wire import decode_part, read_step_batch
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.engines.seeds import sampling_seed
from dapo_megatron.engines.wire import SamplingParams, generate_request
from dapo_megatron.data.snapshot import decode_snapshot, encode_snapshot
from dapo_megatron.data.tokenizer import check_tags
from dapo_megatron.errors import ConfigError, DapoError, EngineError
from dapo_megatron.messages import (
    Batch,
    BeginEvaluation,
    Done,
    Evaluate,
    FetchPart,
    FetchState,
    Goodbye,
    Hello,
    NextBatch,
    RestoreState,
)
from dapo_megatron.observe.samples import read_samples
from dapo_megatron.process import Reporter
from dapo_megatron.records import Response, VersionSpan
from dapo_megatron.rollout.controller import Controller
from dapo_megatron.rollout.ledger import read_ledger
from dapo_megatron.run_folder import RunFolder
from launch.demo import write_model
from tests.tiny import run_config

SUMS = {"train": ["1+2=", "3+4=", "5+6="], "eval": ["7+8=", "9+1="]}


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_carries_how_to_sample(count):
    params = SamplingParams(max_new_tokens=9, temperature=0.7, top_p=0.6, stop_token_ids=[1, 7])
    assert generate_request([5, 6], params, count) == {
        "input_ids": [5, 6] if count == 1 else [[5, 6]] * 3,
        "sampling_params": {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.6, "stop_token_ids": [1, 7]},
        "return_logprob": True,
    }


def test_only_requests_that_are_sampled_alike_travel_together():
    sent = []

    class Client:
        share = 8

        async def generate(self, input_ids, params, count=1):
            sent.append((input_ids, params, count))
            return [params.temperature] * count

    async def run():
        together = CoalescingClient(Client())
        return await asyncio.gather(*(together.generate([5, 6], params) for params in (warm, cold, warm, short)))

    warm, cold = SamplingParams(max_new_tokens=9, temperature=0.75), SamplingParams(max_new_tokens=9, temperature=0.0)
    short = SamplingParams(max_new_tokens=4, temperature=0.75)
    assert asyncio.run(run()) == [0.75, 0.0, 0.75, 0.75]
    assert sent == [([5, 6], warm, 2), ([5, 6], cold, 1), ([5, 6], short, 1)]


@pytest.fixture
def recipe(tmp_path):
    """A model whose tokenizer ends with token 2 and whose generation_config.json with 1 or 7."""
    model = tmp_path / "model"
    write_model(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "0"
    assert tokenizer.eos_token_id == 2
    tokenizer.save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    for name, questions in SUMS.items():
        rows = [json.dumps({"prompt": q, "answer": "3"}) for q in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return run_config(
        model,
        data={
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "eval.jsonl"),
            "template": "plain",
            "chat": False,
        },
        rollout={"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 11, "temperature": 0.7},
        algorithm={"dynamic_sampling": False},
        evaluation={"samples": 3, "temperature": 0.4, "top_p": 0.6, "greedy": True},
    )


class Engine:
    """Answers every request with the same two tokens."""

    def __init__(self, version="0"):
        self.version = version
        self.asked = Counter()
        """Responses by (prompt, sampling parameters)."""

    async def model_info(self, request):
        return web.json_response({"weight_version": self.version})

    async def generate(self, request):
        body = await request.json()
        inputs = body["input_ids"]
        several = isinstance(inputs[0], list)
        for ids in inputs if several else [inputs]:
            self.asked[tuple(ids), json.dumps(body["sampling_params"], sort_keys=True)] += 1
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-0.5, 5, None], [-0.25, 7, None]],
            "weight_version": self.version,
        }
        return web.json_response([{"meta_info": meta}] * len(inputs) if several else {"meta_info": meta})


class Link:
    """The trainer's side: its requests, and the answers to them."""

    def __init__(self, *requests):
        self.requests, self.replies = list(requests), []

    async def receive(self):
        return self.requests.pop(0)

    async def reply(self, message):
        self.replies.append(message)


async def serve(config, folder, link, engine):
    async def grade(text, truth):
        return "right"

    app = web.Application()
    app.router.add_post("/generate", engine.generate)
    app.router.add_get("/model_info", engine.model_info)
    grading = SimpleNamespace(grade=grade, trouble=None, unknown=Counter())
    with Reporter(RunFolder(folder), "controller") as reporter:
        async with (
            TestServer(app) as server,
            EngineClient(
                lambda: of_urls([str(server.make_url("")).rstrip("/")]), concurrency=8, timeout_s=10
            ) as client,
        ):
            controller = Controller(config, reporter, CoalescingClient(client), grading)
            try:
                await controller.serve(link)
            finally:
                await controller.close()


def test_the_engine_is_asked_for_what_the_recipe_says(tmp_path, recipe):
    engine, link = Engine(), Link(Hello(0), Evaluate(0, 0), NextBatch(1, 0), FetchPart(1, 0, 0, 0), Goodbye())
    asyncio.run(serve(recipe, tmp_path, link, engine))

    encode = transformers.AutoTokenizer.from_pretrained(recipe.model.path)
    kinds = {}
    for (prompt, params), count in engine.asked.items():
        (name,) = [n for n, questions in SUMS.items() if list(prompt) in [encode(q)["input_ids"] for q in questions]]
        kinds.setdefault((name, params), []).append(count)

    def how(temperature, top_p):
        params = {"max_new_tokens": 11, "temperature": temperature, "top_p": top_p, "stop_token_ids": [1, 2, 7]}
        return json.dumps(params, sort_keys=True)

    assert kinds == {
        ("train", how(0.7, 1.0)): [4, 4],
        ("eval", how(0.4, 0.6)): [3, 3],
        ("eval", how(0.0, 1.0)): [1, 1],
    }
    _, evaluation, batch, part, _ = link.replies
    assert evaluation.metrics["eval/accuracy"] == evaluation.metrics["eval/greedy_accuracy"] == 1.0
    assert batch.parts == [[1]]
    place, micro_batches = decode_part(part.payload)
    assert (place.step, place.version, place.updates, place.replicas, place.parts) == (1, 0, 1, 1, 1)
    samples = [s for micro_batch in micro_batches for s in micro_batch]
    assert [s.token_ids[s.prompt_length :].tolist() for s in samples] == [[5, 7]] * 8
    assert all(s.loss_mask.all() for s in samples)  # the end token is trained too


class TwoVersions(Engine):
    """Its held-out answers wait until it is told to give them, and end in the next version."""

    def __init__(self):
        super().__init__()
        self.pushed, self.waiting = asyncio.Event(), 0

    async def generate(self, request):
        params = (await request.json())["sampling_params"]
        if params["top_p"] != 1.0:
            self.waiting += 1
            await self.pushed.wait()
        reply = await super().generate(request)
        if params["top_p"] == 1.0:
            return reply
        replies = json.loads(reply.body)
        for each in replies if isinstance(replies, list) else [replies]:
            spans = [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 2}]
            each["meta_info"]["weight_versions"] = spans
        return web.json_response(replies)


def test_an_evaluation_beside_training_holds_up_no_batch_and_tells_of_the_next_version(tmp_path, recipe):
    lag = {"max_policy_lag": 1, "prompts_per_step": 1, "group_size": 2}
    config = recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update=lag),
            "trainer": recipe.trainer.model_copy(update={"mini_batch_prompts": 1}),
            "evaluation": recipe.evaluation.model_copy(update={"samples": 1}),
        }
    )
    engine = TwoVersions()

    class Pushing(Link):
        async def receive(self):
            if isinstance(self.requests[0], Evaluate):
                while engine.waiting < 2:  # both held-out prompts are with the engine, and unanswered
                    await asyncio.sleep(0.01)
                assert not engine.pushed.is_set() and isinstance(self.replies[-1], Batch)
                engine.pushed.set()
            return await super().receive()

    link = Pushing(Hello(0), BeginEvaluation(0, 0), NextBatch(1, 0), Evaluate(0, 0), Goodbye())
    asyncio.run(serve(config, tmp_path, link, engine))
    _, begun, batch, evaluation, _ = link.replies
    assert begun == Done() and batch.metrics["groups/kept"] == 1
    # Two sampled answers of two tokens, of which one is of the next version; two greedy ones all of the measured one.
    assert evaluation.metrics["eval/other_version_share"] == 2 / 8
    assert evaluation.metrics["eval/accuracy"] == 1.0 and "time/evaluate" not in evaluation.metrics


def test_an_evaluation_that_nobody_asks_for_any_more_ends_with_the_controller(tmp_path, recipe):
    config = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_policy_lag": 1})})

    async def run():
        link = Link(Hello(0), BeginEvaluation(0, 0), Goodbye())
        await asyncio.wait_for(serve(config, tmp_path, link, TwoVersions()), 5)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


async def two_turns(prompt, engine):
    first = await engine.generate(prompt.input_ids)
    last = await engine.generate([*prompt.input_ids, *first.token_ids, 5], max_new_tokens=4)
    tokens, n = [*first.token_ids.tolist(), *last.token_ids.tolist()], len(first.token_ids)
    spans = first.version_spans + [VersionSpan(s.version, s.start + n, s.end + n) for s in last.version_spans]
    logprobs = np.concatenate([first.logprobs, last.logprobs])
    return Response(prompt.id, engine.sample, tokens, [True] * len(tokens), logprobs, spans, "stop", "")


def test_every_request_of_a_deterministic_run_has_a_seed_of_its_own(tmp_path, recipe):
    config = recipe.model_copy(
        update={
            "engine": recipe.engine.model_copy(update={"deterministic": True}),
            "rollout": recipe.rollout.model_copy(update={"function": f"{__name__}:two_turns"}),
        }
    )

    def asked(name, seed=0):
        engine, link = Engine(), Link(Hello(0), Evaluate(0, 0), NextBatch(1, 0), Evaluate(1, 0), Goodbye())
        run = config.model_copy(update={"seed": seed, "data": config.data.model_copy(update={"shuffle": False})})
        asyncio.run(serve(run, tmp_path / name, link, engine))
        return engine.asked

    first = asked("a")
    seeds = [json.loads(params)["sampling_seed"] for _, params in first]
    assert set(first.values()) == {1} and all(0 <= seed < 2**31 for seed in seeds)  # none travels with another
    # 2 turns of 2 groups of 4, and twice those of 2 held-out prompts, 3 sampled and 1 greedy, whose seeds do not count.
    sampled = [s for (_, params), s in zip(first, seeds, strict=True) if json.loads(params)["temperature"]]
    assert len(set(sampled)) == len(sampled) == 2 * (2 * 4 + 2 * 2 * 3)
    assert asked("b") == first
    assert not {s for _, params in asked("c", seed=1) if (s := json.loads(params)["sampling_seed"]) in seeds}


def test_a_seed_is_what_it_was_and_no_two_names_read_alike():
    assert sampling_seed(0, "training", 12, "train.jsonl:7", 3, 0) == 1077635429
    names = [(1, 23), (12, 3), ("1", "2", "3"), ("12", "3", ""), ("1:2", 3), ("1", ":2", 3)]
    assert len({sampling_seed(*n) for n in names} | {sampling_seed(0, "training", i) for i in range(2000)}) == 2006


@pytest.mark.parametrize(
    ("lag", "version", "refused"), [(0, 3, False), (0, 4, True), (0, 2, True), (1, 4, False), (1, 5, True)]
)
def test_a_version_that_the_trainer_did_not_push_ends_the_run(tmp_path, recipe, lag, version, refused):
    engine, link = Engine(str(version)), Link(Hello(0), NextBatch(1, 3), Goodbye())
    config = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_policy_lag": lag})})
    if not refused:
        return asyncio.run(serve(config, tmp_path, link, engine))
    with pytest.raises(EngineError, match=f"sampled by policy version {version}, the trainer has pushed none but"):
        asyncio.run(serve(config, tmp_path, link, engine))
    assert link.replies[-1].kind == "engine"


def test_a_second_hello_does_not_empty_the_ledger(tmp_path, recipe):
    link = Link(Hello(0), NextBatch(1, 0), Hello(0))
    with pytest.raises(DapoError, match="a controller that serves another one"):
        asyncio.run(serve(recipe, tmp_path, link, Engine()))
    assert len(read_ledger(RunFolder(tmp_path).ledger)) == 2


class Patient(Link):
    """Says goodbye when what is generated ahead is finished."""

    async def receive(self):
        if isinstance(self.requests[0], Goodbye):
            await asyncio.sleep(0.5)
        return await super().receive()


@pytest.mark.parametrize("version", [1, 2])
def test_what_was_generated_ahead_is_taken_back_by_a_resume_that_may_train_it(tmp_path, recipe, version):
    lag = {"max_policy_lag": 1}
    config = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=lag)})
    first = Patient(Hello(0), NextBatch(1, 0), FetchState(1, 0), Goodbye())
    asyncio.run(serve(config, tmp_path, first, Engine("0")))
    _, batch, state, _ = first.replies
    assert batch.metrics["groups/from_bank"] == 0

    halves = [RestoreState(state.payload[:100]), RestoreState(state.payload[100:])]
    engine, second = Engine(str(version)), Link(*halves, Hello(1, True), NextBatch(2, version), Goodbye())
    asyncio.run(serve(config, tmp_path, second, engine))
    *_, resumed, _ = second.replies
    may = version == 1
    assert resumed.metrics["groups/from_bank"] == (2 if may else 0) and resumed.metrics["groups/not_banked"] == 0
    assert resumed.metrics["rollout/lag_max"] == (1 if may else 0)
    trained = [e.order for e in read_ledger(RunFolder(tmp_path).ledger) if e.fate == "kept"]
    assert len(set(trained)) == len(trained) == 4 and (set(trained) == {0, 1, 2, 3} or not may)


def test_a_snapshot_of_other_prompts_is_refused(tmp_path, recipe):
    first = Link(Hello(0), NextBatch(1, 0), FetchState(1, 0), Goodbye())
    asyncio.run(serve(recipe, tmp_path, first, Engine()))
    state = RestoreState(first.replies[2].payload)
    snapshot = decode_snapshot(state.payload, 1)
    snapshot.again.append((0, "train.jsonl:99"))
    with pytest.raises(DapoError, match=r"prompt 'train.jsonl:99' \(number 0\) of the checkpoint is not in data.train"):
        asyncio.run(serve(recipe, tmp_path, Link(RestoreState(encode_snapshot(snapshot)), Hello(1, True)), Engine()))
    with pytest.raises(DapoError, match="it is of step 1, the checkpoint is of step 2"):
        asyncio.run(serve(recipe, tmp_path, Link(state, Hello(2, True)), Engine()))


async def knows_its_verdict(prompt, engine):
    completion = await engine.generate(prompt.input_ids)
    n = len(completion.token_ids)
    response = Response(
        prompt.id,
        engine.sample,
        completion.token_ids,
        [True] * n,
        completion.logprobs,
        completion.version_spans,
        "stop",
        "",
    )
    if engine.sample == 0:
        response.verdict = "wrong"
    if engine.sample == 1:
        response.accuracy_reward = -2.5
    return response


def test_a_verdict_or_reward_of_the_rollouts_own_is_kept(tmp_path, recipe):
    function = {"function": "tests.unit.rollout.test_sampling:knows_its_verdict"}
    config = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=function)})
    link = Link(Hello(0), NextBatch(1, 0), Goodbye())
    asyncio.run(serve(config, tmp_path, link, Engine()))  # whoever is graded is right
    for group in read_samples(RunFolder(tmp_path)):
        verdicts = [(r["verdict"], r["accuracy_reward"]) for r in group["responses"]]
        assert verdicts == [("wrong", -1.0), ("wrong", -2.5), ("right", 1.0), ("right", 1.0)]


def test_tags_that_the_text_does_not_hold_are_refused(tmp_path, recipe):
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.path)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=False)
    tokenizer.add_tokens(["[/THINK]"], special_tokens=True)
    check_tags(tokenizer, ["<think>", "</think>"])
    check_tags(tokenizer, None)
    with pytest.raises(ConfigError, match=r"\[/THINK\] is a special token"):
        check_tags(tokenizer, ["<think>", "[/THINK]"])


@pytest.mark.parametrize(
    "request_",
    [
        FetchPart(*place)
        for place in [(2, 0, 0, 0), (0, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 0, 0, -1)]
    ]
    + [FetchState(*place) for place in [(2, 0), (1, 1), (1, -1)]],
)
def test_a_part_that_is_not_of_the_batch_ends_the_run(tmp_path, recipe, request_):
    link = Link(Hello(0), NextBatch(1, 0), request_, Goodbye())
    with pytest.raises(DapoError, match="is not the one that is trained|has no part"):
        asyncio.run(serve(recipe, tmp_path, link, Engine()))


def test_a_dumped_batch_is_what_the_replicas_fetch(tmp_path, recipe):
    options = {
        "observe": recipe.observe.model_copy(update={"dump_batches": True}),
        "actor": recipe.actor.model_copy(update={"data_parallel_size": 3, "micro_batch_tokens": 12}),
        "trainer": recipe.trainer.model_copy(update={"mini_batch_prompts": 1}),
    }
    fetches = [FetchPart(1, update, replica, 0) for update in range(2) for replica in range(3)]
    link = Link(Hello(0), NextBatch(1, 0), *fetches, Goodbye())
    asyncio.run(serve(recipe.model_copy(update=options), tmp_path, link, Engine()))
    _, batch, *parts, _ = link.replies
    assert batch.parts == [[1, 1, 1], [1, 1, 1]]
    dumped = read_step_batch(RunFolder(tmp_path).batch(1))
    sources = []
    for fetch, part in zip(fetches, parts, strict=True):
        place, shard = decode_part(part.payload)
        assert (place.update, place.replica) == (fetch.update, fetch.replica)
        kept = dumped.mini_batches[fetch.update].shards[fetch.replica]
        assert [[s.source for s in mb] for mb in shard] == [[s.source for s in mb] for mb in kept]
        sources += [s.source for mb in shard for s in mb]
    assert len(sources) == len(set(sources)) == 8
