// Products of packed experts with a few vectors in integers (integers.h): the weights are the stored 8-bit codewords.
//
// Codewords of a group of weights are loads from the table; a group is multiplied with every token of the expert while it
// is there. With AVX-512 the plane of signs is the mask of a subtraction.
#include "integers.h"

namespace {

typedef uint64_t Longs __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

const long GROUP = 32;  // weights that are multiplied at once

inline Bytes absolute(Bytes values) {
#ifdef __AVX2__
    return (Bytes)_mm256_abs_epi8((__m256i)values);
#else
    return values < 0 ? -values : values;
#endif
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
typedef __mmask32 Signs;  // set where negative

inline Signs signs_of(const uint8_t* bits) { return load<uint32_t>(bits); }
inline Signs signs_of(Bytes values) { return _mm256_movepi8_mask((__m256i)values); }

inline Bytes with_signs(Bytes inputs, Signs negative) {
    return (Bytes)_mm256_mask_sub_epi8((__m256i)inputs, negative, _mm256_setzero_si256(), (__m256i)inputs);
}
#else
typedef Bytes Signs;  // negative where it is

inline Signs signs_of(Bytes values) { return values; }

// -1 for each bit that is set among 32, else 1.
inline Signs signs_of(const uint8_t* bits) {
    uint32_t word;
    std::memcpy(&word, bits, sizeof word);
    const Bytes four = (Bytes)Words{word, word, word, word, word, word, word, word};
    const Bytes places = (Bytes)Longs{0x8040201008040201, 0x8040201008040201, 0x8040201008040201, 0x8040201008040201};
    const Bytes spread = __builtin_shufflevector(four, four, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18,
                                                 18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
    return (Bytes)((spread & places) == places) | 1;
}
#endif

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
#ifdef __AVX512BF16__  // processors as new as this gather faster than they insert
    } else if constexpr (D == 4 && !WIDE) {
        const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(row + v)));
        return (Bytes)_mm256_i32gather_epi32((const int*)table, codes, sizeof(int));
#endif
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
                Bytes weights = codewords<D, WIDE>(row[r], g * (GROUP / D), f.plane, e.table);
                Signs signs;
                if constexpr (SIGNED) signs = signs_of(row[r] + f.plane + g * (GROUP / 8));
                else signs = signs_of(weights), weights = absolute(weights);
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

}  // namespace

// out[p, n] = <decode(codes[experts[p], n]), x[rows_of_x[p]]> with x [tokens, vectors * dim] rounded to 8 bits; experts
// must be valid and ascending. table: int8 [books, codewords, dim], -127 to 127; books: 1, or one for each expert.
extern "C" void kbvq_integer_products(const uint8_t* codes, const int8_t* table, const float* x, const int64_t* rows_of_x,
                                      const int64_t* experts, float* out, long tokens, long pairs, long rows, long vectors,
                                      long plane, long row_bytes, long dim, long codewords, long signs, long books,
                                      long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, 1, 1, signs != 0};
    const Expert bank = {codes, table};
    const Tokens rounded(x, tokens, vectors * dim, threads);
    const auto input = [&](long t) { return rounded[t]; };
    const auto runs = runs_of<Token>(experts, pairs, rows_of_x, input, out, rows);
    const auto run = dim == 2   ? codewords > 256 ? all_products<2, true> : all_products<2, false>
                     : dim == 4 ? codewords > 256 ? all_products<4, true> : all_products<4, false>
                     : codewords > 256 ? all_products<8, true>
                                       : all_products<8, false>;
    run(f, bank, runs, books > 1, threads);
}

