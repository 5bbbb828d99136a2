"""RQ-MoE (arXiv 2605.14359): residual quantization whose codewords adapt to the earlier codes, decoded in parallel.

A vector is the sum of M codewords. Stage 0 is a plain codebook. The codeword of a later stage m is a function of its
own code and of an *instruction* z, the sum of embeddings of the codes before it:

    z_m = Σ_{l<m} a_l[k_l]                                 instruction
    u   = P_m [c_m[j]; z_m]                                conditioned codeword
    g   = softmax(G2_m ReLU(G1_m u))                       gate over the refiners
    refiner_n:  u ← u + B2 ReLU(B1 u), L times             residual blocks
    ĉ_m[j | z] = Σ_n g_n refiner_n(u)                      codeword

No stage needs the reconstruction of another one, so a decoder computes all instructions by one cumulative sum and
then all stages at once. Putting the reconstruction in place of z gives QINCo (Huijben et al. 2024), which has to
decode stage by stage; identity refiners and z = 0 give plain residual quantization.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from kbvq.codes.residual_quantization import fit_residual_codebooks
from kbvq.errors import CheckpointError, ConfigError, NumericalError

FORMAT_VERSION = 1
_METADATA_KEY = "kbvq_rq_moe"  # one JSON value: the order of several keys in the file is not defined
_CHUNK_FLOATS = {"cpu": 1 << 19, "cuda": 1 << 27}  # activations held at once; on CPU they should stay in the cache

_DECODING_BYTES = 1 << 26
"""The decoder tabulates what is linear in the codes when the table is not larger: it has to be read from a cache."""


class RQMoE(nn.Module):
    """Quantizer of float vectors [n, vector_dim] into `num_stages` codes each.

    codebook_size: codewords per stage, K. num_refiners, refiner_depth, refiner_width: N, L and h above. Depth 1
        decodes fastest: everything before the ReLU is then linear in table entries.
    conditioning: "instruction" (RQ-MoE) or "reconstruction" (QINCo: the decoded sum of the earlier stages takes the
        place of z; decoding is sequential).

    The mean of the vectors is subtracted and the rest divided by its root mean square before anything else; both are
    stored. The hidden layer of the gate has 4·N units.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        vector_dim: int,
        num_stages: int,
        codebook_size: int,
        num_refiners: int,
        refiner_depth: int,
        refiner_width: int,
        *,
        conditioning: str = "instruction",
    ) -> None:
        super().__init__()
        sizes = {
            "vector_dim": vector_dim,
            "num_stages": num_stages,
            "codebook_size": codebook_size,
            "num_refiners": num_refiners,
            "refiner_depth": refiner_depth,
            "refiner_width": refiner_width,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"RQMoE: {name} must be a positive integer, not {value!r}")
        if conditioning not in ("instruction", "reconstruction"):
            raise ConfigError(f"RQMoE: conditioning must be instruction or reconstruction, not {conditioning!r}")
        self.vector_dim, self.num_stages, self.codebook_size = vector_dim, num_stages, codebook_size
        self.num_refiners, self.refiner_depth, self.refiner_width = num_refiners, refiner_depth, refiner_width
        self.conditioning = conditioning
        self._decoder: tuple[Any, tuple[Tensor, ...]] | None = None
        dim, later, gate_width = vector_dim, num_stages - 1, 4 * num_refiners
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.zeros(()))  # zero until fitted
        self.codebooks = nn.Parameter(torch.zeros(num_stages, codebook_size, dim))
        # Everything below belongs to stages 1..M-1; the instructions to the stages before them, 0..M-2.
        if conditioning == "instruction":
            self.instructions = nn.Parameter(torch.zeros(later, codebook_size, dim))
        self.projection = nn.Parameter(torch.zeros(later, dim, 2 * dim))
        self.gate_in = nn.Parameter(torch.zeros(later, gate_width, dim))
        self.gate_out = nn.Parameter(torch.zeros(later, num_refiners, gate_width))
        self.refiner_in = nn.Parameter(torch.zeros(later, refiner_depth, num_refiners, refiner_width, dim))
        self.refiner_out = nn.Parameter(torch.zeros(later, refiner_depth, num_refiners, dim, refiner_width))

    @property
    def config(self) -> dict[str, int | str]:
        """The constructor's arguments."""
        return {
            "vector_dim": self.vector_dim,
            "num_stages": self.num_stages,
            "codebook_size": self.codebook_size,
            "num_refiners": self.num_refiners,
            "refiner_depth": self.refiner_depth,
            "refiner_width": self.refiner_width,
            "conditioning": self.conditioning,
        }

    def _projected_codebooks(self) -> Tensor:
        """The part of u = P [c; z] that the code alone decides, for all codewords of stages 1..M-1: [M-1, K, d]."""
        return self.codebooks[1:] @ self.projection[:, :, : self.vector_dim].mT

    def _shift(self, condition: Tensor, stages: slice) -> Tensor:
        """The part of u that the condition decides: [stages, rows, d] -> [stages, rows, d]."""
        return condition @ self.projection[stages, :, self.vector_dim :].mT

    def _first_layer(self) -> Tensor:
        """G1 and the B1 of every refiner's first block, stacked, as all of them read u: [M-1, 4N + N·h, d]."""
        return torch.cat([self.gate_in, self.refiner_in[:, 0].flatten(1, 2)], 1)

    def _mixed_hidden(self, first: Tensor, stages: slice) -> tuple[Tensor, Tensor]:
        """Gates [stages, rows, N] and first blocks' hidden units [stages, rows, N, h] of the first layer's output."""
        first = F.relu(first, inplace=not first.requires_grad)
        gate_width = self.gate_in.shape[1]
        # softmax is vectorised over the inner dimension, which should therefore be the long one
        gates = torch.softmax(self.gate_out[stages] @ first[..., :gate_width].mT, 1).mT
        return gates, first[..., gate_width:].unflatten(2, (self.num_refiners, -1))

    def _refine(self, conditioned: Tensor, first: Tensor, stages: slice) -> tuple[Tensor, Tensor]:
        """Codewords [stages, rows, d] and gates of conditioned codewords u and their first layer's output.

        The mixture is computed as u + Σ_n g_n (refiner_n(u) − u): the same, because the gates sum to one, and exact
        for identity refiners.
        """
        gates, hidden = self._mixed_hidden(first, stages)
        refiner_in, refiner_out = self.refiner_in[stages], self.refiner_out[stages]
        change = None  # Σ of the blocks so far, per refiner: [stages, N, rows, d]
        for block in range(1, self.refiner_depth):
            step = hidden.transpose(1, 2) @ refiner_out[:, block - 1].mT
            change = step if change is None else change + step
            hidden = F.relu((conditioned[:, None] + change) @ refiner_in[:, block].mT).transpose(1, 2)
        mixed = (hidden * gates[..., None]).flatten(2) @ refiner_out[:, -1].mT.flatten(1, 2)
        if change is not None:
            mixed = mixed + torch.einsum("srn,snrd->srd", gates, change)
        return conditioned + mixed, gates

    def _codewords(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codewords [m, n, d] and gates [m-1, n, N] of int64 codes [n, m], of normalised vectors; differentiable."""
        num_later = codes.shape[1] - 1
        codeword = F.embedding(codes[:, 0], self.codebooks[0])[None]
        if num_later == 0:
            return codeword, codeword.new_zeros(0, len(codes), self.num_refiners)
        later = slice(0, num_later)
        first_layer = self._first_layer()
        conditioned = _lookup(self._projected_codebooks()[later], codes[:, 1:])
        if self.conditioning == "instruction":
            instructions = _lookup(self.instructions[later], codes[:, :-1]).cumsum(0)
            conditioned = conditioned + self._shift(instructions, later)
            codewords, gates = self._refine(conditioned, conditioned @ first_layer[later].mT, later)
            return torch.cat([codeword, codewords]), gates
        reconstruction, all_codewords, all_gates = codeword, [codeword], []
        for stage in range(num_later):
            part = slice(stage, stage + 1)
            shifted = conditioned[part] + self._shift(reconstruction, part)
            codeword, gates = self._refine(shifted, shifted @ first_layer[part].mT, part)
            reconstruction = reconstruction + codeword
            all_codewords.append(codeword)
            all_gates.append(gates)
        return torch.cat(all_codewords), torch.cat(all_gates)

    def encode(
        self, vectors: Tensor, *, beam: int = 1, shortlist: int | None = None, num_stages: int | None = None
    ) -> Tensor:
        """Codes of vectors [n, vector_dim]: [n, num_stages] uint8 (int32 above 256 codewords), on the model's device.

        beam: partial codes kept per vector; 1 is greedy. shortlist: evaluate the refiners only for that many
        codewords per stage, those whose conditioned codeword u is nearest to the residual; None for all of them.
        num_stages: use the first so many stages, for a shorter and coarser code; None for all of them.
        Raises ConfigError on another dimension or before `fit`, NumericalError on values that are not finite.
        """
        self._check_fitted()
        vectors = self._checked(vectors)
        if beam < 1 or (shortlist is not None and shortlist < 1):
            raise ConfigError(f"RQMoE.encode: beam {beam} and shortlist {shortlist} must be at least 1")
        if num_stages is not None and not 1 <= num_stages <= self.num_stages:
            raise ConfigError(f"RQMoE.encode: num_stages {num_stages} is not in 1..{self.num_stages}")
        codes = self._encode((vectors - self.mean) / self.scale, beam, shortlist, num_stages or self.num_stages)
        return codes.to(torch.uint8 if self.codebook_size <= 256 else torch.int32)

    @torch.no_grad()
    def _encode(self, vectors: Tensor, beam: int, shortlist: int | None, num_stages: int) -> Tensor:
        """Codes [n, num_stages] int64 of normalised vectors [n, d]."""
        size = min(shortlist or self.codebook_size, self.codebook_size)
        tables = self._projected_codebooks()[: num_stages - 1]
        first_layer = self._first_layer()[: num_stages - 1]
        first_tables = tables @ first_layer.mT
        floats = 3 * self.vector_dim + 2 * first_layer.shape[1] if num_stages > 1 else self.vector_dim
        if self.refiner_depth > 1:
            floats += self.num_refiners * (2 * self.refiner_width + 3 * self.vector_dim)
        chunk = max(1, _CHUNK_FLOATS[vectors.device.type] // (beam * size * floats))
        parts = [self._search(x, beam, size, tables, first_tables, first_layer) for x in vectors.split(chunk)]
        return torch.cat(parts) if parts else torch.empty(0, num_stages, dtype=torch.int64, device=vectors.device)

    def _search(
        self, vectors: Tensor, beam: int, shortlist: int, tables: Tensor, first_tables: Tensor, first_layer: Tensor
    ) -> Tensor:
        """Beam search: codes [n, m] of normalised vectors [n, d]. The first layer is linear, so it acts on the tables
        [m-1, K, ·] and on the shift that a partial code brings to all its candidates, not on each candidate."""
        dim = self.vector_dim
        scores = 0.5 * self.codebooks[0].square().sum(1) - vectors @ self.codebooks[0].T
        codes = scores.topk(min(beam, self.codebook_size), dim=1, largest=False).indices[..., None]  # [n, beam, 1]
        reconstruction = F.embedding(codes[..., 0], self.codebooks[0])
        by_instruction = self.conditioning == "instruction"
        condition = reconstruction
        if by_instruction and len(tables) > 0:
            condition = F.embedding(codes[..., 0], self.instructions[0])
        for stage in range(len(tables)):
            part = slice(stage, stage + 1)
            table, first_table = tables[stage], first_tables[stage]
            residual = vectors[:, None] - reconstruction
            shift = self._shift(condition.flatten(0, 1)[None], part).view_as(condition)
            first_shift = shift @ first_layer[stage].T
            if shortlist < self.codebook_size:
                # The refiners add to u, so the u nearest to the residual are the likely winners.
                scores = 0.5 * table.square().sum(1) - (residual - shift) @ table.T
                candidates = scores.topk(shortlist, dim=2, largest=False).indices  # [n, beam, A]
                table, first_table = F.embedding(candidates, table), F.embedding(candidates, first_table)
            else:
                candidates = torch.arange(self.codebook_size, device=codes.device).expand(*residual.shape[:2], -1)
            conditioned = table + shift[:, :, None]
            first = first_table + first_shift[:, :, None]
            codewords = self._refine(conditioned.flatten(0, 2)[None], first.flatten(0, 2)[None], part)[0]
            codewords = codewords.view_as(conditioned)
            errors = (residual[:, :, None] - codewords).square().sum(3).flatten(1)  # [n, beam·A]
            best = errors.topk(min(beam, errors.shape[1]), dim=1, largest=False).indices
            origin = (best // candidates.shape[2])[..., None]
            code = candidates.flatten(1).gather(1, best)
            codes = torch.cat([codes.gather(1, origin.expand(-1, -1, codes.shape[2])), code[..., None]], 2)
            codeword = codewords.flatten(1, 2).gather(1, best[..., None].expand(-1, -1, dim))
            reconstruction = reconstruction.gather(1, origin.expand(-1, -1, dim)) + codeword
            if not by_instruction:
                condition = reconstruction
            elif stage + 1 < len(tables):
                condition = condition.gather(1, origin.expand(-1, -1, dim))
                condition = condition + F.embedding(code, self.instructions[stage + 1])
        return codes[:, 0]  # topk sorts: the first has the smallest error

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [n, vector_dim] float32 of codes [n, m] of any integer type, on the model's device.

        With m < num_stages columns the first m stages are decoded: a shorter, coarser code.
        Raises ConfigError on codes of another shape or outside the codebook, or before `fit`.
        """
        self._check_fitted()
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= self.num_stages:
            raise ConfigError(f"RQMoE.decode: codes are {list(codes.shape)}, expected [n, 1..{self.num_stages}]")
        limits = torch.iinfo(codes.dtype)
        if len(codes) and (limits.min < 0 or limits.max >= self.codebook_size):
            lowest, highest = codes.aminmax()
            if int(lowest) < 0 or int(highest) >= self.codebook_size:
                raise ConfigError(
                    f"RQMoE.decode: codes must lie in 0..{self.codebook_size - 1}; they come from another quantizer"
                )
        codes = codes.to(self.codebooks.device, torch.int64)
        num_stages = codes.shape[1]
        width = self.gate_in.shape[1] + self.num_refiners * self.refiner_width  # of the first layer
        parts = codes.split(max(1, 2 * _CHUNK_FLOATS[codes.device.type] // (num_stages * max(self.vector_dim, width))))
        table_bytes = 4 * num_stages * self.codebook_size * ((num_stages - 1) * width + self.vector_dim)
        tabled = self.conditioning == "instruction" and self.refiner_depth == 1 and num_stages > 1
        if tabled and table_bytes <= _DECODING_BYTES:
            decoded = [self._decode_by_tables(part) for part in parts]
        else:
            decoded = [torch.addcmul(self.mean, self._codewords(part)[0].sum(0), self.scale) for part in parts]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def _decode_by_tables(self, codes: Tensor) -> Tensor:
        """Vectors of codes for depth 1 [n, d], with everything that is linear in the codes read from tables.

        The instructions are sums over the codes, so the first layer's outputs of all stages are too, and the sum of
        all u as well: one table entry for each code, all of them added up. What is left is Σ_m B2 (g_m ⊙ ReLU(·)), one
        product for all stages.
        """
        table, out, offsets = self._decoding_tables(codes.shape[1])
        later, refiners = codes.shape[1] - 1, self.num_refiners
        units = self.gate_in.shape[1] * later  # of the gates
        summed = F.embedding_bag(codes + offsets, table, mode="sum")
        total, first = summed[:, -self.vector_dim :], summed[:, : -self.vector_dim].relu_()
        # softmax is vectorised over the inner dimension, which should therefore be the long one
        logits = self.gate_out[:later] @ first[:, :units].unflatten(1, (later, -1)).permute(1, 2, 0)
        gates = torch.softmax(logits, 1).flatten(0, 1).T  # [n, later * refiners]
        hidden = first[:, units:]
        hidden.unflatten(1, (later * refiners, -1)).mul_(gates[..., None])
        return torch.addmm(total, hidden, out)

    def _decoding_tables(self, num_stages: int) -> tuple[Tensor, ...]:
        """(table [m · K, all first layers and d], B2 of all stages [·, d], first row of each code's table [m]) for
        codes [n, m], kept until a parameter changes. Row j of code l holds what that code adds: to the gates' layer of
        each stage, to the refiners', to the decoded vector, whose mean and scale are in the table and in B2."""
        stored = (*self._parameters.values(), *self._buffers.values())
        key = (num_stages, [(t.data_ptr(), t._version) for t in stored if t is not None])
        if self._decoder is None or self._decoder[0] != key:
            later, dim, size = num_stages - 1, self.vector_dim, self.codebook_size
            first_layer, own = self._first_layer()[:later], self._projected_codebooks()[:later]
            condition = self.projection[:later, :, dim:]
            first = own.new_zeros(num_stages, size, later, first_layer.shape[1])
            total = torch.cat([self.codebooks[:1], own])
            for stage in range(later):  # stage + 1 of the codes: its own entry, and the instructions of those before
                shift = self.instructions[: stage + 1] @ condition[stage].T
                first[stage + 1, :, stage] += own[stage] @ first_layer[stage].T
                first[: stage + 1, :, stage] += shift @ first_layer[stage].T
                total[: stage + 1] += shift
            total *= self.scale
            total[0] += self.mean
            gate_width = self.gate_in.shape[1]
            parts = [first[..., :gate_width].flatten(2), first[..., gate_width:].flatten(2), total]
            out = self.refiner_out[:later, 0].mT.flatten(0, 2) * self.scale
            offsets = torch.arange(num_stages, device=own.device) * size
            self._decoder = (key, (torch.cat(parts, 2).flatten(0, 1), out, offsets))
        return self._decoder[1]

    def _check_fitted(self) -> None:
        if float(self.scale) == 0:
            raise ConfigError("this RQMoE has no codebooks yet; call fit or load first")

    def _checked(self, vectors: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.vector_dim:
            raise ConfigError(f"RQMoE: vectors are {list(vectors.shape)}, expected [n, {self.vector_dim}]")
        vectors = vectors.to(self.codebooks.device, torch.float32)
        if not torch.isfinite(vectors).all():
            raise NumericalError("RQMoE: the vectors contain NaN or infinite values; remove them first")
        return vectors

    def fit(
        self,
        vectors: Tensor,
        *,
        seed: int = 0,
        weights: Tensor | None = None,
        codebooks: Tensor | None = None,
        epochs: int = 10,
        batch_size: int = 256,
        learning_rate: float = 0.01,
        balance: float = 0.01,
        shortlist: int | None = 8,
        kmeans_iterations: int = 25,
        kmeans_max_vectors: int | None = None,
        progress: bool = True,
    ) -> RQMoE:
        """Train on vectors [n, vector_dim]; returns itself. The same seed gives the same model, byte for byte, on CPU.

        Starts as plain residual quantization, with `codebooks` [num_stages, codebook_size, vector_dim] if given, else
        by k-means on at most `kmeans_max_vectors` vectors per stage. Then `epochs` passes of Adam, a short warm-up and
        a cosine decay of the learning rate to zero. Codes are those of the greedy encoder over `shortlist`
        candidates, without gradient; the loss is

            Σ_m log(1 + mean‖r_m‖² / stopgrad mean‖r_{m−1}‖²) + balance · Σ_m Σ_n mean(g_n)²,   r_{−1} = x

        with means over the batch, weighted by `weights` [n] >= 0 if given. learning_rate is that of the codebooks.
        Instructions and matrices act on u through a sum over d terms and get learning_rate · min(1, 32/d); B2, averaged
        by the gates, N times that. The 32 is a heuristic, tuned on vectors of 32 and 256 dimensions.
        epochs 0 leaves plain residual quantization. progress: show a bar, on a terminal only.
        Raises ConfigError on another dimension, other codebooks or fewer vectors than codewords, NumericalError on
        values that are not finite.
        """
        vectors = self._checked(vectors)
        if len(vectors) < self.codebook_size:
            raise ConfigError(
                f"RQMoE.fit: {len(vectors)} vectors cannot train {self.codebook_size} codewords; "
                "give more vectors or a smaller codebook_size"
            )
        if codebooks is not None and codebooks.shape != self.codebooks.shape:
            expected = list(self.codebooks.shape)
            raise ConfigError(f"RQMoE.fit: codebooks are {list(codebooks.shape)}, expected {expected}")
        with torch.no_grad():
            self.mean.copy_(vectors.mean(0))
            vectors = vectors - self.mean
            rms = vectors.square().mean().sqrt()
            self.scale.copy_(torch.where(rms > 0, rms, torch.ones_like(rms)))
            vectors = vectors / self.scale
            if codebooks is None:
                codebooks = fit_residual_codebooks(
                    vectors,
                    self.num_stages,
                    self.codebook_size,
                    iterations=kmeans_iterations,
                    seed=seed,
                    weights=weights,
                    max_vectors=kmeans_max_vectors,
                )
            else:
                codebooks = codebooks.to(vectors)
                codebooks = torch.cat([codebooks[:1] - self.mean, codebooks[1:]]) / self.scale
            self._start_from_(codebooks, torch.Generator().manual_seed(seed))
        mass = vectors.new_ones(len(vectors)) if weights is None else weights.to(vectors) / weights.mean()

        def loss(rows: Tensor) -> Tensor:
            batch = vectors[rows]
            return self._loss(batch, mass[rows], self._encode(batch, 1, shortlist, self.num_stages), balance)

        self._train(loss, len(vectors), seed, epochs, batch_size, learning_rate, progress)
        return self

    def refit(
        self,
        vectors: Tensor,
        codes: Tensor,
        metric: Tensor,
        *,
        seed: int = 0,
        epochs: int = 2,
        batch_size: int = 256,
        learning_rate: float = 0.003,
    ) -> RQMoE:
        """Train on, from where the network is, with codes that another encoder chose and that are kept; returns itself.

        vectors: [n, vector_dim]. codes: int64 [n, num_stages]. metric: M of each vector, [n, vector_dim, vector_dim].
        The loss is the mean of ‖(x − x̂) M‖²: what an encoder with a beam makes small, whatever the error of the stages
        before the last.
        """
        vectors = (self._checked(vectors) - self.mean) / self.scale
        metric = metric / (metric.square().sum((1, 2)).mean() / self.vector_dim).sqrt()

        def loss(rows: Tensor) -> Tensor:
            wrong = vectors[rows] - self._codewords(codes[rows])[0].sum(0)
            return (wrong[:, None] @ metric[rows]).square().sum((1, 2)).mean()

        self._train(loss, len(vectors), seed, epochs, batch_size, learning_rate, progress=False)
        return self

    def _start_from_(self, codebooks: Tensor, generator: torch.Generator) -> None:
        """Parameters with which the model is plain residual quantization, and from which every gradient is alive.

        P = [I 0] and B2 = 0 make every codeword plain whatever the instructions are, so the instructions may start as
        copies of the codewords: z is then the reconstruction that plain residual quantization has so far. With
        instructions of zero, as published, P's second half (gradient ∝ z) and the instructions (gradient ∝ that half)
        would hold each other at zero. B2 moves at the first step, B1, G1 and G2 as soon as B2 is not zero.
        """
        dim = self.vector_dim
        self.codebooks.copy_(codebooks)
        if self.conditioning == "instruction":
            self.instructions.copy_(codebooks[:-1])
        self.projection[:, :, :dim] = torch.eye(dim, device=codebooks.device)
        self.projection[:, :, dim:] = 0
        self.refiner_out.zero_()
        for parameter in (self.gate_in, self.gate_out, self.refiner_in):
            gain = 1 if parameter is self.gate_out else 2  # He et al. 2015 before a ReLU
            deviation = math.sqrt(gain / parameter.shape[-1])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        # Residuals shrink from stage to stage; a gate that saw them as they are would hardly tell them apart.
        size = codebooks[1:].square().mean((1, 2), keepdim=True).sqrt()
        self.gate_in.div_(size.clamp_min(torch.finfo(size.dtype).eps))

    def _train(
        self,
        loss: Callable[[Tensor], Tensor],
        num_vectors: int,
        seed: int,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        progress: bool,
    ) -> None:
        """Adam on `loss`, a function of the rows of a batch, for `epochs` passes over all rows in random order."""
        steps = epochs * math.ceil(num_vectors / batch_size) if self.num_stages > 1 else 0
        if steps == 0:
            return
        inner_rate = learning_rate * min(1, 32 / self.vector_dim)
        inner = [p for p in self.parameters() if p is not self.codebooks and p is not self.refiner_out]
        optimizer = torch.optim.Adam(
            [
                {"params": [self.codebooks], "lr": learning_rate},
                {"params": inner, "lr": inner_rate},
                {"params": [self.refiner_out], "lr": inner_rate * self.num_refiners},
            ]
        )
        warmup = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        generator = torch.Generator().manual_seed(seed)
        with tqdm(total=steps, desc="RQ-MoE", unit="batch", disable=None if progress else True) as bar:
            for _ in range(epochs):
                order = torch.randperm(num_vectors, generator=generator).to(self.codebooks.device)
                for rows in order.split(batch_size):
                    with torch.enable_grad():
                        value = loss(rows)
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()

    def _loss(self, vectors: Tensor, mass: Tensor, codes: Tensor, balance: float) -> Tensor:
        codewords, gates = self._codewords(codes)
        energies = (vectors - codewords.cumsum(0)).square().sum(2) @ mass / len(mass)  # mean ‖r_m‖² of each stage [M]
        before = torch.cat([(vectors.square().sum(1) @ mass / len(mass))[None], energies[:-1].detach()])
        tiny = torch.finfo(before.dtype).tiny
        return torch.log1p(energies / before.clamp_min(tiny)).sum() + balance * gates.mean(1).square().sum()

    def save(self, path: str | Path) -> None:
        """Write the model to one safetensors file; its format version and sizes are in the file's metadata."""
        self._check_fitted()
        metadata = json.dumps({"format_version": FORMAT_VERSION, **self.config}, sort_keys=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={_METADATA_KEY: metadata})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> RQMoE:
        """Read a file written by `save`. Raises CheckpointError when it is missing, damaged or of another version."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(_METADATA_KEY)
                if metadata is None:
                    raise CheckpointError(f"{path} is not an RQ-MoE file: it lacks the metadata {_METADATA_KEY!r}")
                config = json.loads(metadata)
                version = config.pop("format_version", None)
                if version != FORMAT_VERSION:
                    raise CheckpointError(
                        f"{path} has RQ-MoE format version {version}, this kbvq reads version {FORMAT_VERSION}; "
                        "use the kbvq that wrote it or train the codebooks again"
                    )
                model = cls(**config)
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, ConfigError) as error:
            raise CheckpointError(f"{path} is not a readable RQ-MoE file: {error}") from error
        return model.to(device)


def _lookup(tables: Tensor, codes: Tensor) -> Tensor:
    """Row codes[:, s] of every table s: tables [S, K, d], codes [n, S] -> [S, n, d]."""
    num_tables, size, dim = tables.shape
    offsets = torch.arange(num_tables, device=codes.device)[:, None] * size
    return F.embedding(codes.T + offsets, tables.reshape(-1, dim))
