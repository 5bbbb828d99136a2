"""Decoding speed of RQ-MoE and QINCo with the sizes of both networks beside it, and of both at equal hidden units.

    python eval/decoder_speed.py

Time does not depend on what a network has learned, so its weights are drawn. The sizes are those of
eval/vector_benchmark.py; there QINCo has many times the hidden units of RQ-MoE, as in its paper, and that is most of
the difference in speed. The rows at equal hidden units show what is left of it: either network is given as many as the
other has. QINCo's map of a codeword and a reconstruction, twice as wide as a vector, stays whatever its hidden units.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from qinco import QINCo
from torch import Tensor, nn
from vector_benchmark import FULL, QUICK, Settings

from kbvq.codes.rq_moe import RQMoE

ROOT = Path(__file__).resolve().parent.parent
DIMENSIONS = {"mixture": 64, "hidden states": 256}


@dataclass(frozen=True)
class Network:
    """A decoder. hidden_units: of one stage, all refiners and blocks together, gates left out."""

    name: str
    decoder: nn.Module
    hidden_units: int

    def parameters(self) -> int:
        """Floats that its decoder reads, codebooks included."""
        return sum(parameter.numel() for parameter in self.decoder.parameters())


def networks(settings: Settings, dim: int) -> list[Network]:
    """RQ-MoE and QINCo of the vector benchmark, then each with as many hidden units as the other has there."""
    stages, size, depth = max(settings.num_bytes), settings.codebook_size, settings.qinco_depth
    refiners = settings.num_refiners
    few, many = refiners * settings.refiner_width, depth * settings.qinco_width

    def ours(units: int) -> RQMoE:
        return RQMoE(dim, stages, size, refiners, 1, units // refiners, conditioning="instruction")

    found = [
        Network("RQ-MoE", ours(few), few),
        Network("QINCo", QINCo(dim, stages, size, depth, settings.qinco_width), many),
        Network("RQ-MoE, as many as QINCo", ours(many), many),
        Network("QINCo, as many as RQ-MoE", QINCo(dim, stages, size, depth, few // depth), few),
    ]
    with torch.no_grad():
        for network in found:
            for parameter in network.decoder.parameters():
                parameter.normal_(0, 0.05)
            network.decoder.scale.fill_(1.0)
    return found


def vectors_per_second(decoders: list[nn.Module], codes: Tensor, seconds: float) -> list[float]:
    """Best of all repetitions in time of the processor; the decoders take turns, five calls each."""
    best = [float("inf")] * len(decoders)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or max(best) == float("inf"):
        for index, decoder in enumerate(decoders):
            for _ in range(5):
                start = time.process_time()
                decoder.decode(codes)
                best[index] = min(best[index], time.process_time() - start)
    return [len(codes) / value for value in best]


def measure(settings: Settings, seconds: float) -> list[dict[str, object]]:
    rows = []
    for data, dim in DIMENSIONS.items():
        found = networks(settings, dim)
        for num_bytes in settings.num_bytes:
            speeds: list[dict[int, float]] = [{} for _ in found]
            for batch in settings.timing_batches:
                generator = torch.Generator().manual_seed(0)
                codes = torch.randint(settings.codebook_size, (batch, num_bytes), generator=generator)
                for speed, value in zip(
                    speeds, vectors_per_second([n.decoder for n in found], codes, seconds), strict=True
                ):
                    speed[batch] = value
            for network, speed in zip(found, speeds, strict=True):
                sizes = {"hidden_units": network.hidden_units, "parameters": network.parameters()}
                rows.append({"data": data, "dim": dim, "bytes": num_bytes, "decoder": network.name} | sizes)
                rows[-1]["vectors_per_second"] = speed
    return rows


def markdown(rows: list[dict], conditions: str) -> str:
    batches = list(rows[0]["vectors_per_second"])
    lines = ["# Decoding speed and size", "", f"Made by `python eval/decoder_speed.py`. {conditions}", ""]
    head = ["vectors", "bytes", "decoder", "hidden units a stage", "parameters"]
    head += [f"decode/s, batch {batch}" for batch in batches]
    lines += ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * (len(head) - 3)]
    for row in rows:
        cells = [f"{row['data']}, {row['dim']}-d", str(row["bytes"]), row["decoder"], f"{row['hidden_units']:,}"]
        cells += [f"{row['parameters']:,}", *(f"{row['vectors_per_second'][batch]:,.0f}" for batch in batches)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for place in range(0, len(rows), 4):
        group = rows[place : place + 4]
        for ours, theirs in ((0, 1), (2, 1), (0, 3)):
            pair = [group[index] for index in (ours, theirs)]
            ratios = [pair[0]["vectors_per_second"][b] / pair[1]["vectors_per_second"][b] for b in batches]
            text = ", ".join(f"{ratio:.2f} in batches of {b}" for ratio, b in zip(ratios, batches, strict=True))
            units = " against ".join(str(row["hidden_units"]) for row in pair)
            lines.append(f"- {pair[0]['data']}, {pair[0]['bytes']} bytes, RQ-MoE over QINCo, {units} units: {text}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "decoder_speed.json")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of bytes and batch")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(QUICK if options.quick else FULL, options.seconds)
    conditions = f"One core of {platform.processor() or platform.machine()}, torch {torch.__version__}, drawn weights."
    options.output.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(rows, conditions), encoding="utf-8")
    print(markdown(rows, conditions))


if __name__ == "__main__":
    main()
