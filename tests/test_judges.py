"""Judges on right and wrong code, and attacks on the sandbox."""

import json
import os
import shutil

import pytest

from mint.errors import CaseError, MintError
from mint.measure import judges, sandbox
from mint.measure.judges import judge, judge_ia32, load_tests, load_tests_beside
from mint.measure.sandbox import run_python

TOOLS = [
    pytest.param("nasm", marks=pytest.mark.skipif(not shutil.which("nasm"), reason="nasm is not installed")),
    "keystone",
]


def test_unknown_judge_lists_the_known_and_the_nearest():
    with pytest.raises(MintError, match="unknown judge 'pyhton'; known are .*; did you mean 'python'"):
        judge("pyhton", "x")


# --- python and bash ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["l.sort(reverse=True)\n", "return x", "x = '\\d'", "f(lambda a: a)"])
def test_python_lines_parse(text):
    assert judge("python", text).ok


@pytest.mark.parametrize(
    "text", ["l.sort(reverse=True", "", "# only a comment", "x = \0", "print 'x'", "  x = 1", "(" * 5000]
)
def test_python_faults_are_found_and_never_raise(text):
    found = judge("python", text, "x = 1")
    assert not found.ok and found.detail.startswith("syntax") and found.matches_expected is False


def test_python_match_ignores_layout_and_quotes_but_not_names():
    assert judge("python", 'f( "a" )  # c', "f('a')").matches_expected is True
    assert judge("python", "f('b')", "f('a')").matches_expected is False
    assert judge("python", "f('b')").matches_expected is None
    assert judge("python", "x", "x (").matches_expected is None


@pytest.mark.parametrize(
    "text",
    [
        "find . -name '*.py' -exec grep -l x {} \\;",
        'for f in *; do echo "$f"; done',
        "tar xf {{path/to/file with space.tar}}",
        "a | b && c > out 2>&1",
        "cat <<E\nhi\nE\n",
        "docker run {{image}}:{{tag}} -v {{a|b}}",
        "echo ${x:-{{default}}}",
    ],
)
def test_bash_lines_parse(text):
    assert judge("bash", text).ok


@pytest.mark.parametrize(
    "text", ["echo 'open", "for f in *; do echo", "ls | | wc", "echo $(", "if true; fi", "", "# note", ")"]
)
def test_bash_faults_are_found(text):
    found = judge("bash", text, "ls")
    assert not found.ok and found.detail.startswith("syntax") and found.matches_expected is False


def test_bash_never_runs_what_it_judges(tmp_path):
    witness = tmp_path / "witness"
    assert judge("bash", f"touch {witness}; $(touch {witness})").ok
    assert not witness.exists()


def test_bash_match_ignores_spaces_between_words_only():
    assert judge("bash", "ls  -l   x\n", "ls -l x").matches_expected is True
    assert judge("bash", "echo 'a  b'", "echo 'a b'").matches_expected is False
    assert judge("bash", 'echo "a  b"', 'echo "a b"').matches_expected is False
    assert judge("bash", "cp {{a}} {{b}}", "cp {{b}} {{a}}").matches_expected is False
    assert judge("bash", "a && b", "a || b").matches_expected is False
    assert judge("bash", "ls", "ls (").matches_expected is None


# --- ia32 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("xor eax, eax", "XOR EAX,EAX ; clear", True),
        ("mov al, 11", "mov al, 0xb", True),
        ("mov al, 0bh", "mov al, 0xb", True),
        ("mov al, 10", "mov al, 0x10", False),
        ("int 80h", "int 0x80", True),
        ("jmp short decoder", "jmp short decoder", True),
        ("jne next_byte", "jne last_byte", False),
        ("xor eax, eax \\n push eax", "xor eax, eax\npush eax", True),
        ("mov byte [esi+4], al", "mov [esi + 4], al", True),
        ("push eax", None, None),
    ],
)
def test_ia32_compares_bytes(tool, text, reference, same):
    found = judge_ia32(text, reference, tool=tool)
    assert found.ok and found.matches_expected is same, found


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "text", ["mvo eax, 1", "mov eax", "push eax eax", "hello world here", "", "\0\ud800"]
)
def test_ia32_faults_are_found(tool, text):
    found = judge_ia32(text, "push eax", tool=tool)
    assert not found.ok and found.matches_expected is False


@pytest.mark.parametrize("tool", TOOLS)
def test_ia32_reads_quoted_text_as_nasm_does(tool):
    for text, same in [
        ("msg: db 'ab', 0xa", "db 0x61, 0x62, 0x0a"),
        ("mov eax, 'abcd'", "mov eax, 0x64636261"),
        ('x: dd "abcde"', "db 0x61, 0x62, 0x63, 0x64, 0x65, 0, 0, 0"),
    ]:
        assert judge_ia32(text, same, tool=tool).matches_expected is True, text


@pytest.mark.skipif(not shutil.which("nasm"), reason="nasm is not installed")
def test_ia32_known_bytes_and_texts_without_bytes():
    assert judge("ia32", "mov eax, 1").detail == "assembles (5 bytes)"
    assert judge("ia32", "msg: db 'ab', 0xa").detail == "assembles (3 bytes)"
    assert judge("ia32", "size equ 5", "size  EQU 5").matches_expected is True
    assert judge("ia32", "size equ 5", "size equ 6").matches_expected is False
    assert not judge("ia32", "mov eax, [").ok  # keystone takes it
    assert not judge("ia32", "garbage").ok  # nasm alone would take it for a label
    assert judge("ia32", "push eax", "bad bad bad").matches_expected is None


@pytest.mark.parametrize(
    "text",
    [
        "incbin '/etc/passwd'",
        "%include '/etc/passwd'",
        "times (1<<30) db 0",
        "resb 999999999",
        "%rep 9\n%endrep",
    ],
)
def test_ia32_refuses_directives_that_read_files_or_never_end(text):
    found = judge("ia32", text, "push eax")
    assert not found.ok and found.detail.startswith("refused")


def test_ia32_without_an_assembler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(judges.shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "keystone", None)
    with pytest.raises(
        MintError, match=r"without the program nasm, needs keystone-engine.*mint-repair\[judges\]"
    ):
        judge("ia32", "push eax")


# --- tests run in the sandbox -------------------------------------------------------------------------------


def test_python_tests_pass_and_fail():
    options = {"before": "def f(x):\n", "after": "\nassert f(2) == 4\n"}
    right = judge("python_tests", "    return 2 * x\n", "    return  2*x\n", **options)
    assert right.ok and right.detail == "passed" and right.matches_expected is True
    wrong = judge("python_tests", "    return x\n", "    return 2 * x\n", **options)
    assert not wrong.ok and wrong.detail == "assertion" and wrong.matches_expected is False
    assert judge("python_tests", "  return (\n", **options).detail.startswith("syntax")
    assert judge("python_tests", "    return y\n", **options).detail.startswith("NameError")


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = [0] * 10**10", "memory"),
        ("open('f', 'wb').write(b'x' * 10**8)", "file size"),
        ("import socket; socket.socket()", "blocked: socket"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:1')", "URLError"),
        ("import os; os.fork()", "blocked: os.fork"),
        ("import os; os.system('true')", "blocked: os.system"),
        ("import subprocess; subprocess.run(['true'])", "blocked: subprocess"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGTERM)", "blocked: os.kill"),
        ("import ctypes; ctypes.CDLL(None)", "blocked: ctypes"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "blocked: resource"),
        ("import sys; sys.exit(0)", "exited early"),
        ("import os; os._exit(0)", "exited early"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("def f(:", "syntax"),
        ("x = '\ud800'", "syntax"),
        ("import shutil; shutil.rmtree('/')", "blocked: shutil"),
    ],
)
def test_attacks_do_not_pass(program, detail):
    found = run_python(program, seconds=2 if detail == "timeout" else 30)
    assert not found.passed and detail in found.detail, found


def test_writing_outside_the_working_folder_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for attack in ("open({0!r}, 'w')", "import os; os.remove({0!r})", "import os; os.rename({0!r}, 'x')"):
        found = run_python(attack.format(str(victim)))
        assert found.detail.startswith("blocked")
    assert victim.read_text() == "kept"
    assert run_python("open('own', 'w').write('x'); import os; os.remove('own')").passed


PROGRAMS_THAT_WRITE = {
    "sqlite": "import sqlite3; sqlite3.connect({0!r}).execute('create table t (x)')",
    "attach": "import sqlite3; c = sqlite3.connect(':memory:'); c.execute('attach ? as o', ({0!r},));"
    " c.execute('create table o.t (x)')",
    "mknod": "import os; os.mknod({0!r})",
    "mkfifo": "import os; os.mkfifo({0!r})",
    "posix": "import posix; posix.mkfifo({0!r})",
    "gdbm": "import dbm.gnu; dbm.gnu.open({0!r}, 'c')",
    "ndbm": "import dbm.ndbm; dbm.ndbm.open({0!r}, 'c')",
}


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("name", PROGRAMS_THAT_WRITE)
def test_no_library_writes_outside_the_working_folder(tmp_path, monkeypatch, name, confined):
    """With Landlock, whoever opens the file; without, what writes behind the audit hooks is refused as a whole."""
    if confined and not sandbox.landlock():
        pytest.skip("no Landlock here")
    if not confined:
        monkeypatch.setattr(sandbox, "_CHILD", without_landlock(tmp_path))
    folder = tmp_path / "outside"
    folder.mkdir()
    found = run_python(PROGRAMS_THAT_WRITE[name].format(str(folder / "new")))
    assert not found.passed and os.listdir(folder) == [], found


def without_landlock(tmp_path):
    """The child as it runs where the kernel has no Landlock."""
    text = sandbox._CHILD.read_text().replace(
        "_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444",
        "_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 1444",
    )
    copy = tmp_path / "child.py"
    copy.write_text(text)
    return copy


@pytest.mark.parametrize(
    "attack",
    [
        "import os; os.setxattr({0!r}, 'user.x', b'1')",
        "import os; os.setxattr(os.open({0!r}, os.O_RDONLY), 'user.x', b'1')",
        "import os; os.chmod({0!r}, 0)",
        "import os; os.fchmod(os.open({0!r}, os.O_RDONLY), 0)",
        "import os; os.chmod({2!r}, 0, dir_fd=os.open({1!r}, os.O_RDONLY))",
        "import os; os.utime({2!r}, (0, 0), dir_fd=os.open({1!r}, os.O_RDONLY))",
        "import os; os.remove({2!r}, dir_fd=os.open({1!r}, os.O_RDONLY))",
    ],
)
def test_attributes_of_files_outside_stay(tmp_path, attack):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    before = victim.stat()
    found = run_python(attack.format(str(victim), str(tmp_path), victim.name))
    assert found.detail.startswith("blocked"), found
    after = victim.stat()
    assert (before.st_mode, before.st_mtime, before.st_ctime) == (
        after.st_mode,
        after.st_mtime,
        after.st_ctime,
    )


@pytest.mark.parametrize("confined", [True, False])
def test_files_inside_the_working_folder_are_a_programs_own(tmp_path, monkeypatch, confined):
    program = (
        "import os\nos.mkdir('a'); open('a/x', 'w').write('1'); os.rename('a/x', 'y'); os.chmod('y', 0o600)\n"
    )
    program += (
        "assert open('y').read() == '1'; os.remove('y'); os.rmdir('a'); open('/dev/null', 'w').write('x')\n"
    )
    if not confined:
        monkeypatch.setattr(sandbox, "_CHILD", without_landlock(tmp_path))
    elif sandbox.landlock():
        program += "import sqlite3; sqlite3.connect('own.db').execute('create table t (x)'); os.mkfifo('f')\n"
    assert run_python(program).passed


def test_the_sandbox_says_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(sandbox, "landlock", lambda: 0)
    assert "no Landlock in the kernel" in sandbox.weakness()
    monkeypatch.setattr(sandbox, "landlock", lambda: 3)
    monkeypatch.setattr(sandbox, "isolation", lambda: ())
    assert "no namespaces" in sandbox.weakness() and "Landlock" not in sandbox.weakness()
    monkeypatch.setattr(sandbox, "isolation", lambda: ("unshare",))
    assert sandbox.weakness() is None


def test_a_forged_verdict_does_not_pass():
    # The program sees /dev/null as its output and does not know the word that marks a verdict.
    assert not run_python("import os; os.write(1, b'passed\\n'); os._exit(0)").passed


def test_much_output_and_threads_left_behind_do_no_harm():
    assert run_python("print('x' * 10**7)").passed
    assert run_python(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"
    ).passed


def test_ordinary_imports_work():
    names = "re, math, collections, heapq, itertools, random, datetime, decimal, functools, typing, enum"
    assert run_python(f"import {names}\nP = collections.namedtuple('P', 'a b')\nassert P(1, 2).b == 2").passed


def test_environment_of_the_caller_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("MINT_TEST_SECRET", "s")
    assert run_python("import os; assert 'MINT_TEST_SECRET' not in os.environ").passed


@pytest.mark.skipif(not sandbox.isolation(), reason="this system may not make namespaces")
def test_no_network_interface_but_loopback_is_seen():
    assert run_python(
        "names = open('/proc/self/net/dev').read()\nassert 'eth' not in names and names.count(':') <= 1"
    ).passed


def test_limits_hold_without_namespaces(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: ())
    assert run_python("x = 1").passed
    assert run_python("while True: pass", seconds=1).detail == "timeout"
    assert run_python("x = [0] * 10**10").detail == "memory"
    assert run_python("import socket; socket.socket()").detail.startswith("blocked")


def test_working_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run_python("open('left', 'w').write('x')").passed
    assert os.listdir(tmp_path) == []


# --- files of tests -----------------------------------------------------------------------------------------


def test_tests_file_is_read_by_id(tmp_path):
    path = tmp_path / "c.tests.jsonl"
    path.write_text(json.dumps({"id": "a", "before": "x", "after": "y"}) + "\n")
    assert load_tests(path) == {"a": {"before": "x", "after": "y"}}
    assert load_tests_beside(tmp_path / "c.jsonl") == load_tests(path)
    assert load_tests_beside(tmp_path / "d.jsonl") is None


def test_bad_tests_file_is_one_clear_line(tmp_path):
    path = tmp_path / "c.tests.jsonl"
    path.write_text('{"id": "a", "before": "x"}\n')
    with pytest.raises(CaseError, match=":1: expected an object with the texts id, before and after"):
        load_tests(path)
    row = json.dumps({"id": "a", "before": "x", "after": "y"}) + "\n"
    path.write_text(row * 2)
    with pytest.raises(CaseError, match=":2: id 'a' was used before"):
        load_tests(path)
