"""Data sets as cases, one file each; `TASKS` lists them. `python -m tasks` writes case files."""

from tasks import conala, humaneval, mbpp, nl2bash, shellcode_ia32, tldr
from tasks.common import Loaded, Skipped, Task

TASKS: dict[str, Task] = {
    "conala": conala.TASK,
    "shellcode_ia32": shellcode_ia32.TASK,
    "nl2bash": nl2bash.TASK,
    "tldr": tldr.TASK,
    "humaneval": humaneval.TASK,
    "mbpp": mbpp.TASK,
}

__all__ = ["TASKS", "Loaded", "Skipped", "Task"]
