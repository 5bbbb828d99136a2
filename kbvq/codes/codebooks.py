"""The encoder's side of each code format: choose codes under a metric, say what they stand for, refit the tables.

A metric is an upper triangular matrix M of d × d: the error of a target t coded as c is ‖(t − c) M‖². Error feedback
hands one for each expert and group of d channels; the identity gives plain nearest codewords.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.kmeans import nearest_codewords
from kbvq.codes.packing import expand, pack_bits, pack_stages, store_network, store_tables, table_values
from kbvq.codes.residual_quantization import beam_search
from kbvq.codes.rq_moe import RQMoE
from kbvq.codes.trellis import TrellisCode
from kbvq.structures import ProjectionFormat
from kbvq_kernels import encode as compiled

BEAM = 8
"""Partial sums kept while a sum of codewords is chosen."""

REFIT_VECTORS = 1 << 17
"""Vectors of a projection on which the network of rq-moe is trained, at most."""


@dataclass(frozen=True)
class FeedbackBlock:
    """Channels that are coded together, group of `vector_dim` by group, and what is known of those before them; in
    coding order (error_feedback).

    weights: [E, rows, width] float32. carried: the same shape, (W − Ŵ) M of the channels before; used up. factor: M
    within the block, [E, width, width]. scale: [E, rows] > 0. mass: [E, rows], how much a row counts. codes:
    [num_planes, E, rows, width / vector_dim], to be written. error: W − Ŵ, as weights, to be written.
    """

    weights: Tensor
    carried: Tensor
    factor: Tensor
    scale: Tensor
    mass: Tensor
    codes: Tensor
    error: Tensor


class Codebook(Protocol):
    """Codes are integers [num_planes, E, rows] for one vector of each row, and [num_planes, E, rows, vectors] of type
    `code_dtype` in `pack`."""

    vector_dim: int
    num_planes: int
    code_dtype: torch.dtype

    def code_block(self, block: FeedbackBlock, refit: Refit | None) -> bool:
        """Do at once what error_feedback does with `encode`, `decode` and `Refit.add` group by group; False, and
        nothing done, where there is no compiled code for it."""

    def encode(self, targets: Tensor, metric: Tensor, mass: Tensor) -> Tensor:
        """targets [E, rows, d], metric [E, d, d], mass [E, rows] (how much a row counts) -> codes."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> values [E, rows, d]."""

    def refit(self) -> Refit | None:
        """An empty sum of statistics, or None when there is nothing to refit."""

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """The stored tensors: codes, and the tables where there are any."""


class Refit(Protocol):
    """Sums over encoded vectors from which the best tables for those codes follow: the maximisation step of EM."""

    sums: tuple[Tensor, ...]
    """Over the vectors so far; those of several processes are added up."""

    def begin(self, first_expert: int) -> None:
        """The vectors that follow are of experts from that one of the bank on, all of their channels in order."""

    def add(self, codes: Tensor, targets: Tensor, metric: Tensor, mass: Tensor) -> None: ...

    def solve(self) -> Codebook:
        """The codebook with the tables that minimise the weighted error of the targets, the codes kept."""


class TableCodebook:
    """Codebooks of `vq`, `rq` and `rq-grouped`: tables of codewords, rounded as they will be stored.

    tables: [num_codebooks, num_tables, codebook_size, d] float32; see ProjectionFormat.num_tables for their order.
    groups: [num_codebooks, codebook_size] int64 for rq-grouped with several groups, else None.
    """

    def __init__(self, format: ProjectionFormat, tables: Tensor, groups: Tensor | None = None) -> None:
        self.format = format
        self.vector_dim = format.vector_dim
        self.num_planes = 2 if format.signed else format.num_stages
        self.code_dtype = torch.int64
        self.stored = store_tables(tables, format.codebook_dtype)
        self.tables = table_values(self.stored)
        self.groups = groups
        if groups is not None:
            self.stored["groups"] = groups.to(torch.uint8)

    def code_block(self, block: FeedbackBlock, refit: Refit | None) -> bool:
        suits = self.vector_dim in compiled.VECTOR_DIMS and self.format.codebook_size % compiled.CODEWORDS == 0
        on_cpu = block.weights.device.type == "cpu"
        if not (on_cpu and suits and self.format.num_stages == 1 and compiled.feedback_library()):
            return False
        sums = (refit.normal, refit.right) if isinstance(refit, TableRefit) else None
        tables = self.tables[:, 0]
        compiled.feedback_block(
            block.weights, block.carried, block.factor, tables, block.scale, block.codes, block.error, sums
        )
        return True

    def encode(self, targets: Tensor, metric: Tensor, mass: Tensor) -> Tensor:
        tables = self.tables.expand(len(targets), -1, -1, -1)
        if self.format.signed:
            return _encode_signed(targets, metric, tables[:, 0])
        if self.format.num_stages == 1:
            return nearest_codewords(targets @ metric, tables[:, 0] @ metric)[None]
        groups = None if self.groups is None else self.groups.expand(len(targets), -1)
        codes = torch.empty(*targets.shape[:2], self.num_planes, dtype=torch.int64, device=targets.device)
        for expert, of_expert in enumerate(targets @ metric):  # one at a time: expanded tables are large
            own = tables[expert] @ metric[expert], None if groups is None else groups[expert]
            codes[expert] = beam_search(of_expert, *own, num_groups=self.format.num_groups, beam=BEAM)
        return codes.permute(2, 0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        parts = self.stages(codes)
        return sum(parts[1:], start=parts[0])

    def stages(self, codes: Tensor) -> list[Tensor]:
        """What each stage contributes, [E, rows, d]."""
        flat = self.tables.flatten(0, 2)
        if self.format.signed:
            return [F.embedding(self.cells(codes)[0], flat) * _signs(codes[1], self.vector_dim)]
        return [F.embedding(cells, flat) for cells in self.cells(codes)]

    def cells(self, codes: Tensor) -> list[Tensor]:
        """Per stage the place of the codeword in the flattened tables, [E, rows]."""
        _, tables, size, _ = self.tables.shape
        book = torch.zeros(codes.shape[1], 1, dtype=torch.int64, device=codes.device)
        if len(self.tables) > 1:
            book = torch.arange(codes.shape[1], device=codes.device)[:, None]
        cells = []
        for stage in range(self.format.num_stages):
            table = torch.full_like(codes[0], stage)
            if self.groups is not None and stage:
                group = self.groups.expand(codes.shape[1], -1).gather(1, codes[0])
                table = 1 + (stage - 1) * self.format.num_groups + group
            cells.append((book * tables + table) * size + codes[stage])
        return cells

    def refit(self) -> Refit:
        return TableRefit(self)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        stages = pack_stages(codes[: self.format.num_stages], self.format.codebook_size)
        tensors = dict(self.stored)
        if self.format.signed:
            bits = codes[1][..., None] >> torch.arange(self.vector_dim, device=codes.device) & 1
            stages = torch.cat([stages, pack_bits(bits.flatten(-2).bool())], -1)
        return {"codes": stages} | tensors


class TableRefit:
    """Normal equations of every codeword, the other stages kept: Σ mass · S G S c = Σ mass · S G (t − others), with
    G = M Mᵀ and S the signs."""

    def __init__(self, codebook: TableCodebook) -> None:
        self.codebook = codebook
        books, tables, size, dim = codebook.tables.shape
        self.normal = codebook.tables.new_zeros(books * tables * size, dim, dim)
        self.right = codebook.tables.new_zeros(books * tables * size, dim)
        self.sums: tuple[Tensor, ...] = self.normal, self.right

    def begin(self, first_expert: int) -> None:
        pass

    def add(self, codes: Tensor, targets: Tensor, metric: Tensor, mass: Tensor) -> None:
        dim = self.codebook.vector_dim
        square = metric @ metric.mT
        parts = self.codebook.stages(codes)
        total = sum(parts[1:], start=parts[0])
        signs = _signs(codes[1], dim) if self.codebook.format.signed else None
        for cells, part in zip(self.codebook.cells(codes), parts, strict=True):
            wanted = (targets - total + part) @ square * mass[..., None]
            if signs is None:
                self.right.index_add_(0, cells.flatten(), wanted.flatten(0, 1))
                for expert, of_expert in enumerate(cells):
                    cell_mass = mass.new_zeros(len(self.right)).index_add_(0, of_expert, mass[expert])
                    self.normal.addcmul_(cell_mass[:, None, None], square[expert])
            else:
                self.right.index_add_(0, cells.flatten(), (wanted * signs).flatten(0, 1))
                outer = (signs * mass[..., None])[..., None] * signs[..., None, :] * square[:, None]
                self.normal.index_add_(0, cells.flatten(), outer.flatten(0, 1))

    def solve(self) -> TableCodebook:
        tables = self.codebook.tables
        solved = _solve_codewords(self.normal, self.right, tables.flatten(0, 2))
        if self.codebook.format.signed:
            solved = solved.clamp_min(0)  # the encoder takes the sign of the target for that of the weight
        return TableCodebook(self.codebook.format, solved.view(tables.shape), self.codebook.groups)


class NetworkCodebook(TableCodebook):
    """The codebook of `rq-moe`: a network, rounded as it will be stored. Codes are chosen among the codewords of its
    expansion, for every first code all second ones."""

    def __init__(self, format: ProjectionFormat, network: RQMoE) -> None:
        stored = store_network(network, format.codebook_dtype)
        expanded, tensors = expand(format, stored)
        super().__init__(expanded, table_values(tensors), tensors["groups"].long())
        self.network, self.network_format, self.stored = network, format, stored

    def refit(self) -> NetworkRefit:
        return NetworkRefit(self)


class NetworkRefit:
    """An even sample of the encoded vectors, each with its metric: training of the network with the codes kept.

    All vectors of a projection have a number, by group of channels, expert and row, in which every `stride`-th has a
    place of its own in the sums: the sample does not depend on who codes which experts.
    """

    def __init__(self, codebook: NetworkCodebook) -> None:
        self.codebook = codebook
        self.begin(0)
        format = codebook.network_format
        total, dim = format.num_weights // format.vector_dim, format.vector_dim
        self.stride = -(-total // REFIT_VECTORS)
        places = -(-total // self.stride)
        vectors, metric = (codebook.tables.new_zeros(places, *shape) for shape in ((dim,), (dim, dim)))
        codes = torch.zeros(places, format.num_stages, dtype=torch.int64, device=vectors.device)
        self.sums: tuple[Tensor, ...] = vectors, codes, metric

    def begin(self, first_expert: int) -> None:
        self.first_expert, self.groups = first_expert, 0

    def add(self, codes: Tensor, targets: Tensor, metric: Tensor, mass: Tensor) -> None:
        rows, num_experts = mass.shape[1], self.codebook.network_format.num_experts
        first = (self.groups * num_experts + self.first_expert) * rows
        self.groups += 1
        own = torch.arange(mass.numel(), device=mass.device)[-first % self.stride :: self.stride]
        places = (first + own) // self.stride
        vectors, chosen, metrics = self.sums
        vectors[places] = targets.flatten(0, 1)[own]
        chosen[places] = codes.flatten(1)[:, own].T
        metrics[places] = metric[own // rows] * mass.flatten()[own, None, None].sqrt()

    def solve(self) -> NetworkCodebook:
        network = copy.deepcopy(self.codebook.network)
        network.refit(*self.sums)
        return NetworkCodebook(self.codebook.network_format, network)


class TrellisCodebook:
    """A trellis code down each column: the rows of an expert are one sequence, a metric of one channel weights nothing
    within it."""

    vector_dim = 1
    num_planes = 1
    code_dtype = torch.uint8

    def __init__(self, format: ProjectionFormat) -> None:
        self.code = TrellisCode(format.trellis_bits, tail=format.tail)
        self._scratch: Tensor | None = None

    def code_block(self, block: FeedbackBlock, refit: Refit | None) -> bool:
        if not self.code.is_compiled(block.weights.device):
            return False
        mass = _relative_mass(block.mass)
        self.code.encode_block(
            block.weights, block.carried, block.factor, block.scale, mass, block.codes[0], block.error
        )
        return True

    def encode(self, targets: Tensor, metric: Tensor, mass: Tensor) -> Tensor:
        values = targets[..., 0]
        if self._scratch is None or self._scratch.device != values.device:
            self._scratch = self.code.scratch(len(values), values.shape[1], values.device)
        return self.code.encode(values, _relative_mass(mass), scratch=self._scratch)[None]

    def decode(self, codes: Tensor) -> Tensor:
        return self.code.decode(codes[0])[..., None]

    def refit(self) -> None:
        return None

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"codes": self.code.pack(codes[0].mT)}


def _relative_mass(mass: Tensor) -> Tensor:
    """How much each row counts [E, rows], in those of the mean."""
    return mass / mass.mean(1, keepdim=True)


def _signs(bits: Tensor, dim: int) -> Tensor:
    """Words of sign bits [...] -> ±1 float32 [..., dim]."""
    return 1.0 - 2.0 * (bits[..., None] >> torch.arange(dim, device=bits.device) & 1)


def _encode_signed(targets: Tensor, metric: Tensor, magnitudes: Tensor) -> Tensor:
    """Signs and magnitudes: targets [E, rows, d], metric [E, d, d], magnitudes [E, size, d] -> int64 [2, E, rows].

    With the signs S of the target, ‖(t − S m) M‖² = const − 2 m·S G t + mᵀ S G S m, G = M Mᵀ, is linear in the products
    m_i m_j, so one product with them scores every codeword exactly; then each sign in turn is flipped where that lowers
    the error, and the codeword chosen again for the new signs.
    """
    dim = targets.shape[-1]
    square = metric @ metric.mT
    first, second = torch.triu_indices(dim, dim, 1, device=targets.device)
    pairs = 2 * square[:, first, second][:, None] * magnitudes[..., first] * magnitudes[..., second]
    own = (square.diagonal(dim1=1, dim2=2)[:, None] * magnitudes.square()).sum(-1)
    features = torch.cat([-2 * magnitudes, pairs, own[..., None]], -1).mT.contiguous()  # [E, d + pairs + 1, size]
    pulled = targets @ square

    def choose(signs: Tensor) -> Tensor:
        ones = torch.ones_like(signs[..., :1])
        rows = torch.cat([signs * pulled, signs[..., first] * signs[..., second], ones], -1)
        limit = (1 << 20) if rows.device.type == "cpu" else (1 << 28)
        step = max(1, limit // (rows.shape[1] * features.shape[2]))
        chunks = range(0, len(rows), step)
        return torch.cat([(rows[b : b + step] @ features[b : b + step]).min(2).indices for b in chunks])

    signs = torch.where(targets < 0, -1.0, 1.0)
    index = choose(signs)
    magnitude = magnitudes.gather(1, index[..., None].expand(-1, -1, dim))
    pull = (targets - signs * magnitude) @ square
    for i in range(dim):
        step = signs[..., i] * magnitude[..., i]
        flip = step * (pull[..., i] + step * square[:, None, i, i]) < 0
        signs[..., i] = torch.where(flip, -signs[..., i], signs[..., i])
        pull += torch.where(flip, 2 * step, 0)[..., None] * square[:, None, i]
    index = choose(signs)
    bits = ((signs < 0) << torch.arange(dim, device=signs.device)).sum(-1)
    return torch.stack([index, bits])


def _solve_codewords(normal: Tensor, right: Tensor, codewords: Tensor) -> Tensor:
    """Codewords c with normal · c = right; a slight pull toward the old ones keeps empty and thin cells in place."""
    dim = codewords.shape[-1]
    trace = normal.diagonal(dim1=-2, dim2=-1).sum(-1)
    pull = torch.where(trace > 0, 1e-4 * trace / dim, torch.ones_like(trace))
    identity = torch.eye(dim, device=normal.device)
    solved = torch.linalg.solve(
        (normal + pull[..., None, None] * identity).double(), (right + pull[..., None] * codewords).double()
    )
    return solved.float()
