"""Every metric once: its name, unit, what a step's updates are reduced to, and what it means.

Whoever measures a metric and whoever shows it import its name from here; a record with another name is an error.
`dapo-megatron metrics` prints the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "max", "min", "sum", "last"]


@dataclass(frozen=True)
class Metric:
    """One entry of a step's record."""

    name: str
    unit: str
    doc: str
    over_updates: Reduction = "mean"
    """What one number is made of those of a step's updates; says nothing where a metric is measured once a step."""


CATALOG: dict[str, Metric] = {}


def _metric(name: str, unit: str, doc: str, over_updates: Reduction = "mean") -> str:
    CATALOG[name] = Metric(name, unit, doc, over_updates)
    return name


def reduce_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One record of a step's updates; all of them have the same metrics."""
    return {name: _reduce([u[name] for u in updates], CATALOG[name].over_updates) for name in updates[0]}


def _reduce(values: list[float], how: Reduction) -> float:
    match how:
        case "mean":
            return sum(values) / len(values)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "sum":
            return sum(values)
        case "last":
            return values[-1]


def check_names(record: Mapping[str, object]) -> None:
    """Raise KeyError for a metric that is not in the catalog."""
    if unknown := [name for name in record if name not in CATALOG]:
        raise KeyError(f"{', '.join(unknown)}: add to observe/catalog.py")


STEP = _metric("step", "rollout steps", "Finished rollout steps.")
TIME = _metric("time", "s", "Unix time of the record.")
VERSION = _metric("version", "versions", "Policy version that is live after the step.")

LOSS = _metric("policy/loss", "", "Weighted sum of the token losses of one mini-batch.")
TRAINED_TOKENS = _metric("policy/tokens", "tokens", "Trained tokens of one mini-batch.")
ENTROPY = _metric("policy/entropy", "nats", "Mean entropy of the trained tokens' distributions.")
PROBABILITY = _metric("policy/mean_probability", "", "Mean probability of the trained tokens.")
RATIO = _metric("policy/ratio_mean", "", "Mean ratio of the trained to the old policy.")
CLIP_HIGH = _metric("policy/clip_high_share", "of tokens", "A > 0 and ratio above 1 + clip_high.")
CLIP_LOW = _metric("policy/clip_low_share", "of tokens", "A < 0 and ratio below 1 - clip_low.")
CLIP_DUAL = _metric("policy/clip_dual_share", "of tokens", "A < 0 and ratio above clip_dual.")
APPROX_KL = _metric("policy/approx_kl", "nats", "k3 estimate of KL(old || trained).")
SUPERVISED_ENTROPY = _metric("supervised/entropy", "nats", "Mean entropy in supervised training.")
SUPERVISED_PROBABILITY = _metric("supervised/probability", "", "Mean probability of the tokens in supervised training.")

MISMATCH_MEAN = _metric("mismatch/abs_mean", "nats", "Mean |log-prob difference| of trainer and engine.")
MISMATCH_MAX = _metric("mismatch/abs_max", "nats", "Largest |log-prob difference| of trainer and engine.", "max")
MISMATCH_K3 = _metric("mismatch/k3", "nats", "k3 estimate of KL(engine || trainer).")
MISMATCH_TRUNCATED = _metric("mismatch/truncated_share", "of tokens", "Importance ratio above its cap.")

GRAD_NORM = _metric("optimizer/grad_norm", "", "Global gradient norm before clipping.")
GRAD_NORM_MIN = _metric("optimizer/grad_norm_min", "", "Smallest gradient norm of a step; 0: nothing to learn.", "min")
LR = _metric("optimizer/lr", "", "Learning rate of the last update.", "last")
SKIPPED = _metric("optimizer/skipped", "updates", "Updates skipped for a non-finite gradient.", "sum")

BATCH_SEQUENCES = _metric("batch/sequences", "sequences", "Sequences trained.")
BATCH_TOKENS = _metric("batch/tokens", "tokens", "Tokens of prompts and responses that went through the trainer.")
BATCH_MICRO_BATCHES = _metric("batch/micro_batches", "micro-batches", "Packed micro-batches of all replicas.")
BATCH_REAL_SHARE = _metric("batch/real_token_share", "of tokens", "Tokens that are not padding.")
BATCH_IMBALANCE = _metric("batch/imbalance", "", "Tokens of the heaviest replica over the mean, update by update.")

REWARD = _metric("reward/mean", "", "Mean reward of all responses generated for the step.")
ACCURACY = _metric("reward/accuracy", "of responses", "Responses that are right.")
OVERLONG = _metric("reward/overlong", "", "Mean soft overlong punishment.")
LENGTH_MEAN = _metric("response/length_mean", "tokens", "Mean response length.")
LENGTH_TRAINED = _metric("response/length_trained", "tokens", "Mean length of the responses that are trained.")
LENGTH_MAX = _metric("response/length_max", "tokens", "Longest response.")
TRUNCATED = _metric("response/truncated_share", "of responses", "Responses cut off at the limit.")
RESPONSE_TOKENS = _metric("rollout/response_tokens", "tokens", "Tokens generated for the step.")
KEPT_CACHE = _metric(
    "rollout/kept_cache_share",
    "of tokens",
    "Trained tokens that followed a push within their response, over keys and values kept from before it.",
)
LAG_MEAN = _metric("rollout/lag_mean", "versions", "Mean age of the tokens that are trained.")
LAG_MAX = _metric("rollout/lag_max", "versions", "Age of the oldest token that is trained.")
GENERATION_ROUNDS = _metric(
    "time/generation_rounds", "ratio", "Generation of a step, over that of the groups that began it."
)
GROUPS_KEPT = _metric("groups/kept", "groups", "Groups trained.")
GROUPS_ALL_RIGHT = _metric("groups/all_right", "groups", "Groups filtered because every response is right.")
GROUPS_ALL_WRONG = _metric("groups/all_wrong", "groups", "Groups filtered because no response is right.")
GROUPS_STALE = _metric("groups/stale", "groups", "Carried groups that became too old and are issued again.")
GROUPS_UNFINISHED = _metric("groups/unfinished", "groups", "Groups issued again because engines left them unfinished.")
GROUPS_CARRIED_IN = _metric("groups/carried_in", "groups", "Groups carried over from the step before.")
GROUPS_SURPLUS = _metric("groups/surplus", "groups", "Groups kept for the next step.")
GROUPS_FROM_BANK = _metric("groups/from_bank", "groups", "Finished groups that a resume took back from the bank.")
GROUPS_NOT_BANKED = _metric("groups/not_banked", "groups", "Finished groups for which the bank had no room or no disk.")
GROUPS_KEPT_SHARE = _metric("groups/kept_share", "of groups", "Mixed groups among those generated.")
NO_VERDICT = _metric("grading/unknown", "responses", "Responses of the step without a verdict.")

ROLLOUT_ERRORS = _metric(
    "rollout/errors", "calls", "Calls of the rollout function that raised, since the controller's start."
)
ASKED_AGAIN = _metric(
    "rollout/requests_asked_again",
    "requests",
    "Requests that an engine aborted or left unanswered and that were asked again, since the controller's start.",
)

EVAL_ACCURACY = _metric("eval/accuracy", "of responses", "avg@k on the held-out prompts.")
EVAL_GREEDY_ACCURACY = _metric("eval/greedy_accuracy", "of prompts", "Greedy accuracy on the held-out prompts.")
EVAL_OTHER_VERSION = _metric(
    "eval/other_version_share",
    "of tokens",
    "With a lag: tokens of the evaluation that were sampled by another version than the one that it measures.",
)
EVAL_SECONDS = _metric("eval/seconds", "s", "With a lag: duration of the evaluation, most of it beside training.")

SYNC_SECONDS = _metric("sync/seconds", "s", "Duration of the push.")
SYNC_BYTES = _metric("sync/bytes", "bytes", "Bytes that the push sent to each engine, or wrote for all of them.")
_DIFFERENCE = "|log-prob difference| of trainer and engine on tokens sampled after the push, of the worst engine."
SYNC_DIFFERENCE = _metric("sync/logprob_difference", "nats", f"Largest {_DIFFERENCE}")
SYNC_DIFFERENCE_MEAN = _metric("sync/logprob_difference_mean", "nats", f"Mean {_DIFFERENCE}")
SYNC_DIFFERENCE_P99 = _metric("sync/logprob_difference_p99", "nats", f"99th percentile of {_DIFFERENCE}")
SYNC_CHECKSUMS = _metric(
    "sync/checksums", "parameters", "Of each engine, whose bytes were found to be those that the trainer has."
)

CHECKPOINT_BYTES = _metric("checkpoint/bytes", "bytes", "Size of the checkpoint that was published last.")
CHECKPOINT_SECONDS = _metric("checkpoint/seconds", "s", "From the copy of the state to the published checkpoint.")

PHASES = ("generate", "old_logprobs", "update", "push", "verify", "checkpoint", "evaluate")
"""Of a rollout step, in order; each has its seconds under time/."""
_PHASE_DOCS = {
    "step": "From the request for the batch to the verified push.",
    "generate": "Waiting for the controller's groups.",
    "old_logprobs": "Scoring under the weights at the step's beginning.",
    "update": "All updates.",
    "push": "Sending the weights to the engines.",
    "verify": "Comparing trainer and engines.",
    "checkpoint": "What training waited for checkpoints, up to the step before: the copy of its state.",
    "evaluate": "Sampling and grading the held-out prompts; with a lag, what training waited for it.",
}


def time_of(phase: str) -> str:
    """The metric of a phase's seconds."""
    return f"time/{phase}"


for _phase, _doc in _PHASE_DOCS.items():
    _metric(time_of(_phase), "s", _doc)
STEP_SECONDS, GENERATE_SECONDS, EVALUATE_SECONDS = map(time_of, ("step", "generate", "evaluate"))
GENERATED_PER_SECOND = _metric("speed/response_tokens_per_second", "tokens/s", "Generated tokens over the step's time.")
TRAINED_PER_SECOND = _metric("speed/trained_tokens_per_second", "tokens/s", "Trained tokens over the step's time.")
