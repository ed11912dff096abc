"""Play simulated histories: ``make simulate`` (many), ``make simulate SEED=17`` (one, with its story), ``make simulate PLANTED=1``.

A failing history writes its story to a file and prints the command that plays it again (docs/simulation.md).
"""

import argparse
import faulthandler
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from queue import Empty

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]


def play_many(seeds: range, folder: Path, queue: "multiprocessing.Queue[tuple[str, object]]", limit_s: float) -> None:
    """Play these seeds in this process and tell the parent."""
    from sim_history import simulation

    started, cpu = time.monotonic(), time.process_time()
    played = jobs = 0
    seconds = 0.0
    tables = {"injected": Counter[str](), "histories with": Counter[str](), "changes of state": Counter[str](), "ends of attempts": Counter[str]()}
    with simulation() as simulated:
        for seed in seeds:
            # Code that waits in real time, which nobody's task would ever end, shows where it does.
            faulthandler.dump_traceback_later(60, exit=True)
            outcome = simulated.play(seed)
            played, jobs, seconds = played + 1, jobs + outcome.jobs, seconds + outcome.seconds
            tables["injected"] += outcome.injected
            tables["histories with"].update(name for name, n in outcome.injected.items() if n)
            tables["changes of state"] += outcome.moves
            tables["ends of attempts"] += outcome.outcomes
            if outcome.violations:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"history-{seed}.txt"
                path.write_text(outcome.text() + "\n")
                queue.put(("violation", (seed, outcome.violations, str(path))))
            if time.monotonic() - started > limit_s:
                break
    queue.put(("done", (played, jobs, seconds, time.process_time() - cpu, tables)))


def show(tables: dict[str, Counter[str]]) -> None:
    """Print what was exercised, so that one sees that nothing was left out."""
    with_it = tables.pop("histories with")
    for title, counts in tables.items():
        print(f"\n{title}:")
        for name, n in sorted(counts.items(), key=lambda x: -x[1]):
            print(f"  {n:9,}  {name}" + (f"  (in {with_it[name]:,} histories)" if title == "injected" else ""))


def hunt_planted(names: list[str], first: int) -> int:
    """Plant one bug after the other and say what caught it."""
    import planted
    from sim_history import simulation

    missed = 0
    with simulation() as simulated:
        for bug in planted.BUGS:
            if names and not any(name in bug.name for name in names):
                continue
            catch = planted.hunt(simulated, bug, first)
            missed += catch is None
            told = f"{catch.invariant:4} after {catch.histories:3} histories (seed {catch.seed})" if catch else f"NOT CAUGHT in {bug.within} histories"
            print(f"{bug.name:28} {told}  {catch.violation if catch else ''}"[:220], flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one history and print its story")
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=1, help="seed of the first history")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many minutes")
    parser.add_argument("--planted", nargs="*", help="plant bugs instead (all of them, or those whose names hold one of these words)")
    parser.add_argument("--out", type=Path, default=ROOT / ".factory" / "simulation", help="folder of failing histories")
    options = parser.parse_args()
    if options.planted is not None:
        return bool(hunt_planted(options.planted, options.first))
    if options.seed is not None:
        from sim_history import simulation

        with simulation() as simulated:
            outcome = simulated.play(options.seed)
        print(outcome.text())
        print(f"\nseed {options.seed}: {outcome.jobs} jobs, {outcome.seconds:.0f} simulated seconds, digest {outcome.digest[:16]}, "
              f"{len(outcome.violations)} violations")  # fmt: skip
        return bool(outcome.violations)
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[tuple[str, object]] = context.Queue()
    last = options.first + options.histories
    print(f"seeds {options.first} to {last - 1}, {options.processes} processes", flush=True)
    workers = [
        context.Process(target=play_many, args=(range(options.first + n, last, options.processes), options.out, queue, options.minutes * 60))
        for n in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    played = jobs = violated = done = 0
    simulated_s = cpu_s = 0.0
    tables: dict[str, Counter[str]] = {}
    while done < len(workers):
        try:
            what, data = queue.get(timeout=5)
        except Empty:
            if lost := [worker for worker in workers if worker.exitcode]:
                print(f"a process ended with {lost[0].exitcode} before it had played its histories; the others are stopped", flush=True)
                for worker in workers:
                    worker.terminate()
                return 1
            continue
        if what == "violation":
            seed, violations, path = data  # type: ignore[misc]
            violated += 1
            print(f"seed {seed}: {violations[0]}\n  story: {path}\n  again: make simulate SEED={seed}", flush=True)
        else:
            done += 1
            *one, counted = data  # type: ignore[misc]
            played, jobs, simulated_s, cpu_s = (a + b for a, b in zip((played, jobs, simulated_s, cpu_s), one, strict=True))
            for title, counts in counted.items():
                tables[title] = tables.get(title, Counter()) + counts
    for worker in workers:
        worker.join()
    wall = time.monotonic() - started
    show(tables)
    print(f"{played} histories, {jobs} jobs, {simulated_s / 3600:.0f} simulated hours in {wall:.0f} s ({played / max(cpu_s, 1e-9):.1f} histories "
          f"a CPU second): {violated} with violations")  # fmt: skip
    return 1 if violated or played < options.histories else 0


if __name__ == "__main__":
    sys.exit(main())
