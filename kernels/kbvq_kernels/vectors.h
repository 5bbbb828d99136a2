// Vectors of eight, which the compiler maps to what the target has; included by every .cpp beside it.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr long kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <class V = Floats>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline Floats all(float x) { return Floats{x, x, x, x, x, x, x, x}; }
inline Ints all(int32_t x) { return Ints{x, x, x, x, x, x, x, x}; }

}  // namespace
