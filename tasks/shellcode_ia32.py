"""Shellcode_IA32: English -> one instruction of 32-bit x86 in NASM syntax (Liguori et al., NLP4Prog 2021).

    {"id": "s1", "intent": "wipe register eax with a xor", "target": "xor eax, eax"}

gives the prompt "; wipe register eax with a xor\\n" and the target "xor eax, eax\\n". Other intents with the same
target are its rephrasings. Rows of several instructions, written on one line with the two characters
backslash and n between them, are skipped; `SEVERAL` is the same task with them.
"""

from dataclasses import replace

from tasks.common import Row, Task, after_comment, line_target, multi_line


def _several(row: Row) -> str | None:
    if "\\n" in row["target"]:
        return "target has several instructions; a line-level task takes one"
    return multi_line(row)


def _from_hub(raw: Row) -> Row:
    return {"intent": raw["intent"], "target": raw["snippet"]}


TASK = Task(
    name="shellcode_ia32",
    language="ia32",
    judge="ia32",
    stop="line",
    hub_id="SoLID/shellcode_i_a32",
    from_hub=_from_hub,
    prompt=after_comment(";"),
    target=line_target,
    share_targets=True,
    reject=_several,
)

SEVERAL = replace(TASK, reject=multi_line)
