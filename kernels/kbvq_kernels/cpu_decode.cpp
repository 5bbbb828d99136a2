// Decodes packed experts on the CPU in float32: products with a few vectors, and whole experts, also rounded to bfloat16.
// Compiled by build.py, once
// for each kind of processor: all arithmetic is on vectors of eight floats, which the compiler maps to what the target has.
//
// Weights come in chunks of eight of a row: one codeword of 8, two of 4 or four of 2, a table load each; signs are one
// exclusive or with a mask from a table of all bytes. Chunks of several rows share the loads of x, and a chunk is
// multiplied with every token of the expert while it is there. Tables of 256 codewords of 8 and the masks are 8 KiB
// each and stay in L1.
//
// A trellis code has a lookup for every weight, which no register holds. One lookup here gives the values of two rows
// at once: their states overlap in all but `bits` bits, and a table of 2^(12 + bits) pairs of 16-bit floats is 32 KiB
// for 1 bit and 64 KiB for 2. Eight rows of a column are four lookups and a conversion.
#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "packed.h"
#include "trellis_windows.h"
#include "vectors.h"

namespace {

typedef float Half __attribute__((vector_size(16)));
typedef uint32_t Halves __attribute__((vector_size(16)));  // pairs of 16-bit floats
typedef uint64_t Pairs __attribute__((vector_size(32)));

inline Floats& accumulator(float* p) { return *(Floats*)p; }  // p at a multiple of 32 bytes

// The sign bits of eight weights for every byte of a sign plane.
struct Signs {
    alignas(32) int32_t masks[256][8];
    constexpr Signs() : masks() {
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8; i++) masks[byte][i] = byte >> i & 1 ? INT32_MIN : 0;
    }
};
constexpr Signs SIGNS;

// One expert: its codes, codebook and, with several groups, the group of each codeword of stage 0.
struct Expert {
    const uint8_t* codes;
    const float* table;
    const uint8_t* groups;
};

enum Kind { PLAIN, SIGNED, SUM };

// Codewords of D floats side by side in eight.
template <int D>
inline Floats join(const float* const* codewords) {
    if constexpr (D == 8) return load<Floats>(codewords[0]);
    else if constexpr (D == 4)
        return __builtin_shufflevector(load<Half>(codewords[0]), load<Half>(codewords[1]), 0, 1, 2, 3, 4, 5, 6, 7);
    else
        return (Floats)Pairs{load<uint64_t>(codewords[0]), load<uint64_t>(codewords[1]), load<uint64_t>(codewords[2]),
                             load<uint64_t>(codewords[3])};
}

// The codeword of stage s of vector v of a row whose first code there is `first`.
template <int D, bool WIDE>
inline const float* codeword(const Format& f, const Expert& e, const uint8_t* row, long v, long s, long first) {
    const long group = f.groups > 1 ? e.groups[first] : 0, table = 1 + (s - 1) * f.groups + group;
    return e.table + (table * f.codewords + code<WIDE>(row + s * f.stage_bytes<WIDE>(), v, f.plane)) * D;
}

// Weights 8 c .. 8 c + 7 of a row.
template <int D, bool WIDE, Kind KIND>
inline Floats chunk(const Format& f, const Expert& e, const uint8_t* row, long c) {
    const int parts = 8 / D;
    long first[parts];
    const float* found[parts];
    for (int i = 0; i < parts; i++) {
        first[i] = code<WIDE>(row, c * parts + i, f.plane);
        found[i] = e.table + first[i] * D;
    }
    Floats weights = join<D>(found);
    if constexpr (KIND == SIGNED) weights = (Floats)((Ints)weights ^ load<Ints>(SIGNS.masks[row[f.plane + c]]));
    if constexpr (KIND == SUM)
        for (long s = 1; s < f.stages; s++) {
            for (int i = 0; i < parts; i++) found[i] = codeword<D, WIDE>(f, e, row, c * parts + i, s, first[i]);
            weights += join<D>(found);
        }
    return weights;
}

// The weights after the last whole chunk, at most six: vectors left over where a row is no multiple of eight.
template <int D, bool WIDE, Kind KIND>
inline int remainder(const Format& f, const Expert& e, const uint8_t* row, float* weights) {
    int count = 0;
    for (long v = f.vectors * D / 8 * 8 / D; v < f.vectors; v++) {
        const long first = code<WIDE>(row, v, f.plane);
        for (int i = 0; i < D; i++, count++) {
            weights[count] = e.table[first * D + i];
            for (long s = 1; KIND == SUM && s < f.stages; s++)
                weights[count] += codeword<D, WIDE>(f, e, row, v, s, first)[i];
        }
    }
    return count;
}

// Products of ROWS rows from `first` on with TOKENS vectors x.
template <int D, bool WIDE, Kind KIND, int ROWS, int TOKENS>
void products(const Format& f, const Expert& e, const float* const* x, long first, float* const* out) {
    Floats sums[ROWS][TOKENS] = {};
    const uint8_t* row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = e.codes + (first + r) * f.row_bytes;
    const long chunks = f.vectors * D / 8;
    for (long c = 0; c < chunks; c++) {
        Floats inputs[TOKENS];
        for (int t = 0; t < TOKENS; t++) inputs[t] = load<Floats>(x[t] + 8 * c);
        for (int r = 0; r < ROWS; r++) {
            const Floats weights = chunk<D, WIDE, KIND>(f, e, row[r], c);
            for (int t = 0; t < TOKENS; t++) sums[r][t] += weights * inputs[t];
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float rest[8];
        const int count = remainder<D, WIDE, KIND>(f, e, row[r], rest);
        for (int t = 0; t < TOKENS; t++) {
            float total = 0;
            for (int i = 0; i < 8; i++) total += sums[r][t][i];
            for (int i = 0; i < count; i++) total += rest[i] * x[t][8 * chunks + i];
            out[t][first + r] = total;
        }
    }
}

template <int D, bool WIDE, Kind KIND, int TOKENS>
void product_rows(const Format& f, const Expert& e, const float* const* x, long first, long last, float* const* out) {
    const int rows = TOKENS == 1 ? 8 : TOKENS <= 3 ? 4 : 2;  // their sums fit 16 registers
    for (; first + rows <= last; first += rows) products<D, WIDE, KIND, rows, TOKENS>(f, e, x, first, out);
    for (; first < last; first++) products<D, WIDE, KIND, 1, TOKENS>(f, e, x, first, out);
}

template <int D, bool WIDE, int TOKENS>
void product_rows(const Format& f, const Expert& e, const float* const* x, long first, long last, float* const* out) {
    if (f.stages > 1) return product_rows<D, WIDE, SUM, TOKENS>(f, e, x, first, last, out);
    if constexpr (D > 2 && !WIDE)
        if (f.signs) return product_rows<D, WIDE, SIGNED, TOKENS>(f, e, x, first, last, out);
    product_rows<D, WIDE, PLAIN, TOKENS>(f, e, x, first, last, out);
}

// As many tokens as a run has, at most TOKENS.
template <int D, bool WIDE, int TOKENS>
void run_rows(long tokens, const Format& f, const Expert& e, const float* const* x, long first, long last,
              float* const* out) {
    if (tokens == TOKENS) product_rows<D, WIDE, TOKENS>(f, e, x, first, last, out);
    else if constexpr (TOKENS > 1) run_rows<D, WIDE, TOKENS - 1>(tokens, f, e, x, first, last, out);
}

// A group without tables would be read past them.
bool groups_exist(const Format& f, const uint8_t* groups, long books) {
    bool exist = true;
    for (long i = 0; f.groups > 1 && i < books * f.codewords; i++) exist &= groups[i] < f.groups;
    return exist;
}

template <int D, bool WIDE>
void all_products(const Format& f, const Expert& bank, const std::vector<Run<const float*>>& runs, bool per_expert, long threads) {
    const long block = 32, blocks = (f.rows + block - 1) / block, count = (long)runs.size() * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run<const float*>& run = runs[i / blocks];
        const long e = run.expert, book = per_expert ? e : 0, first = i % blocks * block;
        const long last = first + block < f.rows ? first + block : f.rows;
        const Expert expert = {bank.codes + e * f.rows * f.row_bytes,
                               bank.table + book * f.tables() * f.codewords * D,
                               f.groups > 1 ? bank.groups + book * f.codewords : nullptr};
        run_rows<D, WIDE, MOST>(run.tokens, f, expert, run.inputs, first, last, run.outputs);
    }
}

typedef uint16_t Bfloat;  // bfloat16

// The first `count` of eight weights.
inline void put(float* out, Floats weights, long count) { std::memcpy(out, &weights, count * sizeof *out); }

inline void put(Bfloat* out, Floats weights, long count) {
    typedef Bfloat Bfloats __attribute__((vector_size(16)));
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    const Bfloats rounded = (Bfloats)_mm256_cvtneps_pbh((__m256)weights);
#else
    const Words bits = (Words)weights;  // to the nearest, of two the even one
    const Bfloats rounded = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Bfloats);
#endif
    std::memcpy(out, &rounded, count * sizeof *out);
}

template <int D, bool WIDE, Kind KIND, class Weight>
void decode_row(const Format& f, const Expert& e, const uint8_t* row, Weight* out) {
    const long chunks = f.vectors * D / 8;
    for (long c = 0; c < chunks; c++) put(out + 8 * c, chunk<D, WIDE, KIND>(f, e, row, c), 8);
    float rest[8] = {};
    const int count = remainder<D, WIDE, KIND>(f, e, row, rest);
    put(out + 8 * chunks, load<Floats>(rest), count);
}

template <int D, bool WIDE, class Weight>
void all_rows(const Format& f, const Expert& e, Weight* out, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < f.rows; n++) {
        const uint8_t* row = e.codes + n * f.row_bytes;
        Weight* weights = out + n * f.vectors * D;
        if (f.stages > 1) decode_row<D, WIDE, SUM>(f, e, row, weights);
        else if (!f.signs) decode_row<D, WIDE, PLAIN>(f, e, row, weights);
        else if constexpr (D > 2 && !WIDE) decode_row<D, WIDE, SIGNED>(f, e, row, weights);
    }
}

template <int D, bool WIDE>
void all_rows(const Format& f, const Expert& e, void* out, bool bfloat16, long threads) {
    bfloat16 ? all_rows<D, WIDE>(f, e, (Bfloat*)out, threads) : all_rows<D, WIDE>(f, e, (float*)out, threads);
}

// Trellis: the 12-bit states of rows 8 g .. 8 g + 7 are windows of the bits from byte g * bits on of the column's
// stream, which continues at its beginning.
const long TRELLIS_BLOCK = 256;  // rows: of 2 bits a cache line

// The bytes of a column that hold the windows of a block of rows; copied where they wrap around.
template <int BITS>
struct Stream {
    uint8_t copied[TRELLIS_BLOCK * BITS / 8 + 8];
    const uint8_t* bytes;
    Stream(const uint8_t* column, long column_bytes, long first, long groups) {
        const long begin = first / 8 * BITS, size = groups * BITS + 8;
        bytes = column + begin;
        if (begin + size <= column_bytes) return;
        for (long i = 0; i < size; i++) copied[i] = column[(begin + i) % column_bytes];
        bytes = copied;
    }
};

// Eight pairs of 16-bit floats hold rows 8 g .. 8 g + 7: normal numbers, as all levels of a trellis code are.
inline Floats widen(Halves pairs) {
#ifdef __F16C__
    return (Floats)_mm256_cvtph_ps((__m128i)pairs);
#else
    typedef int16_t Shorts __attribute__((vector_size(16)));
    const Ints half = __builtin_convertvector((Shorts)pairs, Ints);
    return (Floats)(((half & 0x7fff) << 13) | (half & INT32_MIN)) * 0x1p112f;
#endif
}

// The values of eight rows of a column.
template <int BITS>
inline Floats values(const uint8_t* stream, long group, const uint32_t* pairs) {
    const int mask = (1 << (12 + BITS)) - 1;
    const uint64_t word = load<uint64_t>(stream + group * BITS);
    return widen(Halves{pairs[word & mask], pairs[word >> 2 * BITS & mask], pairs[word >> 4 * BITS & mask],
                       pairs[word >> 6 * BITS & mask]});
}

// Rows first .. first + 8 groups - 1 of the products with TOKENS vectors x, into sums[TOKENS][TRELLIS_BLOCK].
template <int BITS, int TOKENS>
void trellis_products(const uint8_t* codes, const uint32_t* pairs, const float* const* x, long bytes, long columns,
                      long first, long groups, float* sums) {
    long k = 0;
    for (; k + 1 < columns; k += 2) {
        const Stream<BITS> even(codes + k * bytes, bytes, first, groups), odd(codes + (k + 1) * bytes, bytes, first, groups);
        for (long g = 0; g < groups; g++) {
            const Floats a = values<BITS>(even.bytes, g, pairs), b = values<BITS>(odd.bytes, g, pairs);
            for (int t = 0; t < TOKENS; t++) accumulator(sums + t * TRELLIS_BLOCK + 8 * g) += a * x[t][k] + b * x[t][k + 1];
        }
    }
    for (; k < columns; k++) {
        const Stream<BITS> last(codes + k * bytes, bytes, first, groups);
        for (long g = 0; g < groups; g++) {
            const Floats a = values<BITS>(last.bytes, g, pairs);
            for (int t = 0; t < TOKENS; t++) accumulator(sums + t * TRELLIS_BLOCK + 8 * g) += a * x[t][k];
        }
    }
}

template <int BITS, int TOKENS>
void trellis_run(long tokens, const uint8_t* codes, const uint32_t* pairs, const float* const* x, long bytes,
                 long columns, long first, long groups, float* sums) {
    if (tokens == TOKENS) trellis_products<BITS, TOKENS>(codes, pairs, x, bytes, columns, first, groups, sums);
    else if constexpr (TOKENS > 1)
        trellis_run<BITS, TOKENS - 1>(tokens, codes, pairs, x, bytes, columns, first, groups, sums);
}

template <int BITS>
void trellis_all_products(const uint8_t* codes, const uint32_t* pairs, const std::vector<Run<const float*>>& runs, long rows,
                          long columns, long threads) {
    const long blocks = (rows + TRELLIS_BLOCK - 1) / TRELLIS_BLOCK, count = (long)runs.size() * blocks;
    const long bytes = rows * BITS / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run<const float*>& run = runs[i / blocks];
        const long first = i % blocks * TRELLIS_BLOCK;
        const long last = first + TRELLIS_BLOCK < rows ? first + TRELLIS_BLOCK : rows;
        alignas(32) float sums[MOST * TRELLIS_BLOCK] = {};
        trellis_run<BITS, MOST>(run.tokens, codes + run.expert * columns * bytes, pairs, run.inputs, bytes, columns,
                                first, (last - first + 7) / 8, sums);
        for (long t = 0; t < run.tokens; t++)
            std::memcpy(run.outputs[t] + first, sums + t * TRELLIS_BLOCK, (last - first) * sizeof(float));
    }
}

#ifdef __AVX512VBMI__
// The levels of a trellis code in bfloat16, put in the places of 64 rows at once.
template <int BITS>
class BfloatRows {
  public:
    BfloatRows(const Bfloat* levels, uint32_t multiplier) : windows_(multiplier) {
        const __m512i even = bytes_by([](int i) { return 2 * i; });
        for (int i = 0; i < 4; i++) {
            const __m512i half[2] = {_mm512_loadu_si512(levels + 64 * i), _mm512_loadu_si512(levels + 64 * i + 32)};
            low_.parts[i] = _mm512_permutex2var_epi8(half[0], even, half[1]);
            high_.parts[i] = _mm512_permutex2var_epi8(half[0], _mm512_or_si512(even, _mm512_set1_epi8(1)), half[1]);
        }
    }
    void operator()(const uint8_t* stream, long rows, Bfloat* out) const {
        // The bytes of eight rows each; the levels' numbers by row, such that unpacking leaves the rows in order.
        const __m512i eights = bytes_by([](int i) { return i / 8 * BITS + i % 8; });
        const __m512i in_rows = bytes_by([](int i) {
            const int row = i % 16 / 8 * 32 + i / 16 * 8 + i % 8;
            return row % 8 / 4 * 64 + row / 8 * 8 + row % 4 * 2 + 1;
        });
        for (long n = 0; n < rows; n += 64, stream += 8 * BITS) {
            const long left = rows - n < 64 ? rows - n : 64, bytes = (left + 7) / 8 * BITS + 8;
            const __m512i streams = _mm512_permutexvar_epi8(eights, _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), stream));
            const __m512i index = _mm512_permutex2var_epi8(windows_(streams, 0), in_rows, windows_(streams, 4));
            const __m512i low = low_[index], high = high_[index];
            const uint64_t mask = ~0ull >> (64 - left);
            _mm512_mask_storeu_epi16(out + n, (__mmask32)mask, _mm512_unpacklo_epi8(low, high));
            _mm512_mask_storeu_epi16(out + n + 32, (__mmask32)(mask >> 32), _mm512_unpackhi_epi8(low, high));
        }
    }

  private:
    const Windows<BITS> windows_;
    Choice low_, high_;  // bytes
};
#endif

// put(stream, rows, place) for each part of a column, whose first row has that place in the transposed weights.
template <int BITS, class Put>
void put_columns(const uint8_t* codes, long rows, long columns, long threads, Put put) {
    const long bytes = rows * BITS / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long k = 0; k < columns; k++)
        for (long first = 0; first < rows; first += TRELLIS_BLOCK) {
            const long count = first + TRELLIS_BLOCK < rows ? TRELLIS_BLOCK : rows - first;
            const Stream<BITS> stream(codes + k * bytes, bytes, first, (count + 7) / 8);
            put(stream.bytes, count, k * rows + first);
        }
}

template <int BITS>
void trellis_all_columns(const uint8_t* codes, const uint32_t* pairs, const Bfloat* levels, uint32_t multiplier, void* out,
                         bool bfloat16, long rows, long columns, long threads) {
    const auto put_pairs = [&](auto* weights) {
        put_columns<BITS>(codes, rows, columns, threads, [=](const uint8_t* stream, long count, long place) {
            for (long n = 0; n < count; n += 8)
                put(weights + place + n, values<BITS>(stream, n / 8, pairs), count - n < 8 ? count - n : 8);
        });
    };
    if (!bfloat16) return put_pairs((float*)out);
#ifdef __AVX512VBMI__
    const BfloatRows<BITS> put_rows(levels, multiplier);
    put_columns<BITS>(codes, rows, columns, threads,
                      [&](const uint8_t* stream, long count, long place) { put_rows(stream, count, (Bfloat*)out + place); });
#else
    (void)levels, (void)multiplier;
    put_pairs((Bfloat*)out);
#endif
}

}  // namespace

#define DISPATCH(function, ...)                                                              \
    const bool wide = codewords > 256;                                                       \
    if (dim == 2) wide ? function<2, true>(__VA_ARGS__) : function<2, false>(__VA_ARGS__);   \
    else if (dim == 4) wide ? function<4, true>(__VA_ARGS__) : function<4, false>(__VA_ARGS__); \
    else wide ? function<8, true>(__VA_ARGS__) : function<8, false>(__VA_ARGS__);

#define DISPATCH_BITS(function, ...)                                                \
    if (bits == 1) function<1>(__VA_ARGS__);                                        \
    else if (bits == 2) function<2>(__VA_ARGS__);                                   \
    else if (bits == 3) function<3>(__VA_ARGS__);                                   \
    else function<4>(__VA_ARGS__);

// out[p, n] = <decode(codes[experts[p], n]), x[rows_of_x[p]]>; experts must be valid and ascending.
// books: 1, or a codebook for each expert. Returns 0, or 1 for a group that does not exist.
extern "C" int kbvq_products(const uint8_t* codes, const float* table, const uint8_t* groups, const float* x,
                             const int64_t* rows_of_x, const int64_t* experts, float* out, long pairs, long rows,
                             long vectors, long plane, long row_bytes, long dim, long codewords, long stages,
                             long num_groups, long signs, long books, long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, stages, num_groups, signs != 0};
    if (!groups_exist(f, groups, books)) return 1;
    const Expert bank = {codes, table, groups};
    const auto input = [&](long row) { return x + row * vectors * dim; };
    const auto runs = runs_of<const float*>(experts, pairs, rows_of_x, input, out, rows);
    DISPATCH(all_products, f, bank, runs, books > 1, threads)
    return 0;
}

// out[n] = decode(codes[n]), all rows of one expert, float32 or bfloat16. Returns as kbvq_products.
extern "C" int kbvq_decode(const uint8_t* codes, const float* table, const uint8_t* groups, void* out, long bfloat16,
                           long rows, long vectors, long plane, long row_bytes, long dim, long codewords, long stages,
                           long num_groups, long signs, long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, stages, num_groups, signs != 0};
    if (!groups_exist(f, groups, 1)) return 1;
    const Expert expert = {codes, table, groups};
    DISPATCH(all_rows, f, expert, out, bfloat16 != 0, threads)
    return 0;
}

// The same for trellis codes; pairs: the values of two rows, as 16-bit floats, for each window of 12 + bits bits.
extern "C" void kbvq_trellis_products(const uint8_t* codes, const uint32_t* pairs, const float* x,
                                      const int64_t* rows_of_x, const int64_t* experts, float* out, long num_pairs,
                                      long rows, long columns, long bits, long threads) {
    const auto input = [&](long row) { return x + row * columns; };
    const auto runs = runs_of<const float*>(experts, num_pairs, rows_of_x, input, out, rows);
    DISPATCH_BITS(trellis_all_products, codes, pairs, runs, rows, columns, threads)
}

// out[k, n]: the weights of one expert, transposed as their streams are, float32 or bfloat16; levels: 256, bfloat16.
extern "C" void kbvq_trellis_decode(const uint8_t* codes, const uint32_t* pairs, const uint16_t* levels, void* out,
                                    uint32_t multiplier, long bfloat16, long rows, long columns, long bits, long threads) {
    DISPATCH_BITS(trellis_all_columns, codes, pairs, levels, multiplier, out, bfloat16 != 0, rows, columns, threads)
}
