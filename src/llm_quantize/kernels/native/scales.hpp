// Tries of one scale for each group of weights, a group in each lane: the error of its nearest codes, and the scale that least
// squares gives those codes. Equal bit for bit to what grids/search.py computes in torch: products and sums are rounded
// apart, and sums over a group are halved again and again in the same order.
#pragma once

#include <cstddef>

#include "simd.hpp"

namespace {

// The sum of terms[0 .. count) by halves; what stood there is lost.
LQ_INLINE vf fold_by_halves(vf* terms, int64_t count) {
    while (count > 1) {
        const int64_t half = count / 2;
        for (int64_t i = 0; i < half; ++i) terms[i] += terms[half + i];
        if (count % 2) terms[0] += terms[count - 1];
        count = half;
    }
    return terms[0];
}

// Ties to even, as torch rounds; beyond 2^22 floats of a level's size are far outside of every grid and are clipped.
LQ_INLINE vf nearest_level(vf x, vf low, vf high) {
    const vf shifter = splat(12582912.0f);
    const vf whole = (x + shifter) - shifter;
    const vf rounded = select(absolute(x) < splat(4194304.0f), whole, x);
    return smaller(larger(rounded, low), high);
}

LQ_INLINE vf finite_reciprocal(vf scale) {
    const vf inverse = splat(1.0f) / scale;
    return select(absolute(inverse) <= splat(3.402823466e38f), inverse, vf{});
}

// What the tries of a lane of groups are worked out in: `count` vectors each.
struct ScaleScratch {
    vf *weights, *importance, *errors, *crosses, *squares;
};

// The error of one scale with the nearest codes of all weights.
LQ_INLINE vf code_error(const ScaleScratch& s, int64_t count, vf scale, const vf* zero, vf low, vf high) {
    const vf inverse = finite_reciprocal(scale);
    for (int64_t i = 0; i < count; ++i) {
        const vf x = s.weights[i];
        vf level = x * inverse;
        level = zero == nullptr ? nearest_level(level, low, high) : nearest_level(level + *zero, low, high) - *zero;
        const vf residual = level * scale - x;
        s.errors[i] = residual * residual * s.importance[i];
    }
    return fold_by_halves(s.errors, count);
}

// The least-squares scale for those codes, and its error with them.
LQ_INLINE vf refitted_scale(const ScaleScratch& s, int64_t count, vf scale, const vf* zero, vf low, vf high, vf& error) {
    const vf inverse = finite_reciprocal(scale);
    for (int64_t i = 0; i < count; ++i) {
        const vf x = s.weights[i], w = s.importance[i];
        vf level = x * inverse;
        level = zero == nullptr ? nearest_level(level, low, high) : nearest_level(level + *zero, low, high) - *zero;
        const vf residual = x - level * scale;
        const vf weighted = w * residual;
        s.errors[i] = residual * weighted;
        s.crosses[i] = weighted * level;
        s.squares[i] = level * level * w;
    }
    const vf least = fold_by_halves(s.errors, count), cross = fold_by_halves(s.crosses, count);
    const vf square = fold_by_halves(s.squares, count);
    const vf step = select(square > vf{}, cross / square, vf{});
    error = least - step * cross;
    return scale + step;
}

// See ScaleSearch of registry.hpp. `scratch`: 5 * count vectors, aligned to one.
void refit_scales(const lq::ScaleSearch& work, float* scratch) {
    vf* const first = reinterpret_cast<vf*>(scratch);
    const int64_t count = work.count, groups = work.groups;
    const ScaleScratch s{first, first + count, first + 2 * count, first + 3 * count, first + 4 * count};
    const vf low = splat(work.lowest), high = splat(work.highest);
    for (int64_t g = 0; g < groups; g += lanes) {
        const size_t bytes = static_cast<size_t>(g + lanes <= groups ? lanes : groups - g) * sizeof(float);
        const auto some = [bytes](const float* p) {
            float padded[lanes] = {};
            __builtin_memcpy(padded, p, bytes);
            return load(padded);
        };
        const auto put = [bytes](float* p, vf v) { __builtin_memcpy(p, &v, bytes); };
        for (int64_t i = 0; i < count; ++i) {
            s.weights[i] = some(work.weights + i * groups + g);
            s.importance[i] = some(work.importance + i * groups + g);
        }
        for (int64_t t = 0; t < work.tries; ++t) {
            const int64_t at = t * groups + g;
            const vf scale = some(work.scale + at), zero = work.zero == nullptr ? vf{} : some(work.zero + at);
            const vf* shift = work.zero == nullptr ? nullptr : &zero;
            if (work.fitted == nullptr) {
                put(work.error + at, code_error(s, count, scale, shift, low, high));
            } else {
                vf error;
                put(work.fitted + at, refitted_scale(s, count, scale, shift, low, high, error));
                put(work.error + at, error);
            }
        }
    }
}

}  // namespace
