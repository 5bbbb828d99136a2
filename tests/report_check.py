"""The report in headless Chromium: `make report-check` (Debian: apt-get install chromium).

    python tests/report_check.py out/demo/report.html --screenshots out/report

At 1280 and 390 pixels, light and dark: nothing on the console, no scrolling sideways, no identifier twice, every link
of the page leads somewhere, nothing is asked of a network; a screenshot of each. Exits with 1 and says what is wrong.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (1280, 390)
SCHEMES = {"light": 1, "dark": 0}
"""Chromium's numbers for prefers-color-scheme."""

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
).split()

# The page in a frame of the width that is tested: a window is never narrower than some 500 pixels.
_FRAME = """<!DOCTYPE html><html><head>
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"></head>
<body style="margin:0"><iframe id="page" style="border:0;width:{width}px;height:{height}px" src="{source}"></iframe>
<pre id="found"></pre><script>
window.onload = () => {{
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const ids = [...page.querySelectorAll("[id]")].map(element => element.id);
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
    twice: ids.filter((id, index) => ids.indexOf(id) !== index),
    broken: [...page.querySelectorAll("a[href^='#']")].map(link => link.hash.slice(1)).filter(id => !ids.includes(id)),
    outside: page.documentElement.outerHTML.match(/(?:src|href)=["']?https?:[^"'\\s>]+/g) || [],
    ink: getComputedStyle(page.body).color, paper: getComputedStyle(page.body).backgroundColor,
  }});
}};
</script></body></html>"""


def browse(
    browser: str, page: Path, width: int, height: int, scheme: int, *more: str
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += [
            f"--blink-settings=preferredColorScheme={scheme}",
            "--allow-file-access-from-files",
            *more,
            page.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


def check(browser: str, report: Path, screenshots: Path) -> list[str]:
    """What is wrong with the report, a line each; screenshots go to the folder."""
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        for width in WIDTHS:
            height = 1000
            for scheme, number in SCHEMES.items():
                frame.write_text(_FRAME.format(width=width, height=height, source=report.as_uri()), encoding="utf-8")
                done = browse(browser, frame, max(width, 600), 1000, number, "--virtual-time-budget=2000", "--dump-dom")
                where = f"{width} px, {scheme}"
                text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
                if text is None or not text[1]:
                    problems.append(f"{where}: the page did not load")
                    continue
                found = json.loads(html.unescape(text[1]))
                if found["content"] > found["width"]:
                    problems.append(f"{where}: it scrolls sideways, {found['content']} of {found['width']} px")
                problems += [
                    f"{where}: {name} {found[name][:3]}" for name in ("twice", "broken", "outside") if found[name]
                ]
                problems += [f"{where}: console: {line}" for line in done.stderr.splitlines() if "CONSOLE" in line]
                light = [int(part) for part in re.findall(r"\d+", found["paper"])[:3]]
                if (sum(light) > 380) != (scheme == "light"):
                    problems.append(f"{where}: the background is {found['paper']}")
                frame.write_text(
                    _FRAME.format(width=width, height=found["height"], source=report.as_uri()), encoding="utf-8"
                )
                shot = screenshots / f"report-{width}-{scheme}.png"
                browse(browser, frame, width, found["height"], number, f"--screenshot={shot}")
                print(f"{where}: {found['width']} x {found['height']}, {shot}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--screenshots", type=Path, required=True)
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium here; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    options.screenshots.mkdir(parents=True, exist_ok=True)
    problems = check(browser, options.report.resolve(), options.screenshots.resolve())
    print("\n".join(problems) or "nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
