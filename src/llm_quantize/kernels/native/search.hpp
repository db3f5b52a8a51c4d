// The scale searches of ggml, one sub-block per SIMD lane.
//
// Legend (all arrays run over the N weights of a sub-block, all vectors over the sub-blocks):
//   x[i] weights, w[i] their importance, code = round(inverse * (x - origin)) in 0..top (or -top..top-1),
//   x ~ scale * code + minimum.
// ggml's floats are added in ggml's order inside each lane, so every result has ggml's bits.
#pragma once

#include "simd.hpp"

namespace {

constexpr float no_scale_below = 1e-15f;  // a sub-block whose largest magnitude is smaller counts as zero
constexpr float magic = 12582912.0f;      // 1.5 * 2^23
constexpr float safe_code = 2097152.0f;   // 2^21: below, adding and subtracting `magic` rounds exactly

LQ_INLINE bool any(vi mask) {
    int32_t sum = 0;
    for (int i = 0; i < lanes; ++i) sum |= mask[i];
    return sum != 0;
}

// round(v) held to low..high, as a float; exact for |v| < 2^22, and for NaN gives low.
LQ_INLINE vf round_clamped(vf v, float low, float high) {
    return (smaller(larger(v, splat(low)), splat(high)) + magic) - magic;
}

// The same by ggml's integers, for values where those wrap.
LQ_INLINE vf round_wrapping(vf v, int32_t low, int32_t high) { return to_float(clamp(nearest(v), low, high)); }

struct AsymmetricFit {
    vf scale, minimum;    // x ~ scale * code + minimum; minimum <= 0
    vf inverse, origin;   // what made the codes
    vi stepped;           // the codes come from a step of the search, not from the first guess
    vf sum_w;
};

template <int N, int top, bool mad>
LQ_INLINE vf asymmetric_error(const vf* x, const vf* w, const vf* code, vf scale, vf minimum) {
    vf error = vf{};
    for (int i = 0; i < N; ++i) {
        const vf off = scale * code[i] + minimum - x[i];
        error += w[i] * (mad ? absolute(off) : off * off);
    }
    return error;
}

// Scale and minimum of least error among the codes of steps+1 inverse scales (first + step * s + top) / range.
// Each accepted step moves the minimum, and the next steps start from it. `guarded` is how the search with an
// imatrix treats inverse scales so large that integers would wrap.
template <int N, int top, int steps, bool mad, bool guarded>
static inline AsymmetricFit fit_asymmetric(const vf* x, const vf* w, float first, float step) {
    AsymmetricFit fit;
    vf low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        low = smaller(x[i], low);
        high = larger(x[i], high);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    const vf smallest = low;
    low = select(low > 0.0f, vf{}, low);
    const vi dead = high == low;
    const auto spread = [&](vf minimum) { return select(dead, splat(1.0f), high - minimum); };
    const auto wraps = [&](vf inverse, vf minimum) {
        const vf above = absolute(inverse * (high - minimum)), below = absolute(inverse * (smallest - minimum));
        return any(~((above < safe_code) & (below < safe_code)));
    };

    fit.inverse = float(top) / spread(low);
    fit.scale = 1.0f / fit.inverse;
    fit.origin = low;
    fit.stepped = vi{};
    fit.sum_w = sum_w;
    vf code[N];
    if (wraps(fit.inverse, low)) {
        for (int i = 0; i < N; ++i) code[i] = round_wrapping(fit.inverse * (x[i] - low), 0, top);
    } else {
        for (int i = 0; i < N; ++i) code[i] = round_clamped(fit.inverse * (x[i] - low), 0.0f, float(top));
    }
    vf best = asymmetric_error<N, top, mad>(x, w, code, fit.scale, low);

    for (int s = 0; s <= steps; ++s) {
        const vf inverse = (first + step * float(s) + float(top)) / spread(low);
        vf sum_l = vf{}, sum_l2 = vf{}, sum_xl = vf{};
        const auto add = [&](int i, vf l) {
            code[i] = l;
            const vf wl = w[i] * l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        };
        if (!guarded && __builtin_expect(wraps(inverse, low), 0)) {
            for (int i = 0; i < N; ++i) add(i, round_wrapping(inverse * (x[i] - low), 0, top));
        } else {
            for (int i = 0; i < N; ++i) add(i, round_clamped(inverse * (x[i] - low), 0.0f, float(top)));
        }
        const vf determinant = sum_w * sum_l2 - sum_l * sum_l;
        vf scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        vf minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const vi positive = minimum > 0.0f;
        scale = select(positive, sum_xl / sum_l2, scale);
        minimum = select(positive, vf{}, minimum);
        const vf error = asymmetric_error<N, top, mad>(x, w, code, scale, minimum);
        const vi better = (error < best) & (determinant > 0.0f) & ~dead;
        best = select(better, error, best);
        fit.scale = select(better, scale, fit.scale);
        fit.inverse = select(better, inverse, fit.inverse);
        fit.origin = select(better, low, fit.origin);
        low = select(better, minimum, low);
        fit.stepped |= better;
    }
    fit.minimum = low;
    fit.scale = select(dead, vf{}, fit.scale);
    fit.inverse = select(dead, vf{}, fit.inverse);
    return fit;
}

struct SymmetricFit {
    vf scale, inverse;  // x ~ scale * code, code = round(inverse * x) in -top..top-1
    vi dead;            // all weights count as zero: scale 0
};

// The largest (sum w x code)^2 / sum w code^2 among 19 inverse scales around the one that sends the weight of largest
// magnitude to -top.
template <int N, int top>
static inline SymmetricFit fit_symmetric(const vf* x, const vf* w) {
    vf largest = vf{}, magnitude = vf{};
    vf wx[N];
    for (int i = 0; i < N; ++i) {
        const vf a = absolute(x[i]);
        const vi more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
        wx[i] = w[i] * x[i];
    }
    SymmetricFit fit;
    fit.dead = magnitude < no_scale_below;
    largest = select(fit.dead, splat(1.0f), largest);
    fit.inverse = -float(top) / largest;
    vf sum_xl, sum_l2;
    const auto sums = [&](vf inverse) {
        sum_xl = sum_l2 = vf{};
        for (int i = 0; i < N; ++i) {
            const vf l = round_clamped(inverse * x[i], -float(top), float(top - 1));
            sum_xl += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
    };
    sums(fit.inverse);
    fit.scale = select(sum_l2 != 0.0f, sum_xl / sum_l2, vf{});
    vf best = fit.scale * sum_xl;
    for (int s = -9; s <= 9; ++s) {
        if (s == 0) continue;
        const vf inverse = -(float(top) + 0.1f * float(s)) / largest;
        sums(inverse);
        const vi better = (sum_l2 > 0.0f) & (sum_xl * sum_xl > best * sum_l2);
        const vf scale = sum_xl / sum_l2;
        fit.scale = select(better, scale, fit.scale);
        best = select(better, scale * sum_xl, best);
        fit.inverse = select(better, inverse, fit.inverse);
    }
    fit.scale = select(fit.dead, vf{}, fit.scale);
    return fit;
}

// Codes 0..top of N non-negative numbers (scales, or minima, of a superblock; here a lane is a superblock), and their
// common scale: nine inverse scales, then up to five passes that move one code at a time. Codes are bytes in ggml and
// wrap as bytes do.
template <int N, int top>
static inline vf fit_positive(const vf* x, const vf* w, vi* code) {
    vf most = vf{};
    for (int i = 0; i < N; ++i) most = larger(most, x[i]);
    const vi dead = most < no_scale_below;
    most = select(dead, splat(1.0f), most);
    vf inverse = float(top) / most;
    vf best = vf{};
    const vf first_scale = 1.0f / inverse;
    for (int i = 0; i < N; ++i) {
        const vf off = x[i] - first_scale * to_float(nearest(inverse * x[i]) & 0xff);
        best += w[i] * off * off;
    }
    for (int s = -4; s <= 4; ++s) {
        if (s == 0) continue;
        const vf tried = (0.1f * float(s) + float(top)) / most;
        const vf scale = 1.0f / tried;
        vf error = vf{};
        for (int i = 0; i < N; ++i) {
            const vf off = x[i] - scale * to_float(smaller(splat(top), nearest(tried * x[i])));
            error += w[i] * off * off;
        }
        const vi better = error < best;
        best = select(better, error, best);
        inverse = select(better, tried, inverse);
    }
    vf sum_xl = vf{}, sum_l2 = vf{};
    for (int i = 0; i < N; ++i) {
        const vi l = smaller(splat(top), nearest(inverse * x[i]));
        code[i] = l & 0xff;
        sum_xl += w[i] * x[i] * to_float(l);
        sum_l2 += w[i] * to_float(l) * to_float(l);
    }
    for (int pass = 0; pass < 5; ++pass) {
        vi changed = vi{};
        for (int i = 0; i < N; ++i) {
            const vf l = to_float(code[i]);
            vf xl = sum_xl - w[i] * x[i] * l;
            vf l2 = sum_l2 - w[i] * l * l;
            vi moved = (xl > 0.0f) & (l2 > 0.0f);
            const vi next = smaller(splat(top), nearest(x[i] * l2 / xl));
            moved &= next != code[i];
            xl += w[i] * x[i] * to_float(next);
            l2 += w[i] * to_float(next) * to_float(next);
            moved &= xl * xl * sum_l2 > sum_xl * sum_xl * l2;
            code[i] = select(moved, next & 0xff, code[i]);
            sum_xl = select(moved, xl, sum_xl);
            sum_l2 = select(moved, l2, sum_l2);
            changed |= moved;
        }
        if (!any(changed & ~dead)) break;
    }
    for (int i = 0; i < N; ++i) code[i] &= ~dead;
    return select((sum_l2 > 0.0f) & ~dead, sum_xl / sum_l2, vf{});
}

// Q3_K without an imatrix: start as fit_symmetric does, then up to five passes that move one code at a time; w = x^2.
template <int N, int top>
static inline vf fit_by_moves(const vf* x, vf* code, vi& dead) {
    vf largest = vf{}, magnitude = vf{};
    for (int i = 0; i < N; ++i) {
        const vf a = absolute(x[i]);
        const vi more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
    }
    dead = magnitude < no_scale_below;
    const vf inverse = -float(top) / select(dead, splat(1.0f), largest);
    vf sum_xl = vf{}, sum_l2 = vf{};
    for (int i = 0; i < N; ++i) {
        const vf w = x[i] * x[i];
        code[i] = round_clamped(inverse * x[i], -float(top), float(top - 1));
        sum_xl += w * x[i] * code[i];
        sum_l2 += w * code[i] * code[i];
    }
    for (int pass = 0; pass < 5; ++pass) {
        vi changed = vi{};
        for (int i = 0; i < N; ++i) {
            const vf w = x[i] * x[i], wx = w * x[i], l = code[i];
            vf xl = sum_xl - wx * l;
            vf l2 = sum_l2 - w * l * l;
            vi moved = xl > 0.0f;
            const vf next = round_wrapping(x[i] * l2 / xl, -top, top - 1);
            moved &= next != l;
            xl += wx * next;
            l2 += w * next * next;
            moved &= (l2 > 0.0f) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
            code[i] = select(moved, next, l);
            sum_xl = select(moved, xl, sum_xl);
            sum_l2 = select(moved, l2, sum_l2);
            changed |= moved;
        }
        if (!any(changed & ~dead)) break;
    }
    return select((sum_l2 > 0.0f) & ~dead, sum_xl / sum_l2, vf{});
}

}  // namespace
