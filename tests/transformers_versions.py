"""A selection of the tests with the transformers versions that kbvq supports: the oldest, that of the GPU machines, the
newest.

    python tests/transformers_versions.py [VERSION ...] [--environments FOLDER]

Each version gets an environment of its own, made once, which sees the packages of this one behind its own: torch is not
installed again. Prints a line for each version; the exit status is 1 where a test failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VERSIONS = ("5.4.0", "5.17.0", "5.23.0")

SELECTION = ("test_loading", "test_hf", "test_moe_adapters", "test_layer_stream", "test_families")
"""What touches transformers: loading, the names of layers and experts, reading a checkpoint layer by layer."""

DECODES_SOURCES = (5, 17)
"""From then on transformers itself decodes FP8 and MXFP4 on a CPU, and test_quantized_sources compares with that."""


def environment(folder: Path, version: str) -> Path:
    """The interpreter of an environment with that version, made if it is not there."""
    python = folder / version / "bin" / "python"
    if not python.exists():
        venv.create(folder / version, with_pip=True)
        purelib = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(purelib) / "zz_behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={version}"], check=True)
    return python


def run(python: Path, version: str) -> str:
    """The last line of pytest."""
    names = [*SELECTION]
    if tuple(map(int, version.split(".")[:2])) >= DECODES_SOURCES:
        names.append("test_quantized_sources")
    tests = [ROOT / "tests" / f"{name}.py" for name in names]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # Processes that tests start find kbvq there: an editable install lies behind another environment unseen.
    sources = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "eval"))
    variables = os.environ | {"PYTHONPATH": sources, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout)
    return done.stdout.strip().rpartition("\n")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-transformers")
    options = parser.parse_args()
    failed = False
    for version in options.versions:
        last = run(environment(options.environments, version), version)
        failed |= "passed" not in last or "failed" in last or "error" in last
        print(f"transformers {version}: {last}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
