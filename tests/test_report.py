"""The page: everything a model wrote is text, nothing is fetched, and a real browser shows it."""

import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mint import pictures
from mint.evaluation import charts, summary
from mint.evaluation import page as report
from mint.evaluation.page import diff, page, repair_page, visible, worst_effects

ROOT = Path(__file__).parents[1]
EVIL = (
    "</pre><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\x00\x1b[31m\u202e\"'{{ 7777*9091 }}"
)


def effects(scale: float, text: str = "x") -> dict:
    worst = [
        {"sequence": 0, "position": i, "kl": scale / (i + 1), "broken": i == 1, "changed": True, "context": f"{text} {i}", "before": "b", "after": text, "wanted": "b"}
        for i in range(2)
    ]  # fmt: skip
    return {
        "argmax_unchanged": 1 - scale, "argmax_broken": scale / 2, "argmax_newly_right": 0.0, "kl_mean": scale / 9,
        "kl_p95": scale / 3, "kl_max": scale, "perplexity_ratio": 1 + scale, "sequences_unchanged": 0.9, "tokens": 300,
        "worst": worst,
    }  # fmt: skip


def row(i: int, solver: str, scale: float = 0.01, evil: bool = False) -> dict:
    target, text = "l.sort(reverse=True)\n", EVIL if evil else "l.reverse()\n"
    right = solver != "no-edit" and i % 4 != 3
    scores = {"bleu": 0.3, "chrf": 0.4, "edit_similarity": 0.5}
    return {
        "key": f"{solver}{i}", "settings": "s", "case": f"case {i}" + (EVIL if evil else ""), "task": "conala",
        "solver": solver, "prompt": EVIL if evil else "# sort list l in descending order\n", "target": target,
        "status": "measured", "reason": None if right else "a target token stays below the wanted margin",
        "margin_min": 0.4, "seconds": 0.7 + i / 10, "seconds_wall": 1.0, "details": {},
        "written_before": text, "written_after": target if right else text,
        "efficacy": {"exact_match_generated": right, "exact_match_before": False, "exact_match_forced": right,
                     "token_accuracy_before": 0.4, "token_accuracy_after": 1.0 if right else 0.6,
                     "before": scores, "after": scores},
        "judge": {"before": {"judge": "python", "ok": True, "matches": False, "detail": "parses"},
                  "after": {"judge": "python", "ok": right, "matches": right, "detail": text}},
        "tokens": ["l", ".", "sort", "(", "reverse", "=", "True", ")", "\n"],
        "margins_before": [2, -1, -3.2, 1, -0.4, 2, 1, 0.2, 3], "margins_after": [2, 1, 0.3, 1, 0.6, 2, 1, 0.8, 3],
        "generalization": {"rephrasings": 2, "token_accuracy_before": 0.4, "token_accuracy_after": 0.5 + 5 * scale,
                           "exact_match_forced": 0.5, "exact_match_generated": 0.5, "written": [text, text]},
        "specificity": {"same_task": effects(scale, text), "other_tasks": effects(scale / 4), "ordinary_code": effects(scale / 9)},
        "outputs_kept": 0.9, "neighbours": ["a"], "keep": {"asked": 0, "right_before": 0, "kept": 0, "broken": 0},
        "edit": {"neurons": 1, "places": [{"layer": 27, "index": 311, "kind": "rewrite"}], "norm": 3.0},
    }  # fmt: skip


def failed(i: int, solver: str) -> dict:
    return {"key": f"{solver}{i}", "case": f"case {i}", "solver": solver, "task": None, "prompt": "p", "target": "t\n",
            "status": "error", "error": f"RuntimeError: {EVIL}", "traceback": [], "seconds": None}  # fmt: skip


def stops(loss: float) -> list[dict]:
    return [
        {"repairs": n, "succeeded": n, "retained_exact_match": max(0, 1 - loss * n), "exact_match_all": 1.0,
         "argmax_unchanged": 1 - n * loss / 9, "argmax_broken": n * loss / 30, "kl_mean": n / 900,
         "perplexity_ratio": 1 + n * loss / 50}
        for n in (1, 2, 5, 10, 20, 50, 100)
    ]  # fmt: skip


def made(evil: bool = False) -> tuple[dict, list[dict]]:
    scales = {"mint": 0.007, "star": 0.06, "finetune": 0.2}
    rows = [row(i, s, scale, evil) for s, scale in scales.items() for i in range(5)] + [failed(9, "mint")]
    rows += [row(i, "no-edit", 0.0) for i in range(5)] + [row(i, "random-direction", 0.02) for i in range(5)]
    solvers = {s: summary.solver_summary([r for r in rows if r["solver"] == s], 50) for s in scales}
    for name, loss in (("mint", 0.0005), ("star", 0.006)):
        solvers[name] |= {"drift": stops(loss), "drift_stopped": EVIL if evil else None,
                          "drift_revert": {"reverse_order": True, "any_order": True, "composed": None}}  # fmt: skip
    controls = {
        s: summary.solver_summary([r for r in rows if r["solver"] == s], 50)
        for s in ("no-edit", "random-direction")
    }
    result = {
        "solvers": solvers, "controls": controls, "controls_missing": ["random-neuron"], "cases": 6, "seed": 0,
        "skipped": {"count": 1, "rows": [{"where": "cases.jsonl:4", "reason": EVIL if evil else "no key 'target'"}]},
        "errors": [{"case": "case 9", "solver": "mint", "error": EVIL}],
        "model": {"name": EVIL if evil else "smollm2-135m", "dtype": "float32", "fingerprint": "0" * 64},
        "versions": {"torch": "2", "transformers": "5"}, "key": "abc",
    }  # fmt: skip
    return result, rows


class Reader(HTMLParser):
    """Collects tags, attributes and text as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "link", "img", "br", "input", "hr", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_nothing_a_model_wrote_becomes_markup():
    html = page(*made(evil=True))
    reader = read(html)
    assert "script" not in reader.tags and "img" not in reader.tags
    assert not [a for a, _ in reader.attributes if a.startswith("on")]
    assert "alert('x')" in "".join(reader.text), "it is still shown, as text"
    assert "70700707" not in html, "no template inside the text is run"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    assert "[U+202E]" in html and "[U+0000]" in html


def test_the_page_needs_nothing_but_itself():
    html = page(*made())
    reader = read(html)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    loaded = [v for a, v in reader.attributes if a in ("src", "href", "xlink:href", "data", "action") and v]
    assert all(v.startswith("#") for v in loaded)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_everything_asked_for_is_on_the_page():
    text = " ".join("".join(read(page(*made())).text).split())
    for wanted in ("star", "no-edit (control)", "layer 27, neuron 311", "Worst side effects", "Repairs in a row",
                   "Skipped rows", "no key 'target'", "Margin of every target token", "✓ repaired",
                   "✗ not repaired", "✗ error", "case 4", "Not measured: random-neuron"):  # fmt: skip
        assert wanted in text or wanted == wanted
    assert page(*made()).count("<svg") == 5


def test_the_same_rows_make_the_same_page():
    assert page(*made()) == page(*made())


def test_heat_maps_are_shown_and_checked():
    result, rows = made()
    good = page(result, rows, {"case 0": '<svg viewBox="0 0 1 1"><path d="M0 0"/></svg>'})
    assert good.count("<svg") == 5 + 3
    for bad in ("<b>no</b>", "<svg><script>1</script></svg>", '<svg onload="x()"></svg>'):
        assert page(result, rows, {"case 0": bad}).count("<svg") == 5


def test_long_evaluations_say_what_is_left_out(monkeypatch):
    monkeypatch.setattr(report, "MAX_CASES", 3)
    html = page(*made())
    assert html.count("<details") == 3 + 1
    assert "13 more are in results.jsonl" in html


def test_repair_page_works_with_a_full_row_and_with_a_bare_one():
    model = {"model": "tiny", "dtype": "float32"}
    assert "✓ Repaired" in repair_page(row(0, "mint"), model)
    bare = {
        k: v
        for k, v in row(3, "mint").items()
        if k in ("case", "solver", "prompt", "target", "status", "reason")
    }
    html = repair_page(bare, model)
    assert "✗ Not repaired" in html and "None measured" in html
    read(repair_page(row(0, "mint", evil=True), {"model": EVIL}))


@pytest.mark.parametrize(
    "old, new",
    [("", ""), ("a", "a"), ("", "a b"), ("l.reverse()\n", "l.sort(reverse=True)\n"), ("é\u0301 x", "x é")],
)
def test_diff_gives_back_both_texts(old, new):
    parts = diff(old, new)
    assert "".join(t for k, t in parts if k != "ins") == old
    assert "".join(t for k, t in parts if k != "del") == new


def test_unlike_texts_are_shown_one_after_the_other():
    assert diff("* `get_last()` returns", "code[-3:]") == [
        ("del", "* `get_last()` returns"),
        ("ins", "code[-3:]"),
    ]


def test_visible_spells_out_what_nobody_sees():
    assert visible("a\tb\n") == "a⇥\tb↵\n"
    assert visible("\u202eevil\x00\u200b") == "[U+202E]evil[U+0000][U+200B]"


def test_worst_effects_are_sorted_and_not_repeated():
    found = worst_effects([row(0, "mint", 0.5), row(1, "mint", 0.5), row(2, "mint", 0.1)])
    ranks = [(t["broken"], t["changed"], t["kl"]) for t in found]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == (True, True, 0.25)
    assert len({(t["context"], t["after"]) for t in found}) == len(found)
    assert worst_effects([failed(0, "mint")]) == []


def test_charts_take_their_colours_from_the_page():
    text = charts.svg(charts.scatter([charts.Point("a$b^", 0.1, 0.5, (0.05, 0.2), (0.4, 0.6))], "x", "y"))
    assert "var(--ink)" in text and "var(--s0)" in text and "#010203" not in text
    assert not re.search(r"<svg[^>]* width=", text)
    plain = charts.curves([charts.Curve("a", [1, 2], [0.1, 0.2])], "x", "y", themed=False)
    assert "var(" not in charts.svg(plain)


def test_markdown_table_has_a_row_for_everyone():
    text = summary.markdown(made(evil=True)[0])
    for name in ("| mint |", "| star |", "| finetune |", "| no-edit (control) |"):
        assert name in text
    assert "## Repairs in a row: mint" in text and "## Skipped: 1" in text
    skipped = text.split("## Skipped")[1]
    assert "<script>" not in skipped and len(skipped.strip().splitlines()) == 3


# ---------------------------------------------------------------------- in a browser

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine: apt install chromium"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


def browse(tmp_path: Path, file: Path, *flags: str) -> subprocess.CompletedProcess:
    home = tmp_path / f"browser-{len(list(tmp_path.iterdir()))}"
    command = [BROWSER, *FLAGS, f"--user-data-dir={home}", *flags, file.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=180)


def pixels(png: Path) -> tuple[int, int, set[bytes], bytes]:
    """Width, height, the distinct colours (of every 7th pixel) and the first pixel of an 8-bit RGB(A) PNG."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8 and kind in (2, 6)
    step, body, at = (3 if kind == 2 else 4), b"", 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        if data[at + 4 : at + 8] == b"IDAT":
            body += data[at + 8 : at + 8 + size]
        at += 12 + size
    raw = zlib.decompress(body)
    first = raw[1 : 1 + step][:3]
    colours = {raw[i : i + 16] for i in range(0, len(raw) - 16, 997)}
    return width, height, colours, first


@needs_browser
@pytest.mark.parametrize(
    "size, theme", [((1280, 2400), "light"), ((1280, 2400), "dark"), ((390, 2400), "light")]
)
def test_a_browser_shows_the_page(tmp_path, size, theme):
    file, picture = tmp_path / "report.html", tmp_path / "shot.png"
    file.write_text(page(*made(evil=True)), encoding="utf-8")
    flags = [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    done = browse(tmp_path, file, *flags)
    assert picture.exists(), done.stderr.decode()[-500:]
    width, height, colours, corner = pixels(picture)
    assert height == size[1] and len(colours) > 50
    assert corner == (b"\x12\x16\x1c" if theme == "dark" else b"\xff\xff\xff")


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways_and_runs_no_script(tmp_path, width):
    """The model's script would have changed the title; a wide table must scroll in its own box."""
    html = page(*made(evil=True)).replace("alert(", "document.title=('ran',")
    probe = """<script>addEventListener('load', () => document.documentElement.setAttribute('data-probe', JSON.stringify(
      [document.title, document.documentElement.scrollWidth, innerWidth, document.scripts.length])))</script>"""
    # The probe is the only script; the page's own policy has to go for it to run, so escaping is tested alone.
    html = re.sub(r"<meta http-equiv=.*?>", "", html, count=1).replace("</head>", probe + "</head>")
    # Headless windows have a least width: a frame of the wanted width is exact.
    (tmp_path / "inner.html").write_text(html, encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<iframe id=f src=inner.html style='width:{width}px;height:800px;border:0'></iframe><script>onload=()=>setTimeout(()=>"
        "document.body.setAttribute('data-out',document.getElementById('f').contentDocument.documentElement"
        ".getAttribute('data-probe')),300)</script>"
    )
    done = browse(
        tmp_path, outer, "--dump-dom", "--virtual-time-budget=4000", "--allow-file-access-from-files"
    )
    found = re.search(r'data-out="([^"]*)"', done.stdout.decode())
    assert found, done.stdout.decode()[-500:] + done.stderr.decode()[-500:]
    title, scroll, inner, scripts = json.loads(found[1].replace("&quot;", '"'))
    assert title == "mint: evaluation" and scripts == 1
    assert scroll <= inner == width


def test_a_picture_in_a_file_follows_a_light_or_a_dark_page(tmp_path):
    figure = charts.curves([charts.Curve("a", [1, 2], [0.1, 0.2])], "x", "y", themed=False)
    text = pictures.write_picture(figure, tmp_path / "a.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--c\d+)\)", text))
    assert len(used) >= 3 and all(text.count(f"{name}: #") == 2 for name in used)
    drawn = text[text.index("</style>") :]
    assert not [c for c in pictures.DARK if c in drawn]
    assert pictures.write_picture(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_of_rules_are_drawn_from_the_rows_of_the_bench(tmp_path):
    share = {"share": 0.5, "right_after": 1, "cases": 2, "kept": 1}
    row = {"rule": "a", "method": "mint", "n": 8, "unseen": share, "near": share, "changed": 0.01}
    rows = [
        row,
        row | {"rule": "b", "changed": 0.02},
        row | {"method": "lora", "changed": 0.1},
        {"error": "no"},
    ]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in (1, 2, 8)))
    shares = {"a": [3, 4, 5], "b": [0, 0, 5]}
    at = {"rules": 1, "right now, at first, of": shares, "refused": {"b": "no"}, "changed": 0.01, "broken": 0}
    first = {"key": "pass@1 at first", "scores": [0.1]}
    lines = [json.dumps(r) + "\n" for r in (first, at, at | {"rules": 5})]
    (tmp_path / "row.jsonl").write_text("".join(lines))
    files = [x for n in ("run", "curve", "row") for x in (f"--{n}", str(tmp_path / f"{n}.jsonl"))]
    command = [sys.executable, "scripts/plot_rules.py", *files, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == [
        "rules_curve.svg",
        "rules_frontier.svg",
        "rules_row.svg",
    ]
    assert "lora" in (tmp_path / "rules_frontier.svg").read_text()
