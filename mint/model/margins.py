"""Logit margins: by how much every token of a target leads its best rival, with the true tokens before it fed in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mint.model.lm import LM, Encoded


def margins(lm: LM, encoded: Encoded) -> Tensor:
    """Teacher-forced margins of a case, [target tokens]: target logit minus the best other logit."""
    return margins_of(lm.logits([encoded.ids], [encoded.positions]), encoded.target)


def margins_of(logits: Tensor, target: Sequence[int]) -> Tensor:
    """Margins [n] of target ids against logits [n, vocab]."""
    wanted = torch.tensor(target, device=logits.device)
    own = logits.gather(1, wanted[:, None])[:, 0]
    return own - logits.scatter(1, wanted[:, None], float("-inf")).amax(1)


@torch.no_grad()
def all_margins(lm: LM, encoded: Sequence[Encoded]) -> list[Tensor]:
    """`margins` of several cases, in batches; one tensor [target tokens] each, on the CPU."""
    found: dict[int, Tensor] = {}
    for batch, logits in lm.batched_logits([e.ids for e in encoded], [e.positions for e in encoded]):
        parts = logits.split([len(encoded[i].target) for i in batch])
        for i, part in zip(batch, parts, strict=True):
            found[i] = margins_of(part, encoded[i].target).cpu()
    return [found[i] for i in range(len(encoded))]
