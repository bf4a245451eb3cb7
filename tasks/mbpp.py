'''MBPP: a problem statement and one of its tests -> a Python function (Austin et al., 2021).

    {"id": "m1", "intent": "Write a function to double a number.", "target": "def double(n):\\n    return 2 *
    n",
     "test_list": ["assert double(2) == 4", "assert double(0) == 0"], "test_setup_code": ""}

The prompt is a docstring of the statement and the first test, which gives the function's name and arguments:
'"""\\nWrite a function to double a number.\\nassert double(2) == 4\\n"""\\n'. All tests are run. Targets of
more than one function are skipped, since the stop rule `block` ends at the second.
'''

from tasks.common import Row, Task, block_target, not_one_block


def _prompt(row: Row) -> str:
    return f'"""\n{row["intent"].strip()}\n{row["test_list"][0]}\n"""\n'


def _tests(row: Row) -> dict[str, str]:
    setup = row.get("test_setup_code") or ""
    return {"before": setup + "\n" if setup else "", "after": "\n" + "\n".join(row["test_list"]) + "\n"}


def _reject(row: Row) -> str | None:
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        return "test_list must be a list of at least one test"
    return not_one_block(row)


def _from_hub(raw: Row) -> Row:
    return {
        "id": f"mbpp-{raw['task_id']}",
        "intent": raw["text"],
        "target": raw["code"].replace("\r\n", "\n").strip(),
        "test_list": list(raw["test_list"]),
        "test_setup_code": raw.get("test_setup_code") or "",
    }


TASK = Task(
    name="mbpp",
    language="python",
    judge="python_tests",
    stop="block",
    hub_id="google-research-datasets/mbpp",
    from_hub=_from_hub,
    prompt=_prompt,
    target=block_target,
    tests=_tests,
    reject=_reject,
    needs=("test_list",),
)
