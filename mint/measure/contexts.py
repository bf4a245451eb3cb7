"""Does a repair hold where the prompt really occurs: in a file, in other words? By free generation of the whole target.

Every context and wording is made from the case's text with hosts that no solver sees (mint/prompts.py, set `measure`).
Knows nothing about solvers or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mint import prompts
from mint.batches import alike
from mint.case import Case
from mint.errors import CaseError
from mint.model.foretell import foretold
from mint.model.lm import LM, Encoded

DEEP_TOKENS = 500
"""Least tokens of the file above the prompt in the kind `deep`."""
BATCH_TOKENS = 2048
"""Most padded prompt tokens that are generated from at once."""
CONTEXTS = ("imports", "function", "pair", "blank", "in_function", "in_class", "deep", "crlf", "tabs")


@dataclass(frozen=True)
class Variant:
    """The case somewhere else. Its target is what must be written there (indented as its host asks)."""

    kind: str
    case: Case
    encoded: Encoded


def contexts(lm: LM, case: Case, stop: str = "auto", seed: int = 0) -> list[Variant]:
    """The case in one host of every kind of `CONTEXTS`, hosts drawn per case; what does not fit the context is left out.

    Of a turn of a conversation only the kinds that show code before the words.
    """
    found = prompts.frame(case.prompt, chat=lm.template is not None)
    texts = prompts.hosts("measure", prompts.language(found, case.target))
    one = {kind: prompts.drawn(some, (seed, case.id, kind)) for kind, some in texts.items()}
    if found.chat:
        made = {
            kind: prompts.in_conversation(case, kind, one[kind]) for kind in ("imports", "function", "pair")
        }
        return _encoded(lm, made.items(), stop)
    inside = prompts.behind(
        case, one["in_function"], gap="\n", indent=prompts.inner_indent(one["in_function"])
    )
    made = {
        "imports": prompts.behind(case, one["imports"]),
        "function": prompts.behind(case, one["function"]),
        "pair": prompts.behind(case, one["pair"], gap="\n"),
        "blank": prompts.behind(case, "\n", gap="\n"),
        "in_function": inside,
        "in_class": prompts.behind(
            case, one["in_class"], gap="\n", indent=prompts.inner_indent(one["in_class"])
        ),
        "deep": prompts.behind(case, _long(lm, texts)),
        "crlf": prompts.with_crlf(prompts.behind(case, one["imports"])),
        "tabs": prompts.with_tabs(inside),
    }
    return _encoded(lm, made.items(), stop)


def _long(lm: LM, texts: dict[str, tuple[str, ...]]) -> str:
    """Whole parts of a file, until they have `DEEP_TOKENS`."""
    whole = ""
    for part in (
        *texts["imports"][:1],
        *texts["filler"],
        *texts["function"],
        *texts["in_class"],
        *texts["in_function"],
    ):
        whole = f"{whole}\n\n{part}" if whole else part
        if len(lm.tokenizer(whole, add_special_tokens=False).input_ids) >= DEEP_TOKENS:
            break
    return whole


def wordings(lm: LM, case: Case, stop: str = "auto") -> list[Variant]:
    """The case in other words: case of the first letter, full stop, comment styles, its own rephrasings."""
    found = prompts.frame(case.prompt, chat=lm.template is not None)
    made: list[tuple[str, Case]] = []
    if found.words:
        made.append(("case", replace(case, prompt=found.saying(prompts.capitals(found.words)))))
        made.append(("full_stop", replace(case, prompt=found.saying(prompts.full_stop(found.words)))))
        made += [("comment_style", replace(case, prompt=prompt)) for prompt in prompts.styles(found)[:3]]
    made += [("rephrasings", replace(case, prompt=prompt)) for prompt in case.rephrasings]
    return _encoded(lm, [(kind, c) for kind, c in made if c.prompt != case.prompt], stop)


def _encoded(lm: LM, made, stop: str) -> list[Variant]:
    found = []
    for kind, case in made:
        try:
            encoded = lm.encode(case, stop)
            if len(encoded.ids) + 8 <= lm.context:
                found.append(Variant(kind, case, encoded))
        except CaseError:
            continue  # too long for this model, or a target that its tokenizer cannot write there
    return found


def written_right(lm: LM, variants: Sequence[Variant]) -> list[bool]:
    """Whether the present model writes each variant's target, exactly; the line ends of Windows count as line ends.

    By free generation, but for targets that it certainly cannot give (`foretold`): most, and they cost one forward.
    """
    told = foretold(lm, [v.encoded for v in variants], [v.case.target for v in variants])
    right = {i: False for i, holds in enumerate(told) if holds is False}
    asked = [i for i in range(len(variants)) if i not in right]
    for part in alike([len(variants[i].encoded.prompt) for i in asked], BATCH_TOKENS):
        batch = [asked[k] for k in part]
        texts = lm.write_all([variants[i].encoded for i in batch], [variants[i].case for i in batch])
        right |= {i: _plain(t) == _plain(variants[i].case.target) for i, t in zip(batch, texts, strict=True)}
    return [right[i] for i in range(len(variants))]


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n")


def by_kind(variants: Sequence[Variant], right: Sequence[bool]) -> dict[str, dict[str, int]]:
    """{kind: {cases, right}}, in the order in which the kinds come."""
    found: dict[str, dict[str, int]] = {}
    for variant, good in zip(variants, right, strict=True):
        counts = found.setdefault(variant.kind, {"cases": 0, "right": 0})
        counts["cases"] += 1
        counts["right"] += int(good)
    return found
