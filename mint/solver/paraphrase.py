"""Other prompts made from a prompt, without a model: rephrasings that mean the same, and negative prompts that do not.

Deterministic for a seed. Knows nothing about tokens or models.
"""

import random
import re
from collections.abc import Sequence
from importlib import resources

_BODY = re.compile(r"\w.*\w", re.DOTALL)
_OPENERS = ("", "How to ", "how do I ", "Write code to ", "please ")
_SMALL = frozenset(
    "a an the of in on to for with from by and or is are all that this its it into as at".split()
)


def split_frame(prompt: str) -> tuple[str, str, str]:
    """Lead, last line's wording and tail: what is around the words (`# `, newline) stays in every variant."""
    stripped = prompt.rstrip("\n")
    start = stripped.rfind("\n") + 1
    found = _BODY.search(prompt, start)
    if found is None:
        return prompt, "", ""
    body = found.group().rstrip()
    end = found.start() + len(body)
    return prompt[: found.start()], prompt[found.start() : end], prompt[end:]


def rephrase(prompt: str, count: int, seed: int = 0) -> list[str]:
    """Up to `count` prompts with the same frame and much of the same wording: dropped words, order, case, openers."""
    lead, body, tail = split_frame(prompt)
    words = body.split(" ")
    if len(words) < 3:
        return []
    draw = random.Random(f"{seed}:{prompt}")
    content = [w for w in words if w.lower() not in _SMALL]
    seen, out = {prompt}, []
    for attempt in range(4 * count):
        kind = attempt % 5
        if kind == 0:
            new = " ".join(content)
        elif kind == 1:
            new = draw.choice(_OPENERS[1:]) + body[:1].lower() + body[1:]
        elif kind == 2:
            new = " ".join(w for w in words if draw.random() > 0.3)
        elif kind == 3:
            new = " ".join(words[: max(2, round(len(words) * draw.uniform(0.5, 0.9)))])
        else:
            half = len(content) // 2
            new = " ".join(content[half:] + content[:half])
        variant = lead + new + tail
        if new and variant not in seen:
            seen.add(variant)
            out.append(variant)
        if len(out) == count:
            break
    return out


def negative_prompts(prompt: str, count: int, seed: int = 0) -> list[str]:
    """`count` prompts with the same frame and the wording of something else, from the reference text that ships."""
    lead, body, tail = split_frame(prompt)
    if len(body.split(" ")) < 3:
        return []  # no sentence to exchange: the prompt ends in code
    bodies = [b for b in _bodies() if b.lower() != body.lower()]
    draw = random.Random(f"stranger:{seed}:{prompt}")
    return [lead + b + tail for b in draw.sample(bodies, min(count, len(bodies)))]


def _bodies() -> Sequence[str]:
    folder = resources.files("mint") / "data" / "reference"
    names = ("asm_lines.txt", "bash_lines.txt", "python_lines.txt")
    lines = [line for name in names for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [line.lstrip("#; ").rstrip() for line in lines if line[:2] in ("# ", "; ")]
