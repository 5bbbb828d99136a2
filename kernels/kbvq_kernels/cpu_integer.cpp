// Products of packed experts with a few vectors in integers. The vectors are rounded to 8 bits, each block of BLOCK
// channels with a scale of its own; weights are the stored 8-bit codewords, or the levels of a trellis code rounded to
// 8 bits. Sums of a block are exact, the blocks are added in float32.
//
// A product of bytes has one factor without sign: magnitudes of weights. Their signs go to the inputs. Codewords of a
// group of 32 weights are loads from the table; a group is multiplied with every token of the expert while it is there.
//
// A level of a trellis code is found without memory: the window of 12 bits is multiplied in 16-bit lanes, and the high
// byte of the product chooses among 128 magnitudes in eight registers of 16.
#include <cmath>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "packed.h"
#include "vectors.h"

namespace {

typedef int8_t Bytes __attribute__((vector_size(32), may_alias));
typedef uint64_t Longs __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

const long BLOCK = 64, GROUP = 32;  // channels with one scale; weights that are multiplied at once

struct Token {
    const int8_t* values;  // filled up with zeros to whole blocks
    const float* scales;   // of each block
};

// Tokens [count, columns], rounded. A value that is not finite makes its block's scale, and all products, NaN.
class Tokens {
  public:
    Tokens(const float* x, long count, long columns)
        : blocks_((columns + BLOCK - 1) / BLOCK), values_(count * blocks_ * BLOCK), scales_(count * blocks_) {
        for (long t = 0; t < count; t++)
            for (long b = 0; b < blocks_; b++) {
                const long first = b * BLOCK, size = columns - first < BLOCK ? columns - first : BLOCK;
                scales_[t * blocks_ + b] = round(x + t * columns + first, size, &values_[(t * blocks_ + b) * BLOCK]);
            }
    }
    Token operator[](long t) const { return {&values_[t * blocks_ * BLOCK], &scales_[t * blocks_]}; }

  private:
    static float round(const float* x, long size, int8_t* values) {
        float largest = 0, zero = 0;
        for (long i = 0; i < size; i++) {
            largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
            zero += x[i] * 0;
        }
        if (zero != 0 || largest == 0) return zero;
        const float units = 127 / largest;
        for (long i = 0; i < size; i++) values[i] = (int8_t)(int32_t)std::rint(x[i] * units);
        return largest / 127;
    }
    const long blocks_;
    std::vector<int8_t> values_;
    std::vector<float> scales_;
};

// sums[i] + Σ_j magnitudes[4 i + j] inputs[4 i + j]; magnitudes 0 to 127, inputs -127 to 127.
inline Ints dot(Ints sums, Bytes magnitudes, Bytes inputs) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (Ints)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)magnitudes, (__m256i)inputs);
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)magnitudes, (__m256i)inputs);
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (long i = 0; i < kLanes; i++)
        for (long j = 4 * i; j < 4 * i + 4; j++) sums[i] += magnitudes[j] * inputs[j];
    return sums;
#endif
}

// Inputs with the signs of other bytes; 0 may count as either.
inline Bytes with_signs(Bytes inputs, Bytes signs) {
#ifdef __AVX2__
    return (Bytes)_mm256_sign_epi8((__m256i)inputs, (__m256i)signs);
#else
    const Bytes negative = signs < 0;
    return (inputs ^ negative) - negative;
#endif
}

inline Bytes absolute(Bytes values) {
#ifdef __AVX2__
    return (Bytes)_mm256_abs_epi8((__m256i)values);
#else
    return values < 0 ? -values : values;
#endif
}

// -1 for each bit that is set among 32, else 1.
inline Bytes signs_of(const uint8_t* bits) {
    uint32_t word;
    std::memcpy(&word, bits, sizeof word);
    const Bytes four = (Bytes)Words{word, word, word, word, word, word, word, word};
    const Bytes places = (Bytes)Longs{0x8040201008040201, 0x8040201008040201, 0x8040201008040201, 0x8040201008040201};
    const Bytes spread = __builtin_shufflevector(four, four, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18,
                                                 18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
    return (Bytes)((spread & places) == places) | 1;
}

template <class Word>
inline Word word(const int8_t* table, long c) {
    Word w;
    std::memcpy(&w, table + c * (long)sizeof w, sizeof w);
    return w;
}

// Codewords of the GROUP weights from vector v on, as they are in the table.
template <int D, bool WIDE>
inline Bytes codewords(const uint8_t* row, long v, long plane, const int8_t* table) {
    if constexpr (D == 8) {
        const auto at = [&](long i) { return word<uint64_t>(table, code<WIDE>(row, v + i, plane)); };
        return (Bytes)Longs{at(0), at(1), at(2), at(3)};
    } else if constexpr (D == 4) {
        const uint64_t eight = load<uint64_t>(row + v);
        const auto at = [&](long i) {  // half of the codes by shifts: loads are what there are too many of
            return word<uint32_t>(table, WIDE || i % 2 ? code<WIDE>(row, v + i, plane) : (long)(eight >> 8 * i & 255));
        };
        return (Bytes)Words{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
    } else {
        const auto at = [&](long i) { return word<uint16_t>(table, code<WIDE>(row, v + i, plane)); };
        return (Bytes)Shorts{at(0), at(1), at(2),  at(3),  at(4),  at(5),  at(6),  at(7),
                             at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15)};
    }
}

// One expert: its codes and codebook.
struct Expert {
    const uint8_t* codes;
    const int8_t* table;
};

inline float total(Floats v) {
    float sum = 0;
    for (long i = 0; i < kLanes; i++) sum += v[i];
    return sum;
}

// Products of ROWS rows from `first` on with TOKENS vectors x.
template <int D, bool WIDE, bool SIGNED, int ROWS, int TOKENS>
void products(const Format& f, const Expert& e, const Token* x, long first, float* const* out) {
    Floats sums[ROWS][TOKENS] = {};
    const uint8_t* row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = e.codes + (first + r) * f.row_bytes;
    const long columns = f.vectors * D, groups = columns / GROUP;
    const auto block = [&](long b, int count) __attribute__((always_inline)) {
        Ints part[ROWS][TOKENS] = {};
#pragma GCC unroll 2
        for (int i = 0; i < count; i++) {
            const long g = b * (BLOCK / GROUP) + i;
            Bytes inputs[TOKENS];
            for (int t = 0; t < TOKENS; t++) inputs[t] = load<Bytes>(x[t].values + g * GROUP);
            for (int r = 0; r < ROWS; r++) {
                Bytes weights = codewords<D, WIDE>(row[r], g * (GROUP / D), f.plane, e.table), signs = weights;
                if constexpr (SIGNED) signs = signs_of(row[r] + f.plane + g * (GROUP / 8));
                else weights = absolute(weights);
                for (int t = 0; t < TOKENS; t++) part[r][t] = dot(part[r][t], weights, with_signs(inputs[t], signs));
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++)
                sums[r][t] += __builtin_convertvector(part[r][t], Floats) * x[t].scales[b];
    };
    const long blocks = columns / BLOCK;
    const uint8_t* ahead = row[0] + ROWS * f.row_bytes;  // what the next rows need is loaded meanwhile
    const long step = blocks ? ROWS * f.row_bytes / blocks : 0;
    for (long b = 0; b < blocks; b++, ahead += step) {
        for (long line = 0; line < step; line += 64) __builtin_prefetch(ahead + line);
        block(b, BLOCK / GROUP);
    }
    if (groups % (BLOCK / GROUP)) block(blocks, 1);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            int32_t rest = 0;  // of the weights after the last whole group
            for (long k = groups * GROUP; k < columns; k++) {
                const int weight = e.table[code<WIDE>(row[r], k / D, f.plane) * D + k % D] * x[t].values[k];
                rest += SIGNED && row[r][f.plane + k / 8] >> k % 8 & 1 ? -weight : weight;
            }
            out[t][first + r] = total(sums[r][t]) + (rest ? rest * x[t].scales[groups * GROUP / BLOCK] : 0);
        }
}

template <int D, bool WIDE, bool SIGNED, int TOKENS>
void product_rows(const Format& f, const Expert& e, const Token* x, long first, long last, float* const* out) {
    const int rows = TOKENS == 1 && !WIDE ? 4 : 2;  // what registers hold
    for (; first + rows <= last; first += rows) products<D, WIDE, SIGNED, rows, TOKENS>(f, e, x, first, out);
    for (; first < last; first++) products<D, WIDE, SIGNED, 1, TOKENS>(f, e, x, first, out);
}

// As many tokens as a run has, at most TOKENS.
template <int D, bool WIDE, bool SIGNED, int TOKENS>
void run_rows(const Run<Token>& run, const Format& f, const Expert& e, long first, long last) {
    if (run.tokens == TOKENS) product_rows<D, WIDE, SIGNED, TOKENS>(f, e, run.inputs, first, last, run.outputs);
    else if constexpr (TOKENS > 1) run_rows<D, WIDE, SIGNED, TOKENS - 1>(run, f, e, first, last);
}

template <int D, bool WIDE>
void all_products(const Format& f, const Expert& bank, const std::vector<Run<Token>>& runs, bool per_expert,
                  long threads) {
    const long block = 32, blocks = (f.rows + block - 1) / block, count = (long)runs.size() * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run<Token>& run = runs[i / blocks];
        const long first = i % blocks * block, last = first + block < f.rows ? first + block : f.rows;
        const Expert expert = {bank.codes + run.expert * f.rows * f.row_bytes,
                               bank.table + (per_expert ? run.expert : 0) * f.codewords * D};
        if constexpr (D > 2 && !WIDE)
            if (f.signs) {
                run_rows<D, WIDE, true, MOST>(run, f, expert, first, last);
                continue;
            }
        run_rows<D, WIDE, false, MOST>(run, f, expert, first, last);
    }
}

// Trellis: the state of row n is a window of 12 bits from bit n * BITS of its column's stream on, which continues at
// its beginning. Rows are taken by tiles: 16 times as many as there are windows before one begins with a byte again.
struct Levels {
    const uint8_t* magnitudes;  // 128, of the lowest level first; the upper levels have the same, last one first
    uint32_t multiplier;
};

template <int BITS>
struct Tile {
    static const int PHASES = BITS == 3 ? 8 : 8 / BITS, STRIDE = BITS == 3 ? 3 : 1;
    static const long ROWS = 16 * PHASES, BYTES = 16 * STRIDE;
};
const long OVERHANG = 8;          // bytes that may be read after those of a tile
const long TRELLIS_BLOCK = 512;   // rows that are summed at once: of 2 bits two cache lines
const long SUMS = TRELLIS_BLOCK / kLanes;

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

// Minus the products of four columns' tiles, added to sums.
template <int BITS, int TOKENS>
inline void add_products(const uint8_t* const* p, long tiles, const Levels& levels, const Bytes* inputs, Ints (*sums)[SUMS]) {
    Bytes indices[SUMS];
    const long phases = Tile<BITS>::PHASES;
    for (long tile = 0; tile < tiles; tile++)
        for (long pair = 0; pair < 2; pair++)
            tile_indices<BITS>(p[2 * pair] + tile * Tile<BITS>::BYTES, p[2 * pair + 1] + tile * Tile<BITS>::BYTES,
                               levels.multiplier, indices + tile * 2 * phases + pair);
#pragma GCC unroll 1
    for (long i = 0; i < tiles * 2 * phases; i += 2) {
        const __m256i left = (__m256i)indices[i], right = (__m256i)indices[i + 1];
        const __m256i halves[2] = {_mm256_unpacklo_epi16(left, right), _mm256_unpackhi_epi16(left, right)};
        for (int half = 0; half < 2; half++) {
            const __m256i upper = _mm256_cmpgt_epi8(_mm256_setzero_si256(), halves[half]);
            const Bytes weights = (Bytes)choose(levels.magnitudes, _mm256_xor_si256(halves[half], upper));
            const Bytes signs = (Bytes)_mm256_or_si256(upper, _mm256_set1_epi8(1));
            for (int t = 0; t < TOKENS; t++)
                sums[t][i + half] = dot(sums[t][i + half], weights, with_signs(inputs[t], signs));
        }
    }
}

// The row of a tile whose sum is number i.
template <int BITS>
inline long row_of(long i) {
    const long phase = i / 16, half = i / 8 % 2, lane = i % 8;
    return (lane / 4 * 8 + half * 4 + lane % 4) * Tile<BITS>::PHASES + phase;
}
#else
template <int BITS, int TOKENS>
inline void add_products(const uint8_t* const* p, long tiles, const Levels& levels, const Bytes* inputs, Ints (*sums)[SUMS]) {
    for (long row = 0; row < tiles * Tile<BITS>::ROWS; row++)
        for (int column = 0; column < 4; column++) {
            const uint8_t* bytes = p[column] + row * BITS / 8;
            const uint32_t word = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
            const uint32_t index = (word >> row * BITS % 8 & 0xfff) * levels.multiplier >> 24;
            const int weight = index < 128 ? levels.magnitudes[index] : -levels.magnitudes[255 - index];
            for (int t = 0; t < TOKENS; t++) ((int32_t*)sums[t])[row] += weight * inputs[t][column];
        }
}

template <int BITS>
inline long row_of(long i) { return i; }
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
    uint8_t copied_[4][TRELLIS_BLOCK * BITS / 8 + OVERHANG];
};

// Rows first .. last - 1, at most a block of them, of the products with TOKENS vectors x.
template <int BITS, int TOKENS>
void trellis_block(const Run<Token>& run, const uint8_t* codes, const Levels& levels, float unit, long rows, long columns,
                   long first, long last) {
    const long tiles = (last - first + Tile<BITS>::ROWS - 1) / Tile<BITS>::ROWS, bytes = rows * BITS / 8;
    const long size = tiles * Tile<BITS>::BYTES + OVERHANG;
    Floats sums[TOKENS][SUMS] = {};
    for (long k = 0; k < columns;) {
        const long block = k / BLOCK, end = k + BLOCK < columns ? k + BLOCK : columns;
        Ints part[TOKENS][SUMS] = {};
        for (; k < end; k += 4) {
            const Streams<BITS> streams(codes, k, columns, bytes, first / 8 * BITS, size);
            for (int c = 16; c < 20; c++)  // hidden by four steps
                for (long line = 0; line < size; line += 64)
                    __builtin_prefetch(codes + (k + c) * bytes + first / 8 * BITS + line);
            Bytes inputs[TOKENS];
            for (int t = 0; t < TOKENS; t++) inputs[t] = (Bytes)all(load<int32_t>(run.inputs[t].values + k));
            add_products<BITS, TOKENS>(streams.begins, tiles, levels, inputs, part);
        }
        for (int t = 0; t < TOKENS; t++)
            for (long i = 0; i < tiles * Tile<BITS>::ROWS / kLanes; i++)
                sums[t][i] += __builtin_convertvector(part[t][i], Floats) * (-unit * run.inputs[t].scales[block]);
    }
    for (int t = 0; t < TOKENS; t++)
        for (long i = 0; i < tiles * Tile<BITS>::ROWS; i++) {
            const long row = first + i / Tile<BITS>::ROWS * Tile<BITS>::ROWS + row_of<BITS>(i % Tile<BITS>::ROWS);
            if (row < last) run.outputs[t][row] = ((const float*)sums[t])[i];
        }
}

template <int BITS, int TOKENS>
void trellis_run(const Run<Token>& run, const uint8_t* codes, const Levels& levels, float unit, long rows, long columns,
                 long first, long last) {
    if (run.tokens == TOKENS) trellis_block<BITS, TOKENS>(run, codes, levels, unit, rows, columns, first, last);
    else if constexpr (TOKENS > 1)
        trellis_run<BITS, TOKENS - 1>(run, codes, levels, unit, rows, columns, first, last);
}

template <int BITS>
void trellis_products(const uint8_t* codes, const Levels& levels, float unit, const std::vector<Run<Token>>& runs,
                      long rows, long columns, long threads) {
    const long blocks = (rows + TRELLIS_BLOCK - 1) / TRELLIS_BLOCK, count = (long)runs.size() * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run<Token>& run = runs[i / blocks];
        const long first = i % blocks * TRELLIS_BLOCK;
        const long last = first + TRELLIS_BLOCK < rows ? first + TRELLIS_BLOCK : rows;
        trellis_run<BITS, MOST>(run, codes + run.expert * columns * (rows * BITS / 8), levels, unit, rows, columns, first,
                                last);
    }
}

}  // namespace

// out[p, n] = <decode(codes[experts[p], n]), x[rows_of_x[p]]> with x [tokens, vectors * dim] rounded to 8 bits; experts
// must be valid and ascending. table: int8 [books, codewords, dim], -127 to 127; books: 1, or one for each expert.
extern "C" void kbvq_integer_products(const uint8_t* codes, const int8_t* table, const float* x, const int64_t* rows_of_x,
                                      const int64_t* experts, float* out, long tokens, long pairs, long rows, long vectors,
                                      long plane, long row_bytes, long dim, long codewords, long signs, long books,
                                      long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, 1, 1, signs != 0};
    const Expert bank = {codes, table};
    const Tokens rounded(x, tokens, vectors * dim);
    const auto input = [&](long t) { return rounded[t]; };
    const auto runs = runs_of<Token>(experts, pairs, rows_of_x, input, out, rows);
    const auto run = dim == 2   ? codewords > 256 ? all_products<2, true> : all_products<2, false>
                     : dim == 4 ? codewords > 256 ? all_products<4, true> : all_products<4, false>
                     : codewords > 256 ? all_products<8, true>
                                       : all_products<8, false>;
    run(f, bank, runs, books > 1, threads);
}

// The same for trellis codes. magnitudes: of the lower half of the levels, in units, 0 to 127.
extern "C" void kbvq_integer_trellis_products(const uint8_t* codes, const uint8_t* magnitudes, const float* x,
                                              const int64_t* rows_of_x, const int64_t* experts, float* out, float unit,
                                              uint32_t multiplier, long tokens, long pairs, long rows, long columns,
                                              long bits, long threads) {
    const Levels levels = {magnitudes, multiplier};
    const Tokens rounded(x, tokens, columns);
    const auto input = [&](long t) { return rounded[t]; };
    const auto runs = runs_of<Token>(experts, pairs, rows_of_x, input, out, rows);
    const auto run = bits == 1   ? trellis_products<1>
                     : bits == 2 ? trellis_products<2>
                     : bits == 3 ? trellis_products<3>
                                 : trellis_products<4>;
    run(codes, levels, unit, runs, rows, columns, threads);
}
