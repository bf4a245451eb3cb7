"""All solvers on the same cases in one run: the README's table, as Markdown and as JSON.

    python scripts/bench_solvers.py --cases conala.jsonl --cases nl2bash.jsonl --limit 20 --out results/bench

Resumable: the same command goes on where it stopped. One block of the table for each file of cases.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mint.errors import MintError
from mint.evaluation import measuring, run, summary
from mint.evaluation.drift import Drift
from mint.evaluation.plan import Request
from mint.files import write_file
from mint.measure import judges
from mint.model.loading import BUILTIN, load_lm
from mint.solver import SOLVERS
from mint.solver.problem import Solver

RESPONSIBLE = "mint, responsible only"


def solvers_of(names: list[str] | None) -> dict[str, Solver]:
    """The solvers to run: those named, else all, and the main one held to the neurons that attribution blames."""
    if names:
        known = {**SOLVERS, RESPONSIBLE: responsible}
        return run.named_solvers(names, known)
    found = dict(SOLVERS)
    if "mint" in found:
        found = {"mint": found.pop("mint"), RESPONSIBLE: responsible, **found}
    return found


def responsible(lm, problem, settings):
    """What it costs to edit only neurons that are to blame, idle carriers left alone."""
    return SOLVERS["mint"](lm, problem, replace(settings, where="responsible"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--cases", type=Path, action="append", required=True, help="file of cases; may be repeated"
    )
    parser.add_argument("--solver", action="append", help="default: all")
    parser.add_argument("--limit", type=int, default=20, help="cases of each file (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequential", action="store_true", help="also repairs in a row")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, summaries and reports")
    parser.add_argument("--table", type=Path, default=Path("results/solvers.md"))
    return parser.parse_args(arguments)


def evaluate_file(
    lm, file: Path, solvers: dict[str, Solver], options: argparse.Namespace, say: Callable
) -> dict:
    """One file of cases with all solvers; the summary."""
    cases, skipped = measuring.read_cases(file)
    skipped += measuring.read_skipped(file.with_name(f"{file.stem}.skipped.jsonl"))
    request = Request(
        solvers=list(solvers),
        registry=solvers,
        drift=Drift() if options.sequential else None,
        seed=options.seed,
        limit=options.limit,
        tests=judges.load_tests_beside(file),
        skipped=skipped,
    )
    return run.evaluate(lm, cases, options.out / file.stem, request, progress=True, say=say)


def table(results: dict[str, dict]) -> str:
    """The Markdown page: a block for each file."""
    first = next(iter(results.values()))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    parts = [
        "# Solvers on the same cases, in one run\n",
        f"Model {first['model']['name']} ({first['model']['dtype']}), {machine}. Written by"
        " `scripts/bench_solvers.py`; what the columns mean is in [evaluation.md](evaluation.md).\n",
    ]
    for name, found in results.items():
        everyone = found["solvers"] | {f"{n} (control)": s for n, s in found["controls"].items()}
        parts.append(f"## {name}: {found['cases']} cases, seed {found['seed']}\n")
        parts.append(summary.table("solver", everyone, summary.COLUMNS))
        for solver, entry in found["solvers"].items():
            if entry.get("drift"):
                rows = {str(d["repairs"]): d for d in entry["drift"]}
                columns = summary.drift_columns(entry["drift"])
                columns = {k: v for k, v in columns.items() if k != "repairs"}
                parts += [f"Repairs in a row, {solver}:\n", summary.table("repairs", rows, columns)]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 0, or 1 with one line on standard error."""
    options = parse(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        solvers = solvers_of(options.solver)
        lm = load_lm(options.model, device=options.device, dtype=options.dtype, say=say)
        results = {f.stem: evaluate_file(lm, f, solvers, options, say) for f in options.cases}
        options.table.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.table, table(results), force=True)
        write_file(options.table.with_suffix(".json"), json.dumps(results, indent=1) + "\n", force=True)
    except MintError as error:
        say(str(error))
        return error.exit_code
    say(f"wrote {options.table} and {options.table.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
