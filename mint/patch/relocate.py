"""Give a rewritten idle neuron another place: which idle neuron carries a repair is arbitrary, so patches that were made
without knowing of each other, and took the same one, can still be put together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mint.errors import PatchError
from mint.model.lm import LM
from mint.patch.edit import NeuronEdit, Patch, make_edit, read_neuron, same_bits
from mint.patch.record import place_of


@dataclass(frozen=True)
class Move:
    """A neuron that got another place."""

    patch: int
    """Which of the patches, from 0."""
    layer: int
    index: int
    to: int
    expert: int | None = None
    """Of a routed expert: its number, before and after."""

    @property
    def told(self) -> str:
        """One line for people."""
        owner = "" if self.expert is None else f", expert {self.expert}"
        return f"layer {self.layer}{owner}, neuron {self.index} moved to neuron {self.to}"


def collisions(patches: Sequence[Patch]) -> list[tuple[int, NeuronEdit]]:
    """(patch number, edit) of every edit whose neuron an earlier patch has changed from the same start."""
    seen: dict[tuple[int, int, int], NeuronEdit] = {}
    found = []
    for number, patch in enumerate(patches):
        for edit in patch.edits:
            earlier = seen.get(edit.place)
            if earlier is not None and not _follows(earlier, edit):
                found.append((number, edit))
            else:
                seen[edit.place] = edit
    return found


def _follows(earlier: NeuronEdit, later: NeuronEdit) -> bool:
    """Whether the later edit starts where the earlier ends, as repairs made in a row do."""
    return all(r not in earlier.after or same_bits(earlier.after[r], v) for r, v in later.before.items())


def spare_of(patch: Patch) -> list[tuple[int, int, int]]:
    """Places (layer, expert or -1, index) that a patch names as other carriers; [] where it names none that make sense.

    A patch lists [layer, index], or [layer, index, expert] for neurons of a routed expert.
    """
    listed = patch.info.get("spare")
    found = listed if isinstance(listed, list) else []
    usable = [
        s
        for s in found
        if isinstance(s, list) and len(s) in (2, 3) and all(type(n) is int and n >= 0 for n in s)
    ]
    return [(s[0], s[2] if len(s) == 3 else -1, s[1]) for s in usable]


def relocate(
    lm: LM, patches: Sequence[Patch], idle: Callable[[int], Sequence[int]] = lambda layer: ()
) -> tuple[list[Patch], list[Move]]:
    """The patches, with every rewrite that collides with an earlier patch's moved to a neuron that its patch names.

    lm: the model without any of them; it is read, not changed. idle: layer -> idle neurons of the block that every token
    passes, asked only where no patch names a free one. Raises `PatchError` for a collision that is none of place: two value
    edits of one neuron, or a rewrite for which no other neuron is known.
    """
    taken = {e.place for p in patches for e in p.edits}
    clashes = {(n, e.place) for n, e in collisions(patches)}
    known = list(dict.fromkeys(place for p in patches for place in spare_of(p)))
    moved, moves = [], []
    for number, patch in enumerate(patches):
        edits: list[NeuronEdit] = []
        new: dict[tuple[int, int, int], int] = {}
        for edit in patch.edits:
            if (number, edit.place) not in clashes:
                edits.append(edit)
                continue
            to = None if edit.kind != "rewrite" else _free(lm, edit, [*spare_of(patch), *known], taken, idle)
            if to is None:
                raise PatchError(_why(edit, number))
            taken.add((*edit.place[:2], to))
            new[edit.place] = to
            edits.append(make_edit(lm, edit.layer, to, _wanted(lm, edit, to), edit.expert))
            moves.append(Move(number, edit.layer, edit.index, to, edit.expert))
        moved.append(replace(patch, edits=tuple(edits), info=_renamed(patch.info, new)) if new else patch)
    return moved, moves


def _free(
    lm: LM,
    edit: NeuronEdit,
    named: Sequence[tuple[int, int, int]],
    taken: set[tuple[int, int, int]],
    idle: Callable[[int], Sequence[int]],
) -> int | None:
    """The first neuron beside that of an edit (same layer, same expert) that nobody has taken."""
    size = lm.block(edit.layer).d_ff if edit.expert is None else lm.layout.experts[edit.layer].d_ff
    owner = edit.place[:2]
    for place in named:
        if place[:2] == owner and place not in taken and place[2] < size:
            return place[2]
    quiet = idle(edit.layer) if edit.expert is None else ()
    return next((index for index in quiet if (*owner, index) not in taken), None)


def _wanted(lm: LM, edit: NeuronEdit, index: int) -> dict:
    """What the new neuron must hold. Its biases change only where the old one's had other values."""
    now = read_neuron(lm, edit.layer, index, expert=edit.expert)
    old = read_neuron(lm, edit.layer, edit.index, expert=edit.expert)
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
        f"{edit.where} is edited by two patches, and no other neuron is known for patch {number + 1} to move to; make the second"
        " repair on the model with the first patch applied (mint repair --patch)"
    )


def _renamed(info: dict, new: dict[tuple[int, int, int], int]) -> dict:
    """The record with the new places of its neurons."""

    def place(item: object) -> object:
        found = place_of(item)
        return item | {"index": new[found]} if isinstance(item, dict) and found in new else item

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
