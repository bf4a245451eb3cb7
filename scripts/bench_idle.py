"""What it costs to overwrite an idle neuron, and how often independent repairs want the same one, by the size of the pool.

    python scripts/bench_idle.py [--model smollm2-135m] [--repairs 20] [--out results/idle.json]

A rewrite that is silent away from its prompt leaves what silencing the neuron leaves: each of the quietest neurons of the
solver's first layer is silenced alone, and the next-token distributions are compared on the lines that ship with mint.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from mint import patch as P
from mint.files import write_file
from mint.measure import specificity
from mint.model.loading import BUILTIN, load_lm
from mint.reference import sample_layers, statistics, written_energy
from mint.session import measured_sequences

POOLS = (384, 192, 96, 48, 16)
"""One in so many neurons of a layer."""


def clash(pool: int, repairs: int) -> float:
    """Chance that at least two of some repairs draw the same of `pool` neurons."""
    free = 1.0
    for drawn in range(repairs):
        free *= max(0.0, 1 - drawn / pool)
    return 1 - free


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--repairs", type=int, default=20)
    parser.add_argument(
        "--every", type=int, default=4, help="behind the first eight, measure one rank in so many"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lm = load_lm(options.model)
    layer = sample_layers(lm)[0]
    energy = written_energy(lm, statistics(lm), layer)
    order = energy.argsort()[: len(energy) // POOLS[-1]].tolist()
    clean = specificity.clean_outputs(lm, measured_sequences(lm), states=[layer])
    rows = []
    for rank, index in enumerate(order):
        if rank >= 8 and rank % options.every:
            continue
        silent = torch.zeros_like(lm.columns(layer)[index])
        with P.applied(lm, P.Patch((P.make_edit(lm, layer, index, {"out": silent}),), P.identity(lm))):
            effects = specificity.compare(lm, clean, since=layer)
        share = float(energy[index] / energy.sum())
        rows.append({"rank": rank, "index": index, "energy_share": share, "kl_mean": effects.kl_mean})
        rows[-1]["argmax_unchanged"] = effects.argmax_unchanged
        print(rows[-1], flush=True)
    table = []
    for share in POOLS:
        pool = max(4, len(energy) // share)
        inside = [r for r in rows if r["rank"] < pool]
        table.append(
            {
                "pool": f"1/{share}",
                "neurons": pool,
                "kl_median": median(r["kl_mean"] for r in inside),
                "kl_max": max(r["kl_mean"] for r in inside),
                "argmax_changed_max": 1 - min(r["argmax_unchanged"] for r in inside),
                "two_repairs_clash": 1 / pool,
                "ten_repairs_clash": clash(pool, 10),
                "many_repairs_clash": clash(pool, options.repairs),
            }
        )
        print(table[-1], flush=True)
    if options.out is not None:
        body = {"model": options.model, "layer": layer, "pools": table, "neurons": rows}
        write_file(options.out, json.dumps(body, indent=1) + "\n", force=True)


if __name__ == "__main__":
    main()
