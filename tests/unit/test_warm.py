"""Jobs whose model is loaded may pass up to 32 that need another; nobody starves."""

import random
from dataclasses import dataclass

import pytest

from db.warm import AHEAD, choose


@dataclass(frozen=True)
class Row:
    id: str
    model: str | None
    priority: int = 0


def rows(models, priority=0):
    return [Row(str(n), m, priority) for n, m in enumerate(models)]


WARM = frozenset({"a"})


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("a", 0), ("b", 0), ("ba", 1), ("bba", 2), ("aba", 0), ("bcd", 0),
        ("b" * 32 + "a", 32), ("b" * 33 + "a", 0),
    ],
)  # fmt: skip
def test_the_nearest_warm_job_within_the_window(models, expected):
    assert choose(rows(models), WARM) == expected


def test_a_head_without_a_model_is_served():
    assert choose([Row("1", None), Row("2", "a")], WARM) == 0


def test_nothing_passes_without_warm_models():
    assert choose(rows("ba"), frozenset()) == 0


def test_a_lower_priority_does_not_pass():
    assert choose([Row("1", "b", 5), Row("2", "a", 0)], WARM) == 0
    assert choose([Row("1", "b", 5), Row("2", "b", 0), Row("3", "a", 5)], WARM) == 0


def test_less_budget_is_a_smaller_window():
    assert choose(rows("bba"), WARM, ahead=1) == 0
    assert choose(rows("bba"), WARM, ahead=0) == 0


def test_nobody_waits_more_than_its_places_however_many_warm_ones_come():
    generator = random.Random(4)
    waiting, n, passed, most = [Row("cold", "b")], 0, 0, 0
    for _ in range(500):
        waiting += [Row(f"j{(n := n + 1)}", generator.choice("ab")) for _ in range(3)]
        index = choose(waiting, WARM, AHEAD - passed) if passed < AHEAD else 0
        passed = passed + 1 if index else 0
        most = max(most, passed)
        del waiting[index]
    assert 0 < most <= AHEAD
    assert all(row.id != "cold" for row in waiting)
