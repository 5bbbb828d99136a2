// Chooses codes on the CPU: the best path through a bit-shift trellis, and what error feedback does around that search
// to a block of channels. Compiled on first use by encode.py.
//
// A state is the last `state_bits` bits of the codes. States that differ in their oldest code alone, a group, continue
// alike, so a step adds to the cost of arriving in each state its own error and keeps for every group the cheapest of
// its 2^bits states. A register holds eight neighbouring groups: their states of one oldest code are neighbours too and
// are reached from neighbouring groups, so that a broadcast is all that moves between lanes, and a single sequence
// fills the registers. Costs are float32; the oldest code travels in the lowest bits of its state's cost through the
// minimum, which makes costs two to four bits shorter, and is kept for the way back in `bits` bits (3: 4).
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <vector>
#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "vectors.h"

// A block of channels of every expert, coded column by column down its rows; see trellis_block of encode.py.
struct KbvqTrellisBlock {
    const float* weights;    // [E, R, width], with strides
    float* carried;          // [E, R, width]: (W − Ŵ) M of the channels before; overwritten
    const float* factor;     // M within the block, [E, width, width], with strides
    const float* codewords;  // [states]
    const float* scale;      // [E, R]
    const float* mass;       // [E, R]: how much a row counts
    uint8_t* codes;          // [E, R, width], with strides
    float* error;            // W − Ŵ, [E, R, width], with strides
    long experts, rows, width, states;
    long weights_expert, weights_row, factor_expert, factor_row, codes_expert, codes_row, error_expert, error_row;
};

namespace {

// Values of a part: a sequence of several is searched in parts, between states that the values around them decide. That
// costs what a seam costs, spread over so many values, and gives several threads something to do.
constexpr long kPart = 2048;
// Steps after which one cost is subtracted from all: near zero they keep their precision. By then every state can be
// reached, however the path began: a window has at most 16 codes.
constexpr long kRestart = 16;
constexpr float kNever = 1e37f;  // cost of starting in a group that the seam excludes

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

    // The states of least cost; earlier, last: the state before the first and the last one, but for its oldest code, or
    // < 0 where they are free.
    void run(const float* values, const float* weights, long length, int64_t earlier, int64_t last, int64_t* states) {
        if (words_ * length > capacity_) choices_.reset(new uint32_t[capacity_ = words_ * length]);
        float *before = arrivals_[0].data(), *after = arrivals_[1].data();
        std::fill(before, before + groups_, earlier < 0 ? 0.0f : kNever);
        if (earlier >= 0) before[earlier % groups_] = 0;
        for (long t = 0; t < length; ++t) {
            step(before, values[t], weights ? weights[t] : 1.0f, after, choices_.get() + t * words_);
            if (t % kRestart == kRestart - 1) restart(after);
            std::swap(before, after);
        }
        long group = last < 0 ? std::min_element(before, before + groups_) - before : last % groups_;
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

// Codes of tail-biting sequences, which the search runs through from their last value to the first.
template <int B, long kGroups>
class Encoder {
  public:
    // threads: that share a sequence of several parts.
    Encoder(const float* codewords, long groups, long length, long reach, long threads)
        : length_(length), reach_(reach), parts_(std::max(1L, length / kPart)), threads_(std::min(threads, parts_)),
          seams_(parts_) {
        const long longest = std::max(2 * reach, (length + parts_ - 1) / parts_);
        for (long i = 0; i < threads_; ++i) workers_.emplace_back(codewords, groups, longest);
    }

    // The states at the ends of all parts first, each from the values around it; then everything between them.
    void run(const float* values, const float* weights, uint8_t* codes) {
#pragma omp parallel for schedule(dynamic) num_threads(threads_) if (threads_ > 1)
        for (long part = 0; part < parts_; ++part) {
            Worker& worker = workers_[threads_ > 1 ? omp_get_thread_num() : 0];
            worker.fill(values, weights, length_, length_ + start(part) - reach_, 2 * reach_);
            worker.search(2 * reach_, -1, -1);
            seams_[part] = worker.states[reach_ - 1];
        }
#pragma omp parallel for schedule(dynamic) num_threads(threads_) if (threads_ > 1)
        for (long part = 0; part < parts_; ++part) {
            Worker& worker = workers_[threads_ > 1 ? omp_get_thread_num() : 0];
            const long first = start(part), count = start(part + 1) - first;
            worker.fill(values, weights, length_, first, count);
            worker.search(count, seams_[part], seams_[(part + 1) % parts_]);
            for (long t = 0; t < count; ++t) codes[length_ - 1 - first - t] = worker.states[t] & ((1 << B) - 1);
        }
    }

  private:
    struct Worker {
        Worker(const float* codewords, long groups, long longest)
            : of_trellis(codewords, groups), x(longest), w(longest), states(longest) {}

        void fill(const float* values, const float* weights, long length, long from, long count) {
            for (long t = 0; t < count; ++t) {
                const long place = length - 1 - (from + t) % length;
                x[t] = values[place];
                w[t] = weights ? weights[place] : 1.0f;
            }
        }

        void search(long count, int64_t before, int64_t last) {
            of_trellis.run(x.data(), w.data(), count, before, last, states.data());
        }

        Search<B, kGroups> of_trellis;
        std::vector<float> x, w;
        std::vector<int64_t> states;
    };

    long start(long part) const { return length_ * part / parts_; }

    const long length_, reach_, parts_, threads_;
    std::vector<int64_t> seams_;  // the state before the first one of each part
    std::deque<Worker> workers_;
};

template <int B, long kGroups>
void encode_all(const float* values, const float* weights, const float* codewords, uint8_t* codes, long count,
                long length, long groups, long reach, long threads) {
    const long within = count < threads ? threads : 1, beside = within > 1 ? 1 : threads;
#pragma omp parallel num_threads(beside) if (beside > 1)
    {
        Encoder<B, kGroups> encoder(codewords, groups, length, reach, within);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < count; ++i)
            encoder.run(values + i * length, weights ? weights + i * length : nullptr, codes + i * length);
    }
}

// A block of channels of one expert, column after column: each is coded for what the errors before it leave to it.
template <class Encoder>
bool code_expert(Encoder& encoder, const KbvqTrellisBlock& b, const float* levels, long bits, long expert,
                 std::vector<float>& target, std::vector<uint8_t>& codes) {
    const float *scale = b.scale + expert * b.rows, *mass = b.mass + expert * b.rows;
    const float* factor = b.factor + expert * b.factor_expert;
    const uint32_t mask = (uint32_t)b.states - 1;
    bool finite = true;
    for (long column = 0; column < b.width; ++column) {
        const float* weights = b.weights + expert * b.weights_expert + column;
        float* carried = b.carried + expert * b.rows * b.width + column;
        const float* passed = factor + column * b.factor_row;  // M of this channel and those behind it
        const float metric = passed[column];
        for (long row = 0; row < b.rows; ++row) {
            target[row] = (weights[row * b.weights_row] + carried[row * b.width] / metric) / scale[row];
            finite &= std::isfinite(target[row]);
        }
        if (!finite) return false;
        encoder.run(target.data(), mass, codes.data());
        uint32_t state = 0;  // of the code at hand: those behind it are its higher digits
        for (long row = std::min(b.rows, 16 / bits) - 1; row >= 0; --row) state = state << bits | codes[row];
        for (long row = b.rows - 1; row >= 0; --row) {
            state = (state << bits | codes[row]) & mask;
            const float wanted = weights[row * b.weights_row], error = wanted - scale[row] * levels[state];
            b.codes[expert * b.codes_expert + row * b.codes_row + column] = codes[row];
            b.error[expert * b.error_expert + row * b.error_row + column] = error;
            float* __restrict rest = carried + row * b.width - column;
            for (long next = column + 1; next < b.width; ++next) rest[next] += error * passed[next];
        }
    }
    return true;
}

template <int B, long kGroups>
bool code_block(const KbvqTrellisBlock& b, long groups, long reach, long threads) {
    const long within = b.experts < threads ? threads : 1, beside = within > 1 ? 1 : threads;
    bool finite = true;
#pragma omp parallel num_threads(beside) if (beside > 1) reduction(&& : finite)
    {
        Encoder<B, kGroups> encoder(b.codewords, groups, b.rows, reach, within);
        std::vector<float> target(b.rows);
        std::vector<uint8_t> codes(b.rows);
#pragma omp for schedule(dynamic)
        for (long expert = 0; expert < b.experts; ++expert)
            finite = code_expert(encoder, b, b.codewords, B, expert, target, codes) && finite;
    }
    return finite;
}

template <int B>
void path_all(const float* values, const float* weights, const float* codewords, const int64_t* firsts,
              const int64_t* lasts, int64_t* states, long count, long length, long groups) {
    Search<B, 0> search(codewords, groups);
    for (long i = 0; i < count; ++i)
        search.run(values + i * length, weights + i * length, length, firsts ? firsts[i] : -1, lasts ? lasts[i] : -1,
                   states + i * length);
}

template <int B>
void encode_any(const float* values, const float* weights, const float* codewords, uint8_t* codes, long count,
                long length, long groups, long reach, long threads) {
    constexpr long kUsual = 4096 >> B;  // 12 state bits
    const auto run = groups == kUsual ? encode_all<B, kUsual> : encode_all<B, 0>;
    run(values, weights, codewords, codes, count, length, groups, reach, threads);
}

template <int B>
bool code_any(const KbvqTrellisBlock& b, long reach, long threads) {
    constexpr long kUsual = 4096 >> B;
    const long groups = b.states >> B;
    return (groups == kUsual ? code_block<B, kUsual> : code_block<B, 0>)(b, groups, reach, threads);
}

}  // namespace

// Codes [count, length] of tail-biting sequences. values, weights (null: 1): [count, length]. codewords:
// [groups << bits], at least eight groups. reach: values on each side of the seam that its search sees, at most length / 2.
extern "C" void kbvq_trellis_encode(const float* values, const float* weights, const float* codewords, uint8_t* codes,
                                    long count, long length, long bits, long groups, long reach, long threads) {
    const auto run = bits == 1 ? encode_any<1> : bits == 2 ? encode_any<2> : bits == 3 ? encode_any<3> : encode_any<4>;
    run(values, weights, codewords, codes, count, length, groups, reach, threads);
}

// States [count, length] of the best paths; firsts, lasts: the states before them and at their ends, [count] or null.
extern "C" void kbvq_trellis_paths(const float* values, const float* weights, const float* codewords,
                                   const int64_t* firsts, const int64_t* lasts, int64_t* states, long count,
                                   long length, long bits, long groups) {
    const auto run = bits == 1 ? path_all<1> : bits == 2 ? path_all<2> : bits == 3 ? path_all<3> : path_all<4>;
    run(values, weights, codewords, firsts, lasts, states, count, length, groups);
}

// Codes a block of channels of every expert; false, and nothing of use written, for targets that are not finite. reach
// as above.
extern "C" bool kbvq_trellis_block(const KbvqTrellisBlock* block, long bits, long reach, long threads) {
    const auto run = bits == 1 ? code_any<1> : bits == 2 ? code_any<2> : bits == 3 ? code_any<3> : code_any<4>;
    return run(*block, reach, threads);
}
