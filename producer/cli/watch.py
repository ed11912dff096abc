"""Live progress of a batch, and its JSON form."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from contentfactory.states import BatchState
from db import batches
from producer.cli.common import duration


def snapshot(database: Any, project_id: str, batch_id: str) -> dict[str, Any]:
    """A batch with its counters, as printed with ``--json``."""
    with database.read() as conn:
        row = batches.get(conn, project_id, batch_id)
        kinds = batches.progress(conn, batch_id)
    if row is None:
        raise LookupError(batch_id)
    return {
        "id": row["id"], "name": row["name"], "state": row["state"], "paused": row["paused"], "total": row["total"],
        "counts": batches.totals(kinds), "kinds": kinds, "created_at": row["created_at"], "finished_at": row["finished_at"],
        "retry_of": row["retry_of"], "error": row["error"], "source": {k: v for k, v in row["source"].items() if k != "object_key"},
    }  # fmt: skip


class Rates:
    """Jobs a second by kind, over a sliding window."""

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self._seen: list[tuple[float, dict[str, int]]] = []

    def add(self, kinds: Mapping[str, Mapping[str, int]], at: float) -> dict[str, float]:
        """Note counters; returns the rate of each kind."""
        done = {k: s.get("succeeded", 0) + s.get("failed", 0) + s.get("dead", 0) + s.get("cancelled", 0) for k, s in kinds.items()}
        self._seen.append((at, done))
        while len(self._seen) > 2 and at - self._seen[0][0] > self.window_s:
            self._seen.pop(0)
        start, first = self._seen[0]
        if at - start < 1.0:
            return {}
        return {k: (n - first.get(k, 0)) / (at - start) for k, n in done.items()}


def _left(states: Mapping[str, int], rate: float) -> float | None:
    open_ = states.get("waiting", 0) + states.get("running", 0)
    if not open_:
        return 0.0
    return open_ / rate if rate > 0 else None


def render(view: Mapping[str, Any], rates: Mapping[str, float], note: str) -> Any:
    """The table that stands on the terminal while a batch runs."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("kind", "left"), ("", "left"), ("done", "right"), ("of", "right"), ("failed", "right"), ("running", "right"),
        ("reused", "right"), ("rate", "right"), ("left", "right"),
    ):  # fmt: skip
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for kind in sorted(view["kinds"]):
        s = view["kinds"][kind]
        total, done = s.get("total", 0), s.get("succeeded", 0)
        failed = s.get("failed", 0) + s.get("dead", 0) + s.get("cancelled", 0)
        rate = rates.get(kind, 0.0)
        left = _left(s, rate)
        grid.add_row(
            kind, ProgressBar(total=max(1, total), completed=done + failed, width=24), str(done), str(total),
            Text(str(failed), style="red" if failed else "dim"), str(s.get("running", 0)), str(s.get("reused", 0)),
            f"{rate:.2f}/s" if rate >= 0.995 else f"{rate * 60:.1f}/min" if rate else "",
            "" if left == 0 else duration(left) if left is not None else "…",
        )  # fmt: skip
    state = "paused" if view["paused"] else view["state"]
    head = Text.assemble((view["name"], "bold"), f"  {view['id']}  {state}", (f"  {note}" if note else "", "dim"))
    return Group(head, grid)


def plain_line(view: Mapping[str, Any]) -> str:
    """One line of progress for a log or a pipe."""
    c = view["counts"]
    failed = c.get("failed", 0) + c.get("dead", 0) + c.get("cancelled", 0)
    parts = [f"{view['state']}: {c.get('succeeded', 0)}/{view['total']} done"]
    if c.get("reused"):
        parts.append(f"{c['reused']} reused")
    if failed:
        parts.append(f"{failed} failed")
    parts.append(f"{c.get('running', 0)} running")
    kinds = ", ".join(f"{k} {s.get('succeeded', 0)}/{s.get('total', 0)}" for k, s in sorted(view["kinds"].items()))
    return ", ".join(parts) + f"  [{kinds}]"


def watch(
    database: Any,
    project_id: str,
    batch_id: str,
    *,
    quiet: bool = False,
    step: Callable[[], None] | None = None,
    note: Callable[[], str] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Show a batch until it is finished.

    Args:
        database: The ledger.
        project_id: Project.
        batch_id: Batch.
        quiet: Print nothing.
        step: Called in each round (expanding, checks of the services); what it raises ends the watching.
        note: A few words to show beside the state.
        timeout_s: Longest watch; None for no limit.

    Returns:
        The last snapshot.
    """
    live: Any = None
    if not quiet and sys.stdout.isatty():
        from rich.live import Live

        live = Live(refresh_per_second=4)
        live.start()
    rates = Rates()
    started = time.monotonic()
    said = ""
    said_at = -1e9
    try:
        while True:
            if step is not None:
                step()
            view = snapshot(database, project_id, batch_id)
            at = time.monotonic()
            speed = rates.add(view["kinds"], at)
            if live is not None:
                live.update(render(view, speed, note() if note else ""))
            elif not quiet:
                line = plain_line(view)
                if line != said and (at - said_at >= 5 or BatchState(view["state"]).terminal):
                    said, said_at = line, at
                    sys.stdout.write(f"[{duration(at - started):>7}] {line}\n")
                    sys.stdout.flush()
            if BatchState(view["state"]).terminal or (timeout_s is not None and at - started > timeout_s):
                return view
            time.sleep(0.25 if live is not None else 0.5)
    finally:
        if live is not None:
            live.stop()
