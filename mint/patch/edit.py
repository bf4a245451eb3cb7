"""A patch: the old and new weights of a few neurons, and where they came from. Apply and revert.

The only module that writes model weights. Weights are copied, never added or subtracted, so that reverting gives
back every bit; everything is checked before anything is written.
"""

import platform
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from mint import __version__
from mint.errors import LayoutError, PatchError
from mint.model.layout import Slice
from mint.model.lm import LM

KINDS = ("value", "rewrite")
ROLES = ("out", "gate", "up", "gate_bias", "up_bias")


@dataclass(frozen=True)
class NeuronEdit:
    """The change of one neuron. `value`: what it writes (role `out`). `rewrite`: also when it fires (input rows)."""

    layer: int
    index: int
    kind: str
    before: dict[str, Tensor]
    """Role -> weights before, [d_model] for rows and columns, [] for biases."""
    after: dict[str, Tensor]
    expert: int | None = None
    """Number of the routed expert that the neuron belongs to; None where every token passes its block."""

    @property
    def place(self) -> tuple[int, int, int]:
        """(layer, expert or -1, index): names a neuron of a model."""
        return self.layer, -1 if self.expert is None else self.expert, self.index

    @property
    def neuron(self) -> tuple[int, int, int | None]:
        """(layer, index, expert), as `Layout.slices` takes it."""
        return self.layer, self.index, self.expert

    @property
    def where(self) -> str:
        if self.expert is None:
            return f"layer {self.layer}, neuron {self.index}"
        return f"layer {self.layer}, expert {self.expert}, neuron {self.index}"

    def named(self) -> dict:
        """Which neuron and what kind of edit, as JSON values: layer, index, kind, and expert where there is one."""
        named = {"layer": self.layer, "index": self.index, "kind": self.kind}
        return named if self.expert is None else named | {"expert": self.expert}


@dataclass(frozen=True)
class Patch:
    """Edits of neurons of one model, with what is needed to trust them."""

    edits: tuple[NeuronEdit, ...]
    base: dict = field(default_factory=dict)
    """Identity of the model: name, revision, fingerprint, tokenizer, dtype."""
    info: dict = field(default_factory=dict)
    """Cases repaired, settings, measured results, versions: JSON values, for people and audits."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.edits[0].after.values())).dtype


def identity(lm: LM) -> dict:
    """What a patch remembers of the model it was made on."""
    return {
        "name": lm.name,
        "revision": lm.revision,
        "fingerprint": lm.fingerprint,
        "tokenizer": lm.tokenizer_hash,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "architecture": type(lm.model).__name__,
    }


def versions() -> dict:
    """Versions of what made a patch."""
    return {
        "mint": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------- weights


def _view(lm: LM, where: Slice) -> Tensor:
    return where.of(lm.parameter(where.parameter).data)


def read_neuron(
    lm: LM, layer: int, index: int, roles: Sequence[str] | None = None, expert: int | None = None
) -> dict[str, Tensor]:
    """Copies (on CPU) of a neuron's present weights by role; all roles by default.

    expert: number of the routed expert that it belongs to; None for the block that the layer has in `lm`.
    """
    slices = lm.block(layer).slices(index) if expert is None else lm.layout.slices(layer, index, expert)
    return {r: _view(lm, s).detach().cpu().clone() for r, s in slices.items() if roles is None or r in roles}


def make_edit(
    lm: LM, layer: int, index: int, after: dict[str, Tensor], expert: int | None = None
) -> NeuronEdit:
    """An edit from the present weights to `after`, rounded to the model's dtype. expert: see `read_neuron`."""
    before = read_neuron(lm, layer, index, tuple(after), expert)
    rounded = {role: after[role].detach().cpu().to(before[role].dtype).clone() for role in before}
    kind = "value" if set(after) == {"out"} else "rewrite"
    return NeuronEdit(
        layer, index, kind, before, rounded, lm.block(layer).expert if expert is None else expert
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def check(lm: LM, patch: Patch, side: str) -> None:
    """Raise `PatchError` unless every edit fits the model and the present weights equal the edit's `side`.

    side: `before` (about to apply) or `after` (about to revert).
    """
    _check_model(lm, patch)
    for edit in patch.edits:
        _check_place(lm, edit)
    moved = [e for e in patch.edits if not _is_at(lm, e, side)]
    if not moved:
        return
    other = "after" if side == "before" else "before"
    if all(_is_at(lm, e, other) for e in patch.edits):
        if side == "before":
            raise PatchError("the patch is already applied to this model; revert it first, or leave it")
        raise PatchError(
            "the patch is not applied to this model, so there is nothing to revert; apply it first"
        )
    raise PatchError(
        f"{moved[0].where}: the present weights differ from the patch's '{side}'; another edit changed this neuron:"
        " use the model that the patch was made on, or revert the other patch first"
    )


def _check_model(lm: LM, patch: Patch) -> None:
    base = patch.base
    dtype = str(lm.dtype).removeprefix("torch.")
    if base.get("dtype") and base["dtype"] != dtype:
        raise PatchError(
            f"the patch was made in {base['dtype']}, the model is in {dtype}; load it with --dtype {base['dtype']}, or"
            f" repair again in {dtype}"
        )
    if base.get("fingerprint") and base["fingerprint"] != lm.fingerprint:
        revision = f" revision {base['revision']}" if base.get("revision") else ""
        present = f" revision {lm.revision}" if lm.revision else ""
        raise PatchError(
            f"the patch was made on another model ({base.get('name')}{revision}, fingerprint"
            f" {str(base['fingerprint'])[:12]}), this is {lm.name}{present} ({lm.fingerprint[:12]}); use the model it was"
            " made on"
        )
    if base.get("tokenizer") and base["tokenizer"] != lm.tokenizer_hash:
        raise PatchError(
            f"the patch was made with another tokenizer ({str(base['tokenizer'])[:12]}), this one is"
            f" {lm.tokenizer_hash[:12]}; use the tokenizer it was made with"
        )


def _check_place(lm: LM, edit: NeuronEdit) -> None:
    if edit.layer >= lm.n_layers:
        raise PatchError(f"the patch edits layer {edit.layer}, the model has layers 0 to {lm.n_layers - 1}")
    try:
        slices = lm.layout.slices(*edit.neuron)
    except LayoutError as error:
        raise PatchError(f"the patch edits {edit.where}: {error}") from None
    unknown = [role for role in edit.after if role not in slices]
    if unknown:
        raise PatchError(
            f"{edit.where} has no '{unknown[0]}' weights in this model; it has {', '.join(slices)}"
        )
    for role, value in edit.after.items():
        shape = tuple(_view(lm, slices[role]).shape)
        if tuple(value.shape) != shape:
            raise PatchError(f"{edit.where}: '{role}' has shape {tuple(value.shape)}, the model has {shape}")


def _is_at(lm: LM, edit: NeuronEdit, side: str) -> bool:
    slices = lm.layout.slices(*edit.neuron)
    return all(same_bits(_view(lm, slices[r]).detach().cpu(), v) for r, v in getattr(edit, side).items())


def _copy(lm: LM, patch: Patch, side: str) -> None:
    for edit in patch.edits:
        slices = lm.layout.slices(*edit.neuron)
        for role, value in getattr(edit, side).items():
            _view(lm, slices[role]).copy_(value)


_locks: "weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(lm: LM) -> threading.RLock:
    """The lock of a model's weights: `apply` and `revert` hold it, `applied` for as long as its block lasts.

    A server takes it around a request that must see one state of the weights. Threads of one process only.
    """
    with _locks_guard:
        return _locks.setdefault(lm.model, threading.RLock())


@torch.no_grad()
def _switch(lm: LM, patch: Patch, present: str, wanted: str) -> None:
    with lock_of(lm):
        check(lm, patch, present)
        try:
            _copy(lm, patch, wanted)
        except BaseException:  # Ctrl-C included: never leave half an edit
            _copy(lm, patch, present)
            raise


def apply(lm: LM, patch: Patch) -> None:
    """Write the patch into the model. Raises `PatchError`, nothing changed, unless the weights equal `before`."""
    _switch(lm, patch, "before", "after")


def revert(lm: LM, patch: Patch) -> None:
    """Give back every bit. Raises `PatchError`, nothing changed, unless the weights equal `after`."""
    _switch(lm, patch, "after", "before")


@contextmanager
def applied(lm: LM, patch: Patch) -> Iterator[LM]:
    """Within: the patch is in the model; afterwards, whatever happened, it is out again bit for bit.

    Other threads that apply, revert or enter such a block on the same model wait until this one ends.
    """
    with lock_of(lm):
        apply(lm, patch)
        try:
            yield lm
        finally:
            revert(lm, patch)
