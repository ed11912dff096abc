"""The lifecycle in a simulated world: a few hundred histories, the same seed twice, and bugs that must be caught (docs/simulation.md)."""

import inspect
from collections import Counter

import planted
import pytest
from sim_history import simulation

FIRST, HISTORIES = 1, 100
"""`make simulate` plays ten thousand."""


@pytest.fixture(scope="module")
def simulated():
    with simulation() as made:
        yield made


def test_no_history_breaks_an_invariant(simulated):
    broken: dict[int, list[str]] = {}
    injected: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + HISTORIES):
        outcome = simulated.play(seed)
        injected += outcome.injected
        moves += outcome.moves
        if outcome.violations:
            broken[seed] = outcome.violations
    assert broken == {}, "play one again, with its story: make simulate SEED=…"
    # What is not exercised proves nothing.
    missing = {"kill", "freeze", "late", "abort", "unknown", "lose", "double", "reorder", "store", "store_unknown", "blow: outage", "blow: flush",
               "blow: restore", "blow: forge", "blow: drain", "blow: timer", "blow: keeper", "left-over object", "worker clock wrong",
               "job: poison", "job: hang", "job: slow"} - set(injected)  # fmt: skip
    assert missing == set()
    missing = {"queued -> dispatched", "dispatched -> queued", "dispatched -> running", "running -> queued", "running -> succeeded",
               "running -> failed", "running -> dead", "running -> cancelled", "queued -> cancelled", "blocked -> queued", "blocked -> failed",
               "blocked -> cancelled"} - set(moves)  # fmt: skip
    assert missing == set()


def test_one_seed_is_one_history(simulated):
    first = [simulated.play(seed).digest for seed in range(20, 26)]
    assert [simulated.play(seed).digest for seed in range(20, 26)] == first
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("name", planted.NAMED)
def test_planted_bugs_are_caught(simulated, name):
    [bug] = [bug for bug in planted.BUGS if bug.name == name]
    catch = planted.hunt(simulated, bug)
    assert catch is not None, f"{bug.what}: nothing told of it in {bug.within} histories"


@pytest.mark.parametrize("bug", planted.BUGS, ids=lambda bug: bug.name)
def test_planted_pieces_can_be_called_like_what_they_replace(bug):
    """A piece that only fails with TypeError is caught by everything and tests nothing."""
    for thing, name, piece in bug.places():
        asked = inspect.signature(getattr(thing, name)).parameters.values()
        word = {p.name: None for p in asked if p.kind is p.KEYWORD_ONLY}
        place = [p.name for p in asked if p.kind is p.POSITIONAL_OR_KEYWORD]
        given = inspect.signature(piece)
        given.bind(*place, **word)
        given.bind(*place[:1], **dict.fromkeys(place[1:]), **word)
        needed = [p for p in asked if p.default is p.empty]
        given.bind(*(p.name for p in needed if p.name in place), **{p.name: None for p in needed if p.name in word})
