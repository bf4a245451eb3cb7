"""Write docs/cli.md, the reference of the command line, from the commands themselves.

python scripts/docs_cli.py            write it
python scripts/docs_cli.py --check    exit code 1 where the page is stale
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
NOTE = "<!-- Made by scripts/docs_cli.py from the command line itself: change the help texts, not this page. -->\n\n"


def page() -> str:
    """The page that typer writes for `mint`, with examples and lists of the help texts set as code."""
    command = [sys.executable, "-m", "typer", "mint.cli.app", "utils", "docs", "--name", "mint"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout
    # Help texts indent what must keep its lines; Markdown keeps them only in a block of its own.
    text = re.sub(
        r"\n((?:  \S.*\n)+)", lambda m: "\n\n```console\n" + re.sub(r"(?m)^  ", "", m[1]) + "```\n", text
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    return NOTE + text.rstrip() + "\n"


def main() -> int:
    """Write the page, or compare it."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
            return 0
        print("docs/cli.md is stale; run: python scripts/docs_cli.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
