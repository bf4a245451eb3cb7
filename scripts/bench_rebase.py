"""Patches carried over to newer versions of their model: what still applies, what has to be solved again, what moves.

    python scripts/bench_rebase.py --patches results/bank/*.safetensors --train mbpp-train.jsonl --out results/rebase

Versions: the model after some LoRA steps on --train (rows with `intent` and `target`), merged; the model in bfloat16; a GGUF
file of it (--gguf). Every patch is rebased on every version, and its cases are asked there by generating.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from mint import patch as P
from mint.errors import MintError
from mint.files import write_file
from mint.model.lm import LM
from mint.model.loading import BUILTIN, load_lm
from mint.patch.record import ask_patch
from mint.rebase import rebase


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--patches", type=Path, nargs="+", required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 80], help="versions by LoRA steps")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def tune(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Directories of the model after so many steps, merged; those that are there are not made again."""
    wanted = {steps: options.out / f"lora-{steps}" for steps in sorted(options.steps)}
    if not all((folder / "config.json").exists() for folder in wanted.values()):
        lm = load_lm(options.model)
        rows = [json.loads(line) for line in options.train.read_text(encoding="utf-8").splitlines()]
        texts = [f"# {row['intent']}\n{row['target']}\n" for row in rows]
        random.Random(options.seed).shuffle(texts)
        torch.manual_seed(options.seed)
        lm.model.requires_grad_(True)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(lm.model, config)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.rate)
        for step in range(1, max(wanted) + 1):
            ids = torch.tensor([lm.tokenizer(texts[step % len(texts)]).input_ids[:160]])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if step % 10 == 0:
                print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
            if step in wanted:
                kept = {n: p.detach().clone() for n, p in model.named_parameters()}
                model.merge_adapter()
                weights = {
                    n.removeprefix("base_model.model.").replace(".base_layer", ""): p
                    for n, p in model.state_dict().items()
                    if "lora_" not in n
                }
                lm.model.config.save_pretrained(wanted[step])
                unique = {n: p.contiguous() for n, p in weights.items() if n != "lm_head.weight"}
                save_file(unique, wanted[step] / "model.safetensors", {"format": "pt"})
                lm.tokenizer.save_pretrained(wanted[step])
                model.unmerge_adapter()
                with torch.no_grad():  # unmerging subtracts; the very bits come back
                    for name, parameter in model.named_parameters():
                        parameter.copy_(kept[name])
        del model, lm
        gc.collect()
    yield from ((f"{steps} LoRA steps, merged", folder) for steps, folder in wanted.items())


def versions(options: argparse.Namespace) -> Iterator[tuple[str, LM]]:
    if options.train is not None:
        for name, folder in tune(options):
            yield name, load_lm(str(folder))
    for dtype in options.dtypes:
        yield dtype, load_lm(options.model, dtype=dtype)
    if options.gguf is not None:
        yield options.gguf.name, load_lm(str(options.gguf))


def applies(lm: LM, patch: P.Patch) -> bool:
    try:
        P.check(lm, patch, "before")
        return True
    except MintError:
        return False


def carry(lm: LM, file: Path) -> dict:
    """One patch on one version."""
    patch = P.load(file)
    row = {"patch": file.stem, "written_before": all(a.holds for a in ask_patch(lm, patch))}
    row["applies_as_it_is"] = applies(lm, patch)
    if row["applies_as_it_is"]:
        with P.applied(lm, patch):
            row["holds_as_it_is"] = all(a.holds for a in ask_patch(lm, patch))
    started = time.perf_counter()
    done = rebase(lm, patch)
    row |= {"seconds": round(time.perf_counter() - started, 1), "success": done.outcome.success}
    row |= {"reason": done.outcome.reason, "needed": any(m["needed"] for m in done.moved)}
    row["stayed"] = all(
        len(m["stayed"]) == len(m["before"]) == len(m["after"]) for m in done.moved if m["needed"]
    )
    row["cosine"] = [c for m in done.moved for c in m["cosine"]]
    if done.outcome.patch is not None:
        with P.applied(lm, done.outcome.patch):
            row["holds"] = all(a.holds for a in ask_patch(lm, done.outcome.patch))
    return row


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    result = {}
    for name, lm in versions(options):
        rows = []
        for file in options.patches:
            rows.append(carry(lm, file))
            print(name, rows[-1], flush=True)
        needed = [r for r in rows if r["needed"]]
        cosines = [c for r in needed for c in r["cosine"]]
        result[name] = {
            "patches": len(rows),
            "written_without_a_patch": sum(r["written_before"] for r in rows),
            "apply_as_they_are": sum(r["applies_as_it_is"] for r in rows),
            "hold_as_they_are": sum(r.get("holds_as_it_is", False) for r in rows),
            "needed": len(needed),
            "carried_over": sum(r["success"] for r in needed),
            "generated": sum(r.get("holds", False) for r in needed),
            "same_neurons": sum(r["stayed"] for r in needed if r["success"]),
            "cosine_median": round(median(cosines), 4) if cosines else None,
            "cosine_min": min(cosines, default=None),
            "seconds_median": median(r["seconds"] for r in rows),
            "rows": rows,
        }
        print(name, {k: v for k, v in result[name].items() if k != "rows"}, flush=True)
        write_file(options.out / "rebase.json", json.dumps(result, indent=1) + "\n", force=True)


if __name__ == "__main__":
    main()
