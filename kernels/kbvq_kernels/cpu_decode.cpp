// Decodes packed rows on the CPU: products with one vector, and whole rows. Compiled on first use by cpu.py.
//
// A codeword is a vector of D floats; a product takes one table load, one x load and one fused multiply-add per
// codeword, four rows at a time so that they share x. A table of 256 codewords of 4 is 4 KiB and stays in L1.
#include <cstdint>
#include <cstring>

namespace {

template <int D>
struct Lanes {
    typedef float Vector __attribute__((vector_size(4 * D)));
    static Vector load(const float* p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
};

template <bool WIDE>
inline int code(const uint8_t* plane, long v, long plane_bytes) {
    int c = plane[v];
    if (WIDE) c |= ((plane[plane_bytes + v / 2] >> (4 * (v & 1))) & 15) << 8;
    return c;
}

struct Format {
    long rows, vectors, plane, row_bytes, codewords, stages;
};

// Products of x with ROWS rows at a time, so that they share its loads.
template <int D, bool WIDE, int ROWS>
void products(const Format& f, const uint8_t* codes, const float* table, const float* x, long first, float* out) {
    typedef Lanes<D> L;
    typedef typename L::Vector Vector;
    const long stage_bytes = WIDE ? f.plane + f.plane / 2 : f.plane, table_stage = f.codewords * D;
    Vector even[ROWS] = {}, odd[ROWS] = {};
    for (long s = 0; s < f.stages; s++) {
        const uint8_t* row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = codes + (first + r) * f.row_bytes + s * stage_bytes;
        const float* t = table + s * table_stage;
        long v = 0;
        for (; v + 1 < f.vectors; v += 2) {
            const Vector x0 = L::load(x + v * D), x1 = L::load(x + v * D + D);
            for (int r = 0; r < ROWS; r++) {
                int c0 = row[r][v], c1 = row[r][v + 1];
                if (WIDE) {
                    const int high = row[r][f.plane + v / 2];
                    c0 |= (high & 15) << 8;
                    c1 |= (high >> 4) << 8;
                }
                even[r] += L::load(t + c0 * D) * x0;
                odd[r] += L::load(t + c1 * D) * x1;
            }
        }
        if (v < f.vectors) {
            const Vector x0 = L::load(x + v * D);
            for (int r = 0; r < ROWS; r++) even[r] += L::load(t + code<WIDE>(row[r], v, f.plane) * D) * x0;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        const Vector sum = even[r] + odd[r];
        float total = 0;
        for (int i = 0; i < D; i++) total += sum[i];
        out[first + r] = total;
    }
}

template <int D, bool WIDE>
void product_rows(const Format& f, const uint8_t* codes, const float* table, const float* x, long first, long last,
                  float* out) {
    for (; first + 4 <= last; first += 4) products<D, WIDE, 4>(f, codes, table, x, first, out);
    for (; first < last; first++) products<D, WIDE, 1>(f, codes, table, x, first, out);
}

template <int D, bool WIDE>
void decode(const Format& f, const uint8_t* codes, const float* table, long n, float* out) {
    typedef Lanes<D> L;
    const long stage_bytes = WIDE ? f.plane + f.plane / 2 : f.plane, table_stage = f.codewords * D;
    const uint8_t* row = codes + n * f.row_bytes;
    for (long v = 0; v < f.vectors; v++) {
        typename L::Vector sum = {};
        for (long s = 0; s < f.stages; s++)
            sum += L::load(table + s * table_stage + code<WIDE>(row + s * stage_bytes, v, f.plane) * D);
        std::memcpy(out + n * f.vectors * D + v * D, &sum, sizeof sum);
    }
}

template <int D, bool WIDE>
void all_products(const Format& f, const uint8_t* codes, const float* table, const float* x, const int64_t* experts,
                  float* out, long pairs, long pairs_per_x, bool per_expert, long threads) {
    const long block = 32, blocks = (f.rows + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < pairs * blocks; i++) {
        const long p = i / blocks, first = i % blocks * block, e = experts[p];
        const long last = first + block < f.rows ? first + block : f.rows;
        product_rows<D, WIDE>(f, codes + e * f.rows * f.row_bytes,
                              table + (per_expert ? e * f.stages * f.codewords * D : 0),
                              x + p / pairs_per_x * f.vectors * D, first, last, out + p * f.rows);
    }
}

template <int D, bool WIDE>
void all_rows(const Format& f, const uint8_t* codes, const float* table, float* out, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < f.rows; n++) decode<D, WIDE>(f, codes, table, n, out);
}

}  // namespace

#define DISPATCH(function, ...)                                                              \
    const bool wide = codewords > 256;                                                       \
    if (dim == 2) wide ? function<2, true>(__VA_ARGS__) : function<2, false>(__VA_ARGS__);   \
    else if (dim == 4) wide ? function<4, true>(__VA_ARGS__) : function<4, false>(__VA_ARGS__); \
    else wide ? function<8, true>(__VA_ARGS__) : function<8, false>(__VA_ARGS__);

// out[p, n] = <decode(codes[experts[p], n]), x[p / pairs_per_x]>; experts must be valid.
extern "C" void kbvq_products(const uint8_t* codes, const float* table, const float* x, const int64_t* experts,
                              float* out, long pairs, long pairs_per_x, long rows, long vectors, long plane,
                              long row_bytes, long dim, long codewords, long stages, long per_expert, long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, stages};
    DISPATCH(all_products, f, codes, table, x, experts, out, pairs, pairs_per_x, per_expert, threads)
}

// out[n] = decode(codes[n]), all rows of one expert.
extern "C" void kbvq_decode(const uint8_t* codes, const float* table, float* out, long rows, long vectors, long plane,
                            long row_bytes, long dim, long codewords, long stages, long threads) {
    const Format f = {rows, vectors, plane, row_bytes, codewords, stages};
    DISPATCH(all_rows, f, codes, table, out, threads)
}
