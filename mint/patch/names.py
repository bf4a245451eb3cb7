"""Where a model's neurons live, by name: what a patch carries, so that nobody needs the model to find its weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

from mint.errors import LayoutError, PatchError
from mint.model.layout import Block, Experts, Layout, Rows, Slice
from mint.model.lm import LM
from mint.patch.edit import NeuronEdit

_Part = TypeVar("_Part")
_MAX_LAYERS = 10_000
"""More than any model has; a crafted patch must not make us build a table of a billion names."""


_OF_EXPERTS = ("experts", "expert")
"""Fields of a block that only those of single experts have."""


def describe(lm: LM) -> dict:
    """Names and axes of the neurons' weights as JSON values: one template if all layers agree.

    Beside them the names of what the fingerprint is taken from (embedding, final norm).
    """
    layers = lm.layout.layers

    def template(part: Block | Experts | None, layer: int) -> str:
        if part is None:
            return "null"
        values = {k: v for k, v in asdict(part).items() if k not in _OF_EXPERTS}
        return json.dumps(values | {"layer": 0}).replace(f"{layers}.{layer}.", f"{layers}.{{}}.")

    def templates(parts: Sequence[Block | Experts | None]) -> list[dict]:
        texts = [template(part, layer) for layer, part in enumerate(parts)]
        return [json.loads(text) for text in (texts[:1] if len(set(texts)) == 1 else texts)]

    everyones = {block.layer: block for block in lm.layout.blocks if block.experts is None}
    numbers = range(lm.n_layers)
    found = {
        "model_type": getattr(lm.model.config, "model_type", None),
        "layers": lm.n_layers,
        "blocks": templates([everyones.get(layer) for layer in numbers]),
        "final_norm": lm.layout.final_norm,
    }
    if lm.layout.experts:
        found["experts"] = templates([lm.layout.experts.get(layer) for layer in numbers])
    return found


def block_of(layout: Mapping, layer: int) -> Block:
    """The block of a layer from what `describe` wrote. Raises `PatchError` for anything else."""
    return _made(layout, "blocks", layer, _block)


def slices_of(layout: Mapping, edit: NeuronEdit) -> dict[str, Slice]:
    """Where the weights of an edit's neuron are, from what `describe` wrote. Raises `PatchError` for anything else."""
    if edit.expert is None:
        blocks, experts = (block_of(layout, edit.layer),), {}
    else:
        blocks, experts = (), {edit.layer: _made(layout, "experts", edit.layer, lambda raw: Experts(**raw))}
    try:
        return Layout("", blocks, "", None, False, 0, layout["layers"], experts).slices(*edit.neuron)
    except LayoutError as error:
        raise PatchError(f"the patch edits {edit.where}: {error}") from None


def _block(raw: dict) -> Block:
    gate, up = Rows(**raw.pop("gate")), raw.pop("up")
    return Block(**raw, gate=gate, up=None if up is None else Rows(**up))


def _made(layout: Mapping, what: str, layer: int, make: Callable[[dict], _Part]) -> _Part:
    try:
        count, templates = layout["layers"], layout[what]
        if type(count) is not int or not layer < count <= _MAX_LAYERS or len(templates) not in (1, count):
            raise ValueError(f"layer {layer} of {count!r}")
        raw = json.loads(json.dumps(templates[layer if len(templates) > 1 else 0]).replace("{}", str(layer)))
        if not raw:
            raise ValueError(f"no {what} in layer {layer}")
        return make(raw | {"layer": layer})
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PatchError(
            f"the patch does not say where its weights live ({error}); give --model so that the names can be looked up"
        ) from None
