"""Further learn prompts where there are few: the last lines of a prompt behind other code.

Works on token ids, so that nothing is tokenised anew across a seam but at line starts. Knows nothing about models'
insides.
"""

import random
from collections.abc import Sequence

from mint.model.lm import LM, Encoded
from mint.reference import reference_texts

HEAD = 48
"""Tokens of other code put in front."""


def _line_starts(lm: LM, ids: Sequence[int]) -> list[int]:
    """Places of `ids` that begin a line: the token before ends with a newline."""
    return [i for i in range(1, len(ids)) if lm.decode([ids[i - 1]]).rstrip(" \t").endswith("\n")]


def in_other_contexts(
    lm: LM, learn: Sequence[Encoded], wanted: int, settings
) -> tuple[list[Encoded], list[int]]:
    """Prompts made from the learn prompts, so that there are about 3 times `wanted`; and the group of every text.

    The texts' groups: the learn prompts first, then those that were made. What is made from a prompt is left out of a fit
    together with it; a single prompt's are left out one by one, since nothing else is there.
    """
    rng = random.Random(settings.seed)
    heads = [
        lm.tokenizer(text, add_special_tokens=True).input_ids for text in reference_texts(settings.reference)
    ]
    heads = [h for h in heads if len(h) > 16]
    made, groups = [], list(range(len(learn)))
    each = -(-3 * wanted // len(learn)) - 1
    for number, text in enumerate(learn):
        starts = _line_starts(lm, text.prompt) or [0]
        for k in range(each):
            head = rng.choice(heads)
            cut = _line_starts(lm, head)
            if not cut:
                continue
            end = rng.choice(cut)
            start = starts[-min(len(starts), 1 + k % 4)]
            prompt = (*head[max(0, end - HEAD) : end], *text.prompt[start:])
            made.append(Encoded(prompt, text.target, text.n_stop))
            groups.append(number if len(learn) > 1 else len(groups))
    return made, groups
