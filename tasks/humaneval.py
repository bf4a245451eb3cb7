'''HumanEval: signature and docstring -> the body of one Python function (Chen et al., 2021).

    {"id": "h1", "intent": "def double(n: int) -> int:\\n    """Twice n."""\\n", "target": "    return 2 * n",
     "entry_point": "double", "test": "def check(candidate):\\n    assert candidate(2) == 4\\n"}

The prompt is the intent as it is; the target is the body with one newline at its end, which is also where the
stop rule `block` cuts. The tests run as prompt + text + test + `check(entry_point)`. Bodies that are more
than one block (helper functions behind them) are skipped.
'''

from tasks.common import Row, Task, block_target, not_one_block


def _tests(row: Row) -> dict[str, str]:
    return {"before": row["intent"], "after": f"\n{row['test']}\ncheck({row['entry_point']})\n"}


def _from_hub(raw: Row) -> Row:
    return {
        "id": raw["task_id"],
        "intent": raw["prompt"],
        "target": raw["canonical_solution"].rstrip(),
        "entry_point": raw["entry_point"],
        "test": raw["test"],
    }


TASK = Task(
    name="humaneval",
    language="python",
    judge="python_tests",
    stop="block",
    hub_id="openai/openai_humaneval",
    from_hub=_from_hub,
    prompt=lambda row: row["intent"],
    target=block_target,
    tests=_tests,
    reject=not_one_block,
    needs=("entry_point", "test"),
)
