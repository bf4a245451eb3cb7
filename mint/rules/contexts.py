"""Further prompts with the habit: the last lines of a learn prompt behind other code.

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
    lm: LM, learn: Sequence[Encoded], each: int, reference: Sequence[str], seed: int
) -> tuple[list[Encoded], list[int]]:
    """`each` texts made from every learn prompt, and the index of the prompt that each was made from.

    What a model begins every text with stays in front. Nothing is made from a conversation, whose turns would be torn.
    """
    rng = random.Random(seed)
    special = set(lm.tokenizer.all_special_ids)
    heads = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in reference_texts(reference)]
    heads = [h for h in heads if len(h) > 16]
    made, owners = [], []
    for number, text in enumerate(learn):
        begins = next((i for i, token in enumerate(text.prompt) if token not in special), 0)
        own = text.prompt[begins:]
        if special & set(own):
            continue
        starts = _line_starts(lm, own) or [0]
        for k in range(each):
            head = rng.choice(heads)
            cut = _line_starts(lm, head)
            if not cut:
                continue
            end = rng.choice(cut)
            start = starts[-min(len(starts), 1 + k % 4)]
            prompt = (*text.prompt[:begins], *head[max(0, end - HEAD) : end], *own[start:])
            made.append(Encoded(prompt, text.target, text.n_stop))
            owners.append(number)
    return made, owners
