"""A rule's figures on a model: every prompt written behind, before and after an edit, and counted. By generation only.

Knows nothing about how the edit came about.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mint.errors import CaseError
from mint.model.lm import LM, Encoded
from mint.rules.cut import NOT_WRITABLE, TOO_LONG, Cut, Uncuttable, encode_row
from mint.rules.judge import (
    NEAR_TOKENS,
    STATEMENT_TOKENS,
    Ask,
    Judge,
    Share,
    text_of,
    verdict,
    well_formed,
    write,
)
from mint.rules.rule import Row, Rule

_SPARE = 8


@dataclass(frozen=True)
class Prompted:
    """A row that this model's tokenizer can use."""

    row: Row
    cut: Cut

    @property
    def ask(self) -> Ask:
        """What to write behind it: a statement at a fault, so many tokens elsewhere."""
        longest = max(len(self.cut.encoded.target), len(self.cut.wrong_ids))
        if self.row.role == "fault":
            lines = 1 + max((self.row.target or "").count("\n"), (self.row.wrong or "").count("\n"))
            return Ask(self.cut.encoded.prompt, max(STATEMENT_TOKENS, longest + _SPARE), lines)
        most = max(NEAR_TOKENS, longest) if self.row.role == "healthy" else NEAR_TOKENS
        return Ask(self.cut.encoded.prompt, most)


@dataclass(frozen=True)
class Line:
    """What became of one row."""

    row: Row
    before: str
    after: str

    @property
    def right_before(self) -> bool:
        return self.row.target is not None and self.before.startswith(self.row.target)

    @property
    def right_after(self) -> bool:
        return self.row.target is not None and self.after.startswith(self.row.target)

    @property
    def kept(self) -> bool:
        """Near: the same text as before. Healthy: still right where it was."""
        if self.row.role == "healthy":
            return self.right_after or not self.right_before
        return self.after == self.before

    def as_dict(self) -> dict:
        """JSON values."""
        return {
            "id": self.row.id,
            "role": self.row.role,
            "split": self.row.split,
            "source": self.row.source,
            "prompt": self.row.prompt,
            "target": self.row.target,
            "wrong": self.row.wrong,
            "before": self.before,
            "after": self.after,
        }


def lines_of(rows: Sequence[Prompted], before: Sequence[str], after: Sequence[str]) -> tuple[Line, ...]:
    """What became of the rows, from what is written behind each of them."""
    return tuple(Line(p.row, b, a) for p, b, a in zip(rows, before, after, strict=True))


# ---------------------------------------------------------------------- rows


def prepared(lm: LM, rule: Rule) -> tuple[list[Prompted], dict[str, int]]:
    """(the rows that can be used, how many cannot by reason).

    A near row's target is not encoded: what must stay are the model's own tokens. Raises `CaseError` where no fault can
    be used, as with a rule file that was made for another tokenizer.
    """
    found: list[Prompted] = []
    unusable: Counter[str] = Counter()
    for row in rule.rows:
        try:
            if row.role == "near":
                ids = lm.encode_prompt(row.prompt)
                found.append(
                    Prompted(row, Cut(row.prompt, row.target or "", row.wrong, Encoded(tuple(ids), ())))
                )
                continue
            moved, cut = encode_row(lm, row)
            found.append(Prompted(moved, cut))
        except Uncuttable as reason:
            unusable[reason.why] += 1
        except CaseError as error:
            unusable[TOO_LONG if "context" in str(error) else NOT_WRITABLE] += 1
    if not any(p.row.role == "fault" for p in found):
        if not rule.part("fault"):
            raise CaseError(
                f"rule '{rule.name}' has no row of role fault; add prompts at which the model is wrong"
            )
        most = unusable.most_common(1)[0][0]
        raise CaseError(
            f"rule '{rule.name}': none of its {len(rule.part('fault'))} faults can be used with the tokenizer of {lm.name}"
            f" ({most}); was it made for another tokenizer? mine it anew with this model"
        )
    return found, dict(sorted(unusable.items()))


def write_all(
    lm: LM, rows: Sequence[Prompted], progress: Callable[[int], None] = lambda _: None
) -> tuple[list[str], list[list[int]]]:
    """(texts, ids) that the present model writes behind the rows."""
    asks = [p.ask for p in rows]
    ids = write(lm, asks, progress)
    return [text_of(lm, a.prompt, i) for a, i in zip(asks, ids, strict=True)], ids


# ---------------------------------------------------------------------- counting


def count_faults(lines: Sequence[Line], judges: Mapping[str, Judge]) -> dict:
    """Figures of faults: how many are right before and after, adopted apart from avoided, well-formed, judged."""
    said = Counter(verdict(x.after, x.row.target or "", x.row.wrong) for x in lines)
    formed = [well_formed(x.row, x.after) for x in lines]
    share = Share(said["adopted"], len(lines))
    figures: dict = {
        "cases": len(lines),
        "right_before": sum(x.right_before for x in lines),
        "right_after": said["adopted"],
        "share": share.value,
        "interval": list(share.interval) if share.interval else None,
        "avoided": said["avoided"],
        "wrong": said["wrong"],
        "statements": sum(f is not None for f in formed),
        "well_formed": sum(f is True for f in formed),
    }
    if judges:
        figures["judges"] = {
            name: {
                "passed_before": sum(judge(x.row, x.before) for x in lines),
                "passed_after": sum(judge(x.row, x.after) for x in lines),
            }
            for name, judge in judges.items()
        }
    return figures


def count_kept(lines: Sequence[Line]) -> dict:
    """Figures of near or healthy rows: how many are kept, in all and by the side of the split."""

    def one(part: Sequence[Line]) -> dict:
        share = Share(sum(x.kept for x in part), len(part))
        interval = list(share.interval) if share.interval else None
        return {"cases": len(part), "kept": share.right, "share": share.value, "interval": interval}

    by_split = {split: one([x for x in lines if x.row.split == split]) for split in ("learn", "unseen")}
    return one(lines) | {k: {"cases": v["cases"], "kept": v["kept"]} for k, v in by_split.items()}
