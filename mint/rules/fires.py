"""Where the edited neurons fire, token by token, and what one rule's edit does at another rule's prompts."""

from collections.abc import Sequence

import torch

from mint.guards import BATCH
from mint.model.hooks import record
from mint.model.lm import LM
from mint.patch import Patch
from mint.reference import passages
from mint.rules.figures import prepared, write_all
from mint.rules.repair import RuleRepair, RulesOutcome
from mint.solver.problem import changed

PROMPTS, PASSAGES, TOKENS = 6, 2, 160
"""Prompts of each kind, passages of reference text, and last tokens of each, that are shown."""
LEVELS = 4
"""Strengths that are told apart: 0 (silent) to 3 (at least three quarters of the strongest)."""


@torch.no_grad()
def fire_levels(lm: LM, patch: Patch, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per text and token, how strongly the strongest edited neuron fires, 0 to `LEVELS` - 1 of the largest seen."""
    strengths: list[torch.Tensor] = []
    layers = sorted({edit.layer for edit in patch.edits})
    with changed(lm, patch):
        for ids in texts:
            with record(lm, layers) as seen:
                lm.logits([ids], [[len(ids) - 1]])
            each = [
                seen[e.layer][0, :, e.index].float().abs() * e.after["out"].float().norm()
                for e in patch.edits
            ]
            strengths.append(torch.stack(each).amax(0).cpu())
    largest = max((float(s.max()) for s in strengths), default=0.0) or 1.0
    return [(s / largest * LEVELS).long().clamp(max=LEVELS - 1).tolist() for s in strengths]


def fires(lm: LM, one: RuleRepair, reference: Sequence[str] = ()) -> list[dict]:
    """Texts of a rule and of reference code, as tokens with the level at which the edit fires: for the report."""
    if one.patch is None:
        return []
    kinds = [
        ("unseen prompt", one.part("fault", "unseen")),
        ("near miss", one.part("near")),
        ("healthy", one.part("healthy")),
    ]
    texts = [(kind, lm.encode_prompt(x.row.prompt)) for kind, lines in kinds for x in lines[:PROMPTS]]
    others = passages(lm, reference)[:PASSAGES] if reference else []
    texts += [("reference code", list(ids)) for ids in others]
    levels = fire_levels(lm, one.patch, [ids for _, ids in texts])
    shown = []
    for (kind, ids), level in zip(texts, levels, strict=True):
        start = max(0, len(ids) - TOKENS)
        tokens = [
            (lm.continuation(ids[:i], [ids[i]]) if i else lm.decode(ids[:1]), level[i])
            for i in range(start, len(ids))
        ]
        shown.append({"kind": kind, "tokens": tokens})
    return shown


def matrix(lm: LM, outcome: RulesOutcome) -> list[list[float | None]]:
    """Entry [i][j]: share of rule j's unseen prompts where the edit of rule i alone changes what is written.

    At most `BATCH` prompts a rule; None where rule i has no edit, or rule j no unseen prompt.
    """
    prompts = []
    for one in outcome.repairs:
        rows, _ = prepared(lm, one.rule)
        prompts.append([p for p in rows if p.row.role == "fault" and p.row.split == "unseen"][:BATCH])
    clean = [write_all(lm, rows)[0] if rows else [] for rows in prompts]
    table: list[list[float | None]] = []
    for one in outcome.repairs:
        if one.patch is None:
            table.append([None] * len(prompts))
            continue
        with changed(lm, one.patch):
            after = [write_all(lm, rows)[0] if rows else [] for rows in prompts]
        table.append(
            [
                sum(a != b for a, b in zip(x, y, strict=True)) / len(x) if x else None
                for x, y in zip(clean, after, strict=True)
            ]
        )
    return table
