"""Prompts as text: frames, hosts, wordings, near misses. No model."""

import pytest

from mint import prompts
from mint.case import Case


@pytest.mark.parametrize(
    ("prompt", "words", "mark"),
    [
        ("# sort the list\n", "sort the list", "#"),
        ("## sort the list\n", "sort the list", "#"),
        ("x = 1\n    # sort the list", "sort the list", "#"),
        ("// sort the list\n", "sort the list", "//"),
        ("/* sort the list */\n", "sort the list", "//"),
        ("; move eax\n", "move eax", ";"),
        ("-- pick all rows\n", "pick all rows", "--"),
        ('"""Sort the list."""\n', "Sort the list.", '"""'),
        ("def f(x):\n    return", "", ""),
    ],
)
def test_frame_finds_the_words_and_loses_nothing(prompt, words, mark):
    found = prompts.frame(prompt)
    assert (found.words, found.mark) == (words, mark)
    assert found.lead + found.words + found.tail == prompt


def test_frame_of_a_docstring_takes_its_first_line():
    prompt = 'def clamp(x):\n    """Return x, but not below zero.\n\n    >>> clamp(-1)\n    0\n    """\n'
    found = prompts.frame(prompt)
    assert found.words == "Return x, but not below zero."
    assert found.saying("Print x.") == prompt.replace("Return x, but not below zero.", "Print x.")


def test_frame_of_a_conversation_lies_between_the_markers():
    prompt = "<|im_start|>user\nHow do I sort a list?<|im_end|>\n<|im_start|>assistant\n"
    found = prompts.frame(prompt)
    assert found.words == "How do I sort a list?" and found.chat
    assert found.lead + found.words + found.tail == prompt
    assert prompts.frame("How do I sort a list?", chat=True).words == "How do I sort a list?"


def test_wordings_keep_the_frame():
    found = prompts.frame("x = 1\n    # sort the list\n")
    assert found.saying(prompts.capitals(found.words)) == "x = 1\n    # Sort the list\n"
    assert found.saying(prompts.full_stop("sort it.")) == "x = 1\n    # sort it\n"
    styles = prompts.styles(found)
    assert styles[:3] == [
        "x = 1\n    ## sort the list\n",
        'x = 1\n    """sort the list"""\n',
        "x = 1\n    // sort the list\n",
    ]


def test_indentation_reaches_prompt_and_target():
    case = Case("a", "# sort it\n", "if x:\n    x.sort()\n")
    inside = prompts.behind(case, "def f(x):\n    x = g(x)", gap="\n", indent="    ")
    assert inside.prompt == "def f(x):\n    x = g(x)\n    # sort it\n"
    assert inside.target == "    if x:\n        x.sort()\n"
    code = prompts.behind(Case("b", "return ", "(\n    1)\n"), "def f():", gap="\n", indent="    ")
    assert (code.prompt, code.target) == ("def f():\n    return ", "(\n        1)\n")


def test_tabs_and_line_ends():
    case = Case("a", "def f():\n    # go\n", "    run()\n")
    tabs = prompts.with_tabs(case)
    assert (tabs.prompt, tabs.target) == ("def f():\n\t# go\n", "\trun()\n")
    assert prompts.with_crlf(case).target == "    run()\r\n"


@pytest.mark.parametrize("speech", prompts.LANGUAGES)
def test_hosts_for_learning_and_measuring_share_no_line(speech):
    lines = {}
    for which in prompts.SETS:
        found = prompts.hosts(which, speech)
        assert set(found) >= {"imports", "function", "pair", "in_function", "in_class", "filler"}
        text = "\n".join(t for texts in found.values() for t in texts)
        lines[which] = {line.strip() for line in text.split("\n") if len(line.strip()) > 20}
    assert not lines["learn"] & lines["measure"]


def test_hosts_of_an_unknown_set_are_refused():
    with pytest.raises(ValueError, match="known are"):
        prompts.hosts("test", "python")


def test_near_misses_for_learning_and_measuring_are_disjoint():
    case = Case(
        "a", "# sort the list in ascending order\n", "x.sort()\n", rephrasings=("# reverse the list\n",)
    )
    learn, measure = (
        prompts.near_misses(case, which, exchanges=50, intents=5) for which in ("learn", "measure")
    )
    assert "# sort the list in descending order\n" in learn
    assert len(measure) > 5 and not set(learn) & set(measure)
    assert case.prompt not in learn + measure and case.rephrasings[0] not in learn + measure
    assert all(p.startswith("# ") and p.endswith("\n") for p in learn + measure)
    assert learn == prompts.near_misses(case, "learn", exchanges=50, intents=5)


def test_near_misses_of_code_exchange_within_the_last_line():
    case = Case("a", "first = 1\nx = first(rows", ")[0]\n")
    found = prompts.near_misses(case, "learn", exchanges=9, intents=3)
    assert found and all(p.startswith("first = 1\nx = ") for p in found)


@pytest.mark.parametrize(
    ("prompt", "target", "speech"),
    [
        ("# sort it\n", "x.sort()\n", "python"),
        ("# pack it\n", "tar -czf a.tgz a\n", "shell"),
        ("; zero\n", "xor eax, eax\n", "asm"),
        ("// zero\n", "x = 0;\n", "c"),
    ],
)
def test_language(prompt, target, speech):
    assert prompts.language(prompts.frame(prompt), target) == speech


def test_a_prompt_to_fill_in_keeps_its_markers_outside():
    prompt = "<|fim_prefix|># sort the list\n<|fim_suffix|>\nprint(x)\n<|fim_middle|>"
    found = prompts.frame(prompt)
    assert (found.words, found.mark, found.chat) == ("sort the list", "#", False)
    assert found.saying("sort the list.") == prompt.replace("list\n", "list.\n")
    assert prompts.styles(found)[0] == prompt.replace("# sort", "## sort")
    inside = prompts.behind(Case("a", prompt, "x.sort()"), "def f(x):", gap="\n", indent="    ")
    assert inside.prompt == (
        "<|fim_prefix|>def f(x):\n    # sort the list\n<|fim_suffix|>\n    print(x)\n<|fim_middle|>"
    )
    assert inside.target == "    x.sort()"


def test_a_prompt_to_fill_in_within_a_line_goes_on_in_that_line():
    case = Case("a", "<fim_prefix>x = <fim_suffix>\n<fim_middle>", "1")
    assert (
        prompts.behind(case, "import re").prompt == "<fim_prefix>import re\n\nx = <fim_suffix>\n<fim_middle>"
    )
    assert prompts.behind(case, "if y:", gap="\n", indent="    ").target == "1"
