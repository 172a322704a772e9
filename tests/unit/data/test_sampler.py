"""The sampler: epochs are permutations, and a restored sampler goes on exactly."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.sampler import PromptSampler, SamplerState
from dapo_megatron.errors import DapoError

sizes, seeds = st.integers(1, 50), st.integers(0, 2**40)


def take(sampler, count):
    return [sampler.next() for _ in range(count)]


@settings(deadline=None)
@given(sizes, seeds, st.booleans())
def test_each_epoch_is_a_permutation(size, seed, shuffle):
    sampler = PromptSampler(size, seed, shuffle)
    for _ in range(3):
        epoch = take(sampler, size)
        assert sorted(epoch) == list(range(size))
        assert shuffle or epoch == list(range(size))


@settings(deadline=None)
@given(sizes, seeds, st.booleans(), st.integers(0, 150), st.integers(0, 100))
def test_a_restored_sampler_goes_on_exactly(size, seed, shuffle, before, after):
    whole, saved = PromptSampler(size, seed, shuffle), PromptSampler(size, seed, shuffle)
    take(whole, before), take(saved, before)
    state = msgspec.json.decode(msgspec.json.encode(saved.state()), type=SamplerState)
    restored = PromptSampler.restore(state, size, seed)
    assert take(restored, after) == take(whole, after)
    assert restored.state() == whole.state()


def test_the_order_is_fixed_for_ever():
    assert take(PromptSampler(8, seed=1), 16) == [1, 5, 4, 2, 7, 0, 3, 6, 1, 5, 2, 3, 6, 4, 0, 7]


def test_seeds_and_epochs_differ():
    sampler = PromptSampler(100, seed=0)
    first, second = take(sampler, 100), take(sampler, 100)
    assert first != second
    assert first != take(PromptSampler(100, seed=1), 100)
    assert second != take(PromptSampler(100, seed=1), 100), "epoch 1 of seed 0 is not epoch 0 of seed 1"


@pytest.mark.parametrize(
    "state, message",
    [
        (SamplerState(0, 0, 0, 11, True), "the data set has 10 prompts, the checkpoint was made with 11"),
        (SamplerState(1, 0, 0, 10, True), "seed=0, the checkpoint was made with seed=1"),
        (SamplerState(0, 0, 11, 10, True), "impossible sampler state"),
        (SamplerState(0, -1, 0, 10, True), "impossible sampler state"),
    ],
)
def test_what_does_not_fit_is_an_error(state, message):
    with pytest.raises(DapoError, match=message):
        PromptSampler.restore(state, 10, seed=0)


def test_no_prompts():
    with pytest.raises(DapoError, match="cannot sample from 0 prompts"):
        PromptSampler(0, seed=0)
