"""A load is given up when it stands still after its deadline, not before; hung children are ended."""

import importlib
import os

import pytest

from contentfactory.jobs.spec import get_kind
from worker import warmup
from worker.loading import PATIENCE, QUIET_S, LoadWatch, deadline_s, usage


@pytest.fixture
def clock():
    at = [0.0]

    def now():
        return at[0]

    now.at = at
    return now


def test_larger_models_may_take_longer():
    assert deadline_s(0) < deadline_s(1_000) < deadline_s(100_000)
    assert deadline_s(100_000) > 3600


def test_a_load_that_stands_still_is_given_up_after_its_deadline(clock):
    watch = LoadWatch("m@1", 100.0, lambda: (1.0,), clock)
    assert watch.stuck() is None
    clock.at[0] = 90.0
    assert watch.stuck() is None
    clock.at[0] = 101.0
    assert "m@1" in watch.stuck()


def test_a_load_that_moves_may_go_on(clock):
    watch = LoadWatch("m@1", 100.0, lambda: (clock.at[0],), clock)
    while clock.at[0] < 100.0 * PATIENCE:
        assert watch.stuck() is None
        clock.at[0] += QUIET_S / 2
    clock.at[0] += QUIET_S
    assert "times its limit" in watch.stuck()


def test_usage_moves_with_work():
    before = usage(os.getpid())
    kept = bytearray(os.urandom(8 * 2**20))
    assert len(before) == 3
    assert usage(os.getpid()) != before
    assert len(kept)
    assert usage(2**22 + 1) == ()


@pytest.mark.parametrize("kind", sorted(warmup.LOADERS))
def test_each_loader_is_there(kind):
    module, _, function = warmup.LOADERS[kind].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert get_kind(kind).takes_model
