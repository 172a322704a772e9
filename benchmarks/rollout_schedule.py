"""How well the producer keeps engines and trainer busy: the real producer, buffer and ledger, in virtual time.

    python -m benchmarks.rollout_schedule                        # lags 0, 1, 2 and 4, 200 steps of 128 prompts each
    python -m benchmarks.rollout_schedule --prompts 512 --engines 16 --steps 50
    python -m benchmarks.rollout_schedule --split 128            # which split of 128 GPUs is fastest, at each lag

Engines decode many requests together, each the slower the more there are; lengths are log-normal (mean 5,000 tokens,
the longest 20,480) and longer for hard prompts; about half of the groups are mixed. A step trains in `--train` of the
time that its generation would take alone, and pauses the engines for a push. No GPU is claimed to behave like
benchmarks/simulated.py; what is compared is who waits.
"""

import argparse
import asyncio
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from benchmarks.simulated import SimulatedEngine, run_virtually
from dapo_megatron.config import RunConfig
from dapo_megatron.observe import catalog as m
from dapo_megatron.records import Prompt, Response, ScoredGroup, VersionSpan
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.ledger import Ledger, check_exactly_once, read_ledger
from dapo_megatron.rollout.producer import Producer

GROUP = 16
LONGEST = 20_480
MEAN, SIGMA = 5_000, 0.7
SPEED, HALF = 120.0, 64.0
"""Tokens a second of one request alone, and the batch at which each has half of that."""
SLOTS = 256
PUSH_S = 5.0
WARM_UP = 10
"""Steps that are left out: nothing is known yet of the data."""
GPUS_PER_ENGINE = 4


@dataclass
class Scene:
    """What is simulated."""

    prompts: int
    engines: int
    steps: int
    train_s: float
    """Seconds that a step trains."""
    seed: int


@dataclass
class Seen:
    """What happened after the warm-up."""

    rounds: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    ages: Counter[int] = field(default_factory=Counter)
    """Groups trained, by the age of their oldest token in versions."""
    idle: float = 0.0
    trained: list[int] = field(default_factory=list)
    """Tokens of the groups that were trained."""
    issued: dict[int, int] = field(default_factory=dict)
    """Tokens of every mixed group, by its number, as it was issued last."""
    stale: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def bias(self) -> float:
        """Mean length trained over mean length issued, less 1."""
        return mean(self.trained) / mean(self.issued.values()) - 1


class World:
    """Engines, and groups whose lengths and verdicts are drawn when they are issued."""

    def __init__(self, scene: Scene):
        self.engines = [SimulatedEngine(SLOTS, SPEED, HALF) for _ in range(scene.engines)]
        self.rng, self.version = random.Random(scene.seed), 0
        self.tokens: dict[int, int] = {}
        self.mixed: set[int] = set()

    async def make_group(self, prompt: Prompt, order: int) -> ScoredGroup:
        """A group whose answers decode side by side."""
        version = self.version
        ease = self.rng.betavariate(0.35, 0.45)
        right = [self.rng.random() < ease for _ in range(GROUP)]
        centre = MEAN * (1.25 - 0.5 * ease)
        lengths = [min(LONGEST, round(centre * self.rng.lognormvariate(-(SIGMA**2) / 2, SIGMA))) + 1 for _ in right]
        self.tokens[order] = sum(lengths)
        if 0 < sum(right) < GROUP:
            self.mixed.add(order)
        await asyncio.gather(*(self._decode(n) for n in lengths))
        verdicts = ["right" if any(right) else "wrong", "right" if all(right) else "wrong"]
        spans = [VersionSpan(version, 0, 1)]
        return ScoredGroup(
            order,
            prompt,
            [Response(prompt.id, i, [0], [True], [0.0], spans, "stop", "", verdict=v) for i, v in enumerate(verdicts)],
        )

    async def _decode(self, tokens: int) -> None:
        await min(self.engines, key=lambda e: e.load).decode(tokens)


def simulate(scene: Scene, lag: int, folder: Path) -> Seen:
    """One run at one lag."""
    config = RunConfig.model_validate(
        {
            "model": {"path": "none"},
            "data": {"train": "none"},
            "rollout": {"prompts_per_step": scene.prompts, "group_size": GROUP, "max_policy_lag": lag},
            "trainer": {"mini_batch_prompts": scene.prompts},
            "engine": {"replicas": scene.engines, "max_running_requests": SLOTS},
        }
    )
    prompts = [Prompt(f"p{i}", [1], "", "", i) for i in range(scene.prompts * 20)]
    path = folder / f"lag_{lag}.jsonl"
    seen = run_virtually(_run(config, scene, World(scene), prompts, path))
    seen.problems = check_exactly_once(read_ledger(path), len(prompts)).problems
    return seen


async def _run(config: RunConfig, scene: Scene, world: World, prompts: list[Prompt], path: Path) -> Seen:
    buffer = GroupBuffer(prompts, seed=scene.seed, shuffle=True)
    producer = Producer(config, buffer, world.make_group, Ledger(path))
    clock = asyncio.get_running_loop().time
    seen, began, first = Seen(), clock(), 0
    busy = [0.0] * len(world.engines)
    for step in range(1, scene.steps + 1):
        if step == WARM_UP + 1:
            seen, began, first = Seen(), clock(), buffer.state.next_order
            busy = [engine.busy_s for engine in world.engines]
        at = clock()
        made = await producer.step(step, world.version, lambda _: None)
        producer.run_ahead()
        seen.rounds.append(made.metrics[m.GENERATION_ROUNDS])
        seen.stale += made.metrics[m.GROUPS_STALE]
        seen.ages += Counter(world.version - g.oldest_version for g in made.groups)
        seen.trained += [world.tokens[g.order] for g in made.groups]
        await asyncio.sleep(scene.train_s)
        for engine in world.engines:
            engine.pause(True)
        await asyncio.sleep(PUSH_S)
        world.version += 1
        for engine in world.engines:
            engine.pause(False)
        seen.step_s.append(clock() - at)
    total = clock() - began
    seen.idle = 1 - mean(e.busy_s - b for e, b in zip(world.engines, busy, strict=True)) / total
    last = buffer.state.next_order - 2 * scene.prompts
    seen.issued = {o: t for o, t in world.tokens.items() if o in world.mixed and first <= o < last}
    await producer.close()
    return seen


def generation_s(scene: Scene) -> float:
    """Seconds that the mixed groups of a step, and those that are filtered, take engines that are always full."""
    tokens = 2.0 * scene.prompts * GROUP * MEAN
    return tokens / (scene.engines * SLOTS * SPEED / (1 + SLOTS / HALF))


def report(scene: Scene, lags: list[int], folder: Path, console: Console) -> bool:
    """Print the table; returns whether every target is met."""
    targets = {0: "rounds <= 1.05", 1: "idle < 10 %", 2: "idle < 3 %"}
    title = f"{scene.steps} steps of {scene.prompts} x {GROUP} responses, {scene.engines} engines x {SLOTS}, "
    title += f"training {scene.train_s:.0f} s a step"
    table = Table(
        "lag", "rounds", "engines idle", "s a step", "age: groups", "stale", "length bias", "ledger", "target"
    )
    table.title = title
    is_met = True
    for lag in lags:
        seen = simulate(scene, lag, folder)
        ok = {0: mean(seen.rounds) <= 1.05, 1: seen.idle < 0.1, 2: seen.idle < 0.03}.get(lag, True)
        ok = ok and abs(seen.bias) <= 0.01 and not seen.problems
        is_met = is_met and ok
        ages = "  ".join(f"{age}: {count}" for age, count in sorted(seen.ages.items()))
        told = targets.get(lag, "")
        table.add_row(
            str(lag),
            f"{mean(seen.rounds):.2f}",
            f"{seen.idle:.1%}",
            f"{mean(seen.step_s):.0f}",
            ages,
            f"{seen.stale:.0f}",
            f"{seen.bias:+.1%}",
            "exact" if not seen.problems else seen.problems[0],
            f"{told}, bias within 1 %: {'met' if ok else 'MISSED'}".lstrip(", "),
        )
    console.print(table)
    return is_met


def engines_of(gpus: int) -> list[int]:
    """Engines on about one eighth of so many GPUs, two eighths, ... ; at least one."""
    return sorted({max(1, gpus * share // 8 // GPUS_PER_ENGINE) for share in range(1, 8)})


def split(scene: Scene, gpus: int, lags: list[int], folder: Path, console: Console) -> None:
    """Seconds a step for several splits of so many GPUs, where training alone on all takes `train_s` / 4."""
    table = Table("GPUs of engines", "of the trainer", *(f"lag {lag}: s a step" for lag in lags))
    for engines in engines_of(gpus):
        trainers = gpus - engines * GPUS_PER_ENGINE
        at = Scene(scene.prompts, engines, scene.steps, scene.train_s / 4 * gpus / trainers, scene.seed)
        seconds = [mean(simulate(at, lag, folder).step_s) for lag in lags]
        table.add_row(str(gpus - trainers), str(trainers), *(f"{s:.0f}" for s in seconds))
    console.print(table)


def main() -> int:
    """Print a table for each lag; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="a step")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=float, default=0.9, help="of the time that generation alone takes")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--split", type=int, metavar="GPUS", help="compare splits of so many GPUs instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.split is not None and args.split < 2 * GPUS_PER_ENGINE:
        parser.error(f"--split {args.split}: an engine takes {GPUS_PER_ENGINE} GPUs, give at least twice as many")
    scene = Scene(args.prompts, args.engines, args.steps, 0.0, args.seed)
    scene.train_s = args.train * generation_s(scene)
    console = Console(width=max(120, Console().width))
    with tempfile.TemporaryDirectory() as folder:
        if args.split is not None:
            split(scene, args.split, args.lags, Path(folder), console)
            return 0
        return 0 if report(scene, args.lags, Path(folder), console) else 1


if __name__ == "__main__":
    raise SystemExit(main())
