"""Where a model's neurons live, by name: what a patch carries, so that nobody needs the model to find its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from mint.errors import PatchError
from mint.model.layout import Block, Rows
from mint.model.lm import LM

_MAX_LAYERS = 10_000
"""More than any model has; a crafted patch must not make us build a table of a billion names."""


def describe(lm: LM) -> dict:
    """Names and axes of the neurons' weights as JSON values: one template if all layers agree.

    Beside them the names of what the fingerprint is taken from (embedding, final norm).
    """
    layers = lm.layout.layers
    blocks = [
        json.dumps(asdict(b) | {"layer": 0}).replace(f"{layers}.{b.layer}.", f"{layers}.{{}}.")
        for b in lm.layout.blocks
    ]
    same = len(set(blocks)) == 1
    return {
        "model_type": getattr(lm.model.config, "model_type", None),
        "layers": len(blocks),
        "blocks": [json.loads(b) for b in (blocks[:1] if same else blocks)],
        "final_norm": lm.layout.final_norm,
    }


def block_of(layout: Mapping, layer: int) -> Block:
    """The block of a layer from what `describe` wrote. Raises `PatchError` for anything else."""
    try:
        count, templates = layout["layers"], layout["blocks"]
        if type(count) is not int or not layer < count <= _MAX_LAYERS or len(templates) not in (1, count):
            raise ValueError(f"layer {layer} of {count!r}")
        raw = json.loads(json.dumps(templates[layer if len(templates) > 1 else 0]).replace("{}", str(layer)))
        gate = Rows(**raw.pop("gate"))
        up = raw.pop("up")
        return Block(**(raw | {"layer": layer}), gate=gate, up=None if up is None else Rows(**up))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PatchError(
            f"the patch does not say where its weights live ({error}); give --model so that the names can be looked up"
        ) from None
