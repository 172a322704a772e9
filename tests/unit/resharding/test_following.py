"""Which engines a push goes to, as they load, fail and are replaced."""

import pytest

from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.errors import EngineError
from dapo_megatron.resharding import following
from dapo_megatron.resharding.following import FollowedEngines

A, B, C = (Member(f"engine-{i}", f"http://e{i}") for i in range(3))
B2 = Member(B.name, B.url, start=2)


class World:
    """What the launcher says and who is up; `at_looks` changes it while somebody waits: [what happens at each look]."""

    def __init__(self, monkeypatch, *members):
        self.set, self.up, self.at_looks = EngineSet(1, members), set(members), []
        monkeypatch.setattr(following.time, "sleep", lambda _: self.at_looks and self.at_looks.pop(0)())
        self.followed = FollowedEngines(lambda: self.set, lambda member: member in self.up, start_timeout_s=0.05)

    def replace(self, *members):
        self.set = EngineSet(self.set.generation + 1, members)

    def connect(self):
        found = self.followed.find()
        self.followed.connect(found)
        return found.members


def test_at_first_all_are_waited_for(monkeypatch):
    world = World(monkeypatch, A, B)
    world.up = {A}
    with pytest.raises(EngineError, match=r"engine-1 \(http://e1\) did not answer within 0 s: see its log"):
        world.followed.find()
    world.at_looks = [lambda: None, lambda: world.up.add(B)]
    assert world.connect() == (A, B) and not world.at_looks


def test_one_that_loads_after_another_start_is_left_out_until_it_is_up(monkeypatch):
    world = World(monkeypatch, A, B)
    world.connect()
    assert not world.followed.is_outdated() and not world.followed.has_lost() and not world.followed.can_follow()
    world.replace(A, B2)
    world.up = {A}
    assert world.followed.is_outdated() and world.followed.has_lost() and not world.followed.can_follow()
    assert world.connect() == (A,)
    assert not world.followed.is_outdated() and not world.followed.has_lost() and not world.followed.can_follow()
    world.up.add(B2)
    assert world.followed.can_follow()
    assert world.connect() == (A, B2)


def test_one_that_was_pushed_to_and_does_not_answer_is_waited_for_until_it_is_replaced(monkeypatch):
    """Also where it was left out of a push between: it may still serve the version that it has."""
    world = World(monkeypatch, A, B, C)
    world.connect()
    world.up = {A, C}
    world.followed.connect(EngineSet(1, (A,)))
    with pytest.raises(EngineError, match="engine-1 .* did not answer within 0 s"):
        world.followed.find()
    world.at_looks = [lambda: world.replace(A, B2, C)]
    with pytest.raises(EngineError, match="an engine was replaced before it answered"):
        world.followed.find()
    assert world.connect() == (A, C)


def test_where_all_are_new_one_is_waited_for(monkeypatch):
    world = World(monkeypatch, B)
    world.connect()
    world.replace(B2)
    world.up = set()
    with pytest.raises(EngineError, match="engine-1 .* did not answer"):
        world.followed.find()
