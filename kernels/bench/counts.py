"""The ceilings of decode_kernel with all that its programs execute. Run: python kernels/bench/counts.py

ceilings.py counts the inner loop. Here one program of each launch is executed from its PTX, at the real widths of a
model, by the emulator of tests/kernels, which counts: the copies of the tables, the addresses, the sums over warps and
the epilogue, the last step of a row that is not full. The program has all columns of its rows: nothing is extrapolated.

PTX is not what a GPU executes. Of the emulator's counts the number of passes through the loop, and how much of the code
outside it a warp executes, are also those of the machine code; so that the instructions of the machine code are

    passes * instructions in the loop + instructions outside * executed share of the PTX outside

"Whole / loop" is what a weight costs in the whole program over what it costs in a full pass of the loop, in PTX and in
machine code; the ceiling takes the larger. Cycles of L1 cache and shared memory are the emulator's own, for loads and
stores are the same in PTX and in machine code. HBM reads the scales and biases of rows, too. Nothing here was timed,
latency is not in it, and neither are the kernels around (align_kernel, combine_kernel).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/kernels"), str(ROOT / "kernels")]
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)

import ceilings  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from emulate import commit  # noqa: E402
from ptx_emulator.launches import Emulator  # noqa: E402
from synthetic import FORMATS, SHAPES, CodeFormat, ExpertShape, random_tensors  # noqa: E402

from kbvq_kernels import aot, prepare  # noqa: E402

CODES = (*FORMATS[:2], CodeFormat("2b trellis", "trellis", 1, 4), CodeFormat("3b trellis", "trellis", 1, 8))

QWEN, MIXTRAL = SHAPES[0], SHAPES[2]
CALLS = (
    (QWEN, "pairs", 1, 1.0),
    (QWEN, "blocks", 16, ceilings.PATHS[1][-1]),
    (MIXTRAL, "pairs", 1, 1.0),
    (MIXTRAL, "blocks", 16, 8.0),
)
"""(model, path, tokens of the call, tokens of an expert): those of ceilings.py, and one token of Qwen3-30B-A3B."""

HEAD = """# Ceilings of whole programs

Made by `python kernels/bench/counts.py`, which says how; nothing was timed. One program of each launch, executed from
its PTX at the real widths; sm_90, bfloat16 hidden states, no low-rank part. instructions/weight: of the machine code,
as in kernels/README.md. a -> b: from the inner loop alone, and from the whole program. "both": gate, up and down by
their shares of the weights. A row that is one step has no loop.

Triton {triton}, commit {commit}

{columns}
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


COLUMNS = (
    "| format | model | tokens | projection | passes | whole / loop, PTX | machine code | instructions/weight | HBM "
    "| L1 | issue | ceiling, loop | ceiling, whole |"
)


@dataclass(frozen=True)
class Counted:
    """A projection. Instructions are of a warp, for a weight: in the whole program, and in a full pass of the loop.

    weights: of one program. passes: of a warp through the loop, 0 without one. l1: cycles of the unit for a weight.
    before: speed-ups by resource from the loop alone, None without one. after: from the whole program.
    """

    weights: float
    passes: float
    ptx: tuple[float, float]
    machine: tuple[float, float]
    l1: float
    before: dict[str, float] | None
    after: dict[str, float]


def with_tensors(entry: aot.Launch, code: CodeFormat, tokens: int, stride: int) -> aot.Launch:
    """The launch on random tensors, of which expert 0 alone exists, for its first program; tokens: pairs of the first
    block, where there are blocks, `stride` pairs apart."""
    a = entry.arguments
    tensors, fields = random_tensors(code, 1, a["N"], a["K"])
    p = prepare(tensors, **fields, dtype=torch.bfloat16, device_type="cuda")
    x = torch.randn(a["x_ptr"].shape).bfloat16()
    order = x
    if a["ALIGNED"]:
        order = torch.full(a["sorted_ptr"].shape, a["num_pairs"], dtype=a["sorted_ptr"].dtype)
        order[:tokens] = stride * torch.arange(tokens)
    made = {
        "x_ptr": x, "low_ptr": x, "sorted_ptr": order,
        "experts_ptr": torch.zeros(a["experts_ptr"].shape, dtype=a["experts_ptr"].dtype),
        "codes_ptr": p.codes, "words_ptr": p.words, "groups_ptr": p.codes if p.groups is None else p.groups,
        "scale_ptr": p.scale, "bias_ptr": p.bias, "coefficients_ptr": p.codes, "factor_scale_ptr": p.codes,
        "out_ptr": torch.zeros(a["out_ptr"].shape, dtype=torch.bfloat16),
    }  # fmt: skip
    return replace(entry, arguments=a | made)


def count(code: CodeFormat, shape: ExpertShape, path: str, batch: int, tokens: float, gated: bool) -> Counted:
    """One projection by `path` in a call with `batch` tokens, where an expert has `tokens`; the cycles of a broken
    number lie between those of its neighbours.

    Raises RuntimeError where the emulator finds a fault, or where the loops of PTX and machine code differ.
    """
    name = f"{code.name}, {shape.name}, {path}"
    entry = ceilings.projection(code, shape, path, batch, gated)
    kernel = aot.compile_launch(entry, 90)
    compiled = aot.inspect(kernel)
    a, warps, full_pass = entry.arguments, entry.options["num_warps"], aot.weights_per_pass(entry)
    weights, matrix = a["N"] * a["K"] / entry.grid[0], a["N"] * a["K"]
    l1 = 0.0
    for some, share in ((int(tokens), 1 - tokens % 1), (int(tokens) + 1, tokens % 1)):
        if not share:
            continue
        emulator = Emulator(90, counting=True, only=lambda _: np.zeros(1, int))
        launched = with_tensors(entry, code, some, shape.top_k)
        emulator.run(launched, kernel)
        if emulator.faults.found:
            raise RuntimeError(f"{name}: {emulator.faults.lines()}")
        ((_, program, counts, _),) = emulator.launched
        l1 += share * sum(counts.cycles.values()) / weights
    bits = 8 * sum(launched.arguments[part].nbytes for part in ("codes_ptr", "scale_ptr", "bias_ptr")) / matrix
    total = counts.instructions(program) / warps
    if not program.loops():
        machine = sum(compiled.instructions.values()) * total / len(program.instructions) * warps / weights
        once = total * warps / weights
        after = ceilings.speedups(bits, l1, machine)
        return Counted(weights, 0, (once, once), (machine, machine), l1, None, after)
    loop = max(program.loops(), key=lambda places: counts.instructions(program, places))
    products = sum(program.instructions[place].parts[0] == "mma" for place in loop)
    if products != sum(n for opcode, n in compiled.loop.items() if opcode.startswith("HMMA")):
        raise RuntimeError(f"{name}: the loop has {products} products in PTX, in machine code {compiled.loop}")
    passes, inside = counts.executed[loop[-1]] / warps, counts.instructions(program, loop) / warps
    share = (total - inside) / (len(program.instructions) - len(loop))
    machine_loop = sum(compiled.loop.values())
    machine_total = passes * machine_loop + share * (sum(compiled.instructions.values()) - machine_loop)
    ptx = total * warps / weights, inside / passes / full_pass
    machine = machine_total * warps / weights, machine_loop / full_pass
    loop_l1 = ceilings.l1_cycles(code, tokens, entry, compiled, full_pass)
    factor = max(ptx[0] / ptx[1], machine[0] / machine[1])
    before = ceilings.speedups(code.bits, loop_l1, machine[1])
    after = ceilings.speedups(bits, l1, factor * machine[1])
    return Counted(weights, passes, ptx, machine, l1, before, after)


def rows(code: CodeFormat, shape: ExpertShape, path: str, batch: int, tokens: float) -> list[str]:
    """Rows of the table: gate and up, down, and both together."""
    gate_up, down = (count(code, shape, path, batch, tokens, gated) for gated in (True, False))
    out = [["gate and up", *_cells(gate_up)], ["down", *_cells(down)]]
    # Gate and up have two weights for one of down, and their times add.
    speed = [3 / (2 / min(a.values()) + 1 / min(b.values())) if a and b else None
             for a, b in ((gate_up.before, down.before), (gate_up.after, down.after))]  # fmt: skip
    out.append(["both", *[""] * 7, *(f"{s:.2f}x" if s else "" for s in speed)])
    return [f"| {code.name} | {shape.name} | {tokens:.2g} | {' | '.join(cells)} |" for cells in out]


def _cells(c: Counted) -> list[str]:
    instructions = [32 * n for n in c.machine]
    if c.before is None:
        speed = [f"{c.after[name]:.2f}x" for name in ("HBM", "L1", "issue")]
        return ["no loop", "", "", f"{instructions[0]:.2f}", *speed, "", ceilings.least(c.after)]
    ratios = [f"{whole / loop:.3f}" for whole, loop in (c.ptx, c.machine)]
    speed = [f"{c.before[name]:.2f}x -> {c.after[name]:.2f}x" for name in ("HBM", "L1", "issue")]
    costs = f"{instructions[1]:.2f} -> {instructions[0]:.2f}"
    return [f"{c.passes:g}", *ratios, costs, *speed, ceilings.least(c.before), ceilings.least(c.after)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", nargs="+", choices=[c.name for c in CODES], metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "kernels/bench/results/ceilings-counted.md")
    chosen = parser.parse_args(arguments)
    chosen.results.write_text(HEAD.format(columns=COLUMNS, triton=triton.__version__, commit=commit()))
    for code in CODES:
        if chosen.format and code.name not in chosen.format:
            continue
        for call in CALLS:
            for row in rows(code, *call):
                print(row, flush=True)
                with chosen.results.open("a") as file:
                    file.write(row + "\n")


if __name__ == "__main__":
    main()
