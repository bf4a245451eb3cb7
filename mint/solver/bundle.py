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
from torch.nn import functional

from mint.model.head import logit_parts, only_read, unembedding
from mint.model.hooks import record, record_block_inputs
from mint.model.lm import LM, Encoded
from mint.model.suffix import kept_cache, kept_prefix, new_cache, record_states, start_at

SOFT = 0.5
"""Temperature, in logits, of the soft maximum."""
_TOKENS = 1536
"""Padded tokens of one clean forward."""


@dataclass(frozen=True)
class Bundle:
    """b texts at one layer; m = the most tokens that any of them predicts. Token j of a text predicts its target token j."""

    lm: LM
    layer: int
    hidden: Tensor
    """[b, m, width], the residual stream as it enters the layer, at the tokens that predict the target."""
    whole: tuple[Tensor, ...]
    """Per text, [tokens, width]: the same at all its tokens."""
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
    clean_soft: Tensor
    """[b, m] the same over the soft maximum of the rivals."""
    spread: float
    """How far the best logit stands above the mean of all, on average."""
    endings: dict[int, Tensor]
    """Last target token -> ids that write at least as much; empty where the texts are to be written exactly."""
    prefix: list[tuple[Tensor, Tensor]]
    mask: Tensor
    positions: Tensor
    as_tuple: int
    """How many values the model's layers return in a tuple; 0 where they return the stream alone."""

    def __len__(self) -> int:
        return len(self.hidden)

    def accepted(self) -> list[Tensor]:
        """Ids that count as right at each real place, in the order of `real.nonzero()`."""
        last = self.real.sum(1) - 1
        return [
            self.endings.get(int(self.target[i, p]), self.target[i, p : p + 1])
            if p == last[i]
            else self.target[i, p : p + 1]
            for i, p in self.real.nonzero().tolist()
        ]

    def margins(self, writes: Tensor) -> tuple[Tensor, Tensor]:
        """Margins [b, m] over the best rival, and over the soft maximum of all rivals; 0 where there is no token.

        writes: [b, m, d_model], what is added to the block's output.
        """
        both = torch.zeros(2, *self.real.shape)
        with torch.no_grad():
            both[:, self.real] = head_margins(self.lm, self._reads(writes), self.accepted(), self.as_tuple)
        return both[0], both[1]

    def soft_margins(self, writes: Tensor, want: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Margins over the soft maximum of all rivals, and their gradients by what is written.

        writes: [b, m, d_model]; want: [b, m] bool, the places asked for; below: [b, m], margins above which nobody wants a
        gradient. Gives margins [b, m], gradients [b, m, m, d_model] (entry [i, p, q]: of the margin at p by what is written
        at q <= p) and the places [b, m] that have one.
        """
        b, m = self.real.shape
        found, gradients = torch.zeros(b, m), torch.zeros(b, m, m, writes.shape[-1])
        with torch.enable_grad():
            write = writes.clone().requires_grad_()
            reads = self._reads(write)
            # The unembedding is wide: it is gone through apart from the layers, a few rows at a time.
            margin, by_read = soft_gradients(self.lm, reads, self.accepted(), self.as_tuple)
            found[self.real] = margin
            want = want & self.real & (found < below)
            asked, columns = want[self.real], self.real.nonzero()[:, 1]
            # Texts do not see each other, so one backward serves a whole column of places.
            for p in range(m):
                here = asked & (columns == p)
                if here.any():
                    picked = by_read * here.to(by_read.device)[:, None]
                    (by_write,) = torch.autograd.grad(reads, write, picked, retain_graph=True)
                    gradients[:, p] = by_write.float()
        return found, gradients, want

    @torch.no_grad()
    def present_margins(self) -> Tensor:
        """[b, m] margins in the model's present weights, which must be the old ones below the layer; whole texts run."""
        out = torch.zeros(self.real.shape)
        accepted = dict(zip(map(tuple, self.real.nonzero().tolist()), self.accepted(), strict=True))
        for batch in _batches([len(x) for x in self.whole]):
            longest = len(self.whole[batch[0]])
            hidden = torch.stack([_padded(self.whole[i], longest) for i in batch])
            places = [(k, i, p) for k, i in enumerate(batch) for p in range(int(self.real[i].sum()))]
            rows = torch.tensor([k for k, _, _ in places])
            first = [len(self.prompt_inputs[i]) for i in batch]
            columns = torch.tensor([first[k] + p for k, _, p in places])
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.lm.device)
            with (
                start_at(self.lm, self.layer, hidden, self.as_tuple),
                only_read(self.lm, rows, columns) as reads,
            ):
                self.lm.model(input_ids=ids, use_cache=False)
            right = [accepted[i, p] for _, i, p in places]
            found, _ = head_margins(self.lm, reads[0], right, self.as_tuple)
            out[[i for _, i, _ in places], [p for _, _, p in places]] = found
        return out

    def part(self, rows: Tensor, tokens: int) -> "Bundle":
        """Some of the texts ([k] indices), and at most so many tokens of each."""
        m = min(tokens, int(self.real[rows].sum(1).max()))
        before = self.mask.shape[1] - self.real.shape[1]
        return Bundle(
            self.lm,
            self.layer,
            self.hidden[rows, :m],
            tuple(self.whole[i] for i in rows.tolist()),
            self.inputs[rows, :m],
            tuple(self.prompt_inputs[i] for i in rows.tolist()),
            self.neurons[rows, :m],
            self.target[rows, :m],
            self.real[rows, :m],
            self.clean[rows, :m],
            self.clean_soft[rows, :m],
            self.spread,
            self.endings,
            [(keys[rows], values[rows]) for keys, values in self.prefix],
            self.mask[rows, : before + m],
            self.positions[rows, :m],
            self.as_tuple,
        )

    def _reads(self, writes: Tensor) -> Tensor:
        """What enters the unembedding at the real places, [real tokens, width], with writes added to the block's output."""
        lm = self.lm
        ids = torch.zeros(self.hidden.shape[:2], dtype=torch.long, device=lm.device)

        def add(_module, _args, output):
            return output + writes.to(output.device, output.dtype).reshape(output.shape)

        cache = kept_cache(self.prefix)
        options = {"past_key_values": cache, "use_cache": True, "attention_mask": self.mask}
        if "position_ids" in inspect.signature(lm.model.forward).parameters:
            options["position_ids"] = self.positions
        with ExitStack() as stack:
            reads = stack.enter_context(only_read(lm, *self.real.nonzero().T))
            stack.enter_context(start_at(lm, self.layer, self.hidden, self.as_tuple))
            stack.callback(lm.module(lm.block(self.layer).out).register_forward_hook(add).remove)
            lm.model(input_ids=ids, **options)
        return reads[0]


def accepted_margins(logits: Tensor, accepted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Margins [n] of accepted ids in logits [n, vocab], over the best rival, and over the soft maximum of all rivals."""
    rows = torch.arange(len(logits)).repeat_interleave(torch.tensor([len(ids) for ids in accepted]))
    rows = rows.to(logits.device)
    where = (rows, torch.cat(list(accepted)).to(logits.device))
    rivals = logits.index_put(where, logits.new_tensor(-torch.inf))
    own = logits.new_full((len(logits),), -torch.inf).scatter_reduce(0, rows, logits[where], "amax")
    return own - rivals.amax(1), own - SOFT * torch.logsumexp(rivals / SOFT, 1)


@torch.no_grad()
def head_margins(lm: LM, reads: Tensor, accepted: Sequence[Tensor], as_tuple: int) -> Tensor:
    """`accepted_margins` [2, n], on the CPU, of what enters the unembedding, [n, width]."""
    with unembedding(lm, as_tuple) as logits:
        found = [
            torch.stack(accepted_margins(logits(reads[part]), accepted[part])).cpu()
            for part in logit_parts(lm, len(reads))
        ]
    return torch.cat(found, 1)


def soft_gradients(lm: LM, reads: Tensor, accepted: Sequence[Tensor], as_tuple: int) -> tuple[Tensor, Tensor]:
    """Margins [n] over the soft maximum, on the CPU, and the gradient [n, width] of each by what enters the unembedding."""
    found, gradients = [], []
    with unembedding(lm, as_tuple) as logits, torch.enable_grad():
        for part in logit_parts(lm, len(reads)):
            read = reads[part].detach().requires_grad_()
            margin = accepted_margins(logits(read), accepted[part])[1]
            gradients += torch.autograd.grad(margin.sum(), read)
            found.append(margin.detach().cpu())
    return torch.cat(found), torch.cat(gradients)


def _endings(lm: LM, texts: Sequence[Encoded]) -> dict[int, Tensor]:
    """Last target token -> every token that begins with its text: a longer one writes the target just as well."""
    tokens = lm.tokenizer.convert_ids_to_tokens(list(range(len(lm.tokenizer))))
    last = {t.target[-1] for t in texts if not t.n_stop}
    return {
        i: torch.tensor(
            [j for j, token in enumerate(tokens) if token is not None and token.startswith(tokens[i])]
        )
        for i in last
    }


@torch.no_grad()
def bundle(lm: LM, texts: Sequence[Encoded], layers: Sequence[int], exact: bool = False) -> dict[int, Bundle]:
    """One plain forward of all texts (prompt and target), kept for restarts in any of `layers`.

    exact: every target token must be written as it is; otherwise the last may be a longer one that begins with it.
    """
    b, m = len(texts), max(len(t.target) for t in texts)
    starts = [len(t.prompt) - 1 for t in texts]
    longest = max(starts)
    target, real = torch.zeros(b, m, dtype=torch.long), torch.zeros(b, m, dtype=torch.bool)
    for i, text in enumerate(texts):
        target[i, : len(text.target)], real[i, : len(text.target)] = torch.tensor(text.target), True
    clean, soft = torch.zeros(b, m), torch.zeros(b, m)
    spread = 0.0
    endings: dict[int, Tensor] = {} if exact else _endings(lm, texts)
    lowest = min(layers)
    hidden: dict[int, list] = {layer: [None] * b for layer in layers}
    inputs: dict[int, list] = {layer: [None] * b for layer in layers}
    neurons: dict[int, list] = {layer: [None] * b for layer in layers}
    kept: list = [None] * b
    as_tuple = 0
    for batch in _batches([len(t.ids) - 1 for t in texts]):
        cache = new_cache(lm)
        rows = torch.tensor([k for k, i in enumerate(batch) for _ in texts[i].target])
        columns = torch.tensor([c for i in batch for c in texts[i].positions])
        with ExitStack() as stack:
            states = stack.enter_context(record_states(lm, layers))
            seen = stack.enter_context(record_block_inputs(lm, layers))
            fired = stack.enter_context(record(lm, layers))
            reads = stack.enter_context(only_read(lm, rows, columns))
            ids = lm.pad([texts[i].ids[:-1] for i in batch])
            lm.model(input_ids=ids, past_key_values=cache, use_cache=True)
        as_tuple = states.as_tuple
        pairs = kept_prefix(lm, cache, ids.shape[1] - 1)
        alone = [torch.tensor([t]) for i in batch for t in texts[i].target]
        ends = torch.tensor([len(texts[i].target) for i in batch]).cumsum(0) - 1
        for i, end in zip(batch, ends.tolist(), strict=True):
            token = texts[i].target[-1]
            if token in endings:
                alone[int(end)] = endings[token]
        parts = []
        with unembedding(lm, as_tuple) as logits:
            for part in logit_parts(lm, len(reads[0])):
                x = logits(reads[0][part])
                parts.append(torch.stack([*accepted_margins(x, alone[part]), x.amax(1) - x.mean(1)]))
        margins, softs, above = torch.cat(parts, 1).cpu()
        spread += len(batch) * float(above.mean())
        at = 0
        for k, i in enumerate(batch):
            n, start = len(texts[i].target), starts[i]
            clean[i, :n], soft[i, :n] = margins[at : at + n], softs[at : at + n]
            at += n
            kept[i] = [(key[k, :, :start], value[k, :, :start]) for key, value in pairs]
            for layer in layers:
                hidden[layer][i] = states.hidden[layer][k, : start + n].clone()
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
            torch.stack([_padded(x[s:], m) for x, s in zip(hidden[layer], starts, strict=True)]),
            tuple(hidden[layer]),
            torch.stack([_padded(x[s:], m) for x, s in zip(inputs[layer], starts, strict=True)]),
            tuple(x[:s] for x, s in zip(inputs[layer], starts, strict=True)),
            torch.stack(neurons[layer]),
            target,
            real,
            clean,
            soft,
            spread / len(texts),
            endings,
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
        like = kept[0][layer][which]
        if layer < lowest:  # only its length is looked at: one number, expanded
            return like.new_zeros(()).expand(len(kept), like.shape[0], longest, like.shape[2])
        parts = (pairs[layer][which] for pairs in kept)
        return torch.stack([functional.pad(x, (0, 0, longest - x.shape[1], 0)) for x in parts])

    return [(joined(layer, 0), joined(layer, 1)) for layer in range(len(kept[0]))]
