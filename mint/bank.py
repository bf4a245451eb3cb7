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
from torch import Tensor

from mint import journal
from mint.errors import PatchError
from mint.files import write_file
from mint.model.experts import focused
from mint.model.hooks import record as record_neurons
from mint.model.lm import LM
from mint.patch import NeuronEdit, Patch, applied, compose, load, save
from mint.patch import check as check_patch
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
    so that the patches of a bank always go together. idle: see `relocate`. Raises `PatchError` if the name or the patch is
    there already, if it belongs to another model, if its cases contradict those of another, or if it collides.
    """
    bank, patch = Path(bank), load(file)
    wanted = re.sub(r"[^\w.-]+", "-", name or Path(file).stem).strip("-.") or "patch"
    new = not bank.exists()
    try:
        bank.mkdir(exist_ok=True)
        with journal.locked(bank):  # of two who add at once, neither may lose an entry
            listed = entries(bank)
            if any(e.name == wanted for e in listed):
                raise PatchError(f"{bank} has a patch '{wanted}' already; give another --name")
            if same := [e.name for e in listed if e.sha256 == patch_id(patch)]:
                raise PatchError(f"{bank} holds this very patch already, as '{same[0]}'; leave it")
            before = list(patches(bank).values()) if listed else []
            patch, moves = _fitted(before, patch, lm, idle)
            entry = Entry(wanted, f"{wanted}.safetensors", patch_id(patch), len(promised(patch)), note)
            save(patch, bank / entry.file, force=True)
            body = {"format": 1, "patches": [asdict(e) for e in [*listed, entry]]}
            write_file(bank / INDEX, json.dumps(body, indent=2) + "\n", force=True)
    except OSError as error:
        raise PatchError(f"cannot write {bank} ({error.strerror}); nothing was added") from None
    finally:
        if new and bank.is_dir() and not any(bank.iterdir()):
            bank.rmdir()
    return entry, moves


def _fitted(
    before: Sequence[Patch], patch: Patch, lm: LM | None, idle: Callable[[int], Sequence[int]]
) -> tuple[Patch, list[Move]]:
    """The patch so that it goes together with those that a bank holds, and what moved for that."""
    if clash := contradictions([*before, patch]):
        one, other = clash[0]
        raise PatchError(
            f"cases '{one.id}' and '{other.id}' contradict each other: behind the same prompt they want {one.target!r} and"
            f" {other.target!r}; leave one of them out"
        )
    moves: list[Move] = []
    if lm is not None:
        if not before:
            check_patch(lm, patch, "before")
        (*_, patch), moves = relocate(lm, [*before, patch], idle)
    elif collisions([*before, patch]):
        raise PatchError(
            "the patch changes a neuron that another patch of the bank changes; add it with --model, so that it can move to"
            " another"
        )
    compose([*before, patch])  # raises where it belongs to another model than the others
    return patch, moves


@dataclass(frozen=True)
class Checked:
    """What became of the promises of each patch on a model that holds all of them."""

    answers: dict[str, list[Answer]]
    fires: dict[str, dict[str, float]]
    """Patch -> where -> how often one of its neurons fires: `own` and `others`, share of the prompts with their targets;
    `elsewhere`, share of texts; `elsewhere_tokens`, share of their tokens."""
    matrix: dict[str, dict[str, float]]
    """Patch -> patch whose prompts are read -> share of them at which the first one fires."""

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
        loud = {n: [_loudness(lm, found, ids) for ids in many] for n, many in own.items()}
        other = [_loudness(lm, found, ids) for ids in elsewhere]
    fires, matrix = {}, {}
    for name in found:
        # A neuron's own scale is what it does at the prompts that it was made for.
        top = {
            place: max(float(seen[name][place].max()) for seen in loud[name]) if loud[name] else 0.0
            for place in (e.place for e in found[name].edits)
        }
        at = {n: [_firing(seen[name], top) for seen in many] for n, many in loud.items()}
        matrix[name] = {n: _share(many) for n, many in at.items() if many}
        shares = {
            "own": at[name],
            "others": [tokens for n, many in at.items() if n != name for tokens in many],
            "elsewhere": [_firing(seen[name], top) for seen in other],
        }
        fires[name] = {where: _share(many) for where, many in shares.items() if many}
        if other:
            fires[name]["elsewhere_tokens"] = float(torch.cat(shares["elsewhere"]).float().mean())
    return Checked(answers, fires, matrix)


def _firing(loudness: dict[tuple[int, int, int], Tensor], top: dict[tuple[int, int, int], float]) -> Tensor:
    """[tokens] bool: where one of a patch's neurons fires."""
    return torch.stack([loudness[place] > FIRES * top[place] for place in top]).any(0)


def _share(texts: Sequence[Tensor]) -> float:
    """Share of texts in which it fires somewhere."""
    return sum(bool(tokens.any()) for tokens in texts) / len(texts)


@torch.no_grad()
def _loudness(
    lm: LM, found: dict[str, Patch], ids: Sequence[int]
) -> dict[str, dict[tuple[int, int, int], Tensor]]:
    """Patch -> neuron -> |activation| at each token of a text, [tokens]."""
    edits = [e for p in found.values() for e in p.edits]
    watched = _watched(lm, edits)
    with record_neurons(watched, sorted({e.layer for e in edits})) as seen:
        watched.logits([list(ids)], [[0]])
    return {
        name: {
            e.place: seen[e.layer][0, :, watched.number(e.layer, e.index, e.expert)].float().abs().cpu()
            for e in patch.edits
        }
        for name, patch in found.items()
    }


def _watched(lm: LM, edits: Sequence[NeuronEdit]) -> LM:
    """The model with the edited experts as blocks of their own; a dense model as it is."""
    chosen: dict[int, set[int]] = {}
    for edit in edits:
        if edit.expert is not None:
            chosen.setdefault(edit.layer, set()).add(edit.expert)
    return focused(lm, {layer: sorted(numbers) for layer, numbers in chosen.items()})
