"""What greedy generation must give, told from one forward with the text fed in, where that is certain.

A forward over prompt and text costs what generation needs for its first token. Where every token of the text leads
clearly, generation cannot give anything else; where the first token that does not lead loses clearly to one that begins
another text, generation cannot give the text. Between the two lies what has to be generated. Knows nothing about edits.
"""

from collections.abc import Sequence

import torch

from mint.model.lm import LM, Encoded
from mint.model.margins import margins_of

_CLEAR, _UNCLEAR = {torch.float32: 0.05}, 0.5
_PLAIN_ENDS = ("line", "eos", "none")
"""Stop rules that judge a text as it is; a block's end is trimmed."""


def clear_margin(lm: LM) -> float:
    """Least margin, in logits, that rounding cannot turn between one forward and token by token."""
    return _CLEAR.get(lm.dtype, _UNCLEAR)


@torch.no_grad()
def foretold(lm: LM, encoded: Sequence[Encoded], texts: Sequence[str]) -> list[bool | None]:
    """Per target: True if free greedy generation writes its tokens, False if it cannot write its text; None: generate.

    texts: the targets as text, without what ends them; line ends of Windows count as line ends. Targets go through the
    model in batches of about 1024 padded tokens.
    """
    found: list[bool | None] = [None] * len(encoded)
    clear = clear_margin(lm)
    for batch, logits in lm.batched_logits([e.ids for e in encoded], [e.positions for e in encoded]):
        for i, part in zip(batch, logits.split([len(encoded[i].target) for i in batch]), strict=True):
            margins, best = margins_of(part, encoded[i].target).cpu(), part.argmax(1).tolist()
            short = (margins <= clear).nonzero().flatten().tolist()
            if not short:
                found[i] = True
            elif float(margins[short[0]]) < -clear and _parts(lm, encoded[i], texts[i], best, short[0]):
                found[i] = False
    return found


def _parts(lm: LM, encoded: Encoded, text: str, best: Sequence[int], place: int) -> bool:
    """Whether what leads at a place of the target begins another text than the target's."""
    rule = encoded.stop.rule if encoded.stop else "none"
    if place >= len(encoded.target) - encoded.n_stop or rule not in _PLAIN_ENDS:
        return False
    before, token = list(encoded.target[:place]), best[place]
    ended = token in lm.stop_ids()
    ids = before if ended else [*before, token]
    # Without half a character, and with one kind of line end.
    now = lm.continuation(encoded.prompt, ids).rstrip("\ufffd").replace("\r", "") if ids else ""
    wanted = text.replace("\r", "")
    if ended:
        return now != wanted
    return not (now.startswith(wanted) or wanted.startswith(now))
