"""Give a rewritten idle neuron another place: which idle neuron carries a repair is arbitrary, so patches that were made
without knowing of each other, and took the same one, can still be put together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mint.errors import PatchError
from mint.model.lm import LM
from mint.patch.edit import NeuronEdit, Patch, make_edit, read_neuron, same_bits


@dataclass(frozen=True)
class Move:
    """A neuron that got another place."""

    patch: int
    """Which of the patches, from 0."""
    layer: int
    index: int
    to: int


def collisions(patches: Sequence[Patch]) -> list[tuple[int, NeuronEdit]]:
    """(patch number, edit) of every edit whose neuron an earlier patch has changed from the same start."""
    seen: dict[tuple[int, int], NeuronEdit] = {}
    found = []
    for number, patch in enumerate(patches):
        for edit in patch.edits:
            place = (edit.layer, edit.index)
            earlier = seen.get(place)
            if earlier is not None and not _follows(earlier, edit):
                found.append((number, edit))
            else:
                seen[place] = edit
    return found


def _follows(earlier: NeuronEdit, later: NeuronEdit) -> bool:
    """Whether the later edit starts where the earlier ends, as repairs made in a row do."""
    return all(r not in earlier.after or same_bits(earlier.after[r], v) for r, v in later.before.items())


def spare_of(patch: Patch) -> list[tuple[int, int]]:
    """Neurons (layer, index) that a patch names as other carriers; [] where it names none that make sense."""
    listed = patch.info.get("spare")
    pairs = listed if isinstance(listed, list) else []
    return [
        (p[0], p[1])
        for p in pairs
        if isinstance(p, list) and len(p) == 2 and all(type(n) is int and n >= 0 for n in p)
    ]


def relocate(lm: LM, patches: Sequence[Patch]) -> tuple[list[Patch], list[Move]]:
    """The patches, with every rewrite that collides with an earlier patch's moved to a neuron that its patch names.

    lm: the model without any of them; it is read, not changed. Raises `PatchError` for a collision that is none of
    place: two value edits of one neuron, or a rewrite whose patch names no other neuron that is free.
    """
    taken = {(e.layer, e.index) for p in patches for e in p.edits}
    clashes = {(n, e.layer, e.index) for n, e in collisions(patches)}
    known = list(dict.fromkeys(place for p in patches for place in spare_of(p)))
    moved, moves = [], []
    for number, patch in enumerate(patches):
        edits = []
        for edit in patch.edits:
            if (number, edit.layer, edit.index) not in clashes:
                edits.append(edit)
                continue
            free = [
                i
                for layer, i in [*spare_of(patch), *known]
                if layer == edit.layer and (layer, i) not in taken and i < lm.block(layer).d_ff
            ]
            if edit.kind != "rewrite" or not free:
                raise PatchError(_why(edit, number))
            taken.add((edit.layer, free[0]))
            edits.append(make_edit(lm, edit.layer, free[0], _wanted(lm, edit, free[0])))
            moves.append(Move(number, edit.layer, edit.index, free[0]))
        new = {(m.layer, m.index): m.to for m in moves if m.patch == number}
        moved.append(replace(patch, edits=tuple(edits), info=_renamed(patch.info, new)) if new else patch)
    return moved, moves


def _wanted(lm: LM, edit: NeuronEdit, index: int) -> dict:
    """What the new neuron must hold. Its biases change only where the old one's had other values."""
    now = read_neuron(lm, edit.layer, index)
    old = read_neuron(lm, edit.layer, edit.index)
    kept = {r: edit.after.get(r, v) for r, v in old.items() if r.endswith("_bias")}
    rows = {r: v for r, v in edit.after.items() if not r.endswith("_bias")}
    return rows | {r: v for r, v in kept.items() if not same_bits(now[r], v)}


def _why(edit: NeuronEdit, number: int) -> str:
    if edit.kind == "value":
        return (
            f"{edit.where} is edited by two patches, and patch {number + 1} changes what it writes where it fires anyway:"
            " that cannot move to another neuron; make the second repair on the model with the first patch applied"
        )
    return (
        f"{edit.where} is edited by two patches, and patch {number + 1} names no free neuron to move to; make the second"
        " repair on the model with the first patch applied (mint repair --patch)"
    )


def _renamed(info: dict, new: dict[tuple[int, int], int]) -> dict:
    """The record with the new places of its neurons."""

    def place(item: object) -> object:
        if isinstance(item, dict) and (item.get("layer"), item.get("index")) in new:
            return item | {"index": new[item["layer"], item["index"]]}
        return item

    found = dict(info)
    for kind in ("cases", "rules"):
        if isinstance(info.get(kind), list):
            found[kind] = [
                c | {"neurons": [place(n) for n in c["neurons"]]}
                if isinstance(c, dict) and isinstance(c.get("neurons"), list)
                else c
                for c in info[kind]
            ]
    return found
