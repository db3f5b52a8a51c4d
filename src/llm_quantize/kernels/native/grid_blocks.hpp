// From rows to the searched sub-blocks of IQ2_* and IQ3_*: loading, weights, signs, and the scales of a superblock.
#pragma once

#include "grid_search.hpp"
#include "superblocks.hpp"

namespace {

// What the search of a batch found, sub-block by sub-block.
struct alignas(64) Searched {
    float scale[batch * 16];      // 0 for a dead sub-block
    uint16_t entry[batch * 64];   // number of the grid entry of each group; 0 in a dead sub-block
    uint8_t sign[batch * 32];     // bit i: weight i of eight is negative; 0 in a dead sub-block
    bool dead[batch * 16];
};

// Magnitudes and weights of the sub-blocks first, first + 1, ...; lanes beyond the last one repeat it.
template <class Type>
LQ_INLINE void load_sub_blocks(const Batch& b, int first, const float* sum, Sub<Type::N>& s) {
    constexpr int N = Type::N, per = superblock / N;
    const int last = b.count * per - 1;
    const float* rows[lanes];
    const float* weights[lanes];
    float squares[lanes];
    for (int k = 0; k < lanes; ++k) {
        const int at = first + k < last ? first + k : last;
        rows[k] = b.x + at * N;
        squares[k] = sum[at / per];
        weights[k] = b.importance[at / per] ? b.importance[at / per] + at % per * N : nullptr;
    }
    load_transposed(rows, N, s.x);
    const vf mean = float(Type::factor) * load(squares) / float(superblock);
    if (weights[0] == nullptr) {
        for (int i = 0; i < N; ++i) s.w[i] = Type::weight(mean, s.x[i]);
    } else {
        load_transposed(weights, N, s.w);
        for (int i = 0; i < N; ++i) s.w[i] = s.w[i] * square_root(mean + s.x[i] * s.x[i]);
    }
}

// Takes the signs from the weights; sign[j] has one bit for each of eight weights.
template <int N>
LQ_INLINE void take_signs(Sub<N>& s, vi* sign) {
    for (int j = 0; j < N / 8; ++j) {
        sign[j] = vi{};
        for (int i = 0; i < 8; ++i) {
            vf& x = s.x[8 * j + i];
            const vi negative = ~(x >= 0.0f);
            sign[j] |= negative & (1 << i);
            x = as_float(as_int(x) ^ (negative & INT32_MIN));
        }
    }
}

// Makes the number of negative signs among eight even, by the weight whose sign costs least; seven signs are kept.
template <int N>
LQ_INLINE void make_signs_even(Sub<N>& s, vi* sign) {
    for (int j = 0; j < N / 8; ++j) {
        vf* x = s.x + 8 * j;
        const vf* w = s.w + 8 * j;
        vi odd = sign[j] ^ sign[j] >> 4;
        odd ^= odd >> 2;
        odd = -((odd ^ odd >> 1) & 1);
        vf least = w[0] * x[0] * x[0];
        vi cheapest = vi{};
        for (int i = 1; i < 8; ++i) {
            const vf cost = w[i] * x[i] * x[i];
            const vi less = cost < least;
            least = select(less, cost, least);
            cheapest = select(less, splat(i), cheapest);
        }
        for (int i = 0; i < 8; ++i) {
            const vi turned = odd & (cheapest == i);
            x[i] = as_float(as_int(x[i]) ^ (turned & INT32_MIN));
            sign[j] ^= turned & (1 << i);
        }
        sign[j] &= 127;
    }
}

template <class Type>
static inline void search_batch(const lq::Codebook& book, const Batch& b, Searched& found) {
    using Grid = typename Type::Grid;
    constexpr int N = Type::N, groups = N / Grid::size;
    float sum[batch];
    sums_of_squares(b, sum);
    Sub<N> s;
    const int count = b.count * (superblock / N);
    for (int first = 0; first < count; first += lanes) {
        vi sign[N / 8], word[groups];
        load_sub_blocks<Type>(b, first, sum, s);
        take_signs(s, sign);
        if (Type::even_signs) make_signs_even(s, sign);
        vf top = s.x[0];
        for (int i = 1; i < N; ++i) top = larger(top, s.x[i]);
        vi dead = Type::vanishing > 0.0f ? top < Type::vanishing : top == 0.0f;
        vf scale;
        Type::start(s, top, scale, dead);
        store_transposed<N>(s.x, s.row_x);
        vf root[N];
        for (int i = 0; i < N; ++i) root[i] = square_root(s.w[i]);
        store_transposed<N>(root, s.row_root);
        const vi alive = ~dead & (lane_numbers() < count - first);
        search_grid<N, Grid, Type::tries, Type::again>(book, s, top, Type::step, alive, scale, word);

        const vi turned = scale < 0.0f;
        scale = absolute(scale);
        scale = select(dead | (scale != scale), vf{}, scale);  // ggml stops at NaN
        store(found.scale + first, scale);
        for (int j = 0; j < N / 8; ++j) {
            sign[j] = (sign[j] ^ (turned & (Type::even_signs ? 127 : 255))) & ~dead;
            for (int k = 0; k < lanes; ++k) found.sign[(first + k) * (N / 8) + j] = static_cast<uint8_t>(sign[j][k]);
        }
        for (int g = 0; g < groups; ++g) {
            vi point = vi{};
            for (int i = Grid::size - 1; i >= 0; --i) {
                point = point * Grid::levels + (word[g] >> (4 * i) & (Grid::per - 1));
            }
            point &= ~dead;  // entry 0 is the point 0
            for (int k = 0; k < lanes; ++k) {
                found.entry[(first + k) * groups + g] = static_cast<uint16_t>(book.index[point[k]]);
            }
        }
        for (int k = 0; k < lanes; ++k) found.dead[first + k] = dead[k] != 0;
    }
}

// The half scale and the four-bit codes of the sub-blocks' scales. False when all scales are zero.
template <class Type>
LQ_INLINE bool quantize_scales(const float* scale, uint8_t* half, int32_t* code) {
    constexpr int per = superblock / Type::N;
    float largest = 0.0f;
    for (int j = 0; j < per; ++j) largest = largest > scale[j] ? largest : scale[j];
    const float unit = largest / 31.0f, inverse = 1.0f / unit;
    store_half(half, float_to_half(unit * Type::fudge));
    for (int j = 0; j < per; ++j) {
        const int32_t c = nearest(0.5f * (inverse * scale[j] - 1.0f));
        code[j] = largest == 0.0f || c < 0 ? 0 : c > 15 ? 15 : c;
    }
    return largest != 0.0f;
}

template <class Type>
static inline void quantize_type(const lq::Codebook& book, const float* x, int64_t rows, int64_t cols,
                                 const float* importance, uint8_t* out) {
    constexpr int per = superblock / Type::N, groups = superblock / Type::Grid::size;
    for_batches(x, rows, cols, importance, [&](const Batch& b, int64_t first) {
        Searched found;
        search_batch<Type>(book, b, found);
        for (int k = 0; k < b.count; ++k) {
            uint8_t* q = out + (first + k) * Type::bytes;
            int32_t code[per];
            const bool any_scale = quantize_scales<Type>(found.scale + k * per, q, code);
            Type::pack(found.entry + k * groups, found.sign + k * 32, code, found.dead + k * per, any_scale, q);
        }
    });
}

LQ_INLINE void store_little(uint8_t* p, uint32_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(value >> (8 * i));
}

LQ_INLINE void store_nibbles(const int32_t* code, int count, uint8_t* p) {
    for (int j = 0; j < count; j += 2) p[j / 2] = static_cast<uint8_t>(code[j] | code[j + 1] << 4);
}

// Four bytes of seven signs each, and the scale code above them.
LQ_INLINE uint32_t signs_and_scale(const uint8_t* sign, int32_t code) {
    return uint32_t{sign[0]} | uint32_t{sign[1]} << 7 | uint32_t{sign[2]} << 14 | uint32_t{sign[3]} << 21 |
           static_cast<uint32_t>(code) << 28;
}

}  // namespace
