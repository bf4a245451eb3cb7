"""Call sites: code counts, strings and comments do not; what is passed over has a reason; near places look like the site."""

import pytest

from mint.errors import CaseError
from mint.rules.sites import MOST_BYTES, MOST_IN_A_FILE, Skipped, files_in, find_sites, read_source

CODE = '''import time
import logging

logger = logging.getLogger("time.time()")


def run(path):
    """Calls time.time() now and then."""
    start = time.time()  # not time.time() here
    mytime.time()
    self.time.time()
    time.sleep(1)
    x = time . time()
    end = time.perf_counter()
    return end - start, time.time_ns()
'''


def found(text, wrong, right, source="a.py", **more):
    return find_sites(text, source, wrong, right, **more)[0]


def places(sites, kind):
    return [(s.line, s.wrong, s.right) for s in sites if s.kind == kind]


def test_python_sites_are_code_never_strings_comments_or_other_names():
    sites = found(CODE, "time.time()", "time.perf_counter()")
    assert places(sites, "wrong") == [
        (9, "time.time()", "time.perf_counter()"),
        (13, "time . time()", "time.perf_counter()"),
    ]
    assert places(sites, "right") == [(14, "time.time()", "time.perf_counter()")]


def test_the_same_opening_going_on_otherwise_is_a_near_place():
    sites = found(CODE, "time.time()", "time.perf_counter()")
    assert [r for _, _, r in places(sites, "other")] == ["time.sleep(1)", "time.time_ns()"]


def test_the_context_is_whole_lines_up_to_the_place():
    (site, *_) = found(CODE, "time.time()", "time.perf_counter()", lines=2)
    assert site.before == 'def run(path):\n    """Calls time.time() now and then."""\n    start = '
    assert CODE.startswith(found(CODE, "time.time()", "time.perf_counter()", lines=50)[0].before)


def test_a_name_stands_for_any_one_argument_and_is_written_again():
    text = 'f = open(path)\ng = open(a[1, 2], "wb")\nh = open(join(b, c))\nk = open(p, encoding="utf-8")\ndef open(x):\n'
    sites = found(text, "open($P)", 'open($P, encoding="utf-8")')
    assert places(sites, "wrong") == [
        (1, "open(path)", 'open(path, encoding="utf-8")'),
        (3, "open(join(b, c))", 'open(join(b, c), encoding="utf-8")'),
    ]
    assert places(sites, "right") == [(4, "open(p)", 'open(p, encoding="utf-8")')]
    assert places(sites, "other") == [(2, "open(a[1, 2])", 'open(a[1, 2], "wb")')]


def test_a_name_at_the_start_of_both_texts_is_the_context():
    sites = found("if x == None:\n    pass\nif y is None: pass\n", "$X == None", "$X is None")
    assert places(sites, "wrong") == [(1, "== None", "is None")]
    assert places(sites, "right") == [(3, "== None", "is None")]


def test_other_methods_of_the_same_receiver_are_near():
    text = "logger.warn('a')\nlogger.info('b')\nthing.stop()\n"
    sites = found(text, ".warn(", ".warning(")
    assert [s.before for s in sites if s.kind == "wrong"] == ["logger"]
    assert [r for _, _, r in places(sites, "other")] == [".info('b')"]


def test_other_names_of_the_same_module_are_near_where_the_texts_share_nothing():
    sites = found("os.system('a')\nx = os.path.join(a)\nsubprocess.run(b)\n", "os.system(", "subprocess.run(")
    assert len(places(sites, "wrong")) == len(places(sites, "right")) == 1
    assert [r for _, _, r in places(sites, "other")] == ["os.path.join(a)"]


def test_a_text_inside_the_other_is_no_site_of_its_own():
    sites = found("x = await go(1)\ny = go(2)\n", "go(", "await go(")
    assert places(sites, "wrong") == [(2, "go(", "await go(")]
    assert places(sites, "right") == [(1, "go(", "await go(")]


def test_other_languages_are_searched_as_text_by_whole_words():
    text = "#!/bin/sh\nx=`which git`\nwhichever git\ny=$(which git)\n"
    sites = found(text, "which git", "command -v git", source="a.sh")
    assert [line for line, _, _ in places(sites, "wrong")] == [2, 4]
    asm = "mov eax, 0\nmov ebx, 0\n"
    assert len(places(found(asm, "mov eax, 0", "xor eax, eax", source="a.asm"), "wrong")) == 1
    assert (
        found("var a = $NAME;\n", "var a = $NAME;", "let a = $NAME;", source="a.js")[0].right
        == "let a = $NAME;"
    )


@pytest.mark.parametrize(
    "wrong, right, match",
    [
        ("time.time()", "time.time()", "are the same text"),
        ("np.prod", "np.product", "'np.product' begins with 'np.prod'; so|begins with"),
        ("", "x", "must not be empty"),
        ("open($P", "open($P, 1)", "has \\$P at its edge"),
        ("f($X)", "g($Y)", "the right text has \\$Y"),
    ],
)
def test_texts_that_make_no_rule_are_one_line(wrong, right, match):
    with pytest.raises(CaseError, match=match):
        found("x = 1\n", wrong, right)


def test_one_file_does_not_make_the_rule():
    sites, beyond = find_sites("x = go(1)\n" * 50, "a.py", "go(", "run(")
    assert len(sites) == MOST_IN_A_FILE and beyond == 50 - MOST_IN_A_FILE
    assert sites[0].line == 1 and sites[-1].line > 40


def test_files_that_cannot_be_used_are_passed_over_with_a_reason(tmp_path):
    made = {
        "binary.py": b"x = 1\0\0",
        "enormous.py": b"#" * (MOST_BYTES + 1),
        "undecodable.py": "x = 'é'".encode("latin-1"),
        "notes.md": b"time.time()",
        "good.py": "x = 'é'\r\n".encode("utf-8-sig"),
    }
    reasons = {}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
        try:
            reasons[name] = read_source(tmp_path / name)
        except Skipped as skipped:
            reasons[name] = f"skipped: {skipped}"
    assert reasons == {
        "binary.py": "skipped: binary",
        "enormous.py": "skipped: enormous",
        "undecodable.py": "skipped: undecodable",
        "notes.md": "skipped: no source code",
        "good.py": "x = 'é'\n",
    }
    with pytest.raises(Skipped, match="no Python|not Python"):
        find_sites("x = (go(1)\n", "a.py", "go(", "run(")


def test_files_are_listed_in_order_without_what_is_excluded(tmp_path):
    for name in ("b/one.py", "a/tests/two.py", "a/three.py", "a/__pycache__/four.py", "five.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    root = tmp_path.name
    assert [n for n, _ in files_in([tmp_path])] == [
        f"{root}/{n}" for n in ("five.py", "a/three.py", "a/tests/two.py", "b/one.py")
    ]
    assert [n for n, _ in files_in([tmp_path], ["tests", "b/*"])] == [f"{root}/five.py", f"{root}/a/three.py"]
    with pytest.raises(CaseError, match="no such folder"):
        list(files_in([tmp_path / "nowhere"]))
