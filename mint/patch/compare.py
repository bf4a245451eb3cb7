"""Patches against each other, and a patch out of two saved models."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mint.errors import PatchError
from mint.model.lm import LM
from mint.patch.edit import NeuronEdit, Patch, identity, read_neuron, same_bits, versions
from mint.patch.names import describe
from mint.patch.record import places_named

MOST = 1000
"""Neurons that two models may differ in and still be told apart by a patch."""


def diff(one: Patch, other: Patch) -> list[dict]:
    """What two patches change differently, a row a neuron: `only` (1 or 2), or how far apart they are where both change it."""
    mine, theirs = ({e.place: e for e in p.edits} for p in (one, other))
    rows = []
    for place in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(place), theirs.get(place)
        row: dict = {"layer": place[0], "index": place[2]} | ({"expert": place[1]} if place[1] >= 0 else {})
        if b is None:
            rows.append(row | {"only": 1, "kind": mine[place].kind})
            continue
        if a is None:
            rows.append(row | {"only": 2, "kind": b.kind})
            continue
        same = a.after.keys() == b.after.keys() and all(same_bits(a.after[r], b.after[r]) for r in a.after)
        row |= {"only": None, "kind": a.kind, "same": same, "same_start": _same_start(a, b)}
        if a.after["out"].shape == b.after["out"].shape:
            x, y = a.after["out"].float(), b.after["out"].float()
            row["distance"] = float((x - y).norm())
            row["cosine"] = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
        rows.append(row)
    return rows


def _same_start(a: NeuronEdit, b: NeuronEdit) -> bool:
    return all(same_bits(a.before[r], b.before[r]) for r in a.before.keys() & b.before.keys())


def split(patch: Patch) -> list[Patch]:
    """One patch a recorded case or rule, with the neurons that its record names.

    Raises `PatchError` where a neuron belongs to two of them or to none: those cannot be taken apart.
    """
    kinds = [(k, c) for k in ("cases", "rules") for c in patch.info.get(k) or [] if isinstance(c, dict)]
    cases = [c for _, c in kinds]
    owners: dict[tuple[int, int, int], list[int]] = {e.place: [] for e in patch.edits}
    for number, case in enumerate(cases):
        for place in places_named(case):
            if place in owners:
                owners[place].append(number)
    for edit in patch.edits:
        who = owners[edit.place]
        if len(who) != 1:
            told = (
                "no case"
                if not who
                else " and ".join(repr(cases[n].get("id", cases[n].get("name"))) for n in who)
            )
            raise PatchError(
                f"{edit.where} belongs to {told}, so the patch cannot be taken apart there; keep it whole"
            )
    parts = []
    for number, (kind, case) in enumerate(kinds):
        edits = tuple(e for e in patch.edits if owners[e.place] == [number])
        if edits:
            dropped = ("cases", "rules", "composed_from", "measured")
            kept = {k: v for k, v in patch.info.items() if k not in dropped}
            parts.append(replace(patch, edits=edits, info=kept | {kind: [case]}))
    if not parts:
        raise PatchError(
            "the patch records no cases and no rules, so there is nothing to take it apart by; keep it whole"
        )
    return parts


def between(before: LM, after: LM) -> Patch:
    """The patch that turns one loaded model into the other.

    Raises `PatchError` if they differ in nothing, in something else than neurons, or in more than `MOST` of them.
    """
    if before.fingerprint != after.fingerprint or before.dtype != after.dtype:
        raise PatchError(
            f"{before.name} and {after.name} differ in their embeddings, shapes or dtypes, so one is no patched copy of the"
            " other; give two copies of one model"
        )
    found: dict[tuple[int, int, int], None] = {}
    inside: set[str] = set()
    routed = [e.block(number) for e in before.layout.experts.values() for number in range(e.count)]
    for block in [*(b for b in before.layout.blocks if b.expert is None), *routed]:
        for role, where in block.slices(0).items():
            inside.add(where.parameter)
            a, b = (lm.parameter(where.parameter).data for lm in (before, after))
            if where.expert is not None:
                a, b = a[where.expert], b[where.expert]
            moved = (a != b) if a.dim() == 1 else (a != b).any(1 - where.axis)
            first, step = where.index, block.slices(1)[role].index - where.index
            for unit in moved.nonzero().flatten().tolist():
                index, rest = divmod(unit - first, step)
                if not rest and 0 <= index < block.d_ff:
                    found[block.layer, -1 if block.expert is None else block.expert, index] = None
    others = [
        n
        for n, p in before.model.named_parameters()
        if n not in inside and not torch.equal(p, after.parameter(n))
    ]
    if others:
        raise PatchError(
            f"{before.name} and {after.name} also differ in '{others[0]}', which belongs to no neuron, so no patch can say"
            " how; this is another training, not a patch"
        )
    if not found or len(found) > MOST:
        raise PatchError(
            f"{before.name} and {after.name} differ in {len(found)} neurons; a patch needs 1 to {MOST}, give two copies of"
            " one model, one of them patched"
        )
    edits = tuple(_edit(before, after, *place) for place in sorted(found))
    base = identity(before) | {"layout": describe(before)}
    return Patch(
        edits, base, {"cases": [], "recovered_from": [before.name, after.name], "versions": versions()}
    )


def _edit(before: LM, after: LM, layer: int, number: int, index: int) -> NeuronEdit:
    expert = None if number < 0 else number
    old, new = (read_neuron(lm, layer, index, expert=expert) for lm in (before, after))
    if all(same_bits(old[r], new[r]) for r in old if r != "out"):
        return NeuronEdit(layer, index, "value", {"out": old["out"]}, {"out": new["out"]}, expert)
    return NeuronEdit(layer, index, "rewrite", old, new, expert)


def names_of(parts: Sequence[Patch], folder: Path) -> list[Path]:
    """File names for the parts of a patch, by their cases' ids."""
    ids = [str(p.info["cases"][0].get("id") or n) for n, p in enumerate(parts, start=1)]
    return [
        folder / f"{n:02d}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', i)[:60]}.safetensors"
        for n, i in enumerate(ids, start=1)
    ]
