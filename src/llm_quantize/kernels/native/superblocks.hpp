// What the K-quants share: batches of superblocks of 256 weights, their transposed loads, and the weights of a search.
//
// Work goes in batches: (1) the search, one sub-block per lane; (2) the scales of the superblocks, with an imatrix one
// superblock per lane; (3) the codes for the stored scales, and the packing, one superblock at a time. A sub-block
// whose stored scale is zero keeps the codes of its search, which are made only then.
#pragma once

#include "pack.hpp"
#include "search.hpp"

namespace {

constexpr int batch = 32;  // superblocks; a multiple of `wide`

// Where the batch's superblocks are: rows are packed, so only the importance must know about rows.
struct Batch {
    const float* x;
    int count;
    const float* importance[batch];  // of each superblock; null without an imatrix
};

struct alignas(64) Found {
    float scale[batch * 16];
    float minimum[batch * 16];  // not negated: <= 0
    float inverse[batch * 16];
    float origin[batch * 16];
    float weight[batch * 16];  // sum of the weights of a sub-block
    int32_t flag[batch * 16];  // asymmetric: stepped; symmetric: dead
};

template <int N>
LQ_INLINE void load_sub_blocks(const Batch& b, int first, wf* x) {
    const int last = b.count * (superblock / N) - 1;
    const float* rows[wide];
    for (int k = 0; k < wide; ++k) rows[k] = b.x + (first + k < last ? first + k : last) * N;
    load_transposed(rows, N, x);
}

template <int N>
LQ_INLINE void load_importance(const Batch& b, int first, wf* w) {
    constexpr int per = superblock / N;
    const int last = b.count * per - 1;
    const float* rows[wide];
    for (int k = 0; k < wide; ++k) {
        const int s = first + k < last ? first + k : last;
        rows[k] = b.importance[s / per] + s % per * N;
    }
    load_transposed(rows, N, w);
}

// sum of x^2 over each superblock, in order, one superblock per lane.
static inline void sums_of_squares(const Batch& b, float* sum) {
    for (int first = 0; first < b.count; first += wide) {
        wf total = wf{};
        for (int part = 0; part < superblock; part += lanes) {
            const float* rows[wide];
            for (int k = 0; k < wide; ++k) {
                const int s = first + k < b.count ? first + k : b.count - 1;
                rows[k] = b.x + s * superblock + part;
            }
            wf x[lanes];
            load_transposed(rows, lanes, x);
            for (int i = 0; i < lanes; ++i) total += x[i] * x[i];
        }
        store(sum + first, total);
    }
}

// w = importance * sqrt(sigma2 + x^2), sigma2 the superblock's.
template <int N>
LQ_INLINE void weigh(const Batch& b, int first, const float* sigma2, const wf* x, wf* w) {
    constexpr int per = superblock / N;
    float of_lane[wide];
    for (int k = 0; k < wide; ++k) of_lane[k] = sigma2[(first + k) / per < batch ? (first + k) / per : batch - 1];
    const wf s = load_wide(of_lane);
    load_importance<N>(b, first, w);
    for (int i = 0; i < N; ++i) put(w[i], w[i] * square_root(s + x[i] * x[i]));
}

// Values of one superblock per lane: out[j][k] = from[(first + k) * per + j].
template <int per>
LQ_INLINE void across(const float* from, int first, int count, float sign, wf* out) {
    for (int j = 0; j < per; ++j) {
        float value[wide];
        for (int k = 0; k < wide; ++k) {
            const int s = first + k < count ? first + k : count - 1;
            value[k] = sign * from[s * per + j];
        }
        out[j] = load_wide(value);
    }
}

// The other way, for codes: to[(first + k) * per + j] = code[j][k].
template <int per>
LQ_INLINE void along(const wi* code, int first, uint8_t* to) {
    for (int j = 0; j < per; ++j) {
        int32_t value[wide];
        store(value, code[j]);
        for (int k = 0; k < wide; ++k) to[(first + k) * per + j] = static_cast<uint8_t>(value[k]);
    }
}

// Cuts (rows, cols) into batches of superblocks.
template <class Work>
LQ_INLINE void for_batches(const float* x, int64_t rows, int64_t cols, const float* importance, const Work& work) {
    const int64_t per_row = cols / superblock, total = rows * per_row;
    for (int64_t first = 0; first < total; first += batch) {
        Batch b;
        b.x = x + first * superblock;
        b.count = static_cast<int>(total - first < batch ? total - first : batch);
        for (int k = 0; k < b.count; ++k) {
            b.importance[k] = importance ? importance + (first + k) % per_row * superblock : nullptr;
        }
        work(b, first);
    }
}

struct alignas(64) Scales {
    uint8_t scale_code[batch * 16];
    uint8_t min_code[batch * 16];
    float scale[batch];
    float minimum[batch];
};

}  // namespace
