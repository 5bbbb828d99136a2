"""Ceilings of whole programs (kernels/bench/counts.py): what the emulator counts against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels/bench"


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import counts

    return counts


def test_a_short_row_costs_what_is_counted_by_hand(counts):
    """128 rows of 768 columns, 2 bits by signed codewords of 8: one program of four warps with 32 rows each."""
    from synthetic import FORMATS, ExpertShape

    c = counts.count(FORMATS[0], ExpertShape("tiny", 1, 4, 2, 128, 768), "pairs", 1, 1.0, gated=False)
    assert c.weights == 128 * 768
    assert c.passes == 3  # a lane takes 8 vectors a time, four lanes of a row 256 columns
    assert c.ptx[0] > c.ptx[1] and c.machine[0] > c.machine[1]
    assert all(c.after[resource] < c.before[resource] for resource in ("HBM", "L1", "issue"))
    # Float32 scales and float16 biases of rows, besides 2 bits.
    assert c.after["HBM"] == pytest.approx(16 / (2 + 48 / 768))
    # A lookup of 16 bytes takes 4 cycles for 32 lanes without conflicts; 8 copies of the table are written, and codes
    # and signs read, at 128 bytes a cycle. x and what follows the loop are the rest.
    least = 4 / 32 / 8 + 8 * 256 * 16 / 128 / c.weights + 2 / 8 / 128
    assert least < c.l1 < 1.4 * least


def test_both_projections_weigh_by_their_weights(counts, monkeypatch):
    def count(code, shape, path, batch, tokens, gated):
        after = {"HBM": 8.0, "L1": 6.0, "issue": 7.0} if gated else {"HBM": 8.0, "L1": 4.0, "issue": 3.0}
        return counts.Counted(1.0, 0, (1.0, 1.0), (1.0, 1.0), 1.0, None, after)

    monkeypatch.setattr(counts, "count", count)
    gate_up, down, both = counts.rows(counts.CODES[0], *counts.CALLS[0])
    assert "6.00x (L1)" in gate_up and "3.00x (issue)" in down
    assert both.endswith("| 4.50x |")  # 3 weights in the time of 2 / 6 + 1 / 3
