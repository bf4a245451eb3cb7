"""Several texts at one layer, run again together from there on, each behind the kept keys and values of its own prompt.

What a neuron of layer l writes behind the last prompt token changes nothing below l and nothing before, so a trial
costs a few tokens a text through the layers above. Prefixes of unlike length are padded on the left and masked. Knows
nothing about how a neuron comes to fire, or about constraints.
"""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from mint.model.hooks import record, record_block_inputs
from mint.model.lm import LM, Encoded
from mint.model.suffix import kept_cache, kept_prefix, record_states, start_at

_TOKENS = 1536
"""Padded tokens of one clean forward."""


@dataclass(frozen=True)
class Bundle:
    """b texts at one layer; m = the most tokens that any of them predicts. Token j of a text predicts its target token j."""

    lm: LM
    layer: int
    hidden: Tensor
    """[b, m, width], the residual stream as it enters the layer, at the tokens that predict the target."""
    inputs: Tensor
    """[b, m, d_model] float32 on CPU, what the layer's input rows see there."""
    prompt_inputs: tuple[Tensor, ...]
    """Per text, [prompt tokens - 1, d_model] float32 on CPU: the same before."""
    neurons: Tensor
    """[b, m, d_ff] float32 on CPU: the activations there, unedited."""
    target: Tensor
    """[b, m] ids; 0 where there is none."""
    real: Tensor
    """[b, m] bool: where there is a target token."""
    clean: Tensor
    """[b, m] margin of the target token without an edit; 0 where there is none."""
    prefix: list[tuple[Tensor, Tensor]]
    mask: Tensor
    positions: Tensor
    as_tuple: bool

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, writes: Tensor) -> Tensor:
        """Logits [real tokens, vocab], float32 on CPU, with writes [b, m, d_model] added to the block's output."""
        rows, columns = self.real.nonzero().T
        with self.lm.only_at(rows, columns):
            return self._forward(writes)

    def leads(self, writes: Tensor, want: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """Leads over rivals and their gradients by what is written.

        writes: [b, m, d_model]; want: [b, m] bool, the places asked for; rivals: [b, m] ids. Gives leads [b, m] and
        gradients [b, m, m, d_model]: entry [i, p, q] is the gradient of the lead at p by what is written at q <= p.
        """
        b, m = self.real.shape
        want = want & self.real
        rows, columns = self.real.nonzero().T
        asked = want[rows, columns]
        seen: dict[str, Tensor] = {}

        def split(_module, args):
            seen["all"] = args[0]
            seen["read"] = args[0].detach().requires_grad_()
            return (seen["read"],)

        leads, gradients = torch.zeros(b, m), torch.zeros(b, m, m, writes.shape[-1])
        with torch.enable_grad(), self.lm.only_at(rows, columns):
            write = writes.clone().requires_grad_()
            handle = self.lm.module(self.lm.layout.unembedding).register_forward_pre_hook(split)
            try:
                logits = self._forward(write)
            finally:
                handle.remove()
            own = logits.gather(1, self.target[rows, columns][:, None])[:, 0]
            lead = own - logits.gather(1, rivals[rows, columns][:, None])[:, 0]
            (by_read,) = torch.autograd.grad(lead[asked].sum(), seen["read"])
            leads[rows, columns] = lead.detach()
            # Texts do not see each other, so one backward serves a whole column of places.
            for p in range(m):
                here = asked & (columns == p)
                if here.any():
                    picked = (by_read[0] * here.to(by_read.device)[:, None])[None]
                    (by_write,) = torch.autograd.grad(seen["all"], write, picked, retain_graph=True)
                    gradients[:, p] = by_write.float()
        return leads, gradients

    def _forward(self, writes: Tensor) -> Tensor:
        lm = self.lm
        ids = torch.zeros(self.hidden.shape[:2], dtype=torch.long, device=lm.device)

        def add(_module, _args, output):
            return output + writes.to(output.device, output.dtype).reshape(output.shape)

        options = {"past_key_values": kept_cache(self.prefix), "use_cache": True, "attention_mask": self.mask}
        if "position_ids" in inspect.signature(lm.model.forward).parameters:
            options["position_ids"] = self.positions
        with ExitStack() as stack:
            stack.enter_context(start_at(lm, self.layer, self.hidden, self.as_tuple))
            stack.callback(lm.module(lm.block(self.layer).out).register_forward_hook(add).remove)
            return lm.model(input_ids=ids, **options).logits[0].float().cpu()


def judge(logits: Tensor, target: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Margins [n] and best rivals [n, count] of logits [n, vocab] for target ids [n]."""
    own = logits.gather(1, target[:, None])
    top = logits.scatter(1, target[:, None], float("-inf")).topk(count, dim=1)
    return (own - top.values[:, :1])[:, 0], top.indices


@torch.no_grad()
def bundle(lm: LM, texts: Sequence[Encoded], layers: Sequence[int]) -> dict[int, Bundle]:
    """One plain forward of all texts (prompt and target), kept for restarts in any of `layers`."""
    b, m = len(texts), max(len(t.target) for t in texts)
    starts = [len(t.prompt) - 1 for t in texts]
    longest = max(starts)
    target, real = torch.zeros(b, m, dtype=torch.long), torch.zeros(b, m, dtype=torch.bool)
    for i, text in enumerate(texts):
        target[i, : len(text.target)], real[i, : len(text.target)] = torch.tensor(text.target), True
    clean = torch.zeros(b, m)
    lowest = min(layers)
    hidden: dict[int, list] = {layer: [None] * b for layer in layers}
    inputs: dict[int, list] = {layer: [None] * b for layer in layers}
    neurons: dict[int, list] = {layer: [None] * b for layer in layers}
    kept: list = [None] * b
    as_tuple = False
    for batch in _batches([len(t.ids) - 1 for t in texts]):
        cache = DynamicCache()
        rows = torch.tensor([k for k, i in enumerate(batch) for _ in texts[i].target])
        columns = torch.tensor([c for i in batch for c in texts[i].positions])
        with ExitStack() as stack:
            states = stack.enter_context(record_states(lm, layers))
            seen = stack.enter_context(record_block_inputs(lm, layers))
            fired = stack.enter_context(record(lm, layers))
            stack.enter_context(lm.only_at(rows, columns))
            ids = lm.pad([texts[i].ids[:-1] for i in batch])
            logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float().cpu()
        as_tuple = states.as_tuple
        pairs = kept_prefix(lm, cache, ids.shape[1] - 1)
        margins, _ = judge(logits, torch.tensor([t for i in batch for t in texts[i].target]))
        at = 0
        for k, i in enumerate(batch):
            n, start = len(texts[i].target), starts[i]
            clean[i, :n] = margins[at : at + n]
            at += n
            kept[i] = [(key[k, :, :start], value[k, :, :start]) for key, value in pairs]
            for layer in layers:
                hidden[layer][i] = _padded(states.hidden[layer][k, start : start + n], m)
                inputs[layer][i] = seen[layer][k, : start + n].float().cpu().clone()
                neurons[layer][i] = _padded(fired[layer][k, start : start + n].float().cpu(), m)
    prefix = _stacked(kept, longest, lowest)
    lead = torch.tensor(starts)
    mask = (torch.arange(longest)[None] >= longest - lead[:, None]).long()
    mask = torch.cat([mask, torch.ones(b, m, dtype=torch.long)], 1).to(lm.device)
    positions = (lead[:, None] + torch.arange(m)[None]).to(lm.device)
    return {
        layer: Bundle(
            lm,
            layer,
            torch.stack(hidden[layer]),
            torch.stack([_padded(x[s:], m) for x, s in zip(inputs[layer], starts, strict=True)]),
            tuple(x[:s] for x, s in zip(inputs[layer], starts, strict=True)),
            torch.stack(neurons[layer]),
            target,
            real,
            clean,
            prefix,
            mask,
            positions,
            as_tuple,
        )
        for layer in layers
    }


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, like lengths together, of at most `_TOKENS` padded tokens a batch."""
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= _TOKENS:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def _padded(x: Tensor, length: int) -> Tensor:
    """[k, d] -> [length, d], zeros behind."""
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def _stacked(kept: list, longest: int, lowest: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [b, heads, longest, size] of the layers, zeros in front; empty below `lowest`, where nobody looks."""

    def joined(layer: int, which: int) -> Tensor:
        parts = []
        for pairs in kept:
            x = pairs[layer][which]
            if layer < lowest:
                x = x[..., :0]
            parts.append(torch.cat([x.new_zeros(x.shape[0], longest - x.shape[1], x.shape[2]), x], 1))
        return torch.stack(parts)

    return [(joined(layer, 0), joined(layer, 1)) for layer in range(len(kept[0]))]
