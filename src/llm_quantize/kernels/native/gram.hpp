// Sums of products of bfloat16 inputs, x^T x, in float32.
//
// The product of two bfloat16 numbers is exact in float32, and so is that of three, so that one fused operation and a
// product followed by a sum round alike: every level gives the same bits. Sums run over `depth` tokens in their order, from zero, and are then
// added to what stands in the result.
#pragma once

#include <cstddef>

#include "simd.hpp"

#if (LQ_LANES == 16 && defined(__AVX512F__)) || (LQ_LANES == 8 && defined(__FMA__))
#include <immintrin.h>
#endif

namespace {

constexpr int64_t gram_depth = 128;
constexpr int gram_rows = LQ_LANES == 16 ? 14 : 6;  // with two vectors of columns: as many sums as registers hold
constexpr int gram_columns = 2 * LQ_LANES;

LQ_INLINE vf add_product(vf sum, vf a, vf b) {
#if LQ_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                reinterpret_cast<__m512>(sum)));
#elif LQ_LANES == 8 && defined(__FMA__)
    return reinterpret_cast<vf>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                reinterpret_cast<__m256>(sum)));
#else
    return sum + a * b;
#endif
}

// Columns first .. first + count of `tokens` rows of x as panels of `width` columns, [panel][token][column], float32,
// zeros behind the last column; times `weights` of the tokens, unless null.
LQ_INLINE void pack_panels(const uint16_t* x, int64_t stride, int64_t tokens, int64_t first, int64_t count, int width,
                           const float* weights, float* out) {
    for (int64_t at = 0; at < count; at += width) {
        const int64_t taken = at + width <= count ? width : count - at;
        for (int64_t t = 0; t < tokens; ++t, out += width) {
            const uint16_t* row = x + t * stride + first + at;
            for (int64_t i = 0; i < taken; ++i) out[i] = float_of_bits(static_cast<uint32_t>(row[i]) << 16);
            for (int64_t i = taken; i < width; ++i) out[i] = 0.0f;
            if (weights == nullptr) continue;
            for (int64_t i = 0; i < taken; ++i) out[i] *= weights[t];
        }
    }
}

// out[r][c] += sum over tokens of a[t][r] * b[t][c], for the `rows` x `columns` that there are.
LQ_INLINE void gram_corner(const float* a, const float* b, int64_t tokens, float* out, int64_t stride, int64_t rows,
                           int64_t columns) {
    vf sums[gram_rows][2] = {};
    for (int64_t t = 0; t < tokens; ++t, a += gram_rows, b += gram_columns) {
        const vf left = load(b), right = load(b + lanes);
#pragma GCC unroll 16
        for (int r = 0; r < gram_rows; ++r) {
            const vf factor = splat(a[r]);
            sums[r][0] = add_product(sums[r][0], factor, left);
            sums[r][1] = add_product(sums[r][1], factor, right);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* to = out + r * stride;
        if (columns == gram_columns) {
            store(to, load(to) + sums[r][0]);
            store(to + lanes, load(to + lanes) + sums[r][1]);
            continue;
        }
        float found[gram_columns];
        store(found, sums[r][0]);
        store(found + lanes, sums[r][1]);
        for (int64_t c = 0; c < columns; ++c) to[c] += found[c];
    }
}

// See GramTile of registry.hpp. `scratch`: gram_depth times the rows and columns, each rounded up by 32.
void add_gram(const lq::GramTile& tile, float* scratch) {
    const int64_t padded = (tile.rows + gram_rows - 1) / gram_rows * gram_rows;
    float* const left = scratch;
    float* const right = scratch + gram_depth * padded;
    for (int64_t from = 0; from < tile.tokens; from += gram_depth) {
        const int64_t tokens = from + gram_depth < tile.tokens ? gram_depth : tile.tokens - from;
        const uint16_t* x = tile.inputs + from * tile.columns_in_all;
        const float* weights = tile.weights == nullptr ? nullptr : tile.weights + from;
        pack_panels(x, tile.columns_in_all, tokens, tile.first_row, tile.rows, gram_rows, weights, left);
        pack_panels(x, tile.columns_in_all, tokens, tile.first_column, tile.columns, gram_columns, nullptr, right);
        for (int64_t c = 0; c < tile.columns; c += gram_columns) {
            const int64_t columns = c + gram_columns < tile.columns ? gram_columns : tile.columns - c;
            for (int64_t r = 0; r < tile.rows; r += gram_rows) {
                // Of what is symmetric the part below the diagonal is left out.
                if (tile.first_row + r > tile.first_column + c + columns - 1) break;
                const int64_t rows = r + gram_rows < tile.rows ? gram_rows : tile.rows - r;
                float* out = tile.sums + (tile.first_row + r) * tile.columns_in_all + tile.first_column + c;
                gram_corner(left + r * tokens, right + c * tokens, tokens, out, tile.columns_in_all, rows, columns);
            }
        }
    }
}

}  // namespace
