// Decodes packed experts on the CPU: products with a few vectors, and whole rows. Compiled on first use by cpu.py.
//
// A codeword is a vector of D floats. Two neighbours make a chunk, a register of 2 D floats: it costs two table loads
// and, with signs, one masked exclusive or, and is multiplied with every token of the expert while it is there. Several
// rows at a time share the loads of x. A table of 256 codewords of 8 is 8 KiB and stays in L1.
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace {

template <int D>
struct Lanes {
    typedef float Vector __attribute__((vector_size(4 * D)));
    typedef int32_t Bits __attribute__((vector_size(4 * D)));
    static Vector load(const float* p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
};

// Two vectors side by side.
template <int D>
inline typename Lanes<2 * D>::Vector join(typename Lanes<D>::Vector a, typename Lanes<D>::Vector b) {
    typename Lanes<2 * D>::Vector both;
    std::memcpy(&both, &a, sizeof a);
    std::memcpy(reinterpret_cast<char*>(&both) + sizeof a, &b, sizeof b);
    return both;
}

#if defined(__AVX512DQ__) && defined(__AVX512VL__)
template <>
inline Lanes<16>::Vector join<8>(Lanes<8>::Vector a, Lanes<8>::Vector b) {
    return (Lanes<16>::Vector)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)a), (__m256)b, 1);
}
template <>
inline Lanes<8>::Vector join<4>(Lanes<4>::Vector a, Lanes<4>::Vector b) {
    return (Lanes<8>::Vector)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)a), (__m128)b, 1);
}
#endif

// Change the sign of 8 or 16 floats by the bits of one or two bytes.
inline Lanes<8>::Vector negate(Lanes<8>::Vector value, const uint8_t* signs) {
#if defined(__AVX512DQ__) && defined(__AVX512VL__)
    return (Lanes<8>::Vector)_mm256_mask_xor_ps((__m256)value, signs[0], (__m256)value, _mm256_set1_ps(-0.0f));
#else
    const Lanes<8>::Bits places = {1, 2, 4, 8, 16, 32, 64, 128};
    const int32_t byte = signs[0];
    const Lanes<8>::Bits all = {byte, byte, byte, byte, byte, byte, byte, byte};
    return (Lanes<8>::Vector)((Lanes<8>::Bits)value ^ (((all & places) != 0) & INT32_MIN));
#endif
}

inline Lanes<16>::Vector negate(Lanes<16>::Vector value, const uint8_t* signs) {
#if defined(__AVX512DQ__) && defined(__AVX512VL__)
    uint16_t mask;
    std::memcpy(&mask, signs, 2);
    return (Lanes<16>::Vector)_mm512_mask_xor_ps((__m512)value, mask, (__m512)value, _mm512_set1_ps(-0.0f));
#else
    Lanes<8>::Vector half[2];
    std::memcpy(half, &value, sizeof value);
    return join<8>(negate(half[0], signs), negate(half[1], signs + 1));
#endif
}

template <bool WIDE>
inline int code(const uint8_t* plane, long v, long plane_bytes) {
    int c = plane[v];
    if (WIDE) c |= ((plane[plane_bytes + v / 2] >> (4 * (v & 1))) & 15) << 8;
    return c;
}

struct Format {
    long rows, vectors, plane, row_bytes, codewords, stages, groups;
    bool signs;
    template <bool WIDE>
    long stage_bytes() const { return WIDE ? plane + plane / 2 : plane; }
    long tables() const { return 1 + (stages - 1) * groups; }
};

// One expert: its codes, codebook and, with several groups, the group of each codeword of stage 0.
struct Expert {
    const uint8_t* codes;
    const float* table;
    const uint8_t* groups;
};

enum Kind { PLAIN, SIGNED, SUM };

// The codeword of vector v without its signs: the sum over stages.
template <int D, bool WIDE, Kind KIND>
inline typename Lanes<D>::Vector codeword(const Format& f, const Expert& e, const uint8_t* row, long v) {
    typedef Lanes<D> L;
    const int first = code<WIDE>(row, v, f.plane);
    typename L::Vector sum = L::load(e.table + first * D);
    if (KIND != SUM) return sum;
    const long group = f.groups > 1 ? e.groups[first] : 0;
    for (long s = 1; s < f.stages; s++) {
        const long t = 1 + (s - 1) * f.groups + group;
        sum += L::load(e.table + (t * f.codewords + code<WIDE>(row + s * f.stage_bytes<WIDE>(), v, f.plane)) * D);
    }
    return sum;
}

// Vectors v and v + 1, v even.
template <int D, bool WIDE, Kind KIND>
inline typename Lanes<2 * D>::Vector chunk(const Format& f, const Expert& e, const uint8_t* row, long v) {
    typename Lanes<2 * D>::Vector both =
        join<D>(codeword<D, WIDE, KIND>(f, e, row, v), codeword<D, WIDE, KIND>(f, e, row, v + 1));
    if constexpr (KIND == SIGNED && D >= 4) both = negate(both, row + f.plane + v * D / 8);
    return both;
}

// The weights of the last vector, where their number is odd. Returns how many weights.
template <int D, bool WIDE, Kind KIND>
inline int remainder(const Format& f, const Expert& e, const uint8_t* row, long v, float* weights) {
    int count = 0;
    for (; v < f.vectors; v++) {
        const typename Lanes<D>::Vector part = codeword<D, WIDE, KIND>(f, e, row, v);
        for (int i = 0; i < D; i++, count++) {
            const long k = v * D + i;
            const bool negative = KIND == SIGNED && row[f.plane + k / 8] >> (k % 8) & 1;
            weights[count] = negative ? -part[i] : part[i];
        }
    }
    return count;
}

// Products of ROWS rows from `first` on with TOKENS vectors x.
template <int D, bool WIDE, Kind KIND, int ROWS, int TOKENS>
void products(const Format& f, const Expert& e, const float* const* x, long first, float* const* out) {
    typedef Lanes<2 * D> L;
    typename L::Vector sums[ROWS][TOKENS] = {};
    const uint8_t* row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = e.codes + (first + r) * f.row_bytes;
    long v = 0;
    for (; v + 1 < f.vectors; v += 2) {
        typename L::Vector inputs[TOKENS];
        for (int t = 0; t < TOKENS; t++) inputs[t] = L::load(x[t] + v * D);
        for (int r = 0; r < ROWS; r++) {
            const typename L::Vector weights = chunk<D, WIDE, KIND>(f, e, row[r], v);
            for (int t = 0; t < TOKENS; t++) sums[r][t] += weights * inputs[t];
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float rest[8];
        const int count = remainder<D, WIDE, KIND>(f, e, row[r], v, rest);
        for (int t = 0; t < TOKENS; t++) {
            float total = 0;
            for (int i = 0; i < 2 * D; i++) total += sums[r][t][i];
            for (int i = 0; i < count; i++) total += rest[i] * x[t][v * D + i];
            out[t][first + r] = total;
        }
    }
}

template <int D, bool WIDE, Kind KIND, int TOKENS>
void product_rows(const Format& f, const Expert& e, const float* const* x, long first, long last, float* const* out) {
    const int rows = TOKENS > 2 ? 4 : 8;
    for (; first + rows <= last; first += rows) products<D, WIDE, KIND, rows, TOKENS>(f, e, x, first, out);
    for (; first < last; first++) products<D, WIDE, KIND, 1, TOKENS>(f, e, x, first, out);
}

template <int D, bool WIDE, int TOKENS>
void product_rows(const Format& f, const Expert& e, const float* const* x, long first, long last, float* const* out) {
    if (f.stages > 1) product_rows<D, WIDE, SUM, TOKENS>(f, e, x, first, last, out);
    else if (f.signs) product_rows<D, WIDE, SIGNED, TOKENS>(f, e, x, first, last, out);
    else product_rows<D, WIDE, PLAIN, TOKENS>(f, e, x, first, last, out);
}

// As many tokens as a run has, at most TOKENS.
template <int D, bool WIDE, int TOKENS>
void run_rows(long tokens, const Format& f, const Expert& e, const float* const* x, long first, long last,
              float* const* out) {
    if (tokens == TOKENS) product_rows<D, WIDE, TOKENS>(f, e, x, first, last, out);
    else if constexpr (TOKENS > 1) run_rows<D, WIDE, TOKENS - 1>(tokens, f, e, x, first, last, out);
}

// Runs of up to MOST pairs of one expert, so that they share its decoding. Pairs are sorted by expert.
const int MOST = 6;

struct Run {
    long expert, first, tokens;
};

std::vector<Run> runs_of(const int64_t* experts, long pairs) {
    std::vector<Run> runs;
    for (long p = 0; p < pairs;) {
        long same = 1;
        while (same < MOST && p + same < pairs && experts[p + same] == experts[p]) same++;
        runs.push_back({experts[p], p, same});
        p += same;
    }
    return runs;
}

template <int D, bool WIDE>
void all_products(const Format& f, const Expert& bank, const float* x, const int64_t* rows_of_x, const int64_t* experts,
                  float* out, long pairs, bool per_expert, long threads) {
    const std::vector<Run> runs = runs_of(experts, pairs);
    const long block = 32, blocks = (f.rows + block - 1) / block, count = (long)runs.size() * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run run = runs[i / blocks];
        const long e = run.expert, book = per_expert ? e : 0, first = i % blocks * block;
        const long last = first + block < f.rows ? first + block : f.rows;
        const Expert expert = {bank.codes + e * f.rows * f.row_bytes,
                               bank.table + book * f.tables() * f.codewords * D,
                               f.groups > 1 ? bank.groups + book * f.codewords : nullptr};
        const float* inputs[MOST];
        float* outputs[MOST];
        for (long t = 0; t < run.tokens; t++) {
            inputs[t] = x + rows_of_x[run.first + t] * f.vectors * D;
            outputs[t] = out + (run.first + t) * f.rows;
        }
        run_rows<D, WIDE, MOST>(run.tokens, f, expert, inputs, first, last, outputs);
    }
}

template <int D, bool WIDE, Kind KIND>
void decode_row(const Format& f, const Expert& e, const uint8_t* row, float* out) {
    long v = 0;
    for (; v + 1 < f.vectors; v += 2) {
        const typename Lanes<2 * D>::Vector weights = chunk<D, WIDE, KIND>(f, e, row, v);
        std::memcpy(out + v * D, &weights, sizeof weights);
    }
    remainder<D, WIDE, KIND>(f, e, row, v, out + v * D);
}

template <int D, bool WIDE>
void all_rows(const Format& f, const Expert& e, float* out, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < f.rows; n++) {
        const uint8_t* row = e.codes + n * f.row_bytes;
        float* weights = out + n * f.vectors * D;
        if (f.stages > 1) decode_row<D, WIDE, SUM>(f, e, row, weights);
        else if (f.signs) decode_row<D, WIDE, SIGNED>(f, e, row, weights);
        else decode_row<D, WIDE, PLAIN>(f, e, row, weights);
    }
}

// Trellis: the 12-bit states of rows 8 g .. 8 g + 7 are windows of the bits from byte g * bits on of the column's
// stream, which continues at its beginning.
const int STATE_MASK = (1 << 12) - 1;

inline uint64_t window(const uint8_t* stream, long bytes, long first) {
    uint64_t word = 0;
    if (first + 8 <= bytes) std::memcpy(&word, stream + first, 8);
    else
        for (int i = 0; i < 8; i++) word |= (uint64_t)stream[(first + i) % bytes] << 8 * i;
    return word;
}

const long TRELLIS_BLOCK = 512;

template <int BITS>
void trellis_products(const uint8_t* codes, const float* table, const float* const* x, long tokens, long rows,
                      long columns, long first, long last, float* const* out) {
    const long bytes = rows * BITS / 8;
    float sums[MOST][TRELLIS_BLOCK] = {};
    for (long k = 0; k < columns; k++)
        for (long g = first / 8; g * 8 < last; g++) {
            const uint64_t word = window(codes + k * bytes, bytes, g * BITS);
            float values[8];
            for (int i = 0; i < 8; i++) values[i] = table[word >> BITS * i & STATE_MASK];
            for (long t = 0; t < tokens; t++)
                for (int i = 0; i < 8; i++) sums[t][g * 8 - first + i] += x[t][k] * values[i];
        }
    for (long t = 0; t < tokens; t++)
        for (long n = first; n < last; n++) out[t][n] = sums[t][n - first];
}

template <int BITS>
void trellis_all_products(const uint8_t* codes, const float* table, const float* x, const int64_t* rows_of_x,
                          const int64_t* experts, float* out, long pairs, long rows, long columns, long threads) {
    const std::vector<Run> runs = runs_of(experts, pairs);
    const long blocks = (rows + TRELLIS_BLOCK - 1) / TRELLIS_BLOCK, count = (long)runs.size() * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Run run = runs[i / blocks];
        const long first = i % blocks * TRELLIS_BLOCK;
        const long last = first + TRELLIS_BLOCK < rows ? first + TRELLIS_BLOCK : rows;
        const uint8_t* own = codes + run.expert * columns * (rows * BITS / 8);
        const float* inputs[MOST];
        float* outputs[MOST];
        for (long t = 0; t < run.tokens; t++) {
            inputs[t] = x + rows_of_x[run.first + t] * columns;
            outputs[t] = out + (run.first + t) * rows;
        }
        trellis_products<BITS>(own, table, inputs, run.tokens, rows, columns, first, last, outputs);
    }
}

template <int BITS>
void trellis_all_rows(const uint8_t* codes, const float* table, float* out, long rows, long columns, long threads) {
    const long bytes = rows * BITS / 8, block = 256, width = 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n0 = 0; n0 < rows; n0 += block)
        for (long k0 = 0; k0 < columns; k0 += width)
            for (long n = n0; n < n0 + block && n < rows; n += 8)
                for (long k = k0; k < k0 + width && k < columns; k++) {
                    const uint64_t word = window(codes + k * bytes, bytes, n / 8 * BITS);
                    for (int i = 0; i < 8 && n + i < rows; i++)
                        out[(n + i) * columns + k] = table[word >> BITS * i & STATE_MASK];
                }
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
extern "C" void kbvq_products(const uint8_t* codes, const float* table, const uint8_t* groups, const float* x,
                              const int64_t* rows_of_x, const int64_t* experts, float* out, long pairs, long rows,
                              long vectors, long plane, long row_bytes, long dim, long codewords, long stages,
                              long num_groups, long signs, long per_expert, long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, stages, num_groups, signs != 0};
    const Expert bank = {codes, table, groups};
    DISPATCH(all_products, f, bank, x, rows_of_x, experts, out, pairs, per_expert, threads)
}

// out[n] = decode(codes[n]), all rows of one expert.
extern "C" void kbvq_decode(const uint8_t* codes, const float* table, const uint8_t* groups, float* out, long rows,
                            long vectors, long plane, long row_bytes, long dim, long codewords, long stages,
                            long num_groups, long signs, long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, stages, num_groups, signs != 0};
    const Expert expert = {codes, table, groups};
    DISPATCH(all_rows, f, expert, out, threads)
}

// The same for trellis codes; table: the value of each state.
extern "C" void kbvq_trellis_products(const uint8_t* codes, const float* table, const float* x,
                                      const int64_t* rows_of_x, const int64_t* experts, float* out, long pairs,
                                      long rows, long columns, long bits, long threads) {
    DISPATCH_BITS(trellis_all_products, codes, table, x, rows_of_x, experts, out, pairs, rows, columns, threads)
}

extern "C" void kbvq_trellis_decode(const uint8_t* codes, const float* table, float* out, long rows, long columns,
                                    long bits, long threads) {
    DISPATCH_BITS(trellis_all_rows, codes, table, out, rows, columns, threads)
}
