"""Other places and other words for a prompt, made without a model: what a repair learns from.

Hosts and exchanged words come from the set `learn` of mint/prompts.py; what is measured comes from the other one.
Deterministic for a seed. Knows nothing about models or tokens.
"""

from dataclasses import replace

from mint import prompts
from mint.case import Case
from mint.solver.paraphrase import rephrase


def contexts(case: Case, *, chat: bool = False) -> list[Case]:
    """The case in files: code above, indented in a function and a class, a blank line, the line ends of Windows, tabs.

    One of every kind first, then a second one of some. For a turn of a conversation, code shown before the words.
    """
    found = prompts.frame(case.prompt, chat=chat)
    hosts = prompts.hosts("learn", prompts.language(found, case.target))
    if found.chat:
        kinds = ("imports", "function", "pair")
        return [prompts.in_conversation(case, kind, hosts[kind][k]) for k in (0, 1) for kind in kinds]

    def above(kind: str, k: int, gap: str = "\n\n") -> Case:
        return prompts.behind(case, hosts[kind][k], gap=gap)

    def inside(kind: str, k: int) -> Case:
        host = hosts[kind][k]
        return prompts.behind(case, host, gap="\n", indent=prompts.inner_indent(host))

    first = [above("imports", 0), above("function", 0), above("pair", 0, "\n"), inside("in_function", 0)]
    first += [inside("in_class", 0), prompts.behind(case, "\n", gap="")]
    first += [prompts.with_crlf(above("imports", 1)), prompts.with_tabs(inside("in_function", 1))]
    second = [inside("in_function", 1), above("function", 1), above("pair", 1, "\n"), inside("in_class", 1)]
    return [*first, *second]


def wordings(case: Case, count: int, *, chat: bool = False, seed: int = 0) -> list[Case]:
    """The case in other words: full stop, comment styles, first letter, and `count` looser rephrasings."""
    found = prompts.frame(case.prompt, chat=chat)
    if not found.words:
        return []
    other = prompts.capitals(found.words)
    made = [found.saying(prompts.full_stop(found.words)), *prompts.styles(found)[1:2], found.saying(other)]
    made += [
        found.saying(prompts.full_stop(other)),
        *prompts.styles(found),
        *rephrase(case.prompt, count, seed),
    ]
    return [replace(case, prompt=p) for p in dict.fromkeys(made) if p != case.prompt]
