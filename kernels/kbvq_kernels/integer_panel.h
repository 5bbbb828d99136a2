// Panels of weights in 8 bits and their products with many tokens; included by cpu_integer.cpp and
// cpu_integer_trellis.cpp. A panel is PANEL_ROWS rows of BLOCK columns, decoded into the nearest cache and then multiplied
// with all tokens of its expert, some of which keep their sums in registers.
//
// It holds the negative weights, in vectors of ROWS_AT_ONCE rows of four columns: [groups of rows][QUADS].
#pragma once
#include "integers.h"

namespace {

const long PANEL_ROWS = 512;
const long QUADS = BLOCK / 4;  // fours of columns of a panel

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
typedef __m512i Weights;  // SHIFT added, so that they have no sign
typedef int32_t Sums __attribute__((vector_size(64)));
const long ROWS_AT_ONCE = 16;
const int SHIFT = 127;
const int TILE_TOKENS = 6;  // times four vectors of rows: what registers hold

inline Sums all_sums(int32_t x) { return (Sums)_mm512_set1_epi32(x); }
inline __m512i four_inputs(const int8_t* values) { return _mm512_set1_epi32(load<int32_t>(values)); }

// In assembler: with the intrinsic GCC 12 keeps a copy of each sum, for which there are no registers.
inline void add(Sums& sums, Weights weights, __m512i inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
}

inline void add_scaled(float* out, Sums sums, float scale) {
    const __m512 values = _mm512_cvtepi32_ps((__m512i)sums);
    _mm512_storeu_ps(out, _mm512_fmadd_ps(values, _mm512_set1_ps(scale), _mm512_loadu_ps(out)));
}

// Weights of eight rows with their signs; half: of the vector's rows.
inline void put(Weights& weights, long half, Bytes eight) {
    const Bytes shift = (Bytes)_mm256_set1_epi8(SHIFT);
    store((Bytes*)&weights + half, shift - eight);
}
#else
typedef Bytes Weights;
typedef Ints Sums;
const long ROWS_AT_ONCE = 8;
const int SHIFT = 0;
const int TILE_TOKENS = 2;

inline Sums all_sums(int32_t x) { return all(x); }
inline Bytes four_inputs(const int8_t* values) { return (Bytes)all(load<int32_t>(values)); }

inline void add(Sums& sums, Weights weights, Bytes inputs) {
    sums = dot(sums, absolute(weights), with_signs(inputs, weights));
}

inline void add_scaled(float* out, Sums sums, float scale) {
    store(out, load<Floats>(out) + __builtin_convertvector(sums, Floats) * scale);
}

inline void put(Weights& weights, long, Bytes eight) { weights = -eight; }
#endif

// Products of `groups` vectors of rows, a multiple of GROUPS, with TOKENS tokens, `unit` each, added to sums [tokens]
// [PANEL_ROWS].
template <int GROUPS, int TOKENS>
__attribute__((noinline)) void multiply(const Weights* panel, long groups, long quads, const Token* tokens, long block,
                                        float unit, float* sums) {
    const int8_t* inputs[TOKENS];
    for (int t = 0; t < TOKENS; t++) inputs[t] = tokens[t].values + block * BLOCK;
    for (long group = 0; group < groups; group += GROUPS, panel += GROUPS * QUADS) {
        Sums part[TOKENS][GROUPS];
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) part[t][g] = all_sums(-SHIFT * tokens[t].totals[block]);
        for (long quad = 0; quad < quads; quad++)
#pragma GCC unroll 6
            for (int t = 0; t < TOKENS; t++) {
                const auto four = four_inputs(inputs[t] + 4 * quad);
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++) add(part[t][g], panel[g * QUADS + quad], four);
            }
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++) {
            const float scale = -unit * tokens[t].scales[block];
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++)
                add_scaled(sums + t * PANEL_ROWS + (group + g) * ROWS_AT_ONCE, part[t][g], scale);
        }
    }
}

// The same with any number of tokens, TOKENS at a time.
template <int GROUPS, int TOKENS = TILE_TOKENS>
inline void multiply_all(const Weights* panel, long groups, long quads, const Token* tokens, long count, long block,
                         float unit, float* sums) {
    for (; count >= TOKENS; count -= TOKENS, tokens += TOKENS, sums += TOKENS * PANEL_ROWS)
        multiply<GROUPS, TOKENS>(panel, groups, quads, tokens, block, unit, sums);
    if constexpr (TOKENS > 1)
        if (count) multiply_all<GROUPS, TOKENS - 1>(panel, groups, quads, tokens, count, block, unit, sums);
}

// Pairs of one expert: what is decoded for them is multiplied with all.
struct Span {
    long expert, count;
    const Token* inputs;
    float* outputs;  // [count][rows]
};
const long MOST_AT_ONCE = 96;  // their sums of a panel's rows fit into the second cache

// each(first, count) for the pairs of every expert; experts: of the pairs, ascending.
template <class Each>
void for_experts(const int64_t* experts, long pairs, Each each) {
    for (long first = 0, end; first < pairs; first = end) {
        for (end = first + 1; end < pairs && experts[end] == experts[first]; end++) {}
        each(first, end - first);
    }
}

// `count` pairs of one expert, as spans.
inline void add_spans(std::vector<Span>& spans, long expert, const Token* inputs, float* outputs, long count, long rows) {
    for (long p = 0; p < count; p += MOST_AT_ONCE)
        spans.push_back({expert, count - p < MOST_AT_ONCE ? count - p : MOST_AT_ONCE, inputs + p, outputs + p * rows});
}

// block(span, first row, last row + 1, room for [count][PANEL_ROWS] sums, which are zero) for all rows of all spans.
template <class Block>
void for_panels(const std::vector<Span>& spans, long rows, long threads, Block block) {
    const long blocks = (rows + PANEL_ROWS - 1) / PANEL_ROWS, count = (long)spans.size() * blocks;
    long most = 0;
    for (const Span& span : spans) most = span.count > most ? span.count : most;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(most * PANEL_ROWS);
#pragma omp for schedule(static)
        for (long i = 0; i < count; i++) {
            const Span& span = spans[i / blocks];
            const long first = i % blocks * PANEL_ROWS;
            std::memset(sums.data(), 0, span.count * PANEL_ROWS * sizeof(float));
            block(span, first, first + PANEL_ROWS < rows ? first + PANEL_ROWS : rows, sums.data());
        }
    }
}

}  // namespace
