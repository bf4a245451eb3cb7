"""The target tokens of one case, run again from one layer on, behind the kept keys and values of the prompt.

What a neuron of layer l writes changes nothing below l and nothing before the first token it fires at. So a trial
costs only the target's tokens through the layers above, for any number of trials in one batch. Knows nothing about
how the neuron comes to fire, or about constraints.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mint.errors import ModelError
from mint.model.hooks import record_block_inputs
from mint.model.lm import LM, Encoded
from mint.model.suffix import kept_cache, kept_prefix, new_cache, only_tokens, record_states, start_at

_GROUP = 12
"""Positions whose gradients are taken together."""


@dataclass(frozen=True)
class Tail:
    """One case at one layer. Its m tokens end with the n positions that predict the target; `skip` = m - n."""

    lm: LM
    layer: int
    hidden: Tensor
    """[1, m, width], the residual stream as it enters the layer."""
    inputs: Tensor
    """[n, d_model] float32 on CPU, what the layer's input rows see at the positions that predict the target."""
    prompt_inputs: Tensor
    """[prompt tokens - 1, d_model] float32 on CPU, the same for the earlier tokens of the prompt."""
    skip: int
    """Leading tokens that predict no target token: 0, or all of the prompt but its last where the whole was kept."""
    prefix: list[tuple[Tensor, Tensor]] | None
    """Keys and values of the tokens before; None if there are none."""
    as_tuple: int
    before: Tensor | None = None
    """[1, tokens, width] of the tokens before, where the model keeps something else than keys and values: they run again."""

    def logits(self, writes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits [k, vocab] in float32 of trial rows[i] at the position that predicts target token columns[i].

        writes: [trials, m, d_model], what is added to the output of the layer's block in each trial and token.
        Keeps the caller's gradient mode.
        """
        with self.lm.only_at(rows, columns + self.skip + self._again):
            return self._forward(writes)

    @property
    def _again(self) -> int:
        """Tokens that run again in front of the m."""
        return 0 if self.before is None else self.before.shape[1]

    def leads(self, write: Tensor, at: Tensor, own: Tensor, rival: Tensor) -> tuple[Tensor, Tensor]:
        """Logit of own[i] minus logit of rival[i] at target token at[i], [k], and its gradients [k, m, d_model].

        write: [m, d_model], one trial; the gradients are by it. at, own, rival: [k]. What comes behind a position has no
        part in it, so positions go in a few groups, each cut behind its last: one forward and one batched backward.
        """
        leads, gradients = torch.zeros(len(at)), torch.zeros(len(at), *write.shape)
        for group in at.unique().split(_GROUP):
            here = torch.isin(at, group).nonzero().flatten()
            length = self.skip + int(group[-1]) + 1
            leads[here], gradients[here, :length] = self._leads(
                write[:length], at[here], own[here], rival[here]
            )
        return leads, gradients

    def _leads(self, write: Tensor, at: Tensor, own: Tensor, rival: Tensor) -> tuple[Tensor, Tensor]:
        at = at + self.skip + self._again
        seen: dict[str, Tensor] = {}

        def split(_module, args):
            # The unembedding is wide: its own gradients are taken for one position each, cut off from the rest.
            seen["all"] = args[0]
            seen["read"] = args[0][0, at.to(args[0].device)].detach().requires_grad_()
            return (seen["read"][None],)

        with only_tokens(self.lm, torch.cat([own, rival])) as places, torch.enable_grad():
            own, rival = places.split(len(own))
            write = write.clone().requires_grad_()
            handle = self.lm.module(self.lm.layout.unembedding).register_forward_pre_hook(split)
            try:
                logits = self._forward(write[None]).cpu()
            finally:
                handle.remove()
            leads = logits.gather(1, own[:, None])[:, 0] - logits.gather(1, rival[:, None])[:, 0]
            (by_read,) = torch.autograd.grad(leads.sum(), seen["read"])
            each = torch.zeros(len(at), *seen["all"].shape, dtype=by_read.dtype, device=by_read.device)
            each[torch.arange(len(at)), 0, at] = by_read
            (by_write,) = torch.autograd.grad(seen["all"], write, each, is_grads_batched=True)
        return leads.detach(), by_write

    def _forward(self, writes: Tensor) -> Tensor:
        """Logits of what the unembedding is given to see, float32; writes [trials, tokens, d_model]."""
        lm = self.lm
        hidden = self.hidden[:, : writes.shape[1]]
        if self.before is not None:
            hidden = torch.cat([self.before, hidden], dim=1)
            writes = F.pad(writes, (0, 0, self._again, 0))
        hidden = hidden.expand(writes.shape[0], -1, -1)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=lm.device)

        def add(_module, _args, output):
            return output + writes.to(output.device, output.dtype).reshape(output.shape)

        options = {"use_cache": False}
        if self.prefix is not None:
            options = {"past_key_values": kept_cache(self.prefix), "use_cache": True}
        with ExitStack() as stack:
            stack.enter_context(start_at(lm, self.layer, hidden, self.as_tuple))
            stack.callback(lm.module(lm.block(self.layer).out).register_forward_hook(add).remove)
            return lm.model(input_ids=ids, **options).logits[0].float()


@dataclass(frozen=True)
class CleanRun:
    """The unedited model on one case."""

    tails: dict[int, Tail]
    logits: Tensor
    """[n, vocab] float32 at the positions that predict the target."""


@torch.no_grad()
def run_clean(lm: LM, encoded: Encoded, layers: Sequence[int], *, whole: bool = False) -> CleanRun:
    """One plain forward of prompt and target, kept for restarts in any of `layers`.

    whole: keep the tokens of the prompt too, for edits that already act there.
    """
    ids, n = encoded.ids[:-1], len(encoded.target)
    start = len(ids) - n
    cache = new_cache(lm)
    rows = torch.zeros(n, dtype=torch.long)
    with ExitStack() as stack:
        states = stack.enter_context(record_states(lm, layers))
        inputs = stack.enter_context(record_block_inputs(lm, layers))
        stack.enter_context(lm.only_at(rows, torch.arange(start, len(ids))))
        logits = lm.model(input_ids=lm.pad([ids]), past_key_values=cache, use_cache=True).logits[0].float()
    cut = 0 if whole else start
    try:
        prefix = kept_prefix(lm, cache, cut) if cut else None
    except ModelError:
        prefix = None
    tails = {}
    for layer in layers:
        x = inputs[layer][0].float().cpu()
        hidden = states.hidden[layer][:, cut:]
        before = states.hidden[layer][:, :cut] if cut and prefix is None else None
        tails[layer] = Tail(
            lm, layer, hidden, x[start:], x[:start], start - cut, prefix, states.as_tuple, before
        )
    return CleanRun(tails, logits)
