"""tldr pages: what an example does -> the bash command, with `{{placeholders}}`. Commands are never run.

    {"id": "t1", "intent": "List the files of an archive", "target": "tar tf {{path/to/file.tar}}",
     "intent_normalized": "list the files of an archive"}

gives the prompt "# List the files of an archive\\n" and the target "tar tf {{path/to/file.tar}}\\n". The
benchmark's wording (`intent_normalized`) is the rephrasing where it differs by more than case and a full stop.
"""

from tasks.common import Row, Task, after_comment, line_target, multi_line


def _normalized(row: Row) -> list[str]:
    other = row.get("intent_normalized")
    return [other] if isinstance(other, str) else []


def _from_hub(raw: Row) -> Row:
    return {"intent": raw["nl"], "target": raw["cmd"]}


TASK = Task(
    name="tldr",
    language="bash",
    judge="bash",
    stop="line",
    hub_id="neulab/tldr",
    from_hub=_from_hub,
    prompt=after_comment("#"),
    target=line_target,
    rephrasings=_normalized,
    reject=multi_line,
)
