// Products of experts packed by a trellis code with vectors in integers (integers.h); the levels are rounded to 8 bits, or
// to 16, as two numbers of 8.
//
// A level is found without memory. The window of 12 bits is multiplied in 16-bit lanes, and the high byte of the product
// chooses: among 128 magnitudes in eight registers of 16, or with AVX-512 VBMI among 256 levels in four registers of 64.
#include "integer_panel.h"
#include "trellis_windows.h"

namespace {

typedef uint16_t Shorts __attribute__((vector_size(32)));

// The state of row n is a window of 12 bits from bit n * BITS of its column's stream on, which continues at its
// beginning. Rows are taken by tiles, each from a byte on.
struct Levels {
    const uint8_t* magnitudes;  // 128, of the lowest level first; the upper levels have the same, last one first
    const int8_t* rests;        // nothing, or in what FINE units more the magnitudes are
    uint32_t multiplier;
    float unit;
};

const int FINE = 254;  // rests of at most half a unit have 8 bits

// Where the weights of four columns go: [groups of rows][QUADS] from their quad on.
struct Place {
    Weights *weights, *rests;
};

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
// A tile is four runs of rows; the windows of a run lie in eight bytes.
template <int BITS>
struct Tile {
    static const long RUN = BITS == 4 ? 8 : 16, ROWS = 4 * RUN, BYTES = ROWS * BITS / 8;
};
const long OVERHANG = 32;  // bytes that may be read from a tile's first on

// SHIFT minus each of the 256 levels, in units, or minus the rests.
inline Choice shifted(const void* lower) {
    const auto load = [&](int i) { return _mm512_loadu_si512((const uint8_t*)lower + 64 * i); };
    const __m512i shift = _mm512_set1_epi8(SHIFT), back = bytes_by([](int i) { return 63 - i; });
    Choice levels;
    for (int i = 0; i < 2; i++) {
        levels.parts[i] = _mm512_add_epi8(shift, load(i));
        levels.parts[3 - i] = _mm512_sub_epi8(shift, _mm512_permutexvar_epi8(back, load(i)));
    }
    return levels;
}

// Decodes four columns' tiles.
template <int BITS, bool RESTS>
inline void decode(const uint8_t* const* p, long tiles, const Levels& levels, Place out) {
    typedef Tile<BITS> T;
    const Choice weights = shifted(levels.magnitudes), rests = shifted(RESTS ? (const void*)levels.rests : levels.magnitudes);
    const Windows<BITS> windows(levels.multiplier);
    // Eight bytes for each run of two columns; of two such the levels' numbers by row and column.
    const __m512i runs = bytes_by([](int i) { return i / 32 * 32 + i / 8 % 4 * (T::RUN * BITS / 8) + i % 8; });
    const __m512i in_rows = bytes_by([](int i) { return i % 4 * 32 + i / 16 * 8 + i / 4 % 4 * 2 + 1; });
    for (long tile = 0; tile < tiles; tile++) {
        const auto columns = [&](int first) {
            const auto at = [&](int i) { return _mm256_loadu_si256((const __m256i*)(p[first + i] + tile * T::BYTES)); };
            return _mm512_permutexvar_epi8(runs, _mm512_inserti64x4(_mm512_castsi256_si512(at(0)), at(1), 1));
        };
        const __m512i left = columns(0), right = columns(2);
#pragma GCC unroll 4
        for (int four = 0; four < T::RUN / 4; four++) {
            const __m512i index = _mm512_permutex2var_epi8(windows(left, 4 * four), in_rows, windows(right, 4 * four));
            const long place = (tile * (T::RUN / 4) + four) * QUADS;
            out.weights[place] = weights[index];
            if (RESTS) out.rests[place] = rests[index];
        }
    }
}

// The row of a tile whose sum is number i; IN_ORDER rows follow each other.
const long IN_ORDER = 4;

template <int BITS>
inline long row_of(long i) {
    return i % 16 / 4 * Tile<BITS>::RUN + i / 16 * 4 + i % 4;
}
#else
const long OVERHANG = 8;  // bytes that may be read after those of a tile

// 16 times as many rows as there are windows before one begins with a byte again.
template <int BITS>
struct Tile {
    static const int PHASES = BITS == 3 ? 8 : 8 / BITS, STRIDE = BITS == 3 ? 3 : 1;
    static const long ROWS = 16 * PHASES, BYTES = 16 * STRIDE;
};

#ifdef __AVX2__
// 16 lanes, of bytes p[STRIDE i + D] and the next.
template <int STRIDE, int D>
inline Shorts lanes(const uint8_t* p) {
    const auto halves = [&](long low, long high) {
        return _mm256_set_m128i(_mm_loadu_si128((const __m128i*)(p + high)), _mm_loadu_si128((const __m128i*)(p + low)));
    };
    if constexpr (STRIDE == 1)
        return (Shorts)_mm256_shuffle_epi8(
            halves(0, 8), _mm256_broadcastsi128_si256(_mm_setr_epi8(D, D + 1, D + 1, D + 2, D + 2, D + 3, D + 3, D + 4, D + 4,
                                                                    D + 5, D + 5, D + 6, D + 6, D + 7, D + 7, D + 8)));
    else {
        const __m128i low = _mm_setr_epi8(D, D + 1, D + 3, D + 4, D + 6, D + 7, D + 9, D + 10, -1, -1, -1, -1, -1, -1, -1, -1);
        return (Shorts)_mm256_or_si256(
            _mm256_shuffle_epi8(halves(0, 24), _mm256_broadcastsi128_si256(low)),
            _mm256_shuffle_epi8(halves(12, 36), _mm256_broadcastsi128_si256(_mm_shuffle_epi32(low, 0x4e))));
    }
}

// The states of rows PHASE, PHASE + PHASES, …
template <int BITS, int PHASE>
inline Shorts states(const uint8_t* p) {
    const int byte = PHASE * BITS / 8, shift = PHASE * BITS % 8;
    const Shorts here = lanes<Tile<BITS>::STRIDE, byte>(p) >> shift;
    if constexpr (shift == 4) return here;
    else if constexpr (shift < 4) return here & 0xfff;
    else return (here | lanes<Tile<BITS>::STRIDE, byte + 1>(p) << (8 - shift)) & 0xfff;
}

// Bytes 0 to 127 choose among the magnitudes.
inline __m256i choose(const uint8_t* magnitudes, __m256i index) {
    const auto among = [&](int i) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)magnitudes + i)), index);
    };
    const __m256i bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2), bit6 = _mm256_slli_epi16(index, 1);
    const auto two = [&](int i) { return _mm256_blendv_epi8(among(i), among(i + 1), bit4); };
    const auto four = [&](int i) { return _mm256_blendv_epi8(two(i), two(i + 2), bit5); };
    return _mm256_blendv_epi8(four(0), four(4), bit6);
}

// Which levels the rows of two columns' tile have: bytes of the one and the other in turn, a vector for each phase.
template <int BITS, int PHASE = 0>
inline void tile_indices(const uint8_t* left, const uint8_t* right, uint32_t multiplier, Bytes* out) {
    if constexpr (PHASE < Tile<BITS>::PHASES) {
        const auto product = [&](const uint8_t* p) {  // bits 16 to 31
            const __m256i state = (__m256i)states<BITS, PHASE>(p);
            const __m256i high = _mm256_mullo_epi16(state, _mm256_set1_epi16((short)(multiplier >> 16)));
            return _mm256_add_epi16(high, _mm256_mulhi_epu16(state, _mm256_set1_epi16((short)multiplier)));
        };
        const __m256i low = _mm256_srli_epi16(product(left), 8);
        out[2 * PHASE] = (Bytes)_mm256_blendv_epi8(low, product(right), _mm256_set1_epi16(-256));
        tile_indices<BITS, PHASE + 1>(left, right, multiplier, out);
    }
}

// As above.
template <int BITS, bool RESTS>
inline void decode(const uint8_t* const* p, long tiles, const Levels& levels, Place out) {
    const long phases = Tile<BITS>::PHASES;
    Bytes indices[2 * phases];
    for (long tile = 0; tile < tiles; tile++) {
        for (long pair = 0; pair < 2; pair++)
            tile_indices<BITS>(p[2 * pair] + tile * Tile<BITS>::BYTES, p[2 * pair + 1] + tile * Tile<BITS>::BYTES,
                               levels.multiplier, indices + pair);
#pragma GCC unroll 1
        for (long i = 0; i < 2 * phases; i += 2) {
            const __m256i left = (__m256i)indices[i], right = (__m256i)indices[i + 1];
            const __m256i halves[2] = {_mm256_unpacklo_epi16(left, right), _mm256_unpackhi_epi16(left, right)};
            for (int half = 0; half < 2; half++) {
                const __m256i upper = _mm256_cmpgt_epi8(_mm256_setzero_si256(), halves[half]);
                const __m256i index = _mm256_xor_si256(halves[half], upper), signs = _mm256_or_si256(upper, _mm256_set1_epi8(1));
                const auto signed_choice = [&](const void* of) {
                    return (Bytes)_mm256_sign_epi8(choose((const uint8_t*)of, index), signs);
                };
                const long place = (tile * 2 * phases + i + half) * QUADS;
                out.weights[place] = signed_choice(levels.magnitudes);
                if (RESTS) out.rests[place] = signed_choice(levels.rests);
            }
        }
    }
}

// As above.
const long IN_ORDER = 1;

template <int BITS>
inline long row_of(long i) {
    const long phase = i / 16, half = i / 8 % 2, lane = i % 8;
    return (lane / 4 * 8 + half * 4 + lane % 4) * Tile<BITS>::PHASES + phase;
}
#else
template <int BITS, bool RESTS>
inline void decode(const uint8_t* const* p, long tiles, const Levels& levels, Place out) {
    for (long row = 0; row < tiles * Tile<BITS>::ROWS; row++)
        for (long column = 0; column < 4; column++) {
            const uint8_t* bytes = p[column] + row * BITS / 8;
            const uint32_t word = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
            const uint32_t index = (word >> row * BITS % 8 & 0xfff) * levels.multiplier >> 24;
            const uint32_t level = index < 128 ? index : 255 - index;
            const int sign = index < 128 ? 1 : -1;
            const long place = row % ROWS_AT_ONCE * 4 + column, vector = row / ROWS_AT_ONCE * QUADS;
            out.weights[vector][place] = sign * levels.magnitudes[level];
            if (RESTS) out.rests[vector][place] = sign * levels.rests[level];
        }
}

const long IN_ORDER = ROWS_AT_ONCE;

template <int BITS>
inline long row_of(long i) { return i; }
#endif
#endif

// Bytes of four columns that hold the windows of a block of rows; copied where they wrap around.
template <int BITS>
class Streams {
  public:
    Streams(const uint8_t* codes, long column, long columns, long bytes, long begin, long size) {
        for (int c = 0; c < 4; c++) {
            const uint8_t* stream = codes + (column + c < columns ? column + c : columns - 1) * bytes;
            begins[c] = stream + begin;
            if (begin + size <= bytes) continue;
            long filled = 0;
            for (long from = begin; filled < size; from = 0) {
                const long part = bytes - from < size - filled ? bytes - from : size - filled;
                std::memcpy(copied_[c] + filled, stream + from, part);
                filled += part;
            }
            begins[c] = copied_[c];
        }
    }
    const uint8_t* begins[4];

  private:
    uint8_t copied_[4][PANEL_ROWS * BITS / 8 + OVERHANG];
};

// Vectors of rows that keep their sums in registers together; a tile of 4 bits has no more than two with VBMI.
template <int BITS>
constexpr int groups_at_once() {
    return Tile<BITS>::ROWS / ROWS_AT_ONCE < 4 ? 2 : 4;
}

// Rows first .. last - 1, of one panel, of the products with the tokens of a span. sums: of for_panels.
template <int BITS, bool RESTS>
void trellis_block(const Span& span, const uint8_t* codes, const Levels& levels, long rows, long columns, long first,
                   long last, float* sums) {
    const long tiles = (last - first + Tile<BITS>::ROWS - 1) / Tile<BITS>::ROWS, bytes = rows * BITS / 8;
    const long size = tiles * Tile<BITS>::BYTES + OVERHANG, groups = tiles * (Tile<BITS>::ROWS / ROWS_AT_ONCE);
    alignas(64) Weights panels[1 + RESTS][PANEL_ROWS / ROWS_AT_ONCE * QUADS];
    for (long k = 0; k < columns; k += BLOCK) {
        const long quads = columns - k < BLOCK ? (columns - k + 3) / 4 : QUADS;
        for (long quad = 0; quad < quads; quad++) {
            const long column = k + 4 * quad;
            for (long c = column + 32; c < column + 36; c++)  // hidden by eight steps
                for (long line = 0; line < size; line += 64)
                    __builtin_prefetch(codes + c * bytes + first / 8 * BITS + line);
            const Streams<BITS> streams(codes, column, columns, bytes, first / 8 * BITS, size);
            decode<BITS, RESTS>(streams.begins, tiles, levels, {panels[0] + quad, panels[RESTS] + quad});
        }
        for (int part = 0; part < 1 + RESTS; part++)
            multiply_all<groups_at_once<BITS>()>(panels[part], groups, quads, span.inputs, span.count, k / BLOCK,
                                                 part ? levels.unit / FINE : levels.unit, sums);
    }
    for (long t = 0; t < span.count; t++)
        for (long i = 0; i < tiles * Tile<BITS>::ROWS; i += IN_ORDER) {
            const long row = first + i / Tile<BITS>::ROWS * Tile<BITS>::ROWS + row_of<BITS>(i % Tile<BITS>::ROWS);
            const float* from = sums + t * PANEL_ROWS + i;
            float* to = span.outputs + t * rows + row;
            if (row + IN_ORDER <= last) std::memcpy(to, from, IN_ORDER * sizeof(float));
            else if (row < last) std::memcpy(to, from, (last - row) * sizeof(float));
        }
}

template <int BITS>
void trellis_products(const uint8_t* codes, const Levels& levels, const std::vector<Span>& spans, long rows, long columns,
                      long threads) {
    for_panels(spans, rows, threads, [&](const Span& span, long first, long last, float* sums) {
        const auto block = levels.rests ? trellis_block<BITS, true> : trellis_block<BITS, false>;
        block(span, codes + span.expert * columns * (rows * BITS / 8), levels, rows, columns, first, last, sums);
    });
}

}  // namespace

// out[p, n] = <decode(codes[experts[p], :, n]), x[rows_of_x[p]]> with x [tokens, columns] rounded to 8 bits; experts must
// be valid and ascending. The lower half of the levels is -unit (magnitudes + rests / 254); magnitudes: 0 to 127; rests:
// -127 to 127, or nothing.
extern "C" void kbvq_integer_trellis_products(const uint8_t* codes, const uint8_t* magnitudes, const int8_t* rests,
                                              const float* x, const int64_t* rows_of_x, const int64_t* experts, float* out,
                                              float unit, uint32_t multiplier, long tokens, long pairs, long rows,
                                              long columns, long bits, long threads) {
    const Levels levels = {magnitudes, rests, multiplier, unit};
    const Tokens rounded(x, tokens, columns, threads);
    std::vector<Token> inputs;
    for (long p = 0; p < pairs; p++) inputs.push_back(rounded[rows_of_x[p]]);
    std::vector<Span> spans;
    for_experts(experts, pairs, [&](long p, long count) {
        add_spans(spans, experts[p], &inputs[p], out + p * rows, count, rows);
    });
    const auto run = bits == 1   ? trellis_products<1>
                     : bits == 2 ? trellis_products<2>
                     : bits == 3 ? trellis_products<3>
                                 : trellis_products<4>;
    run(codes, levels, spans, rows, columns, threads);
}
