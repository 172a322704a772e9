"""The two workloads of the comparison: models, data, and one recipe each that both systems follow."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.config import RunConfig, load_config
from launch import demo

DEMO_RECIPE = Path(__file__).parents[1] / "launch/recipes/demo.yaml"

LONG_SHARE = 0.06
"""Share of the responses that think before they answer."""
MEAN_THOUGHT = 150
"""Mean number of thinking tokens of those that do; geometric, so that a tiny model can learn it from one token."""
LONGEST_RESPONSE = 256
LONG_WARM_UP_UPDATES = 300


WAYS = {
    "this project": ("actor.data_parallel_size=2",),
    "this project, lag 1": ("rollout.max_policy_lag=1", "actor.data_parallel_size=1"),
}
"""How this project runs a workload, each in the faster layout of those that two cores allow for a model that fits into
one: the engine and two ranks in turn, as TRL does it, or the engine beside one rank."""


@dataclass(frozen=True)
class Workload:
    """One column of figures: what is trained, and how far."""

    name: str
    title: str
    prepare: Callable[[Path], None]
    """Makes model, train.jsonl and eval.jsonl in a folder, unless they are there."""
    overrides: tuple[str, ...]
    """What differs from the demo's recipe."""
    steps: int
    target: float | None
    """Held-out accuracy that is timed."""

    def recipe(self, folder: Path, run_dir: Path, *, steps: int, evaluate_every: int, extra: list[str]) -> RunConfig:
        """The run: the demo's recipe on this workload, without dynamic sampling, which TRL does not have."""
        overrides = [
            f"run_dir={run_dir}",
            f"model.path={folder / 'model'}",
            f"data.train={folder / 'train.jsonl'}",
            f"data.eval={folder / 'eval.jsonl' if self.target is not None else 'null'}",
            "algorithm.dynamic_sampling=false",
            "actor.tensor_model_parallel_size=1",
            f"trainer.steps={steps}",
            f"checkpoint.every={steps}",
            f"evaluation.every={evaluate_every}",
            "evaluation.greedy=false",
            *self.overrides,
            *extra,
        ]
        return load_config(DEMO_RECIPE, overrides)


def prepare_long_tail(folder: Path) -> None:
    """The demo's data and model, warmed up to think now and then, at length, before it answers."""
    if (folder / "model" / "model.safetensors").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(0)
    demo.write_data(folder, rng)
    path = folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["response"] = "=" * thought_length(rng) + row["response"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    demo.write_model(folder / "untrained")
    config = folder / "untrained" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2 * LONGEST_RESPONSE}))
    demo.warm_up(folder, LONG_WARM_UP_UPDATES)


def thought_length(rng: random.Random) -> int:
    """Thinking tokens of one response: mostly none, else geometric with mean MEAN_THOUGHT and cut at the limit."""
    if rng.random() >= LONG_SHARE:
        return 0
    return min(1 + int(rng.expovariate(1 / MEAN_THOUGHT)), LONGEST_RESPONSE)


WORKLOADS = (
    Workload(
        name="short",
        title="short answers: the demo's addition",
        prepare=demo.prepare,
        overrides=("resharding.verify_every=0",),
        steps=30,
        target=0.7,
    ),
    Workload(
        name="long",
        title=f"long tail: median 4 tokens, up to {LONGEST_RESPONSE}",
        prepare=prepare_long_tail,
        overrides=(
            "resharding.verify_every=0",
            f"rollout.max_response_tokens={LONGEST_RESPONSE}",
            f"engine.context_length={LONGEST_RESPONSE + 64}",
            "engine.max_total_tokens=98304",
            "algorithm.overlong_cache=0",
            # The paper's rate: the lengths stay what they are while they are measured.
            "optimizer.lr=1.0e-6",
        ),
        steps=7,
        target=None,
    ),
)


def trl_settings(config: RunConfig) -> dict:
    """The same recipe as arguments of trl.GRPOConfig, with what makes TRL fastest on a CPU.

    One device batch is one optimizer update, and one generation serves as many updates as here.
    """
    r, o, a = config.rollout, config.optimizer, config.algorithm
    return {
        "loss_type": "dapo",
        "num_generations": r.group_size,
        "per_device_train_batch_size": config.trainer.mini_batch_prompts * r.group_size,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": config.updates_per_step,
        "num_iterations": 1,
        "max_steps": config.trainer.steps * config.updates_per_step,
        "max_completion_length": r.max_response_tokens,
        "temperature": r.temperature,
        "epsilon": a.clip_low,
        "epsilon_high": a.clip_high,
        "beta": 0.0,
        "scale_rewards": "group",
        "mask_truncated_completions": a.overlong_filtering,
        "learning_rate": o.lr,
        "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_epsilon": o.eps,
        "max_grad_norm": o.clip_grad,
        "seed": config.seed,
        "model_init_kwargs": {"dtype": config.model.dtype},
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "use_vllm": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
