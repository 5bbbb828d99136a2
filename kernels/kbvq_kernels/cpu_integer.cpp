// Products of packed experts with a few vectors in integers (integers.h): the weights are the stored 8-bit codewords.
//
// Codewords of a group of weights are loads from the table; a group is multiplied with up to MOST tokens of the expert
// while it is there, with more by panels. With AVX-512 the plane of signs is the mask of a subtraction.
#include "integer_panel.h"

namespace {

typedef uint64_t Longs __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

const long GROUP = 32;  // weights that are multiplied at once

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

// Whether gathers are faster than inserting, where the library has them; for panels they always are.
inline bool gathers() {
#ifdef __AVX512BF16__
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

// Codewords of the GROUP weights from vector v on, as they are in the table. GATHER: those of 4 channels by a gather, where
// there is such.
template <int D, bool WIDE, bool GATHER>
inline Bytes codewords(const uint8_t* row, long v, long plane, const int8_t* table) {
    if constexpr (D == 8) {
        const auto at = [&](long i) { return word<uint64_t>(table, code<WIDE>(row, v + i, plane)); };
        return (Bytes)Longs{at(0), at(1), at(2), at(3)};
    } else if constexpr (D == 4) {
#ifdef __AVX512BF16__
        if constexpr (!WIDE && GATHER) {
            const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(row + v)));
            return (Bytes)_mm256_i32gather_epi32((const int*)table, codes, sizeof(int));
        }
#endif
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

template <int D>
inline Expert expert_of(const Format& f, const Expert& bank, long expert, bool own_table) {
    return {bank.codes + expert * f.rows * f.row_bytes, bank.table + (own_table ? expert : 0) * f.codewords * D};
}

inline float total(Floats v) {
    float sum = 0;
    for (long i = 0; i < kLanes; i++) sum += v[i];
    return sum;
}

// Products of ROWS rows from `first` on with TOKENS vectors x.
template <int D, bool WIDE, bool SIGNED, bool GATHER, int ROWS, int TOKENS>
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
                Bytes weights = codewords<D, WIDE, GATHER>(row[r], g * (GROUP / D), f.plane, e.table);
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

template <int D, bool WIDE, bool SIGNED, bool GATHER, int TOKENS>
void product_rows(const Format& f, const Expert& e, const Token* x, long first, long last, float* const* out) {
    const int rows = TOKENS == 1 && !WIDE ? 4 : 2;  // what registers hold
    for (; first + rows <= last; first += rows)
        products<D, WIDE, SIGNED, GATHER, rows, TOKENS>(f, e, x, first, out);
    for (; first < last; first++) products<D, WIDE, SIGNED, GATHER, 1, TOKENS>(f, e, x, first, out);
}

// As many tokens as a run has, at most TOKENS.
template <int D, bool WIDE, bool SIGNED, bool GATHER, int TOKENS>
void run_rows(const Run<Token>& run, const Format& f, const Expert& e, long first, long last) {
    if (run.tokens == TOKENS) product_rows<D, WIDE, SIGNED, GATHER, TOKENS>(f, e, run.inputs, first, last, run.outputs);
    else if constexpr (TOKENS > 1) run_rows<D, WIDE, SIGNED, GATHER, TOKENS - 1>(run, f, e, first, last);
}

template <int D, bool WIDE, bool GATHER>
void all_products(const Format& f, const Expert& bank, const std::vector<Run<Token>>& runs, bool per_expert,
                  long threads) {
    const long block = 32, blocks = (f.rows + block - 1) / block, count = (long)runs.size() * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run<Token>& run = runs[i / blocks];
        const long first = i % blocks * block, last = first + block < f.rows ? first + block : f.rows;
        const Expert expert = expert_of<D>(f, bank, run.expert, per_expert);
        if constexpr (D > 2 && !WIDE)
            if (f.signs) {
                run_rows<D, WIDE, true, GATHER, MOST>(run, f, expert, first, last);
                continue;
            }
        run_rows<D, WIDE, false, GATHER, MOST>(run, f, expert, first, last);
    }
}

// Eight vectors of eight words as a matrix, transposed in place.
inline void transpose(Words* w) {
    Words pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = __builtin_shufflevector(w[i], w[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = __builtin_shufflevector(w[i], w[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const int i = j / 2 * 4 + j % 2, to = 2 * j;
        fours[to] = __builtin_shufflevector(pairs[i], pairs[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        fours[to + 1] = __builtin_shufflevector(pairs[i], pairs[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        w[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        w[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// GROUP weights of a row from column k on, with their signs; zeros behind the last.
template <int D, bool WIDE, bool SIGNED>
inline Bytes weights_of(const Format& f, const Expert& e, const uint8_t* row, long k) {
    const long columns = f.vectors * D;
    if (k + GROUP <= columns) {
        const Bytes weights = codewords<D, WIDE, true>(row, k / D, f.plane, e.table);
        if constexpr (SIGNED) return with_signs(weights, signs_of(row + f.plane + k / 8));
        return weights;
    }
    Bytes weights = {};
    for (long i = 0; k + i < columns; i++) {
        const long column = k + i;
        const int8_t weight = e.table[code<WIDE>(row, column / D, f.plane) * D + column % D];
        weights[i] = SIGNED && row[f.plane + column / 8] >> column % 8 & 1 ? -weight : weight;
    }
    return weights;
}

// Rows first .. last - 1, at most STRIP, of the products with the tokens of a span. sums: of for_panels, from `first` on.
// What is decoded together has fewer rows than a panel and more columns: as many as a cache line of codes has.
const long STRIP = 4 * ROWS_AT_ONCE, BLOCKS = 8;

template <int D, bool WIDE, bool SIGNED>
void strip_products(const Span& span, const Format& f, const Expert& e, long first, long last, float* sums) {
    const long columns = f.vectors * D;
    alignas(64) Weights panel[BLOCKS][STRIP / ROWS_AT_ONCE * QUADS];
    for (long begin = 0; begin < columns; begin += BLOCKS * BLOCK) {
        const long end = begin + BLOCKS * BLOCK < columns ? begin + BLOCKS * BLOCK : columns;
        for (long n = 0; n < STRIP; n += kLanes) {
            const uint8_t* rows[kLanes];
            for (long r = 0; r < kLanes; r++)
                rows[r] = e.codes + (first + n + r < last ? first + n + r : last - 1) * f.row_bytes;
            for (long k = begin; k < end; k += GROUP) {
                Words words[kLanes];
#pragma GCC unroll 8
                for (long r = 0; r < kLanes; r++) words[r] = (Words)weights_of<D, WIDE, SIGNED>(f, e, rows[r], k);
                transpose(words);
                const long block = (k - begin) / BLOCK, quad = k % BLOCK / 4;
                Weights* quads = panel[block] + n / ROWS_AT_ONCE * QUADS + quad;
#pragma GCC unroll 8
                for (long q = 0; q < GROUP / 4; q++) put(quads[q], n % ROWS_AT_ONCE / kLanes, (Bytes)words[q]);
            }
        }
        for (long k = begin; k < end; k += BLOCK) {
            const long quads = end - k < BLOCK ? (end - k + 3) / 4 : QUADS;
            multiply_all<4>(panel[(k - begin) / BLOCK], 4, quads, span.inputs, span.count, k / BLOCK, 1, sums);
        }
    }
    for (long t = 0; t < span.count; t++)
        std::memcpy(span.outputs + t * f.rows + first, sums + t * PANEL_ROWS, (last - first) * sizeof(float));
}

template <int D, bool WIDE, bool SIGNED>
void panel_products(const Span& span, const Format& f, const Expert& e, long first, long last, float* sums) {
    for (long n = first; n < last; n += STRIP)
        strip_products<D, WIDE, SIGNED>(span, f, e, n, n + STRIP < last ? n + STRIP : last, sums + n - first);
}

template <int D, bool WIDE>
void all_panels(const Format& f, const Expert& bank, const std::vector<Span>& spans, bool per_expert, long threads) {
    for_panels(spans, f.rows, threads, [&](const Span& span, long first, long last, float* sums) {
        const Expert expert = expert_of<D>(f, bank, span.expert, per_expert);
        if constexpr (D > 2 && !WIDE)
            if (f.signs) return panel_products<D, WIDE, true>(span, f, expert, first, last, sums);
        panel_products<D, WIDE, false>(span, f, expert, first, last, sums);
    });
}

// Pairs of one expert by runs, many by spans.
template <int D, bool WIDE>
void all_pairs(const Format& f, const Expert& bank, const std::vector<Run<Token>>& runs, const std::vector<Span>& spans,
               bool per_expert, long threads) {
    if (runs.size()) {
        const bool gather = D == 4 && !WIDE && gathers();
        (gather ? all_products<D, WIDE, D == 4 && !WIDE> : all_products<D, WIDE, false>)(f, bank, runs, per_expert, threads);
    }
    if (spans.size()) all_panels<D, WIDE>(f, bank, spans, per_expert, threads);
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
    std::vector<Token> inputs;
    for (long p = 0; p < pairs; p++) inputs.push_back(rounded[rows_of_x[p]]);
    std::vector<Run<Token>> runs;
    std::vector<Span> spans;
    for_experts(experts, pairs, [&](long p, long count) {
        if (count > MOST) return add_spans(spans, experts[p], &inputs[p], out + p * rows, count, rows);
        Run<Token> run = {experts[p], count, {}, {}};
        for (long t = 0; t < count; t++) run.inputs[t] = inputs[p + t], run.outputs[t] = out + (p + t) * rows;
        runs.push_back(run);
    });
    const auto run = dim == 2   ? codewords > 256 ? all_pairs<2, true> : all_pairs<2, false>
                     : dim == 4 ? codewords > 256 ? all_pairs<4, true> : all_pairs<4, false>
                     : codewords > 256 ? all_pairs<8, true>
                                       : all_pairs<8, false>;
    run(f, bank, runs, spans, books > 1, threads);
}
