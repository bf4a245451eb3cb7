"""A bank: a directory of patches with an index, each of them also a regression test.

The index names the patches in the order in which they were added; the files beside it are ordinary patch files. Knows
nothing about the command line.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mint.errors import PatchError
from mint.files import write_file
from mint.model.experts import focused
from mint.model.hooks import record as record_neurons
from mint.model.lm import LM
from mint.patch import Patch, applied, compose, load, save
from mint.patch.provenance import patch_id
from mint.patch.record import Answer, ask_patch, contradictions, encoded, promised
from mint.patch.relocate import Move, collisions, relocate

INDEX = "mint_bank.json"
FIRES = 0.02
"""A neuron fires where its activation exceeds this share of its largest one at the repaired prompts."""


@dataclass(frozen=True)
class Entry:
    """One patch of a bank."""

    name: str
    file: str
    sha256: str
    cases: int
    note: str = ""


def entries(bank: str | Path) -> list[Entry]:
    """The patches of a bank, oldest first; empty for a directory without an index. Raises `PatchError` if damaged."""
    path = Path(bank) / INDEX
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["patches"]
        found = [Entry(**item) for item in listed]
        if any(Path(e.file).name != e.file for e in found):
            raise ValueError("an entry names a file elsewhere")
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{path} cannot be read ({error}); restore it, or add the patches again") from None


def patches(bank: str | Path, names: Sequence[str] = ()) -> dict[str, Patch]:
    """Name -> patch, of all or the named ones, in the bank's order. Raises `PatchError` for unknown or changed files."""
    listed = {e.name: e for e in entries(bank)}
    if unknown := [n for n in names if n not in listed]:
        raise PatchError(f"{bank} has no patch '{unknown[0]}'; it has {', '.join(listed) or 'none'}")
    if not listed:
        raise PatchError(f"{bank} holds no patches; add one with `mint bank add {bank} PATCH`")
    found = {}
    for name, entry in listed.items():
        if names and name not in names:
            continue
        found[name] = load(Path(bank) / entry.file)
        if patch_id(found[name]) != entry.sha256:
            raise PatchError(
                f"{Path(bank) / entry.file} is not the file that was added; restore it, or add it again"
            )
    return found


def add(
    bank: str | Path,
    file: str | Path,
    name: str | None = None,
    note: str = "",
    lm: LM | None = None,
    idle: Callable[[int], Sequence[int]] = lambda layer: (),
) -> tuple[Entry, list[Move]]:
    """Copy a patch file into a bank (made where there is none); returns its entry, and what moved. name: default the file's.

    lm: the model without any patch; with it, a rewrite that took the same idle neuron as an earlier one moves to another,
    so that the patches of a bank always go together. idle: see `relocate`. Raises `PatchError` if the name or the patch is there already, if its
    cases contradict those of another, or if it collides.
    """
    bank, file = Path(bank), Path(file)
    patch = load(file)
    listed = entries(bank)
    wanted = re.sub(r"[^\w.-]+", "-", name or file.stem).strip("-.") or "patch"
    if any(e.name == wanted for e in listed):
        raise PatchError(f"{bank} has a patch '{wanted}' already; give another --name")
    if same := [e.name for e in listed if e.sha256 == patch_id(patch)]:
        raise PatchError(f"{bank} holds this very patch already, as '{same[0]}'")
    if clash := contradictions([*(patches(bank).values() if listed else ()), patch]):
        one, other = clash[0]
        raise PatchError(
            f"cases '{one.id}' and '{other.id}' contradict each other: behind the same prompt they want {one.target!r} and"
            f" {other.target!r}; leave one of them out"
        )
    before = list(patches(bank).values()) if listed else []
    moves: list[Move] = []
    if lm is not None:
        (*_, patch), moves = relocate(lm, [*before, patch], idle)
    elif collisions([*before, patch]):
        raise PatchError(
            f"{file} changes a neuron that another patch of {bank} changes; add it with --model, so that it can move to"
            " another"
        )
    try:
        bank.mkdir(exist_ok=True)
        entry = Entry(wanted, f"{wanted}.safetensors", patch_id(patch), len(promised(patch)), note)
        save(patch, bank / entry.file, force=True)
    except OSError as error:
        raise PatchError(f"cannot write {bank} ({error.strerror}); nothing was added") from None
    body = {"format": 1, "patches": [asdict(e) for e in [*listed, entry]]}
    write_file(bank / INDEX, json.dumps(body, indent=2) + "\n", force=True)
    return entry, moves


@dataclass(frozen=True)
class Checked:
    """What became of the cases of each patch on a model that holds all of them."""

    answers: dict[str, list[Answer]]
    fires: dict[str, dict[str, float]]
    """Patch -> where (`own`, `others`, `elsewhere`) -> share of prompts or texts at which one of its neurons fires."""

    @property
    def broken(self) -> list[str]:
        return [f"{n}: {a.case.id}" for n, found in self.answers.items() for a in found if not a.holds]


def check(lm: LM, found: dict[str, Patch], elsewhere: Sequence[Sequence[int]] = ()) -> Checked:
    """Run every case of every patch on the model with all of them in.

    lm: the model without them; as before afterwards. elsewhere: token ids of ordinary code, for how often each fires.
    """
    with applied(lm, compose(list(found.values()))):
        answers = {n: ask_patch(lm, p) for n, p in found.items()}
        own = {n: [e.ids for e in encoded(lm, p)] for n, p in found.items()}
        fires = {n: _fires(_watched(lm, p), n, p, own, elsewhere) for n, p in found.items()}
    return Checked(answers, fires)


def _watched(lm: LM, patch: Patch) -> LM:
    """The model with the experts that a patch edits as blocks of their own; a dense model as it is."""
    chosen: dict[int, set[int]] = {}
    for edit in patch.edits:
        if edit.expert is not None:
            chosen.setdefault(edit.layer, set()).add(edit.expert)
    return focused(lm, {layer: sorted(numbers) for layer, numbers in chosen.items()})


@torch.no_grad()
def _loudest(lm: LM, patch: Patch, ids: Sequence[int]) -> dict[tuple[int, int, int], float]:
    """Largest activation of each of a patch's neurons over a text."""
    layers = sorted({e.layer for e in patch.edits})
    numbers = {e.place: lm.number(e.layer, e.index, e.expert) for e in patch.edits}
    with record_neurons(lm, layers) as seen:
        lm.logits([list(ids)], [[0]])
    return {place: float(seen[place[0]][0, :, number].abs().max()) for place, number in numbers.items()}


def _fires(
    lm: LM, name: str, patch: Patch, own: dict, elsewhere: Sequence[Sequence[int]]
) -> dict[str, float]:
    texts = {
        "own": own[name],
        "others": [ids for other, many in own.items() if other != name for ids in many],
        "elsewhere": list(elsewhere),
    }
    loud = {where: [_loudest(lm, patch, ids) for ids in many] for where, many in texts.items()}
    places = [e.place for e in patch.edits]
    top = {place: max((seen[place] for seen in loud["own"]), default=0.0) for place in places}
    return {
        where: sum(any(seen[p] > FIRES * top[p] for p in top) for seen in many) / len(many)
        for where, many in loud.items()
        if many
    }
