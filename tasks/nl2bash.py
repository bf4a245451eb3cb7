"""NL2Bash: a description -> one bash command line (Lin et al., LREC 2018). Commands are never run.

    {"id": "n1", "intent": "Count the lines of notes.txt", "target": "wc -l notes.txt"}

gives the prompt "# Count the lines of notes.txt\\n" and the target "wc -l notes.txt\\n". Other intents with
the same command are its rephrasings.
"""

from tasks.common import Row, Task, after_comment, line_target, multi_line


def _from_hub(raw: Row) -> Row:
    return {"intent": raw["nl"], "target": raw["bash"]}


TASK = Task(
    name="nl2bash",
    language="bash",
    judge="bash",
    stop="line",
    hub_id="jiacheng-ye/nl2bash",
    from_hub=_from_hub,
    prompt=after_comment("#"),
    target=line_target,
    share_targets=True,
    reject=multi_line,
)
