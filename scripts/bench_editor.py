"""The editor's table: exact match, side effects, generalization and time of single repairs, and of repairs in a row.

    python -m tasks conala --data DIR --split test --out conala.jsonl
    python scripts/bench_editor.py --cases conala.jsonl --limit 100 --out results/editor.jsonl
    python scripts/bench_editor.py --cases conala.jsonl --limit 100 --sequential --out results/row.jsonl

Leaner than `mint evaluate`: one set of other lines for all cases, measured once, no controls, no report. Cases whose
target is longer than 40 tokens, or written already, are left out and counted. Each row is written as it is measured;
the same command goes on where it stopped. `changed` and `broken` are shares of the tokens of 24 other lines of the
same file (120 where repairs are in a row; none of them repaired), code is the held-out text that ships,
generalization is teacher-forced.
"""

import argparse
import json
import random
import statistics as stats
import time
from pathlib import Path

import torch

from mint import guards
from mint.case import Case, load_cases
from mint.measure.specificity import clean_outputs, compare, of_case, of_ids
from mint.model.lm import LM, Encoded
from mint.model.loading import BUILTIN, load_lm
from mint.model.margins import margins
from mint.patch import revert
from mint.reference import passages, sample_layers, statistics
from mint.session import Session, Wishes
from mint.solver import SOLVERS
from mint.solver.problem import Problem, Settings, changed

OTHERS = 24
OTHERS_IN_A_ROW = 120
LONGEST = 40
CHECKPOINTS = (1, 2, 5, 10, 20, 50, 100)


def chosen(lm: LM, path: str, limit: int, seed: int, in_a_row: bool) -> tuple[list, list, dict]:
    """Cases to repair, other cases to watch, and how many were left out and why.

    Single repairs: cases with rephrasings first. in_a_row: one model cannot write two targets behind the same prompt; the later of such cases is left out.
    """
    cases = load_cases(path)
    random.Random(seed).shuffle(cases)
    if not in_a_row:
        cases.sort(key=lambda c: not c.rephrasings)
    taken, left = [], {"too long": 0, "already right": 0, "same prompt": 0}
    prompts: set[str] = set()
    rest: list[tuple[Case, Encoded]] = []
    for case in cases:
        encoded = lm.encode(case)
        if len(encoded.target) > LONGEST:
            left["too long"] += 1
        elif len(taken) == limit:
            rest.append((case, encoded))
        elif float(margins(lm, encoded).min()) > 0:
            left["already right"] += 1
        elif in_a_row and case.prompt in prompts:
            left["same prompt"] += 1
        else:
            taken.append((case, encoded))
            prompts.add(case.prompt)
    targets = {c.target for c, _ in taken}
    others = [(c, e) for c, e in rest if c.prompt not in prompts and c.target not in targets]
    others = others[: OTHERS_IN_A_ROW if in_a_row else OTHERS]
    return taken, others, left


def rephrased(lm: LM, case: Case, encoded: Encoded) -> tuple[int, int] | None:
    """Right tokens and tokens of the target behind the case's rephrasings, teacher-forced; None without any."""
    if not case.rephrasings:
        return None
    prompts = [lm.encode_prompt(p) for p in case.rephrasings[:4]]
    ids = [[*p, *encoded.target] for p in prompts]
    n = len(encoded.target)
    found = lm.logits(ids, [list(range(len(p) - 1, len(p) - 1 + n)) for p in prompts]).argmax(1)
    return int((found == torch.tensor(encoded.target * len(prompts))).sum()), n * len(prompts)


def watch(lm: LM, others: list) -> tuple:
    """The clean model on other lines and on ordinary code."""
    lines = [of_case(encoded) for _, encoded in others]
    text = (Path(__file__).parent.parent / "mint/data/heldout/code.txt").read_text(encoding="utf-8")
    cut = [p.strip("\n") + "\n" for p in text.split("\n---\n")][:8]
    code = [of_ids(ids) for ids in passages(lm, cut)]
    return clean_outputs(lm, lines, states=sample_layers(lm)), clean_outputs(
        lm, code, states=sample_layers(lm)
    )


def side_effects(lm: LM, watched: tuple, since: int | None) -> dict:
    """Shares of changed and broken tokens, and KL, on the watched texts."""
    row = {}
    for name, before in zip(("lines", "code"), watched, strict=True):
        found = compare(lm, before, since=since)
        row[name] = {
            "changed": 1 - found.argmax_unchanged,
            "broken": found.argmax_broken,
            "kl": found.kl_mean,
            "perplexity_ratio": found.perplexity_ratio,
        }
    return row


def single(lm: LM, solver, settings: Settings, taken: list, watched: tuple, out: Path) -> list[dict]:
    """Every case repaired on the clean model."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {r["id"] for r in rows}
    for case, encoded in taken:
        if case.id in done:
            continue
        before = rephrased(lm, case, encoded)
        started = time.perf_counter()
        solution = solver(lm, Problem(case, encoded), settings)
        solved = time.perf_counter() - started
        with changed(lm, solution.change):
            started = time.perf_counter()
            written = lm.write(encoded, case)
            verified = time.perf_counter() - started
            edits = getattr(solution.change, "edits", None)
            since = min(e.layer for e in edits) if edits else None
            row = {
                "id": case.id,
                "exact": written == case.target,
                "reason": solution.reason,
                "margin_min": solution.margin_min,
                "neurons": solution.neurons,
                "solve_seconds": solved,
                "verify_seconds": verified,
                "tokens": len(encoded.target),
                "rephrased_before": before,
                "rephrased_after": rephrased(lm, case, encoded),
                "details": {k: solution.details.get(k) for k in ("iterations", "carriers", "norm")},
            }
            row |= side_effects(lm, watched, since) if solution.change is not None else {}
        with out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{len(rows)}/{len(taken)} exact {row['exact']} {solved:.2f} s", flush=True)
    return rows


def summary(rows: list[dict]) -> dict:
    """Means over cases; generalization over the cases that have rephrasings."""
    solved = [r for r in rows if "lines" in r]
    share = [
        ([*r["rephrased_before"], *r["rephrased_after"]]) for r in rows if r["rephrased_before"] is not None
    ]
    seconds = sorted(r["solve_seconds"] + r["verify_seconds"] for r in rows)
    neurons = [r["neurons"] for r in solved if r["neurons"] is not None]

    def mean(where: str, what: str) -> float:
        return stats.mean(r[where][what] for r in solved)

    return {
        "cases": len(rows),
        "exact": stats.mean(r["exact"] for r in rows),
        "neurons_median": stats.median(neurons) if neurons else None,
        "neurons_max": max(neurons, default=None),
        "lines": {k: mean("lines", k) for k in ("changed", "broken", "kl")},
        "code": {k: mean("code", k) for k in ("changed", "broken", "kl")},
        "rephrased_cases": len(share),
        "rephrased_before": stats.mean(a / b for a, b, *_ in share) if share else None,
        "rephrased_after": stats.mean(c / d for *_, c, d in share) if share else None,
        "seconds_median": stats.median(seconds),
        "seconds_p90": seconds[int(0.9 * (len(seconds) - 1))],
        "solve_seconds_median": stats.median(r["solve_seconds"] for r in rows),
    }


def in_a_row(lm: LM, options: argparse.Namespace, settings: Settings, taken: list, watched: tuple) -> None:
    """All cases repaired in one session, as `mint repair --cases` does; earlier ones generated again at checkpoints."""
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    wishes = Wishes(settings, options.solver, effects=False)
    failed = 0
    with Session(lm, wishes, SOLVERS[options.solver]) as session:
        session.admit([case for case, _ in taken])
        for number, (case, _) in enumerate(taken, start=1):
            repair = session.repair(case)
            failed += not repair.success
            print(f"{number} {repair.seconds:.2f} s {repair.reason or ''}", flush=True)
            if number not in CHECKPOINTS:
                continue
            held = guards.still_hold(lm, session.earlier)
            row = {
                "repairs": number,
                "failed": failed,
                "retained_exact_match": sum(held) / number,
                "lost": [g.name for g, holds in zip(session.earlier, held, strict=True) if not holds],
                "seconds": repair.seconds,
            }
            row |= side_effects(lm, watched, None)
            with options.out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        patches = session.stack.patches
        random.Random(0).shuffle(patches)
        for patch in patches:
            revert(lm, patch)
        patches.clear()
    same = all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    print(f"every patch reverted in shuffled order: every weight bit-identical: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver", default="mint", choices=sorted(SOLVERS))
    parser.add_argument("--generalize", type=float, default=0.5)
    parser.add_argument("--margin", type=float)
    parser.add_argument("--where", default="auto")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    lm = load_lm(options.model)
    statistics(lm)
    taken, others, left = chosen(lm, options.cases, options.limit, options.seed, options.sequential)
    print(f"{len(taken)} cases, {len(others)} other lines, left out: {left}", flush=True)
    settings = Settings(generalize=options.generalize, margin=options.margin, where=options.where)
    watched = watch(lm, others)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.sequential:
        in_a_row(lm, options, settings, taken, watched)
        return
    rows = single(lm, SOLVERS[options.solver], settings, taken, watched, options.out)
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
