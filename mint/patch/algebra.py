"""Patches from patches: compose, scale. Knows nothing about models or files."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mint.errors import PatchError
from mint.patch.edit import NeuronEdit, Patch, same_bits, versions


def compose(patches: Sequence[Patch]) -> Patch:
    """One patch that does what applying the patches in order does.

    A neuron edited twice is merged if the later edit starts where the earlier ends; else `PatchError` names it.
    """
    merged: dict[tuple[int, int, int], NeuronEdit] = {}
    first = patches[0]
    for number, patch in enumerate(patches, start=1):
        for key in ("fingerprint", "tokenizer", "dtype"):
            if patch.base.get(key) != first.base.get(key):
                raise PatchError(
                    f"patch {number} was made for another {'model' if key == 'fingerprint' else key} than patch 1"
                    f" ({patch.base.get(key)} and {first.base.get(key)}); compose patches of one model"
                )
        for edit in patch.edits:
            key = edit.place
            merged[key] = _chain(merged[key], edit) if key in merged else edit
    infos = [p.info for p in patches]
    rules = [r for i in infos for r in i.get("rules") or []]
    info = ({"rules": rules} if rules else {}) | {
        "cases": [c for i in infos for c in i.get("cases") or []],
        "spare": [s for i in infos for s in i.get("spare") or []],
        "composed_from": infos,
        "versions": versions(),
    }
    return Patch(tuple(merged[k] for k in sorted(merged)), first.base, info)


def _chain(earlier: NeuronEdit, later: NeuronEdit) -> NeuronEdit:
    before, after = dict(earlier.before), dict(earlier.after)
    for role, value in later.before.items():
        if role in after and not same_bits(after[role], value):
            raise PatchError(
                f"{earlier.where} is edited by two patches, and the later does not start where the earlier ends; give"
                " --model so that idle neurons can move, or make the second repair on the model with the first applied"
            )
        before.setdefault(role, value)
    after.update(later.after)
    kind = "rewrite" if "rewrite" in (earlier.kind, later.kind) else "value"
    return NeuronEdit(earlier.layer, earlier.index, kind, before, after, earlier.expert)


def scale(patch: Patch, factor: float) -> Patch:
    """The same patch with its effect scaled: 0 changes nothing, 1 is the patch, 2 pushes twice as hard.

    A value edit scales the change of the column. A rewrite keeps when the neuron fires and scales what it writes;
    at 0 the old neuron stays.
    """
    if factor != factor or abs(factor) == float("inf"):
        raise PatchError(f"the factor must be a finite number, found {factor}")
    return replace(
        patch,
        edits=tuple(_scaled(edit, factor) for edit in patch.edits),
        info=patch.info | {"scaled": patch.info.get("scaled", 1.0) * factor},
    )


def _scaled(edit: NeuronEdit, factor: float) -> NeuronEdit:
    if factor == 0:
        return replace(edit, after=dict(edit.before))
    if factor == 1:
        return edit
    after = dict(edit.after)
    old, new = edit.before["out"], edit.after["out"]
    start = old.float() if edit.kind == "value" else torch.zeros_like(old, dtype=torch.float32)
    after["out"] = (start + factor * (new.float() - start)).to(new.dtype)
    if not torch.isfinite(after["out"]).all():
        raise PatchError(f"{edit.where}: factor {factor} overflows {new.dtype}; use a smaller factor")
    return replace(edit, after=after)
