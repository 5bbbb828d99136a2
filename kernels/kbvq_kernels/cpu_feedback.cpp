// Codes a block of channels with error feedback on the CPU, in one pass over its rows: the inner loop of kbvq's
// encode_with_feedback for tables of codewords, with or without sign bits. Compiled on first use by encode.py.
//
// A group of D channels has the target t and the metric G = M Mᵀ. The codeword c = S m, with signs S, costs
// m·(S G S) m − 2 (S G t)·m, and the first term depends on the signs and the codeword alone: it is tabulated once for a
// group, [2^(D−1) signs up to a common one, codewords], so that a codeword costs a row D multiply-adds and an addition.
#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

// One block of channels of every expert; see feedback_block of encode.py.
struct KbvqBlock {
    const float* weights;   // [E, R, width], with strides
    float* carried;         // [E, R, width]: (W − Ŵ) M of the channels before; overwritten
    const float* factor;    // M within the block, [E, width, width], with strides
    const float* inverses;  // of M's diagonal blocks, [E, width / D, D, D]
    const float* tables;    // [books, codewords, D]; books: 1 or E
    const float* scale;     // [E, R]
    int64_t* codes;         // [planes, E, R, width / D], with strides; planes: codeword, sign bits
    float* error;           // W − Ŵ, [E, R, width], with strides
    float* normal;          // null, or sums for a refit, [books, codewords, D, D] and [books, codewords, D]
    float* right;
    long experts, rows, width, codewords, books, is_signed;
    long weights_expert, weights_row, factor_expert, factor_row, codes_plane, codes_expert, codes_row;
    long error_expert, error_row;
};

namespace {

template <int D>
class Coder {
  public:
    explicit Coder(const KbvqBlock& block)
        : b_(block), columns_(D * b_.codewords), own_((b_.is_signed ? 1 << (D - 1) : 1) * b_.codewords),
          pairs_(b_.is_signed ? D * D * b_.codewords : 0) {}

    // Rows [first, last) of an expert; sums: null, or [codewords, D (D + 1)], added to.
    void run(long expert, long first, long last, float* sums) {
        const float* table = b_.tables + (b_.books > 1 ? expert : 0) * b_.codewords * D;
        for (long k = 0; k < b_.codewords; ++k)
            for (int i = 0; i < D; ++i) columns_[i * b_.codewords + k] = table[k * D + i];
        for (long start = 0; start < b_.width; start += D) {
            const float* metric = b_.factor + expert * b_.factor_expert + start * b_.factor_row + start;
            for (int i = 0; i < D; ++i)
                for (int j = 0; j < D; ++j) {
                    float sum = 0;
                    for (int k = 0; k < D; ++k) sum += metric[i * b_.factor_row + k] * metric[j * b_.factor_row + k];
                    square_[i][j] = sum;
                }
            tabulate();
            for (long row = first; row < last; ++row) code(expert, row, start, table, sums);
        }
    }

  private:
    // own_[signs][k] = Σ_ij s_i s_j G_ij m_i m_j. The signs follow each other in Gray code, one flip apart: the first
    // one never changes, since all of them flipped give the same.
    void tabulate() {
        const long size = b_.codewords;
        const auto product = [&](int i, int j, long k) {
            return all(square_[i][j]) * load(&columns_[i * size + k]) * load(&columns_[j * size + k]);
        };
        for (long k = 0; k < size; k += kLanes) {
            Floats sum = all(0.0f);
            for (int i = 0; i < D; ++i) {
                sum += product(i, i, k);
                for (int j = 0; j < i; ++j) sum += 2 * product(i, j, k);
            }
            store(&own_[k], sum);
        }
        if (!b_.is_signed) return;
        for (int i = 1; i < D; ++i)
            for (int j = 0; j < D; ++j)
                for (long k = 0; k < size; k += kLanes) store(&pairs_[(i * D + j) * size + k], 4 * product(i, j, k));
        int before = 0;
        for (int step = 1; step < 1 << (D - 1); ++step) {
            const int flipped = __builtin_ctz(step) + 1, now = before ^ 1 << flipped;
            const float* pair = &pairs_[flipped * D * size];
            float change[D];  // to the pairs of the flipped sign with the others
            for (int j = 0; j < D; ++j)
                change[j] = j == flipped ? 0 : ((before >> flipped ^ before >> j) & 1 ? 1.0f : -1.0f);
            const float* from = &own_[(before >> 1) * size];
            float* to = &own_[(now >> 1) * size];
            for (long k = 0; k < size; k += kLanes) {
                Floats sum = load(from + k);
                for (int j = 0; j < D; ++j) sum += all(change[j]) * load(pair + j * size + k);
                store(to + k, sum);
            }
            before = now;
        }
    }

    // The codeword of least cost own[k] + Σ_i linear_i m_i.
    long choose(const float* linear, const float* own) const {
        const long size = b_.codewords;
        Floats factors[D];
        for (int i = 0; i < D; ++i) factors[i] = all(linear[i]);
        Floats best = all(std::numeric_limits<float>::infinity());
        Ints chosen{}, place = {0, 1, 2, 3, 4, 5, 6, 7};
        for (long k = 0; k < size; k += kLanes) {
            Floats cost = load(own + k);
            for (int i = 0; i < D; ++i) cost += factors[i] * load(&columns_[i * size + k]);
            const Ints less = cost < best;
            best = less ? cost : best;
            chosen = less ? place : chosen;
            place += all((int32_t)kLanes);
        }
        int lane = 0;
        for (int i = 1; i < kLanes; ++i)
            if (best[i] < best[lane] || (best[i] == best[lane] && chosen[i] < chosen[lane])) lane = i;
        return chosen[lane];
    }

    long choose_magnitude(const float* pulled, int signs) const {
        float linear[D];
        for (int i = 0; i < D; ++i) linear[i] = signs >> i & 1 ? 2 * pulled[i] : -2 * pulled[i];
        const int kind = signs & 1 ? ~signs & ((1 << D) - 1) : signs;
        return choose(linear, &own_[(kind >> 1) * b_.codewords]);
    }

    void code(long expert, long row, long start, const float* table, float* sums) const {
        const float* weights = b_.weights + expert * b_.weights_expert + row * b_.weights_row + start;
        float* carried = b_.carried + (expert * b_.rows + row) * b_.width;
        const float* inverse = b_.inverses + (expert * b_.width / D + start / D) * D * D;
        const float scale = b_.scale[expert * b_.rows + row];
        float target[D], pulled[D], value[D];
        for (int i = 0; i < D; ++i) {
            float feedback = 0;
            for (int j = 0; j <= i; ++j) feedback += carried[start + j] * inverse[j * D + i];
            target[i] = (weights[i] + feedback) / scale;
        }
        for (int i = 0; i < D; ++i) {
            float sum = 0;
            for (int j = 0; j < D; ++j) sum += square_[i][j] * target[j];
            pulled[i] = sum;
        }
        long chosen;
        int signs = 0;
        if (b_.is_signed) {
            for (int i = 0; i < D; ++i) signs |= (target[i] < 0) << i;
            chosen = choose_magnitude(pulled, signs);
            const int flipped = flip(signs, target, table + chosen * D);
            if (flipped != signs) chosen = choose_magnitude(pulled, signs = flipped);
        } else {
            float linear[D];
            for (int i = 0; i < D; ++i) linear[i] = -2 * pulled[i];
            chosen = choose(linear, own_.data());
        }
        int64_t* codes = b_.codes + expert * b_.codes_expert + row * b_.codes_row + start / D;
        codes[0] = chosen;
        if (b_.is_signed) codes[b_.codes_plane] = signs;
        float* error = b_.error + expert * b_.error_expert + row * b_.error_row + start;
        for (int i = 0; i < D; ++i) {
            value[i] = signs >> i & 1 ? -table[chosen * D + i] : table[chosen * D + i];
            error[i] = weights[i] - scale * value[i];
        }
        pass_on(error, b_.factor + expert * b_.factor_expert + start * b_.factor_row, carried, start + D);
        if (sums) add(sums + chosen * D * (D + 1), scale * scale, pulled, signs);
    }

    // Signs after each in turn was flipped where that lowers the error of the magnitudes.
    int flip(int signs, const float* target, const float* magnitudes) const {
        float value[D], pull[D];
        for (int i = 0; i < D; ++i) value[i] = signs >> i & 1 ? -magnitudes[i] : magnitudes[i];
        for (int i = 0; i < D; ++i) {
            float sum = 0;
            for (int j = 0; j < D; ++j) sum += square_[i][j] * (target[j] - value[j]);
            pull[i] = sum;
        }
        for (int i = 0; i < D; ++i) {
            if (value[i] * (pull[i] + value[i] * square_[i][i]) >= 0) continue;
            signs ^= 1 << i;
            for (int j = 0; j < D; ++j) pull[j] += 2 * value[i] * square_[i][j];
        }
        return signs;
    }

    // What the error of a group leaves to the channels of the block from `next` on.
    void pass_on(const float* __restrict error, const float* __restrict factor, float* __restrict carried,
                 long next) const {
        for (long column = next; column < b_.width; ++column) {
            float sum = carried[column];
            for (int i = 0; i < D; ++i) sum += error[i] * factor[i * b_.factor_row + column];
            carried[column] = sum;
        }
    }

    // mass · S G S and mass · S G t of the codeword's normal equations.
    void add(float* sums, float mass, const float* pulled, int signs) const {
        for (int i = 0; i < D; ++i) {
            const float signed_mass = signs >> i & 1 ? -mass : mass;
            for (int j = 0; j < D; ++j)
                sums[i * D + j] += (signs >> j & 1 ? -signed_mass : signed_mass) * square_[i][j];
            sums[D * D + i] += signed_mass * pulled[i];
        }
    }

    const KbvqBlock& b_;
    std::vector<float> columns_;  // the table, [D, codewords]
    std::vector<float> own_;      // [signs, codewords]
    std::vector<float> pairs_;    // [D, D, codewords]
    float square_[D][D];
};

template <int D>
void run(const KbvqBlock& b, long threads) {
    // Few experts are split by rows too. How does not depend on the threads, so the sums do not either.
    // Every part tabulates its groups' signs anew, which 1024 rows outweigh.
    const long parts = std::max(1L, std::min(8 / b.experts, b.rows / 1024));
    const long size = b.codewords * D * (D + 1);
    std::vector<float> sums(b.normal ? b.experts * parts * size : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Coder<D> coder(b);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < b.experts * parts; ++task) {
            const long part = task % parts;
            coder.run(task / parts, b.rows * part / parts, b.rows * (part + 1) / parts,
                      b.normal ? &sums[task * size] : nullptr);
        }
    }
    if (!b.normal) return;
    for (long task = 0; task < b.experts * parts; ++task) {
        const long first = (b.books > 1 ? task / parts : 0) * b.codewords;
        for (long k = 0; k < b.codewords; ++k) {
            const float* of_codeword = &sums[task * size + k * D * (D + 1)];
            for (int i = 0; i < D * D; ++i) b.normal[(first + k) * D * D + i] += of_codeword[i];
            for (int i = 0; i < D; ++i) b.right[(first + k) * D + i] += of_codeword[D * D + i];
        }
    }
}

}  // namespace

// dim: 2, 4 or 8; codewords: a multiple of 8.
extern "C" void kbvq_feedback_block(const KbvqBlock* block, long dim, long threads) {
    (dim == 2 ? run<2> : dim == 4 ? run<4> : run<8>)(*block, threads);
}
