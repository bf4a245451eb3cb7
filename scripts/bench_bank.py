"""Many repairs made without knowing of each other, in one bank: do they hold together, and who fires where?

    python scripts/bench_bank.py --cases examples/lines.jsonl --count 20 --out results/bank

Every case is repaired on the clean model, its patch goes into a bank (a rewrite that collides moves), and the bank is
checked by generating. Writes `bank.json`, `fires.svg`, `scale.svg` and the bank itself. Resumable: patches that are there
are not made again.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from mint import bank as B
from mint import patch as P
from mint.case import load_cases
from mint.evaluation import charts, strength
from mint.files import write_file
from mint.measure import specificity
from mint.model.loading import BUILTIN, load_lm
from mint.pictures import write_picture
from mint.reference import idle_neurons
from mint.session import Wishes, measured_sequences, repair
from mint.solver.solve import solve


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--cases", type=Path, default=Path("examples/lines.jsonl"))
    parser.add_argument("--count", type=int, default=20, help="patches to make")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def make(lm, options: argparse.Namespace) -> list[dict]:
    """One patch a case, each on the clean model; what became of each."""
    rows = []
    for case in load_cases(options.cases):
        file = options.out / f"{case.id}.safetensors"
        if not file.exists():
            started = time.perf_counter()
            done = repair(lm, [case], Wishes(effects=False), solve)
            row = {"id": case.id, "seconds": round(time.perf_counter() - started, 1), "reason": done.reason}
            row["note"] = done.repairs[0].note
            rows.append(row)
            if done.patch is None:
                print(row, flush=True)
                continue
            P.save(done.patch, file)
        patch = P.load(file)
        rows.append(
            {"id": case.id, "neurons": [e.named() for e in patch.edits], "bytes": file.stat().st_size}
        )
        print(rows[-1], flush=True)
        if sum("neurons" in row for row in rows) == options.count:
            break
    return rows


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    lm = load_lm(options.model)
    made = make(lm, options)
    bank, idle, moves = options.out / "bank", idle_neurons(lm), []
    known = {e.name for e in B.entries(bank)}
    for row in made:
        if "neurons" in row and row["id"] not in known:
            _, moved = B.add(bank, options.out / f"{row['id']}.safetensors", lm=lm, idle=idle)
            moves += [row["id"] + ": " + move.told for move in moved]
    found = B.patches(bank)
    sequences = measured_sequences(lm)
    checked = B.check(lm, found, [ids for ids, _, _ in sequences])
    names = list(found)
    values = [[*(checked.matrix[a][b] for b in names), checked.fires[a]["elsewhere"]] for a in names]
    grid = charts.grid(
        values, names, [*names, "code"], "prompts of", "patch that fires", "share of the prompts"
    )
    write_picture(grid, options.out / "fires.svg", force=True)
    whole = P.compose(list(found.values()))
    clean = specificity.clean_outputs(lm, sequences)
    with P.applied(lm, whole):
        effects = specificity.compare(lm, clean)
    result = {
        "model": options.model,
        "patches": len(found),
        "neurons": len(whole.edits),
        "moved": moves,
        "made": made,
        "hold": sum(a.holds for many in checked.answers.values() for a in many),
        "cases": sum(map(len, checked.answers.values())),
        "broken": checked.broken,
        "fires": checked.fires,
        "matrix": checked.matrix,
        "effects": {k: v for k, v in effects.as_dict().items() if k != "worst"},
    }
    told = ("patches", "neurons", "moved", "hold", "cases", "broken", "effects")
    write_file(options.out / "bank.json", json.dumps(result, indent=1) + "\n", force=True)
    print(json.dumps({k: result[k] for k in told}, indent=1), flush=True)
    print(f"{'patch':24}  own  others  lines of code  tokens of code")
    for name, shares in checked.fires.items():
        print(
            f"{name:24} {shares['own']:4.0%} {shares['others']:7.1%} {shares['elsewhere']:14.1%}"
            f" {shares['elsewhere_tokens']:15.2%}",
            flush=True,
        )
    scales = strength.over_scale(lm, whole, say=lambda text: print(text, flush=True))
    write_picture(strength.picture(scales), options.out / "scale.svg", force=True)
    result["scales"] = [asdict(one) for one in scales]
    write_file(options.out / "bank.json", json.dumps(result, indent=1) + "\n", force=True)
    for one in scales:
        print(one, flush=True)


if __name__ == "__main__":
    main()
