"""Limits of time: of a block, and by a notice from elsewhere."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from support import FakeClock

from lightning_gradaudit import Budget
from lightning_gradaudit.attacks.budget import Meter
from lightning_gradaudit.utils import time_limit
from lightning_gradaudit.utils.time_limit import EndNotice, TimeIsUpError, limited_time, require_time, time_left


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=clock))
    return clock


def test_the_shortest_of_nested_limits_holds_and_ends_with_its_block(clock):
    assert time_left() == float("inf")
    with limited_time(10):
        with limited_time(20):
            assert time_left() == 10
        with limited_time(4):
            clock.now += 3
            assert time_left() == 1
        assert time_left() == 7
        clock.now += 8
        with pytest.raises(TimeIsUpError):
            require_time()
        assert Meter(Budget(evaluations=5)).exhausted
    require_time()
    assert not Meter(Budget(evaluations=5)).exhausted


def test_a_notice_reaches_a_copy_and_leaves_no_file(clock):
    notice = EndNotice()
    copy = pickle.loads(pickle.dumps(notice))
    with limited_time(10, copy), limited_time(8):
        assert time_left() == 8
        notice.give(2.0)
        assert time_left() == 2
        clock.now += 3
        assert time_left() == -1
        notice.withdraw()
        assert time_left() == 5
    notice.withdraw()  # again
    assert not notice.path.exists()


def test_a_notice_that_cannot_be_given_changes_nothing(clock, tmp_path):
    notice = EndNotice(tmp_path / "missing" / "notice")
    notice.give(1.0)
    assert notice.left() == float("inf")
    (tmp_path / "notice").write_text("no number")
    assert EndNotice(tmp_path / "notice").left() == float("inf")
