"""Pictures of what scripts/bench_rules.py measured: the trade-off of all methods, the learn curve, rules in a row.

python scripts/plot_rules.py --run results.jsonl --curve curve.jsonl --row row.jsonl --out docs

Each of the three files is optional; each makes `rules_frontier.svg`, `rules_curve.svg` and `rules_row.svg`. Points are means
over rules, bars their 95 % bootstrap intervals.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from mint import pictures
from mint.evaluation import charts

RESAMPLES = 1000


def rows_of(path: Path) -> list[dict]:
    """The rows that were measured, without those that ended in an error."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [r for r in rows if "error" not in r]


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean, seed 0."""
    draw = random.Random(0)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def known(rows: Sequence[dict], value: Callable[[dict], float | None]) -> list[float]:
    """One figure of every row that has it."""
    return [v for v in map(value, rows) if v is not None]


def unseen(row: dict) -> float | None:
    """Share of unseen prompts that came out right."""
    return row["unseen"]["share"]


def frontier(rows: Sequence[dict]):
    """Figure: unseen prompts right against tokens of other text changed, a point a method."""
    points = []
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        changed, right = known(mine, lambda r: r["changed"]), known(mine, unseen)
        if changed and right:
            points.append(
                charts.Point(method, mean(changed), mean(right), interval(changed), interval(right))
            )
    return charts.scatter(points, "tokens of other text changed, %", "unseen prompts right, %", themed=False)


def curve(rows: Sequence[dict]):
    """Figure: unseen prompts right, and near misses kept, over the number of prompts learnt from."""
    counts = sorted({r["n"] for r in rows})
    lines = {"unseen prompts right": unseen, "near misses kept": lambda r: r["near"]["share"]}
    series = []
    for name, value in lines.items():
        shares = [known([r for r in rows if r["n"] == n], value) for n in counts]
        drawn = [(n, mean(s)) for n, s in zip(counts, shares, strict=True) if s]
        series.append(charts.Curve(name, [n for n, _ in drawn], [s for _, s in drawn]))
    return charts.curves(series, "prompts learnt from", "share, %", themed=False)


def in_a_row(rows: Sequence[dict]):
    """Figure: what rules repaired one after another still do, of what each did when it was made, and what else changed.

    Refused rules are no part of it.
    """
    rows = [r for r in rows if "rules" in r]  # not those of pass@1
    counts = [r["rules"] for r in rows]
    kept = []
    for row in rows:
        both = [both for name, both in row["right now, at first, of"].items() if name not in row["refused"]]
        kept.append(sum(now for now, _, _ in both) / max(1, sum(first for _, first, _ in both)))
    series = [
        charts.Curve("unseen prompts right, of those when made", counts, kept),
        charts.Curve("tokens of other text unchanged", counts, [1 - r["changed"] for r in rows]),
    ]
    return charts.curves(series, "rules in a row", "share, %", themed=False)


def main() -> None:
    """Draw what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    drawn = {
        "run": ("rules_frontier", frontier),
        "curve": ("rules_curve", curve),
        "row": ("rules_row", in_a_row),
    }
    for option in drawn:
        parser.add_argument(f"--{option}", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    asked = vars(parser.parse_args())
    for option, (name, draw) in drawn.items():
        if asked[option] is not None:
            path = pictures.write_picture(
                draw(rows_of(asked[option])), asked["out"] / f"{name}.svg", force=True
            )
            print(path)


if __name__ == "__main__":
    main()
