// Vectors rounded to 8 bits, each block of BLOCK channels with a scale of its own, and their products with weights of 8
// bits; included by integer_panel.h. Sums of a block are exact, the blocks are added in
// float32.
//
// A product of bytes has one factor without sign: magnitudes of weights. Their signs go to the inputs.
#pragma once
#include <cmath>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "packed.h"
#include "vectors.h"

namespace {

typedef int8_t Bytes __attribute__((vector_size(32), may_alias));

const long BLOCK = 32;  // channels with one scale

struct Token {
    const int8_t* values;   // filled up with zeros to whole blocks
    const float* scales;    // of each block
    const int32_t* totals;  // of each block the sum of its values
};

// Tokens [count, columns], rounded. A value that is not finite makes its block's scale, and all products, NaN.
class Tokens {
  public:
    Tokens(const float* x, long count, long columns, long threads)
        : blocks_((columns + BLOCK - 1) / BLOCK), values_(count * blocks_ * BLOCK), scales_(count * blocks_),
          totals_(count * blocks_) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 16)
        for (long t = 0; t < count; t++)
            for (long b = 0; b < blocks_; b++) {
                const long first = b * BLOCK, size = columns - first < BLOCK ? columns - first : BLOCK;
                alignas(32) float block[BLOCK] = {};
                std::memcpy(block, x + t * columns + first, size * sizeof(float));
                round(block, t * blocks_ + b);
            }
    }
    Token operator[](long t) const { return {&values_[t * blocks_ * BLOCK], &scales_[t * blocks_], &totals_[t * blocks_]}; }

  private:
    void round(const float* x, long block) {
        const Floats none = {};
        Floats greatest = none, zero = none;
        for (long i = 0; i < BLOCK; i += kLanes) {
            const Floats some = load(x + i), size = some < none ? -some : some;
            greatest = size > greatest ? size : greatest;
            zero += some * 0;
        }
        float largest = 0, finite = 0;
        for (long i = 0; i < kLanes; i++) {
            largest = greatest[i] > largest ? greatest[i] : largest;
            finite += zero[i];
        }
        scales_[block] = finite;
        if (finite != 0 || largest == 0) return;
        scales_[block] = largest / 127;
        const float units = 127 / largest;
        int8_t* values = &values_[block * BLOCK];
        int32_t total = 0;
        for (long i = 0; i < BLOCK; i++) {
            const int32_t rounded = (int32_t)std::rint(x[i] * units);
            values[i] = (int8_t)rounded;
            total += rounded;
        }
        totals_[block] = total;
    }
    const long blocks_;
    std::vector<int8_t> values_;
    std::vector<float> scales_;
    std::vector<int32_t> totals_;
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

inline Bytes absolute(Bytes values) {
#ifdef __AVX2__
    return (Bytes)_mm256_abs_epi8((__m256i)values);
#else
    return values < 0 ? -values : values;
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

}  // namespace
