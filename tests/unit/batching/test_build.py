"""Properties of a step's batch. The expected values are computed from the groups by loops, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithm.objective import token_weights
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Group, Prompt
from tests.tiny import packed_batch, response

AGGREGATIONS = ("token", "group_token", "sample")


def make_response(prompt_id, sample, token_ids, mask=None, advantage=0.5):
    return response(
        prompt_id,
        sample,
        token_ids,
        loss_mask=[True] * len(token_ids) if mask is None else mask,
        rollout_logprobs=[-0.01 * (i + 1) - sample for i in range(len(token_ids))],
        advantage=advantage,
    )


def make_group(order, prompt_ids, responses):
    prompt = Prompt(id=f"p{order}", input_ids=prompt_ids, ground_truth="1", text="?", row=order)
    return Group(order=order, prompt=prompt, responses=responses)


token_lists = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@st.composite
def responses(draw, prompt_id, sample):
    token_ids = draw(token_lists)
    masks = st.just([False] * len(token_ids)) | st.lists(
        st.booleans(), min_size=len(token_ids), max_size=len(token_ids)
    )
    return make_response(prompt_id, sample, token_ids, draw(masks), draw(st.floats(-3, 3, width=32)))


@st.composite
def group_lists(draw):
    return [
        make_group(
            order,
            draw(token_lists),
            [draw(responses(f"p{order}", i)) for i in range(draw(st.integers(1, 4)))],
        )
        for order in range(draw(st.integers(1, 6)))
    ]


@st.composite
def layouts(draw):
    sequence = draw(st.sampled_from([1, 1, 2, 4]))
    return PackingRules(
        data_parallel_size=draw(st.integers(1, 5)),
        micro_batch_tokens=draw(st.integers(1, 60)),
        sequence_multiple=sequence,
        total_multiple=sequence * draw(st.integers(1, 8)),
        equal_counts=draw(st.booleans()),
        count_multiple=draw(st.integers(1, 3)),
        equal_lengths=draw(st.booleans()),
    )


problems = st.fixed_dictionaries(
    {
        "step": st.integers(0, 5),
        "seed": st.integers(0, 5),
        "mini_batch_groups": st.integers(1, 4),
        "aggregation": st.sampled_from(AGGREGATIONS),
    }
)
ONE_RANK = PackingRules(data_parallel_size=1, micro_batch_tokens=10_000)


def sequences_of(mini_batch):
    """{(prompt id, sample): {array name: its slice}}; fails if a sequence appears twice."""
    found = {}
    for shard in mini_batch.shards:
        for mb in shard:
            bounds = mb.cu_seqlens.tolist()
            for key, start, end in zip(mb.sequences, bounds, bounds[1:], strict=False):
                assert key not in found
                found[key] = {
                    name: getattr(mb, name)[start:end]
                    for name in ("tokens", "labels", "position_ids", "weights", "advantages")
                    + ("rollout_logprobs", "active")
                }
    return found


def membership(batch):
    return [sorted(sequences_of(mini_batch)) for mini_batch in batch.mini_batches]


@settings(deadline=None)
@given(group_lists(), problems, layouts())
def test_every_token_appears_once_with_its_label_weight_advantage_and_logprob(groups, problem, layout):
    batch = packed_batch(groups, version=3, **problem, rules=layout)

    by_id = {group.prompt.id: group for group in groups}
    seen = []
    for mini_batch in batch.mini_batches:
        found = sequences_of(mini_batch)
        members = [by_id[prompt_id] for prompt_id in sorted({prompt_id for prompt_id, _ in found})]
        active = [[sum(r.loss_mask) for r in group.responses] for group in members]
        weights = token_weights(active, problem["aggregation"])
        for group, group_weights in zip(members, weights, strict=True):
            for r, weight in zip(group.responses, group_weights, strict=True):
                _assert_sequence(found[group.prompt.id, r.sample], group.prompt, r, weight)
        seen += found
    assert sorted(seen) == sorted((r.prompt_id, r.sample) for group in groups for r in group.responses)


def _assert_sequence(arrays, prompt, response, weight):
    tokens = prompt.input_ids + response.token_ids.tolist()
    n, size = len(tokens), arrays["tokens"].size
    assert arrays["tokens"].tolist() == tokens + [0] * (size - n)
    assert arrays["position_ids"].tolist() == list(range(size))
    for name in ("labels", "weights", "advantages", "rollout_logprobs", "active"):
        assert not arrays[name][n:].any()
    for t in range(len(tokens)):
        last = t == len(tokens) - 1
        assert arrays["labels"][t] == (0 if last else tokens[t + 1])
        i = t + 1 - len(prompt.input_ids)  # index of the label within the response
        is_response = 0 <= i < len(response.token_ids)
        trained = is_response and response.loss_mask[i]
        assert arrays["active"][t] == trained
        assert arrays["weights"][t] == np.float32(weight if trained else 0)
        assert arrays["advantages"][t] == np.float32(response.advantage if is_response else 0)
        assert arrays["rollout_logprobs"][t] == np.float32(response.rollout_logprobs[i] if is_response else 0)


@settings(deadline=None)
@given(group_lists(), problems, layouts())
def test_weights_of_a_mini_batch_sum_to_one_unless_all_is_masked(groups, problem, layout):
    for mini_batch in packed_batch(groups, version=0, **problem, rules=layout).mini_batches:
        micro_batches = [mb for shard in mini_batch.shards for mb in shard]
        total = sum(float(mb.weights.astype(np.float64).sum()) for mb in micro_batches)
        trained = any(mb.active.any() for mb in micro_batches)
        assert total == pytest.approx(1.0 if trained else 0.0, abs=1e-5)


@settings(deadline=None)
@given(group_lists(), problems, layouts(), layouts(), st.randoms(use_true_random=False))
def test_membership_and_weights_depend_on_neither_layout_nor_arrival_order(groups, problem, one, other, random):
    arrived = random.sample(groups, len(groups))
    a = packed_batch(groups, version=0, **problem, rules=one)
    b = packed_batch(arrived, version=0, **problem, rules=other)

    assert membership(a) == membership(b)
    for left, right in zip(a.mini_batches, b.mini_batches, strict=True):
        left, right = sequences_of(left), sequences_of(right)
        for key in left:
            ours, theirs = (arrays[key]["weights"][arrays[key]["active"]] for arrays in (left, right))
            assert np.array_equal(ours, theirs)


@settings(deadline=None)
@given(group_lists(), problems, layouts())
def test_shapes_budget_padding_and_balance(groups, problem, layout):
    batch = packed_batch(groups, version=0, **problem, rules=layout)

    for mini_batch in batch.mini_batches:
        assert len(mini_batch.shards) == layout.data_parallel_size
        counts = [len(shard) for shard in mini_batch.shards]
        assert all(count and count % layout.count_multiple == 0 for count in counts)
        assert len(set(counts)) == 1 or not layout.equal_counts
        for shard in mini_batch.shards:
            sizes = [mb.tokens.size for mb in shard]
            assert len(set(sizes)) == 1 or not layout.equal_lengths
            for mb in shard:
                _assert_shape(mb, layout)
                over = mb.tokens.size > layout.micro_batch_tokens
                assert not over or len(mb.sequences) <= 1 or layout.equal_lengths
        lengths = [arrays["tokens"].size for arrays in sequences_of(mini_batch).values()]
        loads = [sum(int(mb.cu_seqlens[len(mb.sequences)]) for mb in shard) for shard in mini_batch.shards]
        assert max(loads) <= sum(loads) / len(loads) + max(lengths)


def _assert_shape(mb, layout):
    T = mb.tokens.size
    assert T > 0 and T % layout.total_multiple == 0
    for name, dtype in (
        ("tokens", np.int64),
        ("labels", np.int64),
        ("position_ids", np.int64),
        ("weights", np.float32),
        ("advantages", np.float32),
        ("rollout_logprobs", np.float32),
        ("active", np.bool_),
    ):
        assert getattr(mb, name).shape == (T,) and getattr(mb, name).dtype == dtype
    assert mb.cu_seqlens.dtype == np.int32 and mb.cu_seqlens[0] == 0 and mb.cu_seqlens[-1] == T
    assert (np.diff(mb.cu_seqlens) > 0).all() and not (mb.cu_seqlens % layout.sequence_multiple).any()
    padding = slice(int(mb.cu_seqlens[len(mb.sequences)]), T)
    assert T - padding.start < layout.total_multiple or not mb.sequences or layout.equal_lengths
    assert len(mb.cu_seqlens) == len(mb.sequences) + 1 + (padding.start < T)
    for name in ("tokens", "labels", "weights", "advantages", "rollout_logprobs", "active"):
        assert not getattr(mb, name)[padding].any()
    assert mb.position_ids[padding].tolist() == list(range(T - padding.start))


@settings(deadline=None)
@given(group_lists(), problems, layouts())
def test_metrics_count_what_is_there(groups, problem, layout):
    batch = packed_batch(groups, version=0, **problem, rules=layout)

    shards = [shard for mini_batch in batch.mini_batches for shard in mini_batch.shards]
    tokens = sum(len(g.prompt.input_ids) + len(r.token_ids) for g in groups for r in g.responses)
    assert batch.metrics["batch/tokens"] == tokens
    assert batch.metrics["batch/sequences"] == sum(len(g.responses) for g in groups)
    assert batch.metrics["batch/micro_batches"] == sum(map(len, shards))
    padded = sum(mb.tokens.size for shard in shards for mb in shard)
    assert batch.metrics["batch/real_token_share"] == pytest.approx(tokens / padded)
    assert 1 <= batch.metrics["batch/imbalance"] <= layout.data_parallel_size + 1e-9


def test_the_imbalance_is_of_all_updates():
    """Two updates on two ranks, of 2 + 4 and 2 + 11 tokens: the ranks meet after 4 and after 11, with 9.5 a rank."""
    lengths = {0: 3, 1: 10}
    groups = [
        make_group(o, [1], [make_response(f"p{o}", i, [1] * n) for i, n in enumerate((1, m))])
        for o, m in lengths.items()
    ]
    rules = PackingRules(data_parallel_size=2, micro_batch_tokens=100)
    batch = build_step_batch(groups, step=1, version=0, seed=0, mini_batch_groups=1, aggregation="token", rules=rules)
    assert batch.metrics["batch/imbalance"] == pytest.approx((4 + 11) / 9.5)


def test_a_packed_micro_batch_by_hand():
    group = make_group(0, [7, 8], [make_response("p0", 0, [1, 2, 3], [True, False, True]), make_response("p0", 1, [4])])
    batch = packed_batch(
        [group],
        step=1,
        version=1,
        seed=0,
        mini_batch_groups=1,
        aggregation="token",
        rules=PackingRules(data_parallel_size=1, micro_batch_tokens=100, total_multiple=5),
    )
    ((mb,),) = batch.mini_batches[0].shards
    third = np.float32(1 / 3)

    assert mb.sequences == [("p0", 0), ("p0", 1)]
    assert mb.tokens.tolist() == [7, 8, 1, 2, 3, 7, 8, 4, 0, 0]
    assert mb.labels.tolist() == [8, 1, 2, 3, 0, 8, 4, 0, 0, 0]
    assert mb.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert mb.cu_seqlens.tolist() == [0, 5, 8, 10]
    assert mb.weights.tolist() == [0, third, 0, third, 0, 0, third, 0, 0, 0]
    assert mb.advantages.tolist() == [0, 0.5, 0.5, 0.5, 0, 0, 0.5, 0, 0, 0]


def test_mini_batches_are_whole_groups_shuffled_anew_by_step_and_seed():
    groups = [make_group(i, [1], [make_response(f"p{i}", j, [2]) for j in range(2)]) for i in range(32)]
    build = {"version": 0, "mini_batch_groups": 8, "aggregation": "token", "rules": ONE_RANK}
    first = membership(packed_batch(groups, step=1, seed=0, **build))

    assert [len(members) for members in first] == [16] * 4
    assert all(members[0::2] == [(p, 0) for p, _ in members[1::2]] for members in first)
    assert first == membership(packed_batch(groups, step=1, seed=0, **build))
    assert first != membership(packed_batch(groups, step=2, seed=0, **build))
    assert first != membership(packed_batch(groups, step=1, seed=1, **build))
    assert first[0] != sorted((f"p{i}", j) for i in range(8) for j in range(2))


def test_a_rank_without_work_gets_padding_only():
    group = make_group(0, [1], [make_response("p0", 0, [2, 3])])
    batch = packed_batch(
        [group],
        step=0,
        version=0,
        seed=0,
        mini_batch_groups=1,
        aggregation="token",
        rules=PackingRules(data_parallel_size=2, micro_batch_tokens=8, total_multiple=4),
    )
    busy, idle = batch.mini_batches[0].shards
    assert busy[0].sequences == [("p0", 0)]
    assert len(idle) == 1 and idle[0].sequences == []
    assert idle[0].cu_seqlens.tolist() == [0, 4]
    assert not idle[0].weights.any() and not idle[0].active.any()
    assert batch.metrics["batch/imbalance"] == 2.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_fully_masked_response_changes_no_other_weight(aggregation):
    trained = [make_response("p0", 0, [1, 2]), make_response("p0", 1, [3])]
    masked = make_response("p0", 2, [4, 5, 6], [False] * 3)
    problem = {"step": 0, "version": 0, "seed": 0, "mini_batch_groups": 4, "aggregation": aggregation}
    without = packed_batch([make_group(0, [9], trained)], **problem, rules=ONE_RANK)
    with_it = packed_batch([make_group(0, [9], [*trained, masked])], **problem, rules=ONE_RANK)

    expected, found = sequences_of(without.mini_batches[0]), sequences_of(with_it.mini_batches[0])
    assert all(np.array_equal(found[key]["weights"], expected[key]["weights"]) for key in expected)
    assert not found["p0", 2]["weights"].any() and not found["p0", 2]["active"].any()
    assert found["p0", 2]["rollout_logprobs"].any()


def test_bad_input_is_named_in_one_line():
    problem = {"step": 0, "version": 0, "seed": 0, "mini_batch_groups": 1, "aggregation": "token", "rules": ONE_RANK}
    short = make_response("p0", 3, [1, 2])
    short.rollout_logprobs = short.rollout_logprobs[:1]
    with pytest.raises(DapoError, match="prompt 'p0', response 3: rollout_logprobs has 1 entries for 2 tokens"):
        build_step_batch([make_group(0, [1], [short])], **problem)
    with pytest.raises(DapoError, match="prompt 'p0', response 0: the prompt has no tokens"):
        build_step_batch([make_group(0, [], [make_response("p0", 0, [1])])], **problem)
    with pytest.raises(ValueError, match="without groups"):
        build_step_batch([], **problem)
