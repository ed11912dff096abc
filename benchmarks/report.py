"""Results as one page that needs nothing else: bars for the sides, marks for the targets, SVG drawn here.

    python -m benchmarks.report RESULT.json [MORE.json ...] [--out page.html]

Of several results the later ones' cases replace the earlier ones' of the same name.
"""

import argparse
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "#2457c5"
OTHER = "#9aa4b2"
GOOD, BAD = "#1d7a46", "#b3261e"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; border-bottom: 1px solid #dde3ea; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; } p { margin: .3rem 0; } .quiet { color: #5b6675; font-size: .9rem; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } th { font-weight: 600; color: #44505e; }
.met { color: #1d7a46; } .missed { color: #b3261e; } svg { display: block; max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #1c2530; }
"""


def number(value: float | None) -> str:
    """A figure with three digits that count."""
    if value is None or value != value:
        return "–"
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def bars(case: Mapping[str, Any]) -> str:
    """The sides as horizontal bars: the median, with the lowest and highest round as a line."""
    sides = [(name, figures["value"]) for name, figures in case["sides"].items() if "value" in figures]
    sides = [(name, s) for name, s in sides if s["median"] == s["median"] and s["high"] is not None]
    if not sides:
        return ""
    left, width, right, row = 230, 430, 100, 24
    top = max(s["high"] for _, s in sides) or 1.0
    height = row * len(sides) + 8
    parts = [f'<svg viewBox="0 0 {left + width + right} {height}" width="{left + width + right}" role="img" aria-label="{html.escape(case["name"])}">']
    for n, (name, s) in enumerate(sides):
        y, long = n * row + 4, max(1.0, s["median"] / top * width)
        colour = OURS if name.startswith("ours") or not any(x.startswith("ours") for x, _ in sides) else OTHER
        low, high = s["low"] / top * width, s["high"] / top * width
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="16" rx="2" fill="{colour}"/>')
        if len(s["runs"]) > 1:
            parts.append(f'<path d="M{left + low:.1f} {y + 8}H{left + high:.1f}M{left + low:.1f} {y + 4}v8M{left + high:.1f} {y + 4}v8" stroke="#1c2530" fill="none"/>')
        parts.append(f'<text x="{left + max(long, high) + 8:.1f}" y="{y + 13}">{number(s["median"])}</text>')
    return "".join([*parts, "</svg>"])


def targets(checks: Sequence[Mapping[str, Any]]) -> str:
    """Ratios against their targets: the bar is the share of the target reached, cut at twice as much."""
    found = [c for c in checks if c["target"] and c["value"] == c["value"]]
    if not found:
        return ""
    left, width, right, row = 380, 260, 190, 22
    height = row * len(found) + 6
    parts = [f'<svg viewBox="0 0 {left + width + right} {height}" width="{left + width + right}" role="img" aria-label="targets">']
    middle = left + width / 2
    for n, check in enumerate(found):
        y = n * row + 3
        share = check["value"] / check["target"]
        long = max(1.0, min(share, 2.0) / 2 * width)
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{html.escape(check["name"])}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="14" rx="2" fill="{GOOD if check["met"] else BAD}"/>')
        parts.append(f'<text x="{left + width + 8}" y="{y + 12}">{number(check["value"])} {html.escape(check["unit"])}, wanted {"≥" if check["op"] == ">=" else "≤"} {number(check["target"])}</text>')
    parts.append(f'<path d="M{middle} 0V{height}" stroke="#1c2530" stroke-dasharray="3 3"/></svg>')
    return "".join(parts)


def grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers to the right."""

    def cell(value: Any, tag: str = "td") -> str:
        if isinstance(value, bool) or value is None:
            return f"<{tag}></{tag}>" if value is None else f"<{tag}>{value}</{tag}>"
        if isinstance(value, int | float):
            return f'<{tag} class="n">{number(value)}</{tag}>'
        return f"<{tag}>{html.escape(str(value))}</{tag}>"

    head = "".join(f'<th class="n">{html.escape(c)}</th>' if rows and isinstance(rows[0][n], int | float) else f"<th>{html.escape(c)}</th>" for n, c in enumerate(columns))
    body = "".join("<tr>" + "".join(cell(v) for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def section(case: Mapping[str, Any]) -> str:
    """One case."""
    extra = sorted({k for figures in case["sides"].values() for k in figures if k != "value"})
    rows = [
        [name, *(figures[k]["median"] if k in figures else None for k in ("value", *extra)), len(figures["value"]["runs"]) if "value" in figures else None]
        for name, figures in case["sides"].items()
    ]
    lines = []
    for c in case["checks"]:
        spread = f" ({number(c['low'])} to {number(c['high'])})" if c["low"] is not None and c["low"] != c["high"] else ""
        wanted = "" if c["target"] is None else f", wanted {'≥' if c['op'] == '>=' else '≤'} {number(c['target'])}"
        kind = {True: "met", False: "missed", None: ""}[c["met"]]
        lines.append(f'<p class="{kind}">{html.escape(c["name"])}: <b>{number(c["value"])} {html.escape(c["unit"])}</b>{spread}{wanted}</p>')
    parts = [f'<h3 id="{html.escape(case["name"])}">{html.escape(case["name"])}</h3><p>{html.escape(case["what"])} <span class="quiet">({html.escape(case["unit"])}, {case["better"]} is better; median of the rounds, the line from the lowest to the highest)</span></p>']
    parts.append(bars(case))
    parts += lines
    if extra and rows:
        parts.append(grid(["side", case["unit"], *extra, "rounds"], rows))
    parts += [f"<p>{html.escape(t['title'])}</p>" + grid(t["columns"], t["rows"]) for t in case["tables"]]
    parts += [f'<p class="quiet">{html.escape(n)}</p>' for n in case["notes"]]
    return "".join(parts)


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page of one or several results."""
    cases: dict[str, Mapping[str, Any]] = {}
    for result in results:
        for case in result["cases"]:
            cases[case["name"]] = case
    families: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases.values():
        families.setdefault(case["name"].partition(".")[0], []).append(case)
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">']
    parts.append(f"<title>Contentfactory: benchmarks</title><style>{STYLE}</style><h1>Contentfactory: benchmarks</h1>")
    for result in results:
        m = result["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
        parts.append(
            f'<p class="quiet">{html.escape(result["begun"])}, size {result["size"]}, commit {html.escape(m["commit"])}: {html.escape(m["cpu"])}, {m["cores"]} cores, '
            f"{m['memory_gb']} GB, {html.escape(m['system'])}, load {', '.join(str(x) for x in m['load'])}. {html.escape(versions)}</p>"
        )
    checks = [{**c, "name": f"{case['name']}: {c['name']}"} for case in cases.values() for c in case["checks"] if c["target"]]
    if checks:
        met = sum(bool(c["met"]) for c in checks)
        parts.append(f"<h2>Targets: {met} of {len(checks)} met</h2><p class='quiet'>The dashed line is the target; where less is better, a bar that stays left of it is good.</p>")
        short = [{**c, "name": c["name"] if len(c["name"]) < 56 else c["name"][:54] + "…"} for c in checks]
        parts.append(targets(short))
    for family, members in families.items():
        parts.append(f"<h2>{html.escape(family)}</h2>" + "".join(section(c) for c in members))
    return "".join(parts) + "</html>\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    text = page([json.loads(p.read_text()) for p in options.results])
    if options.out:
        options.out.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
