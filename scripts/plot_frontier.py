"""The trade-off between generalization and side effects: the `--generalize` dial of the main solver against baselines.

    python scripts/plot_frontier.py --cases conala.jsonl --limit 20 --out results/frontier --plot docs/frontier.svg

Baselines come from the same run with their own defaults (`--solver`, may be repeated), or from the JSON file that
scripts/bench_solvers.py wrote (`--bench`). Resumable.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from mint import pictures
from mint.errors import MintError
from mint.evaluation import charts, measuring, run
from mint.evaluation.plan import Request
from mint.files import write_file
from mint.model.loading import BUILTIN, load_lm
from mint.solver.problem import Settings

DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dial", type=float, nargs="+", default=list(DIAL), help="values of --generalize, 0 to 1"
    )
    parser.add_argument("--solver", action="append", default=[], help="baseline to run beside the dial")
    parser.add_argument("--bench", type=Path, help="docs/solvers_table.json: baselines measured before")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, default=Path("docs/frontier.svg"))
    return parser.parse_args(arguments)


def point(name: str, entry: dict) -> charts.Point | None:
    """A solver's place: share of argmax tokens changed, token accuracy behind rephrasings; None if not measured."""
    kept, after = entry["specificity"]["argmax_unchanged"], entry["generalization"]["token_accuracy_after"]
    if kept is None or after is None:
        return None
    ranges = entry.get("intervals", {})
    low, high = ranges.get("argmax_unchanged", (kept, kept))
    around = tuple(ranges.get("generalization_token_accuracy_after", (after, after)))
    return charts.Point(name, 1 - kept, after, (1 - high, 1 - low), around)


def measure(lm, options: argparse.Namespace) -> dict[str, dict]:
    """Entries of all points by name: the dial, then the baselines."""
    cases, _ = measuring.read_cases(options.cases)
    common = Request(
        controls={}, options=measuring.Options(outputs=0), seed=options.seed, limit=options.limit, page=False
    )  # neither controls nor outputs are drawn
    found = {}
    for value in options.dial:
        settings, out = Settings(generalize=value), options.out / f"generalize-{value:g}"
        request = replace(common, settings=settings)
        point = run.evaluate(lm, cases, out, request, progress=True)["solvers"]["mint"]
        found[f"mint, generalize {value:g}"] = point
    if options.solver:
        beside = run.evaluate(
            lm, cases, options.out / "baselines", replace(common, solvers=options.solver), progress=True
        )
        found |= beside["solvers"]
    return found


def bench(path: Path | None, name: str) -> dict[str, dict]:
    """Baselines of an earlier run on the same file of cases."""
    if path is None:
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    if name not in results:
        raise MintError(
            f"{path}: holds no results for '{name}', but for {', '.join(results)}; run the bench on it"
        )
    return {n: e for n, e in results[name]["solvers"].items() if n != "mint"}


def main(arguments: list[str] | None = None) -> int:
    """Measure and draw; 0, or 1 with one line on standard error."""
    options = parse(arguments)
    try:
        lm = load_lm(options.model, device=options.device, say=lambda s: print(s, file=sys.stderr))
        entries = measure(lm, options) | bench(options.bench, options.cases.stem)
        points = [p for p in (point(name, entry) for name, entry in entries.items()) if p is not None]
        figure = charts.scatter(
            points,
            "argmax tokens of other lines changed, %",
            "token accuracy behind rephrasings, %",
            themed=False,
        )
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_picture(figure, options.plot, force=True)
        values = {p.name: {"changed": p.x, "token_accuracy_behind_rephrasings": p.y} for p in points}
        write_file(options.plot.with_suffix(".json"), json.dumps(values, indent=1) + "\n", force=True)
    except MintError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.plot}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
