"""The neurons behind a habit: ranked over many prompts of a rule, with what each writes and when it fires.

python scripts/habit_neurons.py --model smollm2-135m --rule clock.jsonl --rule md5.jsonl --out small.json
python scripts/habit_neurons.py --tables small.json other.json      prints them for docs/attribution_rules.md

For each rule: the first fault of each learn prompt; the linear effect of replacing each neuron by its mean on reference text, at
the fault's own position (Syed et al. 2023, arXiv 2310.10348, section 2), averaged over the prompts; the first ones checked exactly,
alone and together. What a neuron writes is its column, in the direction of its activation at the faults, through the final norm's weights
and the unembedding (the logit lens); when it fires is read off reference text that no prompt is from. Nothing is edited.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mint.attribution import Fault, find_faults, linear_scores
from mint.attribution.exact import exact_scores, joint_effect, record_run
from mint.attribution.rank import logit_lens
from mint.errors import MintError
from mint.files import write_file
from mint.model.hooks import record
from mint.model.lm import LM, Encoded
from mint.model.loading import load_lm
from mint.reference import passages, reference_texts
from mint.rules.cut import Uncuttable, encode_row
from mint.rules.rule import Rule, load_rule

AROUND = 7
"""Tokens shown on either side of the one at which a neuron fires."""


class Reference:
    """Activations of all neurons on some reference text: mean, mean square, and the places of the largest."""

    def __init__(self, lm: LM, tokens: int):
        windows = passages(lm, reference_texts())
        step = max(1, sum(map(len, windows)) // tokens)
        self.texts = windows[::step]
        each: dict[int, list[Tensor]] = {layer: [] for layer in range(lm.n_layers)}
        with torch.no_grad():
            for ids in self.texts:
                with record(lm) as seen:
                    lm.logits([ids], [[len(ids) - 1]])
                for layer, n in seen.items():
                    each[layer].append(
                        n[0, 1:].to("cpu", torch.float16)
                    )  # the first token is an outlier of its own
        self.values = [torch.cat(parts) for parts in each.values()]  # a layer: [tokens, d_ff]
        self.mean = [n.float().mean(0) for n in self.values]
        self.square = [n.float().square().mean(0) for n in self.values]
        self.places = [(text, at) for text, ids in enumerate(self.texts) for at in range(1, len(ids))]

    def loudest(self, lm: LM, layer: int, index: int, sign: float, count: int) -> list[dict]:
        """The `count` passages in which the neuron's activation goes furthest in the direction `sign`, one place each."""
        n = self.values[layer][:, index].float() * sign
        found: list[dict] = []
        for place in n.argsort(descending=True).tolist():
            text, at = self.places[place]
            if all(f["passage"] != text for f in found):
                ids = self.texts[text]
                parts = ids[max(0, at - AROUND) : at], [ids[at]], ids[at + 1 : at + 1 + AROUND]
                before, token, after = (lm.decode(part) if part else "" for part in parts)
                found.append(
                    {
                        "passage": text,
                        "value": round(float(n[place]) * sign, 2),
                        "text": [before, token, after],
                    }
                )
            if len(found) == count:
                break
        return found


def faults_of(lm: LM, rule: Rule, limit: int) -> list[tuple[Encoded, Fault]]:
    """The first fault of each learn prompt at which this model is wrong."""
    found = []
    for row in rule.learn:
        try:
            encoded = encode_row(lm, row)[1].encoded
        except (Uncuttable, MintError):
            continue
        wrong = find_faults(lm, encoded)
        if wrong and wrong[0].position == encoded.positions[0]:
            found.append((encoded, wrong[0]))
        if len(found) == limit:
            break
    return found


def flat(parts: Sequence[Tensor]) -> Tensor:
    """One row of all neurons, [layers x d_ff]."""
    return torch.cat([p.reshape(-1).float().cpu() for p in parts])


def ranked(lm: LM, rule: Rule, reference: Reference, limit: int, top: int) -> dict:
    """The neurons behind one rule, as JSON values."""
    places = faults_of(lm, rule, limit)
    if not places:
        raise MintError(f"{rule.name}: {lm.name} is right at every learn prompt; there is nothing to explain")
    widths = [n.shape[1] for n in reference.values]
    owner = [(layer, index) for layer, width in enumerate(widths) for index in range(width)]
    scores, activations = [], []
    runs = []
    for encoded, fault in places:
        run = record_run(lm, encoded.ids, fault)
        runs.append(run)
        scores.append(flat(linear_scores(lm, run.ids, [fault], reference.mean).at_fault))
        activations.append(flat([n[-1] for n in run.neurons]))
    effect, n = torch.stack(scores), torch.stack(activations)  # [prompts, neurons]
    ten = effect.argsort(1)[:, :10]
    guilty = effect.mean(0).argsort()[:top].tolist()
    square = flat(reference.square)
    exact = torch.stack([exact_scores(lm, run, [owner[g] for g in guilty], reference.mean) for run in runs])
    together = [
        joint_effect(lm, run, [(*owner[g], float(reference.mean[owner[g][0]][owner[g][1]])) for g in guilty])
        for run in runs
    ]
    rows = []
    for column, g in enumerate(guilty):
        layer, index = owner[g]
        value = float(n[:, g].mean())
        rows.append(
            {
                "layer": layer,
                "index": index,
                "linear": round(float(effect[:, g].mean()), 3),
                "exact": round(float(exact[:, column].mean()), 3),
                "among_ten": int((ten == g).any(1).sum()),
                "value": round(value, 3),
                "selectivity": round(float(n[:, g].square().mean() / square[g].clamp_min(1e-12)), 1),
                "fires": reference.loudest(lm, layer, index, 1.0 if value >= 0 else -1.0, 3),
            }
        )
    for row, (up, down) in zip(rows, logit_lens(lm, rows), strict=True):
        row["promotes"], row["suppresses"] = up, down
    return {
        "rule": rule.name,
        "wrong": rule.learn[0].wrong,
        "right": rule.learn[0].target,
        "prompts": len(places),
        "difference": round(sum(f.logit_difference for _, f in places) / len(places), 2),
        "together": round(sum(together) / len(together), 2),
        "neurons": rows,
    }


def code(text: str) -> str:
    """Text as inline code in a cell of a Markdown table."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("|", "¦").replace("`", "'")
    return f"`{shown}`" if shown.strip() else f"`{shown.replace(' ', '␣')}`"


def tables(found: dict) -> str:
    """The figures of one model as Markdown."""
    lines = []
    for rule in found["rules"]:
        lines += [
            f"### {found['model']}: {code(rule['wrong'])} instead of {code(rule['right'])}",
            "",
            f"{rule['prompts']} prompts; on average the wrong token leads by {rule['difference']} logits, and by"
            f" {rule['difference'] + rule['together']:.2f} with the {len(rule['neurons'])} neurons below at their usual activation.",
            "",
            "| neuron | effect, exact (linear) | among the ten guiltiest | louder here | writes | against |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for n in rule["neurons"]:
            words = [" ".join(map(code, n[key])) for key in ("promotes", "suppresses")]
            lines.append(
                f"| {n['layer']}.{n['index']} | {n['exact']:+.2f} ({n['linear']:+.2f}) | {n['among_ten']} of {rule['prompts']} |"
                f" {n['selectivity']:.0f} x | {words[0]} | {words[1]} |"
            )
        lines += ["", "Where they fire most on reference text:", ""]
        for n in rule["neurons"][:4]:
            places = [
                f"{code(before)} **{code(token)}** {code(after)}"
                for before, token, after in (f["text"] for f in n["fires"])
            ]
            lines += [f"- **{n['layer']}.{n['index']}**", *(f"    - {place}" for place in places)]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the figures of one model and several rules."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", type=Path, metavar="JSON", help="print what was measured")
    parser.add_argument("--model")
    parser.add_argument("--rule", action="append", default=[], type=Path)
    parser.add_argument("--prompts", type=int, default=12, help="most learn prompts of a rule")
    parser.add_argument("--top", type=int, default=6, help="neurons listed")
    parser.add_argument("--tokens", type=int, default=2000, help="of reference text, about")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.tables:
        print("\n".join(tables(json.loads(p.read_text(encoding="utf-8"))) for p in asked.tables))
        return
    if not (asked.model and asked.rule and asked.out):
        parser.error("give --model, --rule and --out, or --tables")
    lm = load_lm(asked.model)
    reference = Reference(lm, asked.tokens)
    rules = []
    for path in asked.rule:
        rules.append(ranked(lm, load_rule(path), reference, asked.prompts, asked.top))
        print(json.dumps({k: v for k, v in rules[-1].items() if k != "neurons"}), flush=True)
    found = {
        "model": Path(lm.name).name,
        "neurons": sum(n.shape[1] for n in reference.values),
        "reference_tokens": len(reference.places),
        "rules": rules,
    }
    write_file(asked.out, json.dumps(found, indent=1) + "\n", force=True)


if __name__ == "__main__":
    main()
