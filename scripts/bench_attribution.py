"""How fast and how right attribution is, measured on the machine it runs on.

    python scripts/bench_attribution.py                                   ratios on the built-in model
    python scripts/bench_attribution.py --table --faults 30 --data DIR    every method against exact patching of all neurons

The table takes its faults from the CoNaLa rows of DIR/test.jsonl (settings were chosen on train rows) and patches every
neuron of each fault exactly: about a minute and a half a fault on one core. It appends one line a fault to
docs/attribution_table.jsonl and continues where it stopped; docs/attribution_table.md and .json are rewritten after
each fault.
"""

import argparse
import json
import os
import platform
import resource
import statistics as st
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mint.attribution import find_faults, linear_scores
from mint.attribution.exact import Run, exact_all, exact_scores, record_run
from mint.attribution.faults import Fault, differences
from mint.attribution.linear import forward_with_graph
from mint.attribution.methods import METHODS, estimate
from mint.attribution.rank import pearson, recall_at, screened, sign_agreement, spearman
from mint.attribution.references import draws
from mint.case import Case
from mint.model.hooks import override
from mint.model.lm import LM
from mint.model.loading import BUILTIN, load_lm
from mint.reference import statistics

DOCS = Path(__file__).resolve().parent.parent / "docs"
CASE = Case("bench", "# sort list `l` in descending order of its values\n", "l.sort(reverse=True)\n")
CHECKED = "linear + exact check"


def seconds_each(functions: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Wall seconds of each function, called in turn `repeats` times after one round to warm up.

    In turn, so that what else runs on the machine slows all of them alike.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return times


def median_ratio(times: list[float], plain: list[float]) -> float:
    """Median over rounds of one time over the other's of the same round."""
    return st.median(t / p for t, p in zip(times, plain, strict=True))


def graph_mb(lm: LM, ids: list[int], fault: Fault) -> float:
    """Memory that one linear pass keeps for its backward, weights excluded, in MB."""
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = forward_with_graph(lm, ids, [fault])
    del keep_alive
    return sum(kept.values()) / 2**20


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")),
            name,
        )
    load = os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, load {load:.1f}"


def speeds(lm: LM, repeats: int, sample: int) -> dict:
    """Cost of linear patching in plain forwards, and of exact patching of all neurons of one fault."""
    encoded = lm.encode(CASE)
    faults = find_faults(lm, encoded)
    fault = faults[0]
    ids = encoded.ids[: fault.position + 1]
    means = statistics(lm, say=print).neurons_mean

    @torch.no_grad()
    def plain() -> None:
        lm.logits([ids], [[len(ids) - 1]])

    out: dict = {"machine": machine(), "prompt_tokens": len(ids), "neurons": lm.layout.n_neurons}
    plains, linears = seconds_each([plain, lambda: linear_scores(lm, ids, [fault], means)], repeats)
    out["plain_forward_s"], out["linear_s"] = st.median(plains), st.median(linears)
    out["linear_over_plain"] = median_ratio(linears, plains)
    out["linear_graph_mb"] = graph_mb(lm, ids, fault)

    @torch.no_grad()
    def whole() -> None:
        lm.logits([encoded.ids], [encoded.positions])

    out["all_faults"] = len(faults)
    fulls, combined, each = seconds_each(
        [
            whole,
            lambda: linear_scores(lm, encoded, faults, means, combined=True),
            lambda: linear_scores(lm, encoded, faults, means),
        ],
        repeats,
    )
    out["combined_over_plain"], out["each_fault_over_plain"] = (
        median_ratio(t, fulls) for t in (combined, each)
    )

    run = record_run(lm, ids, fault)
    start = time.perf_counter()
    exact = exact_all(lm, run, means)
    out["exact_all_s"] = time.perf_counter() - start
    out |= naive_sample(lm, ids, fault, means, exact, sample)
    out["exact_speedup"] = out["naive_all_s_extrapolated"] / out["exact_all_s"]
    out["peak_mb"] = peak_mb()
    return out


@torch.no_grad()
def naive_sample(lm: LM, ids: list[int], fault: Fault, means: list, exact: list, sample: int) -> dict:
    """One full forward a neuron, on a random sample, extrapolated to all; checks the batched effects on the way."""
    generator = torch.Generator().manual_seed(0)

    def metric() -> float:
        return float(differences(lm.logits([ids], [[len(ids) - 1]]), [fault])[0])

    base, worst = metric(), 0.0
    start = time.perf_counter()
    for _ in range(sample):
        layer = int(torch.randint(lm.n_layers, (1,), generator=generator))
        index = int(torch.randint(lm.block(layer).d_ff, (1,), generator=generator))

        def change(n, layer=layer, index=index):
            n = n.clone()
            n[:, -1, index] = float(means[layer][index])
            return n

        with override(lm, {layer: change}):
            worst = max(worst, abs(metric() - base - float(exact[layer][index])))
    each = (time.perf_counter() - start) / sample
    return {
        "naive_sample": sample,
        "naive_each_s": each,
        "naive_all_s_extrapolated": each * lm.layout.n_neurons,
        "largest_difference": worst,
    }


# ---------------------------------------------------------------------- the table


def faulty_rows(lm: LM, folder: Path, count: int) -> list[tuple[str, Case]]:
    """The first single-line test rows whose target the model gets wrong, (id, case) each."""
    found = []
    for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("multiline"):
            continue
        case = Case(row["id"], f"# {row['intent']}\n", row["target"] + "\n")
        if find_faults(lm, lm.encode(case)):
            found.append((row["id"], case))
        if len(found) == count:
            break
    return found


def one_fault(lm: LM, case: Case, place: int, means: list) -> dict:
    """Every method against the exact effects of all neurons, for one fault of a case."""
    encoded = lm.encode(case)
    faults = find_faults(lm, encoded)
    fault = faults[
        place % len(faults)
    ]  # not always the first: later faults have more of the target before them
    run = record_run(lm, encoded.ids, fault)
    start = time.perf_counter()
    truth = torch.cat(exact_all(lm, run, means))
    seconds = time.perf_counter() - start
    plain = st.median(seconds_each([lambda: lm.logits([list(run.ids)], [[len(run.ids) - 1]])], 5)[0])
    row = {
        "id": case.id,
        "position": fault.position,
        "tokens": len(run.ids),
        "exact_s": seconds,
        "plain_s": plain,
        "no_op": run.no_op_error,
        "methods": {},
    }
    for name in METHODS:
        start = time.perf_counter()
        scores = torch.cat(estimate(lm, run, means, name))
        row["methods"][name] = figures(scores, truth) | {"forwards": (time.perf_counter() - start) / plain}
        if name == "linear":
            row["methods"][CHECKED] = checked(lm, run, scores, truth, means, plain)
    return row


def figures(scores: torch.Tensor, truth: torch.Tensor) -> dict:
    return {
        "spearman": spearman(scores, truth),
        "pearson": pearson(scores, truth),
        "sign": sign_agreement(scores, truth),
        "recall_at_10": recall_at(scores, truth, 10),
        "recall_at_50": recall_at(scores, truth, 50),
    }


def checked(lm: LM, run: Run, scores: torch.Tensor, truth: torch.Tensor, means: list, plain: float) -> dict:
    """The default of `attribute`: the linear screen with what it sends to the exact check replaced by exact effects."""
    start = time.perf_counter()
    columns = torch.cat([lm.columns(layer).float().norm(dim=1) for layer in range(lm.n_layers)])
    stream = torch.cat([run.hidden[i][0, -1].norm().expand(lm.block(i).d_ff) for i in range(lm.n_layers)])
    change = torch.cat([m - n[-1] for m, n in zip(means, run.neurons, strict=True)]).abs()
    places = screened(scores, change * columns / stream, 128)
    starts = torch.tensor([b.d_ff for b in lm.layout.blocks]).cumsum(0)
    layers = torch.searchsorted(starts, torch.tensor(places), right=True).tolist()
    neurons = [(at, p - (int(starts[at - 1]) if at else 0)) for at, p in zip(layers, places, strict=True)]
    mended = scores.clone()
    mended[places] = exact_scores(lm, run, neurons, means)
    # Only what was checked may enter the list.
    listed = torch.full_like(mended, float("inf"))
    listed[places] = mended[places]
    found = figures(mended, truth)
    found |= {f"recall_at_{k}": recall_at(listed, truth, k) for k in (10, 50)}
    return found | {"forwards": (time.perf_counter() - start) / plain}


def table(rows: list[dict], note: str) -> tuple[str, dict]:
    """Markdown and JSON of the means over faults, with the worst fault in brackets."""
    names = sorted(rows[0]["methods"], key=lambda n: -mean(rows, n, "spearman"))
    keys = ("spearman", "pearson", "sign", "recall_at_10", "recall_at_50")
    lines = [
        f"# Estimates against exact patching of every neuron\n\n{note}\n",
        "Mean over faults, the worst fault in brackets. Truth: exact effect of replacing each neuron at the fault's"
        " position by its mean on healthy text, all neurons, denoising. Recall: share of the 10 (50) guiltiest found."
        " Cost: plain forwards of the same tokens, own time of the estimate.\n",
        "| method | Spearman | Pearson | sign | recall@10 | recall@50 | cost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    summary: dict = {}
    for name in names:
        values = {k: [r["methods"][name][k] or 0.0 for r in rows] for k in keys}
        cost = st.median(r["methods"][name]["forwards"] for r in rows)
        cells = " | ".join(f"{st.mean(v):.3f} ({min(v):.3f})" for v in values.values())
        lines.append(f"| {name} | {cells} | {cost:.1f} |")
        summary[name] = {k: {"mean": st.mean(v), "worst": min(v)} for k, v in values.items()} | {
            "forwards": cost
        }
    exact = st.median(r["exact_s"] for r in rows)
    cost = st.median(r["exact_s"] / r["plain_s"] for r in rows)
    lines.append(f"| exact, all neurons | 1 | 1 | 1 | 1 | 1 | {cost:.0f} ({exact:.0f} s) |")
    summary["exact"] = {"seconds": exact, "forwards": cost}
    return "\n".join(lines) + "\n", {"faults": len(rows), "note": note, "methods": summary}


def mean(rows: list[dict], name: str, key: str) -> float:
    return st.mean(r["methods"][name][key] or 0.0 for r in rows)


def make_table(lm: LM, folder: Path, count: int, out: Path) -> None:
    """Add the faults that are missing to the JSON Lines file, and rewrite the table after each."""
    log = out.with_suffix(".jsonl")
    stats = statistics(lm, say=print)
    draws(lm, stats.key, say=print)
    rows = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    rows = [r for r in rows if r["statistics"] == stats.key]
    done = {r["id"] for r in rows}
    faults = faulty_rows(lm, folder, count)
    for place, (identity, case) in enumerate(faults):
        if identity in done:
            continue
        row = one_fault(lm, case, place, stats.neurons_mean)
        row["statistics"] = stats.key
        rows.append(row)
        with log.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        note = f"{len(rows)} faults of CoNaLa test rows, {lm.name.split('/')[-1]}, {lm.layout.n_neurons} neurons, {lm.dtype}; {machine()}."
        text, summary = table(rows, note)
        out.write_text(text)
        out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{len(rows)}/{len(faults)} {identity}: {row['exact_s']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=9, help="calls of which the median is taken")
    parser.add_argument("--sample", type=int, default=64, help="neurons patched by a full forward each")
    parser.add_argument("--table", action="store_true", help="compare the methods instead")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--data", type=Path, help="folder with CoNaLa's test.jsonl")
    parser.add_argument("--out", type=Path, default=DOCS / "attribution_table.md")
    parser.add_argument("--json", action="store_true", help="print the ratios as JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    lm = load_lm(options.model, device=options.device, dtype=options.dtype)
    if options.table:
        if options.data is None or not (options.data / "test.jsonl").exists():
            parser.error("--table needs --data, a folder that holds CoNaLa's test.jsonl")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        make_table(lm, options.data, options.faults, options.out)
        return
    found = speeds(lm, options.repeats, options.sample)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(found["machine"])
    print(
        f"linear patching, all {found['neurons']} neurons, {found['prompt_tokens']} tokens: {found['linear_s']:.3f} s ="
        f" {found['linear_over_plain']:.2f} plain forwards ({found['plain_forward_s']:.3f} s each),"
        f" {found['linear_graph_mb']:.0f} MB kept for the backward (peak of the process {found['peak_mb']:.0f} MB)"
    )
    print(
        f"all {found['all_faults']} faults of the case: {found['combined_over_plain']:.2f} forwards together,"
        f" {found['each_fault_over_plain']:.2f} one score each"
    )
    print(
        f"exact patching of all neurons of one fault: {found['exact_all_s']:.1f} s; one full forward a neuron:"
        f" {found['naive_all_s_extrapolated']:.0f} s (extrapolated from {found['naive_sample']} neurons),"
        f" {found['exact_speedup']:.0f} times more; largest difference {found['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
