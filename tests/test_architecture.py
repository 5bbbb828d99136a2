"""Imports point down, and what must not be imported is not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEVELS = [
    {"errors", "structures", "recipes"},
    {"kmeans", "bit_budget", "rate_distortion", "packing", "trellis"},
    {"shared_basis", "codebooks", "error_feedback", "vector_quantization", "bias_correction", "residual_quantization",
     "grouped_residual", "rq_moe", "projection"},
    {"moe_adapters", "layer_stream", "calibration_text", "expert_forward", "calibration", "packed_experts",
     "sensitivity"},
    {"block_tuning", "distillation", "planning", "layer_quantization", "checkpoint", "pipeline"},
    {"hf", "cli", "__init__"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TORCH_ALONE = {name for names in LEVELS[:3] for name in names}


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


@pytest.mark.parametrize("path", sorted((ROOT / "kbvq").glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path):
    modules = imported_modules(path)
    for module in modules:
        if module.startswith("kbvq."):
            assert LEVEL[module.removeprefix("kbvq.")] <= LEVEL[path.stem], f"{path.stem} imports {module} above it"
    if path.stem in TORCH_ALONE:
        foreign = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "kbvq", "safetensors", "tqdm"}


def test_kernels_and_evaluation_stay_on_their_side():
    for path in (ROOT / "kernels" / "kbvq_kernels").glob("*.py"):
        assert not any(module.partition(".")[0] == "kbvq" for module in imported_modules(path)), path
    for path in (ROOT / "kbvq").glob("*.py"):
        assert not any(module.startswith("kbvq_eval") for module in imported_modules(path)), path


def test_folders_that_would_shadow_libraries_are_no_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()


def test_import_touches_neither_triton_nor_cuda():
    code = "import sys, torch, kbvq; assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
