"""What a step's generation amounts to, in numbers. Pure."""

from collections import Counter
from collections.abc import Sequence

from dapo_megatron.observe import catalog as m
from dapo_megatron.records import Group
from dapo_megatron.rollout.ledger import Fate


def group_metrics(
    fates: Counter[Fate], carried_in: int, rounds: float, fresh_kept: int, generated: int
) -> dict[str, float]:
    """Groups by what became of them; `fresh_kept` of the `generated` ones are mixed."""
    return {
        m.GROUPS_KEPT: float(fates["kept"]),
        m.GROUPS_ALL_RIGHT: float(fates["all_right"]),
        m.GROUPS_ALL_WRONG: float(fates["all_wrong"]),
        m.GROUPS_STALE: float(fates["stale"]),
        m.GROUPS_UNFINISHED: float(fates["unfinished"]),
        m.GROUPS_CARRIED_IN: float(carried_in),
        m.GROUPS_SURPLUS: float(fates["carried"]),
        m.GROUPS_KEPT_SHARE: fresh_kept / generated if generated else 1.0,
        m.GENERATION_ROUNDS: rounds,
    }


def response_metrics(
    trained: Sequence[Group], generated: Sequence[Group], version: int, *, keeps_kv: bool = False
) -> dict[str, float]:
    """Rewards and lengths of everything generated for a step, filtered groups included: what the policy does, not what
    it trains on; and the age of what it trains on.

    Args:
        version: the policy version that is trained.
        keeps_kv: a response goes on over a push with the keys and values of the versions before.
    """
    responses = [r for g in (generated or trained) for r in g.responses]
    lengths = [len(r.token_ids) for r in responses]
    n = len(responses)
    kept = [len(r.token_ids) for g in trained for r in g.responses]
    return {
        m.REWARD: sum(r.reward for r in responses) / n,
        m.ACCURACY: sum(r.verdict == "right" for r in responses) / n,
        m.OVERLONG: sum(r.overlong_penalty for r in responses) / n,
        m.LENGTH_MEAN: sum(lengths) / n,
        m.LENGTH_MAX: float(max(lengths)),
        m.TRUNCATED: sum(r.finish_reason == "length" for r in responses) / n,
        m.RESPONSE_TOKENS: float(sum(lengths)),
        m.NO_VERDICT: float(sum(r.verdict == "unknown" for g in generated for r in g.responses)),
        m.KEPT_CACHE: kept_cache_share(trained) if keeps_kv else 0.0,
        m.LENGTH_TRAINED: sum(kept) / len(kept),
        m.LAG_MEAN: mean_age(trained, version),
        m.LAG_MAX: float(version - min(g.oldest_version for g in trained)),
    }


def mean_age(trained: Sequence[Group], version: int) -> float:
    """Versions between the sampling of a token and its training, on average over all tokens."""
    spans = [s for g in trained for r in g.responses for s in r.version_spans]
    tokens = sum(s.end - s.start for s in spans)
    return sum((version - s.version) * (s.end - s.start) for s in spans) / tokens if tokens else 0.0


def kept_cache_share(trained: Sequence[Group]) -> float:
    """Share of the trained tokens that another version sampled than the first of their response."""
    tokens = later = 0
    for response in (r for g in trained for r in g.responses):
        first = response.version_spans[0].version if response.version_spans else 0
        tokens += int(response.loss_mask.sum())
        later += sum(
            int(response.loss_mask[s.start : s.end].sum()) for s in response.version_spans if s.version != first
        )
    return later / tokens if tokens else 0.0
