"""Input rows of one neuron, and the edits that make a neuron of them.

Where a block has biases they stay what they are, and the rows take them back: so only matrices change, and an edit can
travel as a low-rank adapter. Knows nothing about how rows and columns are found.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mint.model.lm import LM
from mint.patch import NeuronEdit, make_edit, read_neuron

STEEP = 8.0
"""Gate pre-activation where a learnt neuron fires in full: large enough that SiLU and GELU act as a ReLU."""


@dataclass(frozen=True)
class InputRows:
    """Rows of one neuron: activation act(gate.x + bias) (up.x + bias), or act(gate.x + bias) in a plain block."""

    gate: Tensor
    """[d_model]."""
    up: Tensor | None
    """[d_model]; None in a plain block."""
    gain: float = 1.0
    """What the activation is where the neuron fires in full; the column is divided by it."""
    bias: tuple[float, float] = (0.0, 0.0)
    """The model's own biases of gate and up."""

    def respond(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Activation over gain [...] at raw inputs [..., d_model]."""
        n = act(x @ self.gate + self.bias[0])
        if self.up is not None:
            n = n * (x @ self.up + self.bias[1])
        return n / self.gain


def own_bias(lm: LM, layer: int, index: int) -> tuple[float, float]:
    """What the block itself adds to a neuron's gate.x and up.x; 0 where it adds nothing."""
    now = read_neuron(lm, layer, index, ("gate_bias", "up_bias"))
    gate, up = (
        float(now.get(role, 0.0)) - lm.block(layer).neutral(role) for role in ("gate_bias", "up_bias")
    )
    return gate, up


def present_rows(lm: LM, layer: int, index: int, gain: float = 1.0) -> InputRows:
    """The rows that a neuron has in the model's present weights, float32."""
    now = read_neuron(lm, layer, index, ("gate", "up"))
    up = now["up"].float() if "up" in now else None
    return InputRows(now["gate"].float(), up, gain, own_bias(lm, layer, index))


def rewrite(lm: LM, layer: int, index: int, rows: InputRows, column: Tensor) -> NeuronEdit:
    """The edit after which a neuron fires as `rows` do and writes `column` [d_model] where it fires in full.

    rows: made for the biases of this very neuron, see `own_bias`; they are left as they are.
    """
    after = {"out": column / rows.gain, "gate": rows.gate}
    if rows.up is not None:
        after["up"] = rows.up
    return make_edit(lm, layer, index, after)


def write_more(lm: LM, layer: int, index: int, change: Tensor) -> NeuronEdit:
    """The edit after which a neuron fires as before and writes `change` [d_model] more a unit of activation."""
    return make_edit(lm, layer, index, {"out": lm.columns(layer)[index].float().cpu() + change})
