"""Vector compression: RQ-MoE beside residual and product quantization and QINCo, on the same vectors and bytes.

    python eval/vector_benchmark.py [--output docs/results]
    python eval/vector_benchmark.py --quick --output quick     # seconds, meaningless figures
    python eval/vector_benchmark.py --files bigann1m learn.bvecs base.bvecs query.bvecs   # published vectors

Writes vectors.json and vectors.md, anew after every seed. Two sources of vectors: a Gaussian mixture in 64 dimensions
and the 256-dimensional hidden states of the bundled model. Every quantizer is trained on the same vectors, encodes
others, the base, and is judged by the mean squared error of the base and by recall@1: the share of queries whose
nearest base vector is still the nearest one after the base was compressed; the queries are not compressed.
One core, about 30 minutes. With --files the vectors are those of files (vector_files.py) instead, by default as many as
RQ-MoE's paper takes, and the two files are called by the name that is given.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from qinco import QINCo
from torch import Tensor
from tqdm import tqdm
from vector_files import read_vectors

from kbvq.codes.kmeans import nearest_codeword
from kbvq.codes.residual_quantization import fit_residual_codebooks, residual_decode, residual_encode
from kbvq.codes.rq_moe import RQMoE
from kbvq.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
Decoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. num_bytes: stages, each of codebook_size <= 256. hidden_layer: after how many decoder layers.

    epochs: passes of each network over the training vectors, by data; those of FULL take about the same time of the
    processor. batch_size and learning_rate are those of both networks."""

    train_vectors: dict[str, int]
    epochs: dict[str, dict[str, int]]
    base_vectors: int = 2048
    queries: int = 1000
    mixture_dim: int = 64
    mixture_components: int = 64
    hidden_layer: int = 2
    codebook_size: int = 256
    num_bytes: tuple[int, ...] = (8, 16)
    beam: int = 4
    shortlist: int = 8
    kmeans_iterations: int = 10
    kmeans_max_vectors: int = 16384
    batch_size: int = 128
    learning_rate: float = 0.004
    num_refiners: int = 4
    refiner_width: int = 6
    qinco_depth: int = 2
    qinco_width: int = 256
    timing_batches: tuple[int, ...] = (1, 64, 4096)
    timing_seconds: float = 3.0


FULL = Settings(
    train_vectors={"mixture": 32768, "hidden": 32768},
    epochs={"mixture": {"QINCo": 3, "RQ-MoE": 9}, "hidden": {"QINCo": 1, "RQ-MoE": 3}},
)
QUICK = Settings(
    train_vectors={"mixture": 1024, "hidden": 256},
    epochs={"mixture": {"QINCo": 4, "RQ-MoE": 4}, "hidden": {"QINCo": 1, "RQ-MoE": 1}},
    base_vectors=256,
    queries=64,
    mixture_dim=8,
    mixture_components=4,
    codebook_size=16,
    num_bytes=(2, 4),
    beam=2,
    batch_size=64,
    learning_rate=0.01,
    refiner_width=4,
    qinco_width=8,
    timing_batches=(32,),
    timing_seconds=0.01,
)


@dataclass(frozen=True)
class Vectors:
    """Vectors of one source, float32: train and base [n, d], queries [q, d]."""

    train: Tensor
    base: Tensor
    queries: Tensor

    def variance(self) -> float:
        """Mean squared distance of the base to the mean of the training vectors: the error of a code of no bits."""
        return float((self.base - self.train.mean(0)).square().sum(1).mean())


@dataclass(frozen=True)
class Result:
    """One quantizer and search with one seed. mse: mean of ‖x − x̂‖² over the base vectors, relative_mse: over their
    variance. train_seconds: of this core, the codebooks that a network starts from included."""

    data: str
    num_bytes: int
    quantizer: str
    beam: int
    seed: int
    mse: float
    relative_mse: float
    recall_at_1: float
    train_seconds: float


@dataclass(frozen=True)
class Speed:
    """Decoded vectors per second of one core, by batch size."""

    data: str
    num_bytes: int
    quantizer: str
    vectors_per_second: dict[int, float]


def gaussian_mixture(settings: Settings, seed: int) -> Vectors:
    """Components of equal mass with standard normal means; within one, standard deviations that fall from 1 to
    exp(-6.4) along the axes of a random basis of its own."""
    dim, components = settings.mixture_dim, settings.mixture_components
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, dim, generator=generator)
    bases = torch.linalg.qr(torch.randn(components, dim, dim, generator=generator))[0]
    maps = bases * torch.exp(-6.4 * torch.arange(dim) / dim)

    def draw(count: int) -> Tensor:
        component = torch.randint(components, (count,), generator=generator)
        noise = torch.randn(count, dim, generator=generator)
        vectors = means[component]
        for index in range(components):
            members = component == index
            vectors[members] += noise[members] @ maps[index].T
        return vectors

    return Vectors(*(draw(n) for n in (settings.train_vectors["mixture"], settings.base_vectors, settings.queries)))


def hidden_states(settings: Settings, model_path: Path, held_out: str) -> Vectors:
    """Hidden states of the model after `hidden_layer` layers, of evenly spaced windows of 256 tokens: calibration
    text to train, `held_out` text (test or validation) for base and queries, drawn at random from one set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.no_grad()
    def states(text: Path, count: int) -> Tensor:
        tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
        needed = math.ceil(count / 256)
        if needed > len(windows):
            raise ConfigError(f"{text} has {len(tokens)} tokens, too few for the {count} vectors asked for")
        windows = windows[torch.linspace(0, len(windows) - 1, needed).long()]
        outputs = [
            model.model(batch, output_hidden_states=True).hidden_states[settings.hidden_layer]
            for batch in windows.split(16)
        ]
        return torch.cat(outputs).flatten(0, 1)[:count].contiguous()

    train = states(ROOT / "tests/data/calibration.txt", settings.train_vectors["hidden"])
    others = states(ROOT / f"tests/data/{held_out}.txt", settings.base_vectors + settings.queries)
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))]
    return Vectors(train, others[: settings.base_vectors], others[settings.base_vectors :])


def recall_at_1(queries: Tensor, base: Tensor, decoded: Tensor) -> float:
    """Share of queries [q, d] whose nearest vector of base [n, d] is the nearest one of decoded [n, d] too."""
    return float((nearest_codeword(queries, base) == nearest_codeword(queries, decoded)).double().mean())


class Benchmark:
    """All quantizers on one source of vectors. A quantizer is trained once, with the most stages; the shorter codes
    are those of its first stages. Product quantization cannot do that and is trained for each size."""

    def __init__(self, data: str, vectors: Vectors, settings: Settings) -> None:
        self.data, self.vectors, self.settings = data, vectors, settings
        self.variance = vectors.variance()

    def _result(self, num_bytes: int, name: str, beam: int, seed: int, decoded: Tensor, seconds: float) -> Result:
        base = self.vectors.base
        mse = float((base - decoded).double().square().sum(1).mean())
        recall = recall_at_1(self.vectors.queries, base, decoded)
        result = Result(self.data, num_bytes, name, beam, seed, mse, mse / self.variance, recall, seconds)
        tqdm.write(f"{self.data}  {num_bytes:2} bytes  {name:9} beam {beam}  MSE {mse:.5g}  recall@1 {recall:.3f}")
        return result

    def faiss(self) -> Iterator[Result]:
        """faiss's quantizers, which take no seed, trained on as many vectors as k-means is given. Its residual
        quantizer searches with the beam in training too."""
        import faiss

        bits, most = int(math.log2(self.settings.codebook_size)), max(self.settings.num_bytes)
        train, base = self.vectors.train[: self.settings.kmeans_max_vectors].numpy(), self.vectors.base.numpy()
        dim = train.shape[1]
        start = time.process_time()
        trained = faiss.ResidualQuantizer(dim, most, bits)
        trained.max_beam_size = self.settings.beam
        trained.train_type = faiss.ResidualQuantizer.Train_default  # plain k-means, as in RQ
        trained.train(train)
        residual_seconds = time.process_time() - start
        codebooks = faiss.vector_to_array(trained.codebooks)
        for num_bytes in self.settings.num_bytes:
            start = time.process_time()
            product = faiss.ProductQuantizer(dim, num_bytes, bits)
            product.train(train)
            seconds = time.process_time() - start
            decoded = torch.from_numpy(product.decode(product.compute_codes(base)))
            yield self._result(num_bytes, "faiss PQ", 1, 0, decoded, seconds)
            residual = faiss.ResidualQuantizer(dim, num_bytes, bits)
            residual.max_beam_size = self.settings.beam
            faiss.copy_array_to_vector(codebooks[: num_bytes * self.settings.codebook_size * dim], residual.codebooks)
            residual.is_trained = True
            residual.compute_codebook_tables()
            decoded = torch.from_numpy(residual.decode(residual.compute_codes(base)))
            yield self._result(num_bytes, "faiss RQ", self.settings.beam, 0, decoded, residual_seconds)

    def own(self, seed: int) -> Iterator[Result | Speed]:
        """RQ, QINCo and RQ-MoE, both of which start from RQ's codebooks; with seed 0 their speed too."""
        settings, train, base = self.settings, self.vectors.train, self.vectors.base
        stages, start = max(settings.num_bytes), time.process_time()
        codebooks = fit_residual_codebooks(
            train,
            stages,
            settings.codebook_size,
            iterations=settings.kmeans_iterations,
            seed=seed,
            max_vectors=settings.kmeans_max_vectors,
        )
        plain_seconds = time.process_time() - start
        decoders: dict[str, Decoder] = {"RQ": lambda codes: residual_decode(codes, codebooks)}
        for num_bytes in settings.num_bytes:
            for beam in (1, settings.beam):
                codes = residual_encode(base, codebooks[:num_bytes], beam=beam)
                yield self._result(num_bytes, "RQ", beam, seed, residual_decode(codes, codebooks), plain_seconds)

        networks = {
            "QINCo": (1, settings.qinco_depth, settings.qinco_width, "reconstruction"),
            "RQ-MoE": (settings.num_refiners, 1, settings.refiner_width, "instruction"),
        }
        for name, (*sizes, conditioning) in networks.items():
            model = RQMoE(train.shape[1], stages, settings.codebook_size, *sizes, conditioning=conditioning)
            start = time.process_time()
            model.fit(
                train,
                seed=seed,
                codebooks=codebooks,
                epochs=settings.epochs[self.data][name],
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
            )
            seconds = plain_seconds + time.process_time() - start
            decoders[name] = decode = model.decode if name == "RQ-MoE" else QINCo.from_rq_moe(model).decode
            for num_bytes in settings.num_bytes:
                for beam in (1, settings.beam):
                    codes = model.encode(base, beam=beam, shortlist=settings.shortlist, num_stages=num_bytes).long()
                    yield self._result(num_bytes, name, beam, seed, decode(codes), seconds)
        if seed == 0:
            yield from self._speeds(codes, decoders)

    def _speeds(self, codes: Tensor, decoders: dict[str, Decoder]) -> Iterator[Speed]:
        """The best of all repetitions, in time of the processor: what other programs on the machine disturb least. The
        decoders take turns, five calls each."""
        for num_bytes in self.settings.num_bytes:
            speeds: dict[str, dict[int, float]] = {name: {} for name in decoders}
            for batch in self.settings.timing_batches:
                part = codes[:batch, :num_bytes].contiguous()
                seconds: dict[str, list[float]] = {name: [] for name in decoders}
                for decode in decoders.values():
                    decode(part)
                end = time.perf_counter() + self.settings.timing_seconds
                while time.perf_counter() < end:
                    for name, decode in decoders.items():
                        for _ in range(5):
                            start = time.process_time()
                            decode(part)
                            seconds[name].append(time.process_time() - start)
                for name, times in seconds.items():
                    speeds[name][batch] = len(part) / min(times)
            for name, speed in speeds.items():
                yield Speed(self.data, num_bytes, name, speed)


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def markdown(results: list[Result], speeds: list[Speed], descriptions: dict[str, str], conditions: str) -> str:
    lines = ["# Vectors", "", "Made by `python eval/vector_benchmark.py`. " + conditions]
    for data in dict.fromkeys(r.data for r in results):
        batches = [batch for s in speeds if s.data == data for batch in s.vectors_per_second]
        batches = list(dict.fromkeys(batches))
        trainings = len({r.seed for r in results if r.data == data})
        over = f"mean ± standard deviation over {trainings} training{'s' * (trainings > 1)}"
        lines += ["", f"## {descriptions[data]}, {over}", ""]
        columns = ["bytes", "quantizer", "beam", "MSE", "MSE / variance", "recall@1", "train (CPU s)"]
        columns += [f"decode/s, batch {batch}" for batch in batches]
        lines += ["| " + " | ".join(columns) + " |", "|---:|---|" + "---:|" * (len(columns) - 2)]
        groups: dict[tuple[int, str, int], list[Result]] = {}
        for r in sorted((r for r in results if r.data == data), key=lambda r: r.num_bytes):
            groups.setdefault((r.num_bytes, r.quantizer, r.beam), []).append(r)
        for (num_bytes, quantizer, beam), group in groups.items():
            cells = [str(num_bytes), quantizer, str(beam), spread([r.mse for r in group], ".4g")]
            cells += [spread([r.relative_mse for r in group], ".5f"), spread([r.recall_at_1 for r in group], ".3f")]
            cells.append(f"{statistics.mean(r.train_seconds for r in group):.0f}")
            speed = find_speed(speeds, data, num_bytes, quantizer)
            cells += [f"{speed[batch]:,.0f}" if speed else "" for batch in batches]
            lines.append("| " + " | ".join(cells) + " |")
        for num_bytes in sorted({s.num_bytes for s in speeds if s.data == data}):
            ours, theirs = (find_speed(speeds, data, num_bytes, name) for name in ("RQ-MoE", "QINCo"))
            ratios = ", ".join(f"{ours[b] / theirs[b]:.1f} in batches of {b}" for b in batches)
            lines += ["", f"Decoding speed of RQ-MoE over that of QINCo at {num_bytes} bytes: {ratios}."]
    return "\n".join([*lines, ""])


def find_speed(speeds: list[Speed], data: str, num_bytes: int, quantizer: str) -> dict[int, float]:
    wanted = (data, num_bytes, quantizer)
    return next((s.vectors_per_second for s in speeds if (s.data, s.num_bytes, s.quantizer) == wanted), {})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the two files")
    parser.add_argument("--data", choices=["mixture", "hidden"], nargs="+", default=["mixture", "hidden"])
    parser.add_argument("--model", type=Path, default=ROOT / "tests/models/tiny-qwen3-moe")
    parser.add_argument("--held-out", choices=["test", "validation"], default="test", help="text of base and queries")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of RQ, QINCo and RQ-MoE")
    parser.add_argument("--no-faiss", action="store_true", help="leave out faiss's quantizers")
    parser.add_argument(
        "--files",
        nargs=4,
        metavar=("NAME", "TRAIN", "BASE", "QUERIES"),
        help="vectors of three files in place of --data: .fvecs, .bvecs, .fbin, .u8bin, .npy",
    )
    parser.add_argument(
        "--counts", type=int, nargs=3, default=[500_000, 1_000_000, 10_000], help="vectors of the three files"
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=[3, 9], help="of QINCo and RQ-MoE on --files")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that it runs")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    name = "vectors"
    if options.files:
        name, *paths = options.files
        options.data = [name]
        read = [read_vectors(Path(path), count) for path, count in zip(paths, options.counts, strict=True)]
        if len({vectors.shape[1] for vectors in read}) > 1:
            parser.error(f"the three files have dimensions {', '.join(str(v.shape[1]) for v in read)}; they must agree")
        settings = replace(
            settings,
            train_vectors={name: options.counts[0]},
            base_vectors=options.counts[1],
            queries=options.counts[2],
            epochs={name: dict(zip(("QINCo", "RQ-MoE"), options.epochs, strict=True))},
        )
    torch.set_num_threads(1)
    setting = {**asdict(settings), "held_out": options.held_out, "torch": torch.__version__}
    if not options.no_faiss:
        try:
            import faiss
        except ImportError as error:
            parser.error(f"faiss cannot be imported ({error}): pip install faiss-cpu -c constraints.txt, or --no-faiss")
        faiss.omp_set_num_threads(1)
        setting["faiss"] = faiss.__version__

    benchmarks = {}
    for data in options.data:
        if options.files:
            vectors = Vectors(*read)
        elif data == "mixture":
            vectors = gaussian_mixture(settings, seed=0)
        else:
            vectors = hidden_states(settings, options.model, options.held_out)
        benchmarks[data] = Benchmark(data, vectors, settings)
    passes = {d: ", ".join(f"{n} {e} passes" for n, e in epochs.items()) for d, epochs in settings.epochs.items()}
    dims = {data: benchmark.vectors.train.shape[1] for data, benchmark in benchmarks.items()}
    descriptions = {
        data: f"{data}: {dims[data]} dimensions, {settings.train_vectors[data]} training vectors ({passes[data]})"
        for data in benchmarks
    }
    descriptions |= (
        {}
        if options.files
        else {
            "mixture": f"Gaussian mixture: {dims.get('mixture')} dimensions, {settings.mixture_components} components, "
            f"{settings.train_vectors['mixture']} training vectors ({passes['mixture']})",
            "hidden": f"Hidden states of the bundled model after layer {settings.hidden_layer}: {dims.get('hidden')} "
            f"dimensions, {settings.train_vectors['hidden']} training vectors ({passes['hidden']})",
        }
    )
    conditions = (
        f"One core, torch {torch.__version__}"
        + (f", faiss {setting['faiss']}" if "faiss" in setting else "")
        + f". {settings.base_vectors} base vectors, {settings.queries} queries, {settings.codebook_size} codewords per "
        "stage. Speeds are the best of many repetitions, per second of processor time. "
        f"QINCo has {settings.qinco_depth} blocks of width {settings.qinco_width}, RQ-MoE {settings.num_refiners} "
        f"refiners of one block of width {settings.refiner_width}; both start from the RQ of the same seed, and "
        "have the same optimizer and about the same time to train. MSE / variance: over the variance of the base. "
        "All but faiss PQ are trained once, with "
        f"{max(settings.num_bytes)} stages: a shorter code is the first stages of that."
    )
    results: list[Result] = []
    speeds: list[Speed] = []

    def write() -> None:
        options.output.mkdir(parents=True, exist_ok=True)
        record = {"setting": setting, "results": [asdict(r) for r in results], "speeds": [asdict(s) for s in speeds]}
        (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.output / f"{name}.md").write_text(markdown(results, speeds, descriptions, conditions))

    for seed in range(options.seeds):
        for benchmark in benchmarks.values():
            for found in benchmark.own(seed):
                (speeds if isinstance(found, Speed) else results).append(found)
            if seed == 0 and not options.no_faiss:
                results.extend(benchmark.faiss())
            write()


if __name__ == "__main__":
    main()
