"""What is learned of micro-batches: sizes that fit, sizes that pay; a process that is clean after memory ran out."""

import gc
import weakref
from types import SimpleNamespace

import pytest

from contentfactory.errors import FactoryError, ModelUnavailable, ResourceError, TransientError
from db.limits import CAREFUL, STREAK, Limit, best_size
from worker import memory
from worker import meter as meter_module
from worker.breaker import Breaker
from worker.meter import GroupMeter
from worker.models import ModelCache


def work(limit: Limit, fits: int, groups: int, most: int) -> tuple[Limit, int]:
    """Run micro-batches one after the other at the size that is allowed; returns the limit and how often memory ran out."""
    failures = 0
    for _ in range(groups):
        size = limit.most or most
        if size > fits:
            failures += 1
            limit = limit.after_memory(size)
        else:
            limit = limit.after_success(size, 1, most)
    return limit, failures


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 17, 31, 32, 63, 64])
def test_memory_runs_out_a_bounded_number_of_times(fits):
    limit, failures = work(Limit(), fits, 20 * STREAK, 64)
    # Halving, one more for each step of growth that meets the ceiling, and careful tries far apart.
    assert failures <= 64 .bit_length() + 2
    assert (limit.most or 64) == fits


def test_a_size_that_failed_is_tried_again_only_after_very_many():
    limit, _ = work(Limit(), 5, 40 * STREAK, 64)
    assert (limit.most, limit.refused, limit.streak > STREAK) == (5, 6, True)
    needed = STREAK * CAREFUL * 2 ** min(limit.refusals, 10)
    assert limit.after_success(5, needed - limit.streak - 1, 64).most == 5
    grown = limit.after_success(5, needed - limit.streak, 64)
    assert grown.most == 6
    assert grown.after_memory(6).most == 5


def test_it_grows_by_a_quarter_up_to_the_kinds_own_size():
    limit = Limit(most=8, fits=8)
    sizes = []
    while limit.most:
        sizes.append(limit.most)
        limit = limit.after_success(limit.most, STREAK, 16)
    assert sizes == [8, 10, 12, 15, 16]


def test_smaller_micro_batches_teach_nothing_about_the_limit():
    assert Limit(most=8, fits=8).after_success(7, 10 * STREAK, 16).streak == 0


def test_a_late_failure_of_a_large_one_does_not_raise_the_limit():
    assert Limit(most=4, fits=4, refused=8).after_memory(32).most == 4


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 1.0, 4: 3.0, 8: 3.9, 16: 4.0}, 8),
        ({1: 1.0, 4: 2.0, 8: 3.0}, 0),
        ({2: 5.0, 4: 3.0}, 2),
        ({4: 1.0}, 0),
        ({}, 0),
    ],
)
def test_the_smallest_size_near_the_best_speed(rates, expected):
    assert best_size({size: (10, 100.0 * rate, 100.0) for size, rate in rates.items()}) == expected


def test_speed_needs_evidence():
    assert best_size({4: (7, 100.0, 100.0), 8: (100, 100.0, 100.0)}) == 0
    assert best_size({4: (100, 9.0, 9.0), 8: (100, 90.0, 90.0)}) == 0
    assert best_size({4: (100, 30.0, 30.0), 8: (100, 30.0, 30.0)}) == 0  # too short: commits would weigh too much


def test_old_speeds_fade():
    limit = Limit()
    for _ in range(3000):
        limit = limit.after_speed(4, 1, 1.0, 1.0)
    assert limit.speed["4"][0] <= 257
    for _ in range(1200):
        limit = limit.after_speed(4, 1, 2.0, 1.0)
    assert limit.speed["4"][1] / limit.speed["4"][2] > 1.9


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"), RuntimeError("std::bad_alloc"), OSError(12, "Cannot allocate memory"),
    ],
)  # fmt: skip
def test_out_of_memory_is_known_in_all_its_words(error):
    assert memory.is_out_of_memory(error)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), FactoryError("out of memory"), None])
def test_other_errors_are_not_out_of_memory(error):
    assert not memory.is_out_of_memory(error)


class _Tensor:
    pass


def test_release_lets_go_of_what_the_failed_pass_held():
    found = []

    def forward():
        tensor = _Tensor()
        found.append(weakref.ref(tensor))
        raise MemoryError("no room")

    gc.disable()
    try:
        try:
            forward()
        except MemoryError as error:
            assert found[0]() is not None
            memory.release(error)
            assert found[0]() is None
    finally:
        gc.enable()


def test_a_model_that_does_not_fit_beside_others_is_loaded_alone():
    cache = ModelCache(1000)
    cache.get("small", lambda: "small", 10)

    def loader():
        if cache.keys:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return "large"

    assert cache.get("large", loader, 10) == "large"
    assert cache.keys == ["large"]


def test_a_model_that_does_not_fit_alone_is_a_matter_of_memory_but_not_of_the_group():
    def loader():
        raise MemoryError("no room")

    with pytest.raises(ResourceError) as caught:
        ModelCache(1000).get("large", loader, 10)
    assert caught.value.code == "model_out_of_memory"


def test_a_breaker_opens_longer_each_time_and_closes_on_success():
    at = [0.0]
    breaker = Breaker(most_s=10.0, clock=lambda: at[0])
    assert breaker.wait_s("m") == 0
    pauses = []
    for _ in range(5):
        pauses.append(breaker.failed("m", ValueError("broken")))
        assert breaker.wait_s("m") == pauses[-1]
        at[0] += pauses[-1]
        assert breaker.wait_s("m") == 0
    assert pauses == [2, 4, 8, 10, 10]
    assert breaker.failures("m") == 5
    assert breaker.message("m") == "ValueError: broken"
    assert breaker.wait_s("other") == 0
    breaker.worked("m")
    assert breaker.failures("m") == 0


def test_a_broken_model_is_not_loaded_over_and_over():
    cache, loads = ModelCache(100), []

    def loader():
        loads.append(1)
        raise ValueError("broken file")

    with pytest.raises(ValueError, match="broken file"):
        cache.get("m", loader, 1)
    for _ in range(100):
        with pytest.raises(TransientError, match="broken file"):
            cache.get("m", loader, 1)
    assert len(loads) == 1


def test_a_model_that_is_missing_says_so_each_time():
    cache = ModelCache(100)

    def loader():
        raise ModelUnavailable("not installed")

    for _ in range(2):
        with pytest.raises(ModelUnavailable):
            cache.get("m", loader, 1)


def test_the_device_has_a_name_without_torch():
    name = memory.device_name("cpu")
    assert name.startswith("cpu ") and name.endswith(" GB") and len(name) <= 40


# --- the meter ---

SPEC = SimpleNamespace(name="trial.act", max_group=32, share_key=lambda params, model: "key")


def member(error=None):
    claimed = SimpleNamespace(params={}, model=None, seconds=2.0)
    return SimpleNamespace(claimed=claimed, resolved=SimpleNamespace(params=None), error=error)


@pytest.fixture
def meter(sqlite_database):
    return GroupMeter(sqlite_database, lambda: "cpu 1 GB")


def measure(meter, size, error=None):
    members = [member() for _ in range(size)]
    with meter.measure(SPEC, members, ModelCache(1)):
        members[0].error = error


def test_trifles_are_not_measured(meter):
    measure(meter, 4)
    assert meter._pending == {}


def test_memory_is_told_at_once_and_cuts_what_comes(meter):
    oom = FactoryError("no room", code="out_of_memory")
    assert [len(p) for p in meter.pieces(SPEC, [member()] * 20)] == [20]
    measure(meter, 20, oom)
    [told] = meter.due()
    assert (told.size, told.out_of_memory, told.device, told.full) == (20, 1, "cpu 1 GB", 0)
    assert [len(p) for p in meter.pieces(SPEC, [member()] * 21)] == [7, 7, 7]
    meter.told([told], {"key": 10})
    assert meter.due() == ()
    measure(meter, 10)
    meter._told_at -= 100
    [told] = meter.due()
    assert (told.size, told.full, told.groups) == (10, 1, 0)


def test_a_failure_of_another_size_meanwhile_stays_urgent(meter):
    oom = FactoryError("no room", code="out_of_memory")
    measure(meter, 8, oom)
    told = meter.due()
    measure(meter, 4, oom)
    meter.told(told, {"key": 4})
    assert [one.size for one in meter.due()] == [4]
    assert [len(p) for p in meter.pieces(SPEC, [member()] * 4)] == [2, 2]


def test_what_is_left_is_told_at_the_end(meter, sqlite_database):
    meter._known["key"] = meter_module._Known(8, 0.0)
    measure(meter, 4)
    meter.flush()
    assert meter._pending == {}


def test_what_comes_in_while_it_is_told_is_kept(meter):
    oom = FactoryError("no room", code="out_of_memory")
    measure(meter, 8, oom)
    told = meter.due()
    measure(meter, 8, oom)
    meter.told(told, {"key": 4})
    assert [one.out_of_memory for one in meter.due()] == [1]
