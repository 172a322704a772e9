"""Who shares a prefix cache."""

import pytest

from dapo_megatron.engines.cache_keys import CacheKeys


def test_requests_for_one_input_share_while_one_of_them_is_in_flight():
    keys = CacheKeys()
    with keys.key_for([1, 2]) as first:
        with keys.key_for([1, 2]) as second, keys.key_for([1, 3]) as other:
            assert first == second != other
        with keys.key_for([1, 2]) as third:
            assert third == first
    with keys.key_for([1, 2]) as later, CacheKeys().key_for([1, 2]) as of_another_client:
        assert len({first, later, of_another_client}) == 3


def test_a_request_that_fails_is_no_longer_in_flight():
    keys = CacheKeys()
    with pytest.raises(ConnectionError), keys.key_for([1]) as first:
        raise ConnectionError
    with keys.key_for([1]) as second:
        assert second != first


def test_the_first_may_end_first():
    keys = CacheKeys()
    first, second = keys.key_for([1]), keys.key_for([1])
    name = first.__enter__()
    assert second.__enter__() == name
    first.__exit__(None, None, None)
    with keys.key_for([1]) as third:
        assert third == name
    second.__exit__(None, None, None)
    with keys.key_for([1]) as fourth:
        assert fourth != name
