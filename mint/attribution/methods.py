"""Named ways to estimate the effect of every neuron, besides the exact one: better gradients, and controls.

All take one fault and give one tensor [d_ff] a layer, float32 on CPU: the estimated change of logit(wrong) -
logit(desired) when the neuron at the fault's position is replaced by its reference. Guilty neurons are negative.

    linear      gradient x change at the faulty run (Syed et al. 2310.10348)
    ig          the gradient averaged on the way to the reference, layer by layer (integrated gradients over activations,
                Sundararajan et al. 1703.01365; Hanna et al. 2403.17806, EAP-IG-activations)
    relp        gradients by relevance rules: norm denominators and act(z)/z held constant, the gradient of the gate's
                product halved (Jafari et al., RelP; Achtibat et al. 2402.05602, AttnLRP)
    direct      what the neuron writes, read off by the final norm (held constant) and the unembedding
    activation  control: minus |reference - activation|, blind to what the neuron does
    captum      control: Captum's LayerGradientXActivation, negated (zero reference whatever was asked)
    random      control: seeded noise
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mint.attribution.exact import Run, differentiable_rerun, reference_at
from mint.attribution.faults import differences
from mint.attribution.linear import linear_scores
from mint.errors import MintError
from mint.extras import need
from mint.model.layout import Block, Rows
from mint.model.lm import LM

STEPS = 5
"""Points of the path of `ig` (midpoint rule)."""

Reference = Sequence[Tensor] | None
Method = Callable[[LM, Run, Reference, int], list[Tensor]]


def _linear(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    return [s[0].cpu() for s in linear_scores(lm, run.ids, [run.fault], reference).at_fault]


def _change(run: Run, reference: Reference, layer: int) -> Tensor:
    """reference - activation at the fault, [d_ff] float32."""
    return reference_at(run, reference, layer) - run.neurons[layer][-1].float()


def path_gradients(lm: LM, run: Run, reference: Reference, layer: int, steps: int = STEPS) -> Tensor:
    """Mean gradient of the metric at `steps` midpoints between a layer's activations and their reference, [d_ff].

    The layer's neurons move together, at the fault's position; each step is one token row behind kept keys and values.
    """
    change = _change(run, reference, layer)
    shares = (torch.arange(steps, device=change.device) + 0.5) / steps
    leaf = (run.neurons[layer][-1].float() + shares[:, None] * change).requires_grad_()  # [steps, d_ff]

    def replace(n: Tensor) -> Tensor:
        return leaf[:, None].to(n.dtype)

    metric = differentiable_rerun(lm, run, {layer: replace}, steps)
    return torch.autograd.grad(metric.sum(), leaf)[0].mean(0)


def _ig(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    return [
        (path_gradients(lm, run, reference, layer) * _change(run, reference, layer)).cpu()
        if lm.d_ff(layer)
        else torch.zeros(0)
        for layer in range(lm.n_layers)
    ]


# ---------------------------------------------------------------------- relevance rules


def norms(lm: LM) -> list[nn.Module]:
    """The normalisations of a model, by structure: leaves whose only weights have one axis, or that have none but an eps."""
    found = []
    for module in lm.model.modules():
        weights = list(module.parameters(recurse=False))
        leaf = next(module.children(), None) is None
        named = any(hasattr(module, key) for key in ("eps", "variance_epsilon"))
        if leaf and named and all(w.dim() == 1 for w in weights):
            found.append(module)
    return found


def _constant_denominator(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """The same values, with a gradient through the numerator alone (LN-rule)."""
    given = args[0]
    x = given.detach().float()
    with torch.no_grad():
        moved = module.forward((given + given.std()).to(given.dtype))
        centred = bool((moved - output).abs().max() < 1e-2 * output.abs().max())
        bias = getattr(module, "bias", None)
        y = output.detach().float() - (0 if bias is None else bias.float())
        x = x - x.mean(-1, keepdim=True) if centred else x
        ratio = y * x / (x.square() + 1e-12)
    numerator = given.float() - given.float().mean(-1, keepdim=True) if centred else given.float()
    surrogate = numerator * ratio
    return output.detach() + (surrogate - surrogate.detach()).to(output.dtype)


def _units(rows: Rows, output: Tensor, d_ff: int) -> Tensor:
    """The pre-activations [..., d_ff] of a block's rows inside the output of their linear map."""
    return output[..., rows.offset : rows.offset + rows.stride * (d_ff - 1) + 1 : rows.stride]


def _ruled_neurons(lm: LM, block: Block, seen: dict[str, Tensor], n: Tensor) -> Tensor:
    """The same activations, with act(z)/z constant (identity rule) and the product's gradient halved (half rule)."""
    z = _units(block.gate, seen[block.gate.module], block.d_ff)
    act = lm.layout.act(block.layer)
    with torch.no_grad():
        safe = torch.where(z.abs() < 1e-4, torch.full_like(z, 1e-4), z)
        slope = act(safe) / safe
    if block.up is None:
        surrogate = z * slope
    else:
        u = _units(block.up, seen[block.up.module], block.d_ff)
        surrogate = (z * (slope * u).detach() + u * act(z).detach()) / 2
    return n.detach() + surrogate - surrogate.detach()


@contextmanager
def relevance_rules(lm: LM) -> Iterator[None]:
    """Within: forwards give the same values, and gradients follow the relevance rules of RelP."""
    with ExitStack() as stack:
        for module in norms(lm):
            stack.callback(module.register_forward_hook(_constant_denominator).remove)
        for block in lm.layout.blocks:
            seen: dict[str, Tensor] = {}
            for name in {rows.module for rows in (block.gate, block.up) if rows is not None}:

                def keep(_module, _args, output, name=name, seen=seen):
                    seen[name] = output

                stack.callback(lm.module(name).register_forward_hook(keep).remove)

            def rule(_module, args, block=block, seen=seen):
                if not seen[block.gate.module].requires_grad:
                    return None  # below the graph's start
                return (_ruled_neurons(lm, block, seen, args[0]), *args[1:])

            stack.callback(lm.module(block.out).register_forward_pre_hook(rule).remove)
        yield


def _relp(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    with relevance_rules(lm):
        return _linear(lm, run, reference, seed)


# ---------------------------------------------------------------------- direct reading


def direct_gradient(lm: LM, run: Run) -> Tensor:
    """d metric / d residual stream at the fault through the final norm (denominator constant) and the unembedding, [width].

    Zero for what later layers read: the direct share of an effect only.
    """
    top = lm.layout.repairable[-1]
    leaf: list[Tensor] = []

    def enter(_module, args):
        leaf.append(args[0].detach().requires_grad_())
        return (leaf[0], *args[1:])

    if lm.layout.final_norm is None:
        raise MintError(f"{lm.name}: the final norm could not be found; the direct reading needs it")
    norm = lm.module(lm.layout.final_norm)
    with torch.enable_grad(), ExitStack() as stack:
        stack.callback(norm.register_forward_pre_hook(enter).remove)
        stack.callback(norm.register_forward_hook(_constant_denominator).remove)
        metric = differentiable_rerun(lm, run, {top: lambda n: n}, 1)
        (gradient,) = torch.autograd.grad(metric[0], leaf[0])
    return gradient.reshape(-1, gradient.shape[-1])[-1].float()


def _direct(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    reads = direct_gradient(lm, run)
    out = []
    for layer in range(lm.n_layers):
        columns = lm.columns(layer).float()
        out.append((_change(run, reference, layer) * (columns @ reads.to(columns.device))).cpu())
    return out


# ---------------------------------------------------------------------- controls


def _activation(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    return [-_change(run, reference, layer).abs().cpu() for layer in range(lm.n_layers)]


def _random(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(lm.d_ff(layer), generator=generator) for layer in range(lm.n_layers)]


def _captum(lm: LM, run: Run, reference: Reference, seed: int) -> list[Tensor]:
    from captum.attr import LayerGradientXActivation

    fault = run.fault
    embed = lm.model.get_input_embeddings()
    ids = torch.tensor([run.ids], device=lm.device)

    def forward(embedded: Tensor) -> Tensor:
        logits = lm.model(inputs_embeds=embedded, use_cache=False).logits[:, -1].float()
        return differences(logits, [fault])

    layers = [lm.module(block.out) for block in lm.layout.blocks]
    method = LayerGradientXActivation(forward, layers)
    with torch.enable_grad():
        embedded = embed(ids).detach().requires_grad_()
        found = method.attribute(embedded, attribute_to_layer_input=True)
    found = [f[0] if isinstance(f, tuple) else f for f in found]
    scores: list[list[Tensor]] = [[torch.zeros(0)] for _ in range(lm.n_layers)]
    for block, f in zip(lm.layout.blocks, found, strict=True):
        scores[block.layer].append(-f.detach().reshape(-1, f.shape[-1])[-1].float().cpu())
    return [torch.cat(parts) for parts in scores]


METHODS: dict[str, Method] = {
    "linear": _linear,
    "ig": _ig,
    "relp": _relp,
    "direct": _direct,
    "activation": _activation,
    "captum": _captum,
    "random": _random,
}


def check_method(method: str) -> None:
    """Raise `MintError` for an unknown name, and for a method whose library is not installed."""
    if method not in METHODS:
        raise MintError(f"unknown method '{method}'; known are {', '.join(METHODS)}")
    if method == "captum":
        need("the control 'captum'", "captum")


def estimate(lm: LM, run: Run, reference: Reference, method: str = "linear", seed: int = 0) -> list[Tensor]:
    """Scores of all neurons by a named method, [d_ff] a layer. Raises `MintError` as `check_method`."""
    check_method(method)
    return METHODS[method](lm, run, reference, seed)
