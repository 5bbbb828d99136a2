"""Trellis codebook for Gaussian sources: `bits` per value, decoded from a sliding window of the bit stream.

A bit-shift trellis (Mao & Gray, "Rate-distortion efficient source coding", 2010; for the weights of language models
QTIP, Tseng et al. 2024): value t is a fixed function of the `state_bits` bits of the stream that begin at its own code,

    state_t = Σ_i code_{t+i} · 2^(bits·i)        i = 0 .. state_bits/bits − 1
    value_t = levels[(state_t · multiplier mod 2^32) >> 24]

so any value decodes alone: one window read, one integer product and shift, one lookup in a table of 256. From the last
value to the first, state_t = (state_{t+1} << bits | code_t) mod 2^state_bits, and every sequence of codes is a path.
Indices wrap around (tail-biting): the windows of the last values end in the first codes, no start state is stored.

The levels suit Gaussian values or such with heavier tails (kbvq.codes.levels). Under the product, the place of a level
among them is a sum of the window's codes times constants, modulo one, so that the branches out of a state lie evenly
apart; a random order, which QTIP's hashes imitate, has 0.074 mean squared error at 2 bits and 2^12
states, this one 0.069. The multipliers are the best of some thousand random ones at 2^12 states, chosen by that error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.levels import levels
from kbvq.errors import ConfigError, NumericalError
from kbvq_kernels import encode as compiled

MULTIPLIERS = {1: 0x8DB4863B, 2: 0xC34D312F, 3: 0xE0B8F077, 4: 0x4FDE7251}
"""Bits per value -> odd factor that scatters the states over the levels."""

_CPU_COSTS = 1 << 18  # path costs of one step on a CPU: 1 MiB, so that they stay in the L2 cache
_CPU_STORED_COSTS = 1 << 26  # 256 MiB
_GPU_STORED_COSTS = 1 << 29  # 2 GiB
# Windows on each side of the seam. At length 512, 6 cost another 0.4 % of error, half the sequence saves 0.2 %.
_SEAM_MEMORIES = 12

PART = 2048
"""Sequences of twice as many values and more are searched in parts of about so many, each between states that the
values around its ends decide: parts wait for none of the others. Known to cpu_trellis.cpp too."""


_NOT_FINITE = "the trellis got values that are NaN or infinite; check the weights they come from"


@cache
def _codewords(bits: int, state_bits: int, tail: int) -> Tensor:
    return levels(tail)[(torch.arange(1 << state_bits) * MULTIPLIERS[bits] & 0xFFFFFFFF) >> 24]


@dataclass(frozen=True)
class TrellisCode:
    """A code of `bits` bits per value with 2^`state_bits` states.

    state_bits: a multiple of `bits`, at least twice and at most 16. The time of `encode` is proportional to
    2^state_bits; that of `decode` does not depend on it. 12 is a multiple of every rate. tail: of the levels.
    """

    bits: int
    state_bits: int = 12
    tail: int = 0

    def __post_init__(self) -> None:
        if self.bits not in MULTIPLIERS:
            raise ConfigError(f"a trellis code has 1, 2, 3 or 4 bits per value, not {self.bits!r}")
        if self.state_bits % self.bits or not 2 * self.bits <= self.state_bits <= 16:
            raise ConfigError(
                f"state_bits must be a multiple of bits = {self.bits} from {2 * self.bits} to 16, not {self.state_bits}"
            )

    @property
    def memory(self) -> int:
        """Codes in a window: on how many codes a value depends."""
        return self.state_bits // self.bits

    def codewords(self) -> Tensor:
        """The value of every state, [2^state_bits] float32."""
        return _codewords(self.bits, self.state_bits, self.tail).clone()

    def scratch(self, num_sequences: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Working memory of `encode` for values [num_sequences, length]: 1-D float32, at most 256 MiB (GPU: 2 GiB) or
        one sequence; empty where the search is compiled.

        Callers that encode column after column should hold it: fresh memory can cost as much time as the search.
        """
        if self.is_compiled(torch.device(device)):
            return torch.empty(0)
        batch = min(num_sequences, self._batch(length, torch.device(device)))
        return torch.empty(batch * self._stored_costs(length), device=device)

    def encode(self, values: Tensor, weights: Tensor | None = None, *, scratch: Tensor | None = None) -> Tensor:
        """Codes that minimise Σ_t weight_t (value_t − decoded_t)² for each sequence, up to the choice of the seam.

        values: [num_sequences, length] float32 of about unit variance, on a CPU or a GPU. weights: the same shape,
        float32 >= 0, or None for 1 (one weight for a whole sequence would change nothing). scratch: what `scratch`
        returned for this shape, overwritten; allocated if None.

        The state across the seam, where the sequence closes on itself, is first found by a search without constraint
        in the values around it, then held in the search over all values: exact but for that state. At length 512 the
        error is 0.5 % above that of an endless sequence. A sequence of several times PART has a seam at the end of each
        part. On a CPU with a C++ compiler the search is compiled and takes
        a sequence after the other; without, and on a GPU, every step handles all sequences at once, so that the time
        per value is least for many (64 of 512). Both find the same codes but for ties of the costs as rounded.

        Returns [num_sequences, length] uint8 < 2^bits.
        Raises ConfigError for a wrong shape or a length below `memory`, NumericalError for values that are not finite
        and for weights that are negative or not finite.
        """
        self._check_values(values, weights)
        length = values.shape[1]
        if self.is_compiled(values.device):
            weights = None if weights is None else weights.float()
            return compiled.trellis_encode(values.float(), weights, self.codewords(), self.bits, self._reach(length))
        values = values.float().flip(1)  # in the order in which states follow each other
        weights = torch.ones_like(values) if weights is None else weights.float().flip(1)
        if scratch is None:
            scratch = self.scratch(len(values), length, values.device)
        states = self._closed_path(values, weights, scratch)
        return (states & ((1 << self.bits) - 1)).to(torch.uint8).flip(1)

    def encode_block(
        self,
        weights: Tensor,
        carried: Tensor,
        factor: Tensor,
        scale: Tensor,
        mass: Tensor,
        codes: Tensor,
        error: Tensor,
    ) -> None:
        """Codes of a block of channels with error feedback, compiled; see kbvq_kernels.encode.trellis_block."""
        rows = weights.shape[1]
        if rows < self.memory:
            raise ConfigError(f"a trellis needs sequences of {self.memory} values or more, not {rows}")
        finite = compiled.trellis_block(
            weights,
            carried,
            factor,
            self.codewords(),
            scale,
            mass,
            codes,
            error,
            bits=self.bits,
            reach=self._reach(rows),
        )
        if not finite:
            raise NumericalError(_NOT_FINITE)

    def _reach(self, length: int) -> int:
        """Values on each side of a seam that decide its state."""
        return min(_SEAM_MEMORIES * self.memory, length // 2)

    def _closed_path(self, values: Tensor, weights: Tensor, scratch: Tensor) -> Tensor:
        """States of tail-biting sequences, [num_sequences, length]; arguments in the order of the states."""
        (count, length), device = values.shape, values.device
        parts, reach = max(1, length // PART), self._reach(length)
        starts = torch.arange(parts + 1, device=device) * length // parts

        def search(places: Tensor, before: Tensor | None = None, last: Tensor | None = None) -> Tensor:
            """Best paths of the values at `places` [parts, size], of all sequences: [num_sequences, parts, size]."""
            chosen = [t[:, places].flatten(0, 1) for t in (values, weights)]
            ends = [None if t is None else t.flatten() for t in (before, last)]
            return self.best_path(*chosen, *ends, scratch=scratch).unflatten(0, (count, len(places)))

        around = torch.arange(-reach, reach, device=device)
        seams = search((starts[:-1, None] + around) % length)[..., reach - 1]
        states = torch.empty(values.shape, dtype=torch.int64, device=device)
        sizes = starts.diff()
        for size in sizes.unique().tolist():
            chosen = (sizes == size).nonzero()[:, 0]
            places = starts[chosen, None] + torch.arange(size, device=device)
            states[:, places] = search(places, seams[:, chosen], seams[:, (chosen + 1) % parts])
        return states

    def best_path(
        self,
        values: Tensor,
        weights: Tensor,
        before: Tensor | None = None,
        last: Tensor | None = None,
        *,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """Viterbi search: the states s_t = (s_{t−1} << bits | code_t) mod 2^state_bits of least cost
        Σ_t weights_t (values_t − codeword(s_t))², summed in float32 (on a GPU: unless torch is told to allow TF32).

        values, weights: [num_sequences, length] float32, in the order of the states (which `encode` reverses).
        before, last: [num_sequences] int64 states, both or none: with which the state before s_0 and the last state
        agree in all but the oldest code, the one that s_0 no longer contains; where both are the same, the path closes.
        scratch: as in `encode`.

        Returns [num_sequences, length] int64.
        """
        count, length = values.shape
        if self.is_compiled(values.device):
            return compiled.trellis_paths(values, weights, self.codewords(), self.bits, before, last)
        if scratch is None:
            scratch = self.scratch(count, length, values.device)
        batch = min(self._batch(length, values.device), max(1, scratch.numel() // self._stored_costs(length)))
        if scratch.numel() < min(count, 1) * self._stored_costs(length) or scratch.dtype != torch.float32:
            raise ConfigError(
                f"scratch of {scratch.numel()} {scratch.dtype} is too small for length {length}; "
                "take what TrellisCode.scratch returns"
            )
        paths = [torch.empty(0, length, dtype=torch.int64, device=values.device)]
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            ends = None if before is None or last is None else (before[part], last[part])
            paths.append(self._search(values[part].T, weights[part].T, ends, scratch))
        return torch.cat(paths)

    def is_compiled(self, device: torch.device) -> bool:
        """Whether the compiled search runs: on a CPU, for all but the smallest trellises, where it could be built."""
        groups = 1 << self.state_bits - self.bits
        return device.type == "cpu" and groups >= compiled.MIN_GROUPS and compiled.trellis_library() is not None

    def _stored_costs(self, length: int) -> int:
        return length << self.state_bits - self.bits

    def _batch(self, length: int, device: torch.device) -> int:
        """Sequences searched at once."""
        if device.type == "cpu":
            limit = min(max(8, _CPU_COSTS >> self.state_bits), _CPU_STORED_COSTS // self._stored_costs(length))
        else:
            limit = _GPU_STORED_COSTS // self._stored_costs(length)
        return max(1, limit)

    def _search(self, values: Tensor, weights: Tensor, ends: tuple[Tensor, Tensor] | None, scratch: Tensor) -> Tensor:
        """`best_path` of one batch; values and weights are [length, num_sequences].

        The cost of a path is kept under its state's *slot*: the bits of the state rotated left by bits·j,
        j = −t mod memory. So the code that leaves the window and the one that enters have the same place, digit j of
        the slot: a step is a minimum over that digit and a broadcast along it, and nothing moves between slots.
        """
        bits, memory, device = self.bits, self.memory, values.device
        length, count = values.shape
        fanout, states = 1 << bits, 1 << self.state_bits
        groups = states >> bits  # the states of a group differ in their oldest code alone and continue alike

        slots = torch.arange(states, device=device)
        by_state = self.codewords().to(device)
        codewords = [by_state[_rotate(slots, -bits * j, self.state_bits)] for j in range(memory)]
        # w (x − c)² = [c², c, 1] · [w, −2 w x, w x²]
        emissions = [torch.stack([c.square(), c, torch.ones_like(c)], 1) for c in codewords]
        terms = torch.stack([weights, -2 * weights * values, weights * values.square()], 1).unbind()

        best = scratch[: length * groups * count].view(length, groups, count)  # least cost of arriving in a group
        if ends is None:
            best[0].zero_()
        else:
            best[0].fill_(torch.inf).scatter_(0, (ends[0] % groups)[None], 0.0)
        arrivals = best.unbind()
        cost = values.new_empty(states, count)
        axes = [cost.view(-1, fanout, 1 << bits * j, count) for j in range(memory)]
        halves = [[(a[:, :h], a[:, h : 2 * h]) for h in (8, 4, 2, 1) if h < fanout] for a in axes]
        for t, (arrival, term) in enumerate(zip(arrivals, terms, strict=True)):
            j = -t % memory
            arrival = arrival.view(-1, 1, 1 << bits * j, count)
            if t:
                *pairs, (first, second) = halves[j]
                for left, right in pairs:  # in place, the costs are used up; several times faster than amin
                    torch.minimum(left, right, out=left)
                torch.minimum(first, second, out=arrival)
            axes[j].copy_(arrival)
            cost.addmm_(emissions[j], term)

        if ends is None:
            slot = cost.argmin(0)
        else:
            final = (ends[1] % groups) + groups * torch.arange(fanout, device=device)[:, None]
            final = _rotate(final, bits * (-(length - 1) % memory), self.state_bits)
            slot = final.gather(0, cost.gather(0, final).argmin(0, keepdim=True))[0]

        # Backwards. The oldest code of the predecessor is the one that gave the minimum: to find it again for one state
        # per step is cheaper than to store it for all of them. `places`: where arrivals, flat, hold sequence 0 of the
        # group that a slot belongs to.
        places = [
            ((slots >> bits * (j + 1) << bits * j) | (slots & ((1 << bits * j) - 1))) * count for j in range(memory)
        ]
        digits = [torch.arange(fanout, device=device)[:, None] << bits * j for j in range(memory)]
        lanes = torch.arange(count, device=device)
        path = [slot]
        for t in range(length - 1, 0, -1):
            j = -t % memory
            candidates = (slot & ~((fanout - 1) << bits * j)) + digits[j]
            j = (j + 1) % memory
            arrival = arrivals[t - 1].view(-1).take(places[j].take(candidates).add_(lanes))
            error = codewords[j].take(candidates).sub_(values[t - 1])
            choice = arrival.addcmul_(error.square_(), weights[t - 1]).argmin(0, keepdim=True)
            slot = candidates.gather(0, choice)[0]
            path.append(slot)
        shifts = bits * (torch.arange(length, device=device) % memory)  # undoes the rotation by −t
        return _rotate(torch.stack(path[::-1], 1), shifts, self.state_bits)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of the codes, [.., length] uint8 (or any integer type) -> [.., length] float32.

        Raises ConfigError for a code of more than `bits` bits, or a length below `memory`.
        """
        self._check_codes(codes)
        codes = codes.int()
        window = torch.cat([codes, codes[..., : self.memory - 1]], -1)
        states = codes.clone()
        for i in range(1, self.memory):
            states |= window[..., i : i + codes.shape[-1]] << self.bits * i
        return F.embedding(states, self.codewords().to(codes.device)[:, None])[..., 0]

    def pack(self, codes: Tensor) -> Tensor:
        """The bit stream: integers [.., length] < 2^bits -> uint8 [.., length · bits / 8].

        Code t has the bits from bits·t on, counted from the lowest bit of byte 0. So state t is the `state_bits` bits
        from bits·t on of a little-endian word; past the last byte the first ones follow.

        Raises ConfigError for a code of more than `bits` bits, a length below `memory`, or bits that fill no whole
        number of bytes.
        """
        self._check_codes(codes)
        if codes.shape[-1] * self.bits % 8:
            raise ConfigError(
                f"{codes.shape[-1]} codes of {self.bits} bits fill no whole number of bytes; the length must be a "
                f"multiple of {8 // gcd(8, self.bits)}"
            )
        return _regroup(codes.to(torch.uint8), self.bits, 8)

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`: uint8 [.., bytes] -> uint8 [.., 8 · bytes / bits].

        Raises ConfigError if the bytes hold no whole number of codes.
        """
        if packed.shape[-1] * 8 % self.bits:
            raise ConfigError(f"{packed.shape[-1]} bytes hold no whole number of {self.bits}-bit codes")
        return _regroup(packed, 8, self.bits)

    def _check_codes(self, codes: Tensor) -> None:
        if codes.shape[-1] < self.memory:
            raise ConfigError(f"{codes.shape[-1]} codes do not fill a window of {self.memory}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << self.bits:
            raise ConfigError(
                f"codes lie in [{int(codes.min())}, {int(codes.max())}]; "
                f"{self.bits} bits hold [0, {(1 << self.bits) - 1}]"
            )

    def _check_values(self, values: Tensor, weights: Tensor | None) -> None:
        if values.ndim != 2 or values.shape[1] < self.memory:
            raise ConfigError(
                f"values must be [num_sequences, length >= {self.memory}] for this trellis, not {list(values.shape)}"
            )
        if weights is not None and weights.shape != values.shape:
            raise ConfigError(f"weights {list(weights.shape)} must have the shape of values, {list(values.shape)}")
        if not torch.isfinite(values).all():
            raise NumericalError(_NOT_FINITE)
        if weights is not None and not (torch.isfinite(weights) & (weights >= 0)).all():
            raise NumericalError("the trellis got error weights that are negative, NaN or infinite")


def _rotate(words: Tensor, shift: int | Tensor, width: int) -> Tensor:
    """Rotate integers of `width` bits left by `shift` bits."""
    shift = shift % width
    return ((words << shift) | (words >> width - shift)) & ((1 << width) - 1)


def _regroup(words: Tensor, width: int, new_width: int) -> Tensor:
    """Read a stream of `width`-bit words, lowest bit first, as words of `new_width` bits: uint8 in, uint8 out."""
    stream = (words[..., None] >> torch.arange(width, dtype=torch.uint8, device=words.device)) & 1
    shifts = torch.arange(new_width, dtype=torch.uint8, device=words.device)
    return (stream.flatten(-2).unflatten(-1, (-1, new_width)) << shifts).sum(-1, dtype=torch.uint8)
