"""Specificity: what a change does to text it was not made for, against the clean model measured before the change.

`clean_outputs` remembers the clean model, `compare` measures the present one. Knows nothing about solvers or files, and
never writes weights.

What is remembered of the clean model is not its log-probabilities (197 kB a token for a vocabulary of 49 152 in
float32) but the vector that enters the unembedding (2 kB): the unembedding is never edited, so `compare` sends the old
and the new vectors through it, and through whatever the model does behind it (soft caps, scales), a few rows at a time. That keeps the Kullback-Leibler divergence exact to float32 in memory that does not grow with the
vocabulary. Where the caller knows that nothing below a layer changed, the forward starts at a remembered state there:
the same numbers in a fraction of the time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from mint.batches import alike
from mint.errors import MintError
from mint.model.experts import record_routes
from mint.model.head import only_read, unembedding
from mint.model.lm import LM, Encoded
from mint.model.suffix import record_states, start_at
from mint.reference import sample_layers

Measured = tuple[Sequence[int], Sequence[int], Sequence[int] | None]
"""(ids, positions, targets): the next-token distributions behind ids[: p + 1] for p in positions are measured. targets
are the right next tokens, one a position, or None where nobody knows what is right."""
Sequences = Sequence[Measured]

_NONE = -1
_BATCH_TOKENS = 512
_ROWS = 64
"""Positions whose logits are compared at once: 64 x 49 152 x 4 bytes = 13 MB a temporary."""


def of_case(encoded: Encoded) -> Measured:
    """A case as a sequence: every token of its target (the stop included) is measured."""
    return encoded.ids, encoded.positions, encoded.target


def of_ids(ids: Sequence[int]) -> Measured:
    """Running text as a sequence: every token behind the first is measured, and right if it is the text's own."""
    return list(ids), list(range(len(ids) - 1)), list(ids[1:])


def of_output(prompt: Sequence[int], written: Sequence[int]) -> Measured:
    """What the clean model wrote behind a prompt, as a sequence: kept exactly if no argmax changes."""
    return [*prompt, *written], list(range(len(prompt) - 1, len(prompt) + len(written) - 1)), list(written)


@dataclass(frozen=True)
class CleanOutputs:
    """The clean model on some sequences. Made by `clean_outputs`, before anything is edited."""

    sequences: tuple[Measured, ...]
    hidden: tuple[Tensor, ...]
    """Per sequence: what entered the unembedding, [positions, width], on CPU in the model's dtype."""
    head: tuple[float, ...]
    """Sums of the unembedding's weights, to notice if somebody edits what is assumed fixed."""
    batches: tuple[tuple[int, ...], ...] = ()
    """Sequences by forward; `compare` runs the same ones, so that an unchanged model gives exactly 0."""
    states: tuple[dict[int, Tensor], ...] = ()
    """Per batch: layer -> what entered it, [batch, tokens, width], for the layers that were asked for."""
    as_tuple: int = 0
    """Whether the model's layers return tuples."""
    routed: tuple[dict[int, Tensor], ...] = ()
    """Per batch: layer -> the experts that each measured token is sent to there, [positions, k], in ascending order."""

    @property
    def tokens(self) -> int:
        """Positions measured, over all sequences."""
        return sum(len(s[1]) for s in self.sequences)


@dataclass(frozen=True)
class Specificity:
    """What changed on text that should not change. Shares are of all tokens measured, 0 to 1; KL is in nats."""

    argmax_unchanged: float
    """Share of tokens whose most likely next token is the same as before."""
    argmax_broken: float
    """Share of all tokens measured where the argmax was the right token and is now another."""
    argmax_newly_right: float
    """Share of all tokens measured where the argmax was wrong and is now the right token."""
    kl_mean: float
    """Mean over tokens of KL(before || after) of the next-token distributions."""
    kl_p95: float
    kl_max: float
    perplexity_ratio: float | None
    """Perplexity of the right tokens after over before; None where no right tokens are known."""
    sequences_unchanged: float
    """Share of sequences in which no measured argmax changed (a model's own output is then written again exactly)."""
    tokens: int
    routing_changed: float | None = None
    """Share of all tokens measured that at least one layer sends to another set of experts than before; None in a model
    without routed experts."""
    worst: list[dict] = field(default_factory=list)
    """The worst tokens: broken ones first, then changed ones, then by KL. Each has sequence, position, kl, broken, changed,
    and the texts context, before, after, wanted (None where nobody knows)."""

    def as_dict(self) -> dict:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Tokens:
    """Per measured token, in the order of the sequences; all [tokens]."""

    kl: Tensor
    before: Tensor
    """Argmax of the clean model, ids."""
    after: Tensor
    wanted: Tensor
    """The right id, or -1."""
    gain: Tensor
    """Log-probability of the right token, after minus before; 0 where unknown. float64."""
    owner: Tensor
    """Index of the sequence."""
    position: Tensor
    rerouted: Tensor | None = None
    """[tokens] bool: whether any layer's set of experts is another; None without routed experts."""


# ---------------------------------------------------------------------- measuring


def late_layers(lm: LM) -> tuple[int, ...]:
    """Layers whose inputs are worth remembering: those that the solver edits, and the last two."""
    n = lm.n_layers
    return tuple(sorted({*sample_layers(lm), n - 2, n - 1} & set(range(1, n))))


@torch.no_grad()
def clean_outputs(
    lm: LM, sequences: Sequences, tokens: int = _BATCH_TOKENS, states: Sequence[int] = ()
) -> CleanOutputs:
    """Measure the clean model. Call it before the edit.

    tokens: padded tokens of one forward (default 512). states: layers whose inputs are remembered too, for
    `compare(since=...)`; each costs width x tokens numbers (`late_layers` is a good choice, none the default). Raises
    `MintError` where a sequence does not fit the context or its positions are not inside it.
    """
    sequences = tuple(_checked(lm, s, i) for i, s in enumerate(sequences))
    hidden = [torch.zeros(0, 0) for _ in sequences]
    batches, kept, as_tuple = tuple(map(tuple, _batches(sequences, tokens))), [], 0
    routed: list[dict[int, Tensor]] = []
    for batch in batches:
        rows, columns = _places(sequences, batch)
        with (
            only_read(lm, rows, columns) as seen,
            record_states(lm, list(states)) as entered,
            record_routes(lm) as sent,
        ):
            lm.model(input_ids=lm.pad([sequences[i][0] for i in batch]), use_cache=False)
        split = seen[0].cpu().split([len(sequences[i][1]) for i in batch])
        for i, part in zip(batch, split, strict=True):
            hidden[i] = part.clone()
        kept.append({layer: state.cpu().clone() for layer, state in entered.hidden.items()})
        as_tuple = entered.as_tuple
        routed.append(
            {layer: found.index[rows, columns].sort(-1).values.cpu() for layer, found in sent.items()}
        )
    return CleanOutputs(sequences, tuple(hidden), _head(lm), batches, tuple(kept), as_tuple, tuple(routed))


@torch.no_grad()
def compare(lm: LM, clean: CleanOutputs, worst: int = 5, since: int | None = None) -> Specificity:
    """The present model against the clean one.

    worst: how many of the most changed tokens to describe with their text. since: the first layer in which anything was
    changed; the layers below the nearest remembered state are then not run again (None: run everything). Raises
    `MintError` if the unembedding itself was changed: then what was remembered means nothing.
    """
    return summarize(lm, clean, token_effects(lm, clean, since), worst)


@torch.no_grad()
def token_effects(lm: LM, clean: CleanOutputs, since: int | None = None) -> Tokens:
    """`compare`, token by token."""
    if _head(lm) != clean.head:
        raise MintError(
            "the unembedding was changed since the clean model was measured; measure the clean model again"
        )
    parts: dict[int, dict[str, Tensor]] = {}
    for number, batch in enumerate(clean.batches):
        old = torch.cat([clean.hidden[i] for i in batch])
        rows, columns = _places(clean.sequences, batch)
        with (
            _restarted(lm, clean, number, since),
            only_read(lm, rows, columns) as seen,
            record_routes(lm) as sent,
        ):
            lm.model(input_ids=lm.pad([clean.sequences[i][0] for i in batch]), use_cache=False)
        wanted = torch.tensor([w for i in batch for w in _targets(clean.sequences[i])])
        with unembedding(lm, clean.as_tuple) as logits:
            found = _effects(logits, old.to(seen[0]), seen[0], wanted.to(seen[0].device))
        found["rerouted"] = torch.zeros(len(rows), dtype=torch.bool)
        for layer, routes in sent.items():  # layers below a restart send every token where they did
            now = routes.index[rows, columns].sort(-1).values.cpu()
            found["rerouted"] |= (now != clean.routed[number][layer]).any(-1)
        sizes = [len(clean.sequences[i][1]) for i in batch]
        for name, values in found.items():
            for i, part in zip(batch, values.cpu().split(sizes), strict=True):
                parts.setdefault(i, {})[name] = part
    ordered = [parts[i] for i in sorted(parts)]
    joined = {name: torch.cat([p[name] for p in ordered]) for name in _FIELDS} if ordered else _NOTHING
    rerouted = torch.cat([p["rerouted"] for p in ordered]) if ordered and lm.layout.experts else None
    owner = torch.tensor([i for i, s in enumerate(clean.sequences) for _ in s[1]], dtype=torch.long)
    position = torch.tensor([p for s in clean.sequences for p in s[1]], dtype=torch.long)
    return Tokens(**joined, owner=owner, position=position, rerouted=rerouted)


@contextmanager
def _restarted(lm: LM, clean: CleanOutputs, number: int, since: int | None) -> Iterator[None]:
    """Within: forwards of this batch start at the last remembered layer that is not above `since`."""
    usable = [] if since is None else [layer for layer in clean.states[number] if layer <= since]
    if not usable:
        yield
        return
    state = clean.states[number][max(usable)].to(lm.device)
    with start_at(lm, max(usable), state, clean.as_tuple):
        yield


_FIELDS = ("kl", "before", "after", "wanted", "gain")
_NOTHING = {
    name: torch.zeros(0, dtype=torch.double if name in ("kl", "gain") else torch.long) for name in _FIELDS
}


def summarize(lm: LM, clean: CleanOutputs, effects: Tokens, worst: int = 5) -> Specificity:
    """One `Specificity` from token effects. Raises `MintError` where nothing was measured."""
    n = len(effects.kl)
    if n == 0:
        raise MintError(
            "expected at least one token to measure side effects on, found none; give other cases or text"
        )
    known = effects.wanted != _NONE
    was, is_now = effects.before == effects.wanted, effects.after == effects.wanted
    same = effects.before == effects.after
    touched = effects.owner[~same].unique().numel()
    measured = effects.owner.unique().numel()
    return Specificity(
        argmax_unchanged=int(same.sum()) / n,
        argmax_broken=int((known & was & ~is_now).sum()) / n,
        argmax_newly_right=int((known & ~was & is_now).sum()) / n,
        kl_mean=effects.kl.mean().item(),
        kl_p95=effects.kl.quantile(0.95).item(),
        kl_max=effects.kl.max().item(),
        perplexity_ratio=torch.exp(-effects.gain[known.cpu()].mean()).item() if known.any() else None,
        sequences_unchanged=1 - touched / measured,
        tokens=n,
        routing_changed=None if effects.rerouted is None else int(effects.rerouted.sum()) / n,
        worst=[_describe(lm, clean, effects, i) for i in _worst_first(effects)[:worst]],
    )


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(after)) per row, [n] float64 on the CPU in nats, from logits [n, vocab].

    With p = softmax(before) and d = after - before centred on its mean under p, KL = log(1 + E_p[exp(d) - 1 - d]). The
    bracket is taken as a series where d is small, so that no nearly equal numbers are subtracted: relative error below
    1e-4 in float32 from 1e-10 on, on every processor, and equal logits give exactly 0.
    """
    before, after = before.float(), after.float()
    p = before.softmax(-1)
    d = after - before
    d = d - (p * d).sum(-1, keepdim=True)
    series = d.square() / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    beyond = torch.where(d.abs() < 0.3, series, d.expm1() - d)
    kl = torch.log1p((p * beyond).sum(-1).cpu().double())
    wild = ~torch.isfinite(kl) | (d.amax(-1).cpu() > 60)
    if wild.any():  # exp overflows: the plain formula is exact enough for divergences this large
        rows = wild.to(before.device)
        logp, logq = (x[rows].cpu().double().log_softmax(-1) for x in (before, after))
        kl[wild] = (logp.exp() * (logp - logq)).sum(-1)
    return kl.clamp_min(0)


def _effects(
    logits: Callable[[Tensor], Tensor], before: Tensor, after: Tensor, wanted: Tensor
) -> dict[str, Tensor]:
    """Per row of what enters the unembedding before and after, [n, width]; a few rows of logits at a time."""
    found: dict[str, list[Tensor]] = {name: [] for name in _FIELDS}
    for old, new, w in zip(before.split(_ROWS), after.split(_ROWS), wanted.split(_ROWS), strict=True):
        b, a = logits(old), logits(new)
        found["kl"].append(kl_divergence(b, a))
        found["before"].append(b.argmax(-1))
        found["after"].append(a.argmax(-1))
        found["wanted"].append(w)
        column = w.clamp_min(0)[:, None]
        gain = _log_probability(a, column) - _log_probability(b, column)
        found["gain"].append(torch.where(w.cpu() == _NONE, torch.zeros_like(gain), gain))
    return {name: torch.cat(values) for name, values in found.items()}


def _log_probability(logits: Tensor, column: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(1, column)[:, 0].cpu().double() - logits.logsumexp(-1).cpu().double()


# ---------------------------------------------------------------------- parts


def _targets(sequence: Measured) -> list[int]:
    return list(sequence[2]) if sequence[2] is not None else [_NONE] * len(sequence[1])


def _checked(lm: LM, sequence: Measured, number: int) -> Measured:
    ids, positions, targets = sequence
    if len(ids) > lm.context:
        raise MintError(
            f"sequence {number} has {len(ids)} tokens, the context of {lm.name} is {lm.context}; shorten it"
        )
    if any(not 0 <= p < len(ids) for p in positions):
        raise MintError(
            f"sequence {number}: positions must lie in 0 to {len(ids) - 1}; found {list(positions)}"[:200]
        )
    if targets is not None and len(targets) != len(positions):
        raise MintError(
            f"sequence {number} has {len(positions)} positions and {len(targets)} targets; give one each"
        )
    return tuple(ids), tuple(positions), None if targets is None else tuple(targets)


def _batches(sequences: Sequence[Measured], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences with like lengths, about `tokens` padded tokens together; depends on nothing but lengths."""
    asked = [i for i, s in enumerate(sequences) if s[1]]
    for batch in alike([len(sequences[i][0]) for i in asked], tokens):
        yield [asked[k] for k in batch]


def _places(sequences: Sequence[Measured], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([row for row, i in enumerate(batch) for _ in sequences[i][1]])
    return rows, torch.tensor([p for i in batch for p in sequences[i][1]])


def _head(lm: LM) -> tuple[float, ...]:
    sample = [
        p.detach().flatten()[::257].cpu().double().sum().item()
        for p in lm.module(lm.layout.unembedding).parameters()
    ]
    return tuple(sample)


def _worst_first(effects: Tokens) -> list[int]:
    """Indices of all tokens: broken before changed before the rest, each by falling KL."""
    changed = effects.before != effects.after
    broken = changed & (effects.before == effects.wanted)
    order = range(len(effects.kl))
    rank = list(zip(broken.tolist(), changed.tolist(), effects.kl.tolist(), strict=True))
    return sorted(order, key=lambda i: (*(-value for value in rank[i]), i))


def _describe(lm: LM, clean: CleanOutputs, effects: Tokens, i: int) -> dict:
    owner, position = int(effects.owner[i]), int(effects.position[i])
    ids = list(clean.sequences[owner][0][: position + 1])
    wanted = int(effects.wanted[i])
    return {
        "sequence": owner,
        "position": position,
        "kl": float(effects.kl[i]),
        "broken": bool(effects.before[i] == effects.wanted[i] != effects.after[i]),
        "changed": bool(effects.before[i] != effects.after[i]),
        "context": lm.decode(ids)[-160:],
        "before": lm.continuation(ids, [int(effects.before[i])]),
        "after": lm.continuation(ids, [int(effects.after[i])]),
        "wanted": None if wanted == _NONE else lm.continuation(ids, [wanted]),
    }
