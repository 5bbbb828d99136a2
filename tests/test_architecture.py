"""Imports point down, and what must not be imported is not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEVELS = [
    ("errors", "structures", "recipes"),
    ("codes",),
    ("method",),
    ("models",),
    ("storage",),
    ("quantization", "serving"),
    ("reporting",),
    ("cli", "__main__", "__init__"),
]
"""Files and folders of kbvq; imports stay within a room or point to an earlier one."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TORCH_ALONE = {name for names in LEVELS[:3] for name in names}
SOURCES = sorted((ROOT / "kbvq").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "kbvq").parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports at its top level, e.g. "torch" or "kbvq.errors"."""
    modules = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = node.module == "kbvq"
            modules |= {f"kbvq.{alias.name}" for alias in node.names} if own else {str(node.module)}
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "kbvq")))
def test_imports_point_down(path):
    modules = imported_modules(path)
    for module in modules:
        if module.startswith("kbvq."):
            other = module.split(".")[1]
            assert LEVEL[other] <= LEVEL[room(path)], f"{path} imports {module} above it"
            assert other == room(path) or LEVEL[other] < LEVEL[room(path)] or LEVEL[other] == 0, (
                f"{path} imports {module} of the room beside it"
            )
    if room(path) in TORCH_ALONE:
        foreign = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
        # of kbvq_kernels the searches compiled for the CPU (kbvq.codes)
        assert foreign <= {"torch", "kbvq", "kbvq_kernels", "safetensors", "tqdm"}


def test_kernels_and_evaluation_stay_on_their_side():
    for path in (ROOT / "kernels" / "kbvq_kernels").glob("*.py"):
        assert not any(module.partition(".")[0] == "kbvq" for module in imported_modules(path)), path
    for path in SOURCES:
        assert not any(module.startswith("kbvq_eval") for module in imported_modules(path)), path


def test_folders_that_would_shadow_libraries_are_no_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()


def test_import_touches_neither_triton_nor_cuda():
    code = "import sys, torch, kbvq; assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
