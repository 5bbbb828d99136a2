// Chooses codes on the CPU: the best path through a bit-shift trellis. Compiled on first use by encode.py.
//
// A state is the last `state_bits` bits of the codes. States that differ in their oldest code alone, a group, continue
// alike, so a step adds to the cost of arriving in each state its own error and keeps for every group the cheapest of
// its 2^bits states. A register holds eight neighbouring groups: their states of one oldest code are neighbours too and
// are reached from neighbouring groups, so that a broadcast is all that moves between lanes, and a single sequence
// fills the registers. Costs are float32; the oldest code travels in the lowest bits of its state's cost through the
// minimum, which makes costs two to four bits shorter, and is kept for the way back in `bits` bits (3: 4).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

constexpr long kLanes = 8;
// Steps after which one cost is subtracted from all: near zero they keep their precision. By then every state can be
// reached, however the path began: a window has at most 16 codes.
constexpr long kRestart = 16;
constexpr float kNever = 1e37f;  // cost of starting in a group that the seam excludes

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats all(float x) { return Floats{x, x, x, x, x, x, x, x}; }

// Lane by lane the lesser of two costs.
inline Ints least(Ints a, Ints b) {
#if defined(__AVX__)
    return (Ints)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return (Floats)a < (Floats)b ? a : b;
#endif
}

// Costs of arriving in eight neighbouring states, from those of the groups before them. May read four floats.
template <int B>
inline Floats spread(const float* p) {
#if defined(__AVX__)  // one load and one shuffle; a list of elements would go through memory
    if (B <= 2) {
        const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
        const __m256i places =
            B == 1 ? _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3) : _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        return (Floats)_mm256_permutevar_ps(four, places);
    }
#endif
    if (B == 1) return Floats{p[0], p[0], p[1], p[1], p[2], p[2], p[3], p[3]};
    if (B == 2) return Floats{p[0], p[0], p[0], p[0], p[1], p[1], p[1], p[1]};
    return all(p[0]);
}

// Of eight groups the least cost of arriving in each after a value, with the oldest code that gave it in the lowest
// bits. The error less w x², which all states share, is c (w c − 2 w x).
template <int B>
inline Ints winners(const float* before, const float* codewords, Floats square, Floats linear, long groups) {
    Ints best{};
#pragma GCC unroll 16
    for (int oldest = 0; oldest < 1 << B; ++oldest) {
        const Floats codeword = load(codewords + oldest * groups);
        const Floats cost = spread<B>(before + (oldest * groups >> B)) + codeword * (square * codeword + linear);
        const Ints marked = ((Ints)cost & ~((1 << B) - 1)) | oldest;
        best = oldest == 0 ? marked : least(best, marked);
    }
    return best;
}

// The search in a trellis of 2^B branches; kGroups: their number where it is known beforehand, else 0.
template <int B, long kGroups>
class Search {
  public:
    Search(const float* codewords, long groups) : codewords_(codewords), groups_(kGroups ? kGroups : groups) {
        arrivals_[0].resize(groups_ + kLanes);  // spread reads a little past the end
        arrivals_[1].resize(groups_ + kLanes);
        const long vectors = groups_ / kLanes;
        packed_ = vectors < kPacked ? vectors : kPacked;
        words_ = groups_ / packed_;
    }

    // The states of least cost; seam < 0: free start and end, else see TrellisCode.best_path.
    void run(const float* values, const float* weights, long length, int64_t seam, int64_t* states) {
        if (words_ * length > capacity_) choices_.reset(new uint32_t[capacity_ = words_ * length]);
        float *before = arrivals_[0].data(), *after = arrivals_[1].data();
        std::fill(before, before + groups_, seam < 0 ? 0.0f : kNever);
        if (seam >= 0) before[seam % groups_] = 0;
        for (long t = 0; t < length; ++t) {
            step(before, values[t], weights ? weights[t] : 1.0f, after, choices_.get() + t * words_);
            if (t % kRestart == kRestart - 1) restart(after);
            std::swap(before, after);
        }
        long group = seam < 0 ? std::min_element(before, before + groups_) - before : seam % groups_;
        for (long t = length - 1; t >= 0; --t) {
            states[t] = choice(choices_.get() + t * words_, group) * groups_ + group;
            group = states[t] >> B;
        }
    }

  private:
    static constexpr int kBits = B == 3 ? 4 : B;
    static constexpr long kPacked = 32 / kBits;

    void step(const float* before, float value, float weight, float* after, uint32_t* choices) const {
        const Floats square = all(weight), linear = all(-2 * weight * value);
        const long packed = kGroups ? std::min(kGroups / kLanes, kPacked) : packed_;
        const long groups = kGroups ? kGroups : groups_;
        for (long first = 0; first < groups; first += packed * kLanes) {
            Words word{};
            for (long vector = 0; vector < packed; ++vector) {
                const long group = first + vector * kLanes;
                const Ints best = winners<B>(before + (group >> B), codewords_ + group, square, linear, groups);
                store(after + group, (Floats)best);
                word = word << kBits | (Words)(best & ((1 << B) - 1));
            }
            std::memcpy(choices + first / packed, &word, sizeof word);
        }
    }

    void restart(float* costs) const {
        const Floats one = all(costs[0]);
        for (long group = 0; group < groups_; group += kLanes) store(costs + group, load(costs + group) - one);
    }

    long choice(const uint32_t* choices, long group) const {
        const long vector = group / kLanes;
        const uint32_t word = choices[vector / packed_ * kLanes + group % kLanes];
        return word >> (packed_ - 1 - vector % packed_) * kBits & ((1 << B) - 1);
    }

    const float* codewords_;  // of every state
    const long groups_;
    long packed_, words_;  // registers of choices in one register of words; words in a step
    std::vector<float> arrivals_[2];
    std::unique_ptr<uint32_t[]> choices_;
    long capacity_ = 0;
};

// The codes of one sequence, which the search runs through from its last value to the first.
template <class Searcher>
void encode(Searcher& search, const float* values, const float* weights, long length, long reach, int bits,
            std::vector<float>* buffers, std::vector<int64_t>& states, uint8_t* codes) {
    std::vector<float>&x = buffers[0], &w = buffers[1];
    // once around the seam, from `reach` values before it to as many after it, then everything
    const auto fill = [&](long from, long count) {
        for (long t = 0; t < count; ++t) {
            const long place = length - 1 - (from + t) % length;
            x[t] = values[place];
            w[t] = weights ? weights[place] : 1.0f;
        }
    };
    fill(length - reach, 2 * reach);
    search.run(x.data(), w.data(), 2 * reach, -1, states.data());
    const int64_t seam = states[reach - 1];
    fill(0, length);
    search.run(x.data(), w.data(), length, seam, states.data());
    for (long t = 0; t < length; ++t) codes[length - 1 - t] = states[t] & ((1 << bits) - 1);
}

template <int B, long kGroups>
void encode_all(const float* values, const float* weights, const float* codewords, uint8_t* codes, long count,
                long length, long groups, long reach, long threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Search<B, kGroups> search(codewords, groups);
        std::vector<float> buffers[2] = {std::vector<float>(length), std::vector<float>(length)};
        std::vector<int64_t> states(length);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < count; ++i)
            encode(search, values + i * length, weights ? weights + i * length : nullptr, length, reach, B, buffers,
                   states, codes + i * length);
    }
}

template <int B>
void path_all(const float* values, const float* weights, const float* codewords, const int64_t* seams, int64_t* states,
              long count, long length, long groups) {
    Search<B, 0> search(codewords, groups);
    for (long i = 0; i < count; ++i)
        search.run(values + i * length, weights + i * length, length, seams ? seams[i] : -1, states + i * length);
}

template <int B>
void encode_any(const float* values, const float* weights, const float* codewords, uint8_t* codes, long count,
                long length, long groups, long reach, long threads) {
    constexpr long kUsual = 4096 >> B;  // 12 state bits
    const auto run = groups == kUsual ? encode_all<B, kUsual> : encode_all<B, 0>;
    run(values, weights, codewords, codes, count, length, groups, reach, threads);
}

}  // namespace

// Codes [count, length] of tail-biting sequences. values, weights (null: 1): [count, length]. codewords:
// [groups << bits], at least eight groups. reach: values on each side of the seam that its search sees, at most length / 2.
extern "C" void kbvq_trellis_encode(const float* values, const float* weights, const float* codewords, uint8_t* codes,
                                    long count, long length, long bits, long groups, long reach, long threads) {
    const auto run = bits == 1 ? encode_any<1> : bits == 2 ? encode_any<2> : bits == 3 ? encode_any<3> : encode_any<4>;
    run(values, weights, codewords, codes, count, length, groups, reach, threads);
}

// States [count, length] of the best paths; seams: [count] or null.
extern "C" void kbvq_trellis_paths(const float* values, const float* weights, const float* codewords,
                                   const int64_t* seams, int64_t* states, long count, long length, long bits,
                                   long groups) {
    const auto run = bits == 1 ? path_all<1> : bits == 2 ? path_all<2> : bits == 3 ? path_all<3> : path_all<4>;
    run(values, weights, codewords, seams, states, count, length, groups);
}
