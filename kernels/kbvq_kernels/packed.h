// Packed experts as cpu_decode.cpp and cpu_integer.cpp read them: rows of codes, and the pairs that ask for products.
#pragma once
#include <cstdint>
#include <vector>

namespace {

struct Format {
    long rows, vectors, plane, row_bytes, codewords, stages, groups;
    bool signs;
    template <bool WIDE>
    long stage_bytes() const { return WIDE ? plane + plane / 2 : plane; }
    long tables() const { return 1 + (stages - 1) * groups; }
};

// Code v of a plane of low bytes and, of 12 bits, the plane of nibbles after it.
template <bool WIDE>
inline long code(const uint8_t* plane, long v, long plane_bytes) {
    long c = plane[v];
    if (WIDE) c |= ((plane[plane_bytes + v / 2] >> (4 * (v & 1))) & 15) << 8;
    return c;
}

// Up to MOST pairs of one expert, so that they share its decoding.
const int MOST = 4;

template <class Input>
struct Run {
    long expert, tokens;
    Input inputs[MOST];
    float* outputs[MOST];
};

// Runs of all pairs, which are sorted by expert; input(row): row of x.
template <class Input, class Rows>
std::vector<Run<Input>> runs_of(const int64_t* experts, long pairs, const int64_t* rows_of_x, Rows input, float* out,
                                long rows) {
    std::vector<Run<Input>> runs;
    for (long p = 0; p < pairs;) {
        Run<Input> run = {experts[p], 0, {}, {}};
        for (; run.tokens < MOST && p < pairs && experts[p] == run.expert; p++, run.tokens++) {
            run.inputs[run.tokens] = input(rows_of_x[p]);
            run.outputs[run.tokens] = out + p * rows;
        }
        runs.push_back(run);
    }
    return runs;
}

}  // namespace
