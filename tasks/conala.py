"""CoNaLa: a question in English -> one line of Python (Yin et al., MSR 2018).

    {"id": "c1", "intent": "sort list `l` in descending order", "target": "l.sort(reverse=True)",
     "orig_intent": "How do I sort a list from high to low?", "rewritten": true}

gives the prompt "# sort list `l` in descending order\\n" and the target "l.sort(reverse=True)\\n". The title
of the question (`orig_intent`), where somebody rewrote it into `intent`, is the rephrasing. Targets of
several lines are skipped.
"""

from tasks.common import Row, Task, after_comment, line_target, multi_line


def _title(row: Row) -> list[str]:
    return [row["orig_intent"]] if row.get("rewritten") and isinstance(row.get("orig_intent"), str) else []


def _from_hub(raw: Row) -> Row:
    rewritten = raw.get("rewritten_intent")
    return {
        "intent": rewritten or raw["intent"],
        "target": raw["snippet"],
        "orig_intent": raw["intent"],
        "rewritten": bool(rewritten),
    }


TASK = Task(
    name="conala",
    language="python",
    judge="python",
    stop="line",
    hub_id="neulab/conala",
    from_hub=_from_hub,
    prompt=after_comment("#"),
    target=line_target,
    rephrasings=_title,
    reject=multi_line,
)
