"""Where single repairs hold and where they are felt, by free generation: contexts, wordings, near misses, other lines, code.

    python -m tasks conala --data DIR --split train --out conala.jsonl
    python scripts/bench_contexts.py --cases conala.jsonl --cases nl2bash.jsonl --limit 6 --solver mint --solver contexts \\
        --out results/contexts.jsonl

One row a case and solver, written as it is measured; the same command goes on where it stopped, and `--show` only adds up.
`--plot FILE` draws all solvers and values of the dial: near misses that change against contexts and wordings that hold.
`changed` are shares of the tokens of `--lines` other lines of the same file, and of the held-out code that ships. Intervals are 95 %,
by a bootstrap that draws cases.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mint import pictures
from mint.case import Case, load_cases
from mint.evaluation import charts
from mint.measure import places
from mint.measure.specificity import clean_outputs, compare, of_case, of_ids
from mint.model.lm import LM, Encoded
from mint.model.loading import BUILTIN, load_lm
from mint.model.margins import margins
from mint.reference import passages, sample_layers, statistics
from mint.solver import SOLVERS
from mint.solver.problem import Problem, Settings, changed

DIAL = 0.5
"""Default of `--generalize`."""
LONGEST = 30


def chosen(
    lm: LM, path: str, limit: int, seed: int, lines: int
) -> tuple[list[tuple[Case, Encoded]], list[Encoded]]:
    """Cases that the model does not write, and other lines of the same file."""
    cases = load_cases(path)
    random.Random(seed).shuffle(cases)
    taken, others = [], []
    for case in cases:
        encoded = lm.encode(case)
        if len(encoded.target) > LONGEST:
            continue
        if len(taken) < limit:
            if float(margins(lm, encoded).min()) <= 0:
                taken.append((case, encoded))
        elif case.target not in {c.target for c, _ in taken}:
            others.append(encoded)
        if len(others) == lines:
            break
    return taken, others


def measured(lm: LM, name: str, case: Case, encoded: Encoded, settings: Settings, watched: tuple) -> dict:
    """One row: what a solver's repair of the case does everywhere."""
    around = places.prepare(lm, case)
    started = time.perf_counter()
    solution = SOLVERS[name](lm, Problem(case, encoded), settings)
    row: dict = {"seconds": time.perf_counter() - started, "reason": solution.reason}
    row |= {"neurons": solution.neurons, "details": {k: str(v) for k, v in solution.details.items()}}
    with changed(lm, solution.change):
        row["exact"] = lm.write(encoded, case) == case.target
        row |= places.measure(lm, around)
        for where, before in zip(("lines", "code"), watched, strict=True):
            found = compare(lm, before)
            row[where] = {"changed": 1 - found.argmax_unchanged, "broken": found.argmax_broken}
    return row


# ---------------------------------------------------------------------- adding up


def _shares(rows: list[dict], kind: str) -> dict[str, float]:
    sums: dict[str, list[int]] = {}
    for row in rows:
        for name, counts in row[kind].items():
            both = sums.setdefault(name, [0, 0])
            both[0] += counts["right"]
            both[1] += counts["cases"]
    return {name: right / cases for name, (right, cases) in sums.items()}


def _without(shares: dict[str, float], kind: str) -> list[float]:
    return [share for name, share in shares.items() if name != kind]


def _near(rows: list[dict], what: str) -> float:
    cases = sum(r["near_misses"].get("cases", 0) for r in rows)
    return sum(r["near_misses"].get(what, 0) for r in rows) / cases if cases else float("nan")


FIGURES = {
    "exact behind the prompt": lambda rows: float(np.mean([r["exact"] for r in rows])),
    "contexts, mean": lambda rows: float(np.mean(list(_shares(rows, "contexts").values()))),
    "contexts, worst kind": lambda rows: min(_shares(rows, "contexts").values()),
    "case, full stop, style": lambda rows: float(
        np.mean(_without(_shares(rows, "wordings"), "rephrasings") or [float("nan")])
    ),
    "rephrasings": lambda rows: _shares(rows, "wordings").get("rephrasings", float("nan")),
    "near misses that become the target": lambda rows: _near(rows, "became_target"),
    "near misses that change": lambda rows: _near(rows, "changed"),
    "tokens changed on other lines": lambda rows: float(np.mean([r["lines"]["changed"] for r in rows])),
    "tokens changed on code": lambda rows: float(np.mean([r["code"]["changed"] for r in rows])),
    "tokens broken on other lines": lambda rows: float(np.mean([r["lines"]["broken"] for r in rows])),
    "seconds, median": lambda rows: float(np.median([r["seconds"] for r in rows])),
    "neurons, median": lambda rows: float(np.median([r["neurons"] or 0 for r in rows])),
}


RESAMPLES = 1000


def interval(rows: list[dict], figure: Callable[[list[dict]], float]) -> tuple[float, float]:
    """95 %, by drawing cases anew."""
    draw = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        many = [figure([rows[i] for i in draw.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(many, [2.5, 97.5]) if not np.isnan(many).all() else (np.nan, np.nan)
    return float(low), float(high)


def by_solver(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by solver, those of a dial's values apart where there are several."""
    several = {r["solver"] for r in rows if r["generalize"] != DIAL}
    found: dict[str, list[dict]] = {}
    for row in rows:
        name = row["solver"] + (f", {row['generalize']:g}" if row["solver"] in several else "")
        found.setdefault(name, []).append(row)
    return found


def show(rows: list[dict]) -> None:
    """A table: one column a solver, the 95 % interval behind each figure."""
    solvers = by_solver(rows)
    print(f"| | {' | '.join(solvers)} |\n| --- |{' --- |' * len(solvers)}")
    for label, figure in FIGURES.items():
        cells = []
        for own in solvers.values():
            low, high = interval(own, figure)
            cells.append(f"{figure(own):.3g} [{low:.3g}, {high:.3g}]")
        print(f"| {label} | {' | '.join(cells)} |")
    for name, own in solvers.items():
        kinds = {k: round(v, 2) for k, v in (_shares(own, "contexts") | _shares(own, "wordings")).items()}
        print(f"\n{name}, {len(own)} cases, by kind: {kinds}")


def everywhere(rows: list[dict]) -> float:
    """Share of contexts and wordings, kinds weighing alike, in which the target is written."""
    return float(np.mean([*_shares(rows, "contexts").values(), *_shares(rows, "wordings").values()]))


def plot(rows: list[dict], path: Path) -> None:
    """Where a repair holds against where it is felt, one point a solver."""
    points = []
    for name, own in by_solver(rows).items():
        near = FIGURES["near misses that change"]
        points.append(
            charts.Point(name, near(own), everywhere(own), interval(own, near), interval(own, everywhere))
        )
    figure = charts.scatter(
        points, "near misses that change, %", "contexts and wordings that hold, %", themed=False
    )
    pictures.write_picture(figure, path, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cases", action="append", required=True)
    parser.add_argument("--limit", type=int, default=20, help="cases of each file")
    parser.add_argument(
        "--lines", type=int, default=12, help="other lines of each file to look for changes on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver", action="append", choices=sorted(SOLVERS))
    parser.add_argument("--generalize", type=float, default=DIAL)
    parser.add_argument("--show", action="store_true", help="only add up what was measured")
    parser.add_argument("--plot", type=Path, help="picture to draw of all rows")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    rows = [json.loads(x) for x in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.show:
        show(rows)
        if options.plot:
            plot(rows, options.plot)
        return
    done = {(r["solver"], r["id"], r["generalize"]) for r in rows}
    lm = load_lm(options.model, device=options.device, dtype=options.dtype)
    statistics(lm).measure(sample_layers(lm), sample_layers(lm))
    settings = Settings(generalize=options.generalize)
    text = (Path(__file__).parent.parent / "mint/data/heldout/code.txt").read_text(encoding="utf-8")
    code = [of_ids(ids) for ids in passages(lm, [p.strip("\n") + "\n" for p in text.split("\n---\n")][:4])]
    on_code = clean_outputs(lm, code)
    files = [chosen(lm, path, options.limit, options.seed, options.lines) for path in options.cases]
    on_lines = [clean_outputs(lm, [of_case(e) for e in others]) for _, others in files]
    for number in range(
        options.limit
    ):  # a case of each file in turn, so that a run cut short has some of all
        for (taken, _), lines in zip(files, on_lines, strict=True):
            if number >= len(taken):
                continue
            case, encoded = taken[number]
            for name in options.solver or ["mint", "contexts"]:
                if (name, case.id, options.generalize) in done:
                    continue
                row = {"solver": name, "id": case.id, "generalize": options.generalize}
                row |= measured(lm, name, case, encoded, settings, (lines, on_code))
                rows.append(row)
                with options.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(f"{case.id} {name} exact {row['exact']} {row['seconds']:.1f} s", flush=True)
    show(rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
