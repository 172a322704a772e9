"""TRL's side of the comparison: one process of TRL's own virtual environment, started by vs_trl.py.

    python benchmarks/trl_worker.py JOB.json

reads {threads, settings, model, train, eval, evaluate_every, updates_per_step, warmup_updates, max_response_tokens,
overlong_cache, samples, rows} and appends one line a rollout step to the file `rows`. The reward is this project's own:
its grader (in this process: TRL has no grading workers) and its overlong penalty.
"""

import json
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dapo_megatron.algorithm.overlong import overlong_penalty
from dapo_megatron.algorithm.reward import accuracy_reward
from dapo_megatron.grading.answers import grade


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a clock on its phases, and this project's learning-rate warm-up."""

    def __init__(self, *args, warmup_updates: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.warmup_updates = warmup_updates
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.lengths: list[int] = []

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Rate lr * min(1, k / warm-up) for update k = 1, 2, ...; transformers' own begins with an update at 0."""
        rate = lambda done: min(1.0, (done + 1) / max(1, self.warmup_updates))  # noqa: E731
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    @contextmanager
    def timed(self, phase: str):
        """Add the seconds of a block to a phase."""
        began = time.monotonic()
        yield
        self.phases[phase] += time.monotonic() - began

    def _prepare_inputs(self, generation_batch):
        with self.timed("prepare"):
            return super()._prepare_inputs(generation_batch)

    def _generate(self, prompts):
        with self.timed("generate"):
            generated = super()._generate(prompts)
        self.lengths += [len(ids) for ids in generated[1]]
        return generated

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.timed("old_logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class Recorder(TrainerCallback):
    """Writes a row after each rollout step, and evaluates off the clock."""

    def __init__(self, job: dict, tokenizer):
        self.job, self.tokenizer = job, tokenizer
        self.held_out = [json.loads(line) for line in Path(job["eval"]).read_text().splitlines()] if job["eval"] else []
        self.trainer: TimedTrainer | None = None
        self._in_updates = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._write({"step": 0, "time": time.time()} | self._evaluate(0))
        self._began = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self._update_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._in_updates += time.monotonic() - self._update_began
        if state.global_step % self.job["updates_per_step"]:
            return
        step, phases = state.global_step // self.job["updates_per_step"], self.trainer.phases
        row = {"step": step, "seconds": time.monotonic() - self._began}
        row |= {phase: phases[phase] for phase in ("generate", "old_logprobs")}
        row["update"] = self._in_updates - phases["prepare"]
        row["lengths"] = self.trainer.lengths
        self._write(row | self._evaluate(step))
        phases.clear()
        self.trainer.lengths, self._in_updates, self._began = [], 0.0, time.monotonic()

    @torch.no_grad()
    def _evaluate(self, step: int) -> dict[str, float]:
        if not self.held_out or step % self.job["evaluate_every"]:
            return {}
        model = self.trainer.model
        model.eval()
        inputs = self.tokenizer([r["prompt"] for r in self.held_out], return_tensors="pt", padding=True)
        generated = model.generate(
            **inputs,
            generation_config=self.trainer.generation_config,
            num_return_sequences=self.job["samples"],
        )
        model.train()
        texts = self.tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        truths = [r["answer"] for r in self.held_out for _ in range(self.job["samples"])]
        return {"accuracy": sum(map(grade, texts, truths)) / len(texts)}

    def _write(self, row: dict) -> None:
        with Path(self.job["rows"]).open("a") as f:
            f.write(json.dumps(row) + "\n")


def main() -> int:
    """Train."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    rows = [json.loads(line) for line in Path(job["train"]).read_text().splitlines()]
    recorder = Recorder(job, tokenizer)

    def reward(completions, completion_ids, answer, **_):
        """R = R_acc + R_len of each response."""
        limits = job["max_response_tokens"], job["overlong_cache"]
        return [
            accuracy_reward("right" if grade(text, truth) else "wrong") + overlong_penalty(len(ids), *limits)
            for text, ids, truth in zip(completions, completion_ids, answer, strict=True)
        ]

    trainer = TimedTrainer(
        model=job["model"],
        args=GRPOConfig(output_dir=str(Path(job["rows"]).parent / "trl"), **job["settings"]),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]),
        processing_class=tokenizer,
        callbacks=[recorder],
        warmup_updates=job["warmup_updates"],
    )
    recorder.trainer = trainer
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
