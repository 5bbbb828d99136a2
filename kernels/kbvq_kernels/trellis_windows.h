// AVX-512 VBMI: which levels the windows of a trellis code choose, 32 windows at once, and what 256 levels are.
#pragma once
#ifdef __AVX512VBMI__
#include <immintrin.h>

#include <cstdint>

namespace {

// 64 bytes by a function of their place.
template <class Place>
inline __m512i bytes_by(Place place) {
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = place(i);
    return _mm512_load_si512(bytes);
}

// In eight bytes each: the windows of rows FIRST .. FIRST + 3 from their beginning on, in 16-bit lanes, multiplied; the
// high byte of a lane is the number of a level.
template <int BITS>
class Windows {
  public:
    Windows(uint32_t multiplier)
        : low_(_mm512_set1_epi16((short)multiplier)), high_(_mm512_set1_epi16((short)(multiplier >> 16))) {}
    __m512i operator()(__m512i streams, int first) const {
        const __m512i window = bytes_by([](int i) { return i % 8 / 2 * BITS + i % 2 * 8; });
        const __m512i shifts = _mm512_add_epi8(window, _mm512_set1_epi8(BITS * first));
        const __m512i all = _mm512_multishift_epi64_epi8(shifts, streams);
        const __m512i state = _mm512_and_si512(all, _mm512_set1_epi16(0xfff));
        return _mm512_add_epi16(_mm512_mullo_epi16(state, high_), _mm512_mulhi_epu16(state, low_));
    }

  private:
    const __m512i low_, high_;  // halves of the multiplier; of the product bits 16 to 31 are asked for
};

// 256 bytes, of which each of 64 indices chooses one.
struct Choice {
    __m512i parts[4];
    __m512i operator[](__m512i index) const {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), _mm512_permutex2var_epi8(parts[0], index, parts[1]),
                                      _mm512_permutex2var_epi8(parts[2], index, parts[3]));
    }
};

}  // namespace
#endif
