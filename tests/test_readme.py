"""Every command of the README runs, and so does its snippet."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fixture_table
import matplotlib
import plot_results
import pytest
import real_table
from readme_tables import write_table

ROOT = Path(__file__).resolve().parent.parent


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository, so that the commands' `out` is not left in it."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("tests", "Makefile", "quantize.py", "kbvq", "eval", "kernels", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command, folder):
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("script", "results"), [(fixture_table, "fixture"), (real_table, "real")])
def test_results_tables_are_those_of_the_recorded_measurements(script, results):
    recorded = json.loads((ROOT / "docs" / "results" / f"{results}.json").read_text(encoding="utf-8"))
    assert script.readme_table(recorded["results"]) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", [fixture_table, real_table])
def test_table_is_written_between_its_marks_alone(script, tmp_path):
    copy = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    (name,) = re.findall(r'write_table\("(.*?)"', Path(script.__file__).read_text(encoding="utf-8"))
    write_table(name, "| other |", copy)
    before, _, after = copy.read_text(encoding="utf-8").partition("| other |")
    assert text.startswith(before) and text.endswith(after)
    assert before.endswith("-->\n\n") and after.startswith(f"\n\n<!-- end of {name} -->")
    with pytest.raises(ValueError, match="0 tables"):
        write_table("what is not there", "| other |", copy)


def test_picture_is_that_of_the_recorded_measurements(tmp_path):
    ((alternative, name),) = re.findall(r"!\[(.*?)\]\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "KL" in alternative
    picture = ROOT / name
    if f"Matplotlib v{matplotlib.__version__}," not in picture.read_text(encoding="utf-8"):
        pytest.skip("another version of matplotlib drew the picture, and places its parts elsewhere")
    for results in ("fixture", "peers", "real"):
        shutil.copy(picture.with_name(f"{results}.json"), tmp_path)
    assert plot_results.draw(tmp_path).read_bytes() == picture.read_bytes(), "run eval/plot_results.py"


def test_commands_and_snippet(workplace):
    (commands,) = blocks("bash")
    outputs = []
    for line in commands.strip().splitlines():
        command = shlex.split(line, comments=True)
        if command[0] == "make":  # the environment is there already: make must not build it a second time
            command = ["make", "--no-print-directory", "--old-file=.venv/.installed", *command[1:]]
        outputs.append(run(command, workplace))
    demo, quantized, evaluated = outputs
    assert "bits per expert weight" in quantized
    for table in (demo, evaluated):
        assert re.search(r"KL", table) and re.search(r"perplexity", table)
    assert "fixture_cloze" in demo and demo.splitlines()[-1].endswith("out/demo/report.html")
    (snippet,) = blocks("python")
    assert run([sys.executable, "-c", snippet], workplace).startswith("In the beginning God created the")
