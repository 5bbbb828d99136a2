"""Mean squared error of the codebooks on unit-Gaussian values, at exactly 2.0 and 3.0 bits per value.

    python eval/codebook_benchmark.py [--output docs/results]

Writes codebooks.json and codebooks.md. Codebooks are trained on one sample and measured on another, the same for all;
both are drawn from fixed seeds. One core, about two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.kmeans import kmeans, nearest_codeword
from kbvq.codes.residual_quantization import fit_residual_codebooks, residual_decode, residual_encode
from kbvq.codes.trellis import TrellisCode

NUM_TRAIN = 1 << 20  # values
NUM_TEST = 1 << 18
ITERATIONS = {1: 200, 4: 20, 8: 20}  # vector dimension -> iterations of k-means, which is slow to settle on scalars
SEQUENCE = 512  # values in a tail-biting trellis sequence


@dataclass(frozen=True)
class Result:
    """One codebook.

    table_values, table_bytes: what a decoder looks up, in float16. mse and its standard error: on the test values.
    bits_above_limit: ½ log₂(mse / 2^(−2·bits)), over the Gaussian rate-distortion function.
    reference: the error that theory, the literature or another implementation gives, or None.
    """

    bits: int
    codebook: str
    table_values: int
    table_bytes: int
    mse: float
    standard_error: float
    bits_above_limit: float
    reference: str | None


class RandomOrder(TrellisCode):
    """The same trellis with a quantile for every state, in random order: what the integer product replaces."""

    def codewords(self) -> Tensor:
        size = 1 << self.state_bits
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        return math.sqrt(2) * torch.erfinv((2 * order + 1).double() / size - 1).float()


def vector_codebook(train: Tensor, test: Tensor, dim: int, size: int) -> tuple[int, Tensor]:
    """k-means; dim 1 is the Lloyd-Max scalar quantizer. Returns the number of table values and the decoded test."""
    codebook = kmeans(train.view(-1, dim), size, iterations=ITERATIONS[dim], seed=0)
    vectors = test.view(-1, dim)
    return codebook.numel(), F.embedding(nearest_codeword(vectors, codebook), codebook).flatten()


def sign_codebook(train: Tensor, test: Tensor, dim: int, size: int) -> tuple[int, Tensor]:
    """A sign bit per value and k-means on the magnitudes."""
    table, magnitudes = vector_codebook(train.abs(), test.abs(), dim, size)
    return table, torch.where(test < 0, -magnitudes, magnitudes)


def residual_codebook(train: Tensor, test: Tensor, dim: int, stages: int, beam: int) -> tuple[int, Tensor]:
    """Plain residual quantization, stages of 256."""
    codebooks = fit_residual_codebooks(train.view(-1, dim), stages, 256, iterations=ITERATIONS[dim], seed=0)
    codes = residual_encode(test.view(-1, dim), codebooks, beam=beam)
    return codebooks.numel(), residual_decode(codes, codebooks).flatten()


def trellis(test: Tensor, code: TrellisCode) -> tuple[int, Tensor]:
    values = test.view(-1, SEQUENCE)
    return code.codewords().unique().numel(), code.decode(code.encode(values)).flatten()


def codebooks(train: Tensor, test: Tensor) -> Iterator[tuple[int, str, str | None, Callable[[], tuple[int, Tensor]]]]:
    """Bits, name, reference error, and what measures it."""
    yield 2, "Lloyd-Max scalar, 4 levels", "0.1175", lambda: vector_codebook(train, test, 1, 4)
    yield 2, "k-means d=4, 256", "0.0974", lambda: vector_codebook(train, test, 4, 256)
    yield 2, "residual d=8, 2 x 256, greedy", "0.1066", lambda: residual_codebook(train, test, 8, 2, 1)
    yield 2, "residual d=8, 2 x 256, beam 16", "0.091-0.094", lambda: residual_codebook(train, test, 8, 2, 16)
    yield 2, "sign + k-means d=8, 256 magnitudes", "0.0961", lambda: sign_codebook(train, test, 8, 256)
    yield 2, "trellis, 2^12 states, random order", None, lambda: trellis(test, RandomOrder(2))
    yield 2, "trellis, 2^12 states", None, lambda: trellis(test, TrellisCode(2))
    yield 2, "trellis, 2^16 states", "0.0677", lambda: trellis(test, TrellisCode(2, 16))
    yield 3, "Lloyd-Max scalar, 8 levels", "0.0345", lambda: vector_codebook(train, test, 1, 8)
    yield 3, "k-means d=4, 4096", "0.0260", lambda: vector_codebook(train, test, 4, 4096)
    yield 3, "residual d=8, 3 x 256, beam 16", None, lambda: residual_codebook(train, test, 8, 3, 16)
    yield 3, "sign + k-means d=4, 256 magnitudes", "0.0273", lambda: sign_codebook(train, test, 4, 256)
    yield 3, "trellis, 2^12 states, random order", None, lambda: trellis(test, RandomOrder(3))
    yield 3, "trellis, 2^12 states", None, lambda: trellis(test, TrellisCode(3))
    yield 3, "trellis, 2^15 states", "0.0172", lambda: trellis(test, TrellisCode(3, 15))


def unit_gaussian(count: int, seed: int) -> Tensor:
    """Normal values, scaled to second moment 1: the error of every codebook is proportional to it."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return values / values.square().mean().sqrt()


def measure() -> list[Result]:
    train, test = unit_gaussian(NUM_TRAIN, seed=0), unit_gaussian(NUM_TEST, seed=1)
    results = []
    for bits, name, reference, run in codebooks(train, test):
        table, decoded = run()
        errors = (test - decoded).double().square().view(-1, SEQUENCE).mean(1)
        mse = float(errors.mean())
        above = 0.5 * math.log2(mse) + bits
        results.append(
            Result(bits, name, table, 2 * table, mse, float(errors.std() / math.sqrt(len(errors))), above, reference)
        )
        print(f"{bits} bits  {name:36} {mse:.5f}", flush=True)
    return results


def markdown(results: list[Result]) -> str:
    lines = [
        "# Codebooks on unit-Gaussian values",
        "",
        f"Mean squared error on {NUM_TEST} normal values of second moment 1, at exactly the stated bits per value; "
        f"beside the codes a decoder needs one table. k-means: {ITERATIONS[4]} iterations ({ITERATIONS[1]} for "
        f"scalars) on {NUM_TRAIN} other values. "
        f"Trellis: tail-biting sequences of {SEQUENCE}.",
        "Bits above the limit: ½ log₂(error / 2^(−2·bits)), the Gaussian rate-distortion function. "
        "Reference: the error that theory, the literature or another implementation gives for such a codebook.",
        "",
        f"Made by `python eval/codebook_benchmark.py` with torch {torch.__version__} on a CPU.",
    ]
    for bits in sorted({r.bits for r in results}):
        lines += [
            "",
            f"## {bits} bits",
            "",
            "| codebook | table values | table bytes | error | ± standard error | bits above the limit | reference |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for r in results:
            if r.bits == bits:
                lines.append(
                    f"| {r.codebook} | {r.table_values} | {r.table_bytes} | {r.mse:.4f} | {r.standard_error:.4f} | "
                    f"{r.bits_above_limit:.3f} | {r.reference or ''} |"
                )
        lines.append(f"| Shannon limit | | | {4.0**-bits:.4f} | | 0 | |")
    lines += [
        "",
        "Every trellis but those in random order decodes a value with one integer product and one lookup in the same "
        "table of 256; random order needs a table of all states.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the two files")
    folder = parser.parse_args().output
    torch.set_num_threads(1)  # one order of summation, hence the same figures every time
    results = measure()
    folder.mkdir(parents=True, exist_ok=True)
    setting = {"train_values": NUM_TRAIN, "test_values": NUM_TEST, "sequence": SEQUENCE, "torch": torch.__version__}
    record = {"setting": setting, "results": [asdict(r) for r in results]}
    (folder / "codebooks.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    (folder / "codebooks.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
