// The scale searches of ggml, one sub-block per SIMD lane.
//
// Legend (all arrays run over the N weights of a sub-block, all vectors over the sub-blocks):
//   x[i] weights, w[i] their importance, code = round(inverse * (x - origin)) in 0..top (or -top..top-1),
//   x ~ scale * code + minimum.
// ggml's floats are added in ggml's order inside each lane, so every result has ggml's bits.
#pragma once

#include "wide.hpp"

namespace {

constexpr float no_scale_below = 1e-15f;  // a sub-block whose largest magnitude is smaller counts as zero
constexpr float safe_code = 2097152.0f;   // 2^21: below, ggml's integer rounding does not wrap

// round(v) held to low..high, as a float; for NaN gives low.
LQ_INLINE wf round_clamped(wf v, float low, float high) {
    return round_even(smaller(larger(v, splat_wide(low)), splat_wide(high)));
}

// The same by ggml's integers, for values where those wrap.
LQ_INLINE wf round_wrapping(wf v, int32_t low, int32_t high) { return to_float(clamp(nearest(v), low, high)); }

struct AsymmetricFit {
    wf scale, minimum;    // x ~ scale * code + minimum; minimum <= 0
    wf inverse, origin;   // what made the codes
    wi stepped;           // the codes come from a step of the search, not from the first guess
    wf sum_w;
};

template <int N, int top, bool mad>
LQ_INLINE wf asymmetric_error(const wf* x, const wf* w, const wf* code, wf scale, wf minimum) {
    wf error = wf{};
    for (int i = 0; i < N; ++i) {
        const wf off = scale * code[i] + minimum - x[i];
        error += w[i] * (mad ? absolute(off) : off * off);
    }
    return error;
}

// Scale and minimum of least error among the codes of steps+1 inverse scales (first + step * s + top) / range.
// Each accepted step moves the minimum, and the next steps start from it. `guarded` is how the search with an
// imatrix treats inverse scales so large that integers would wrap.
template <int N, int top, int steps, bool mad, bool guarded>
static inline AsymmetricFit fit_asymmetric(const wf* x, const wf* w, float first, float step) {
    AsymmetricFit fit;
    wf low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        low = smaller(x[i], low);
        high = larger(x[i], high);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    const wf smallest = low;
    low = select(low > 0.0f, wf{}, low);
    const wi dead = high == low;
    const auto spread = [&](wf minimum) { return select(dead, splat_wide(1.0f), high - minimum); };
    const auto wraps = [&](wf inverse, wf minimum) {
        const wf above = absolute(inverse * (high - minimum)), below = absolute(inverse * (smallest - minimum));
        return any(~((above < safe_code) & (below < safe_code)));
    };

    fit.inverse = float(top) / spread(low);
    fit.scale = 1.0f / fit.inverse;
    fit.origin = low;
    fit.stepped = wi{};
    fit.sum_w = sum_w;
    wf code[N];
    if (wraps(fit.inverse, low)) {
        for (int i = 0; i < N; ++i) code[i] = round_wrapping(fit.inverse * (x[i] - low), 0, top);
    } else {
        for (int i = 0; i < N; ++i) code[i] = round_clamped(fit.inverse * (x[i] - low), 0.0f, float(top));
    }
    wf best = asymmetric_error<N, top, mad>(x, w, code, fit.scale, low);

    for (int s = 0; s <= steps; ++s) {
        const wf inverse = (first + step * float(s) + float(top)) / spread(low);
        wf sum_l = wf{}, sum_l2 = wf{}, sum_xl = wf{};
        const auto add = [&](int i, wf l) {
            code[i] = l;
            const wf wl = w[i] * l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        };
        if (!guarded && __builtin_expect(wraps(inverse, low), 0)) {
            for (int i = 0; i < N; ++i) add(i, round_wrapping(inverse * (x[i] - low), 0, top));
        } else {
            for (int i = 0; i < N; ++i) add(i, round_clamped(inverse * (x[i] - low), 0.0f, float(top)));
        }
        const wf determinant = sum_w * sum_l2 - sum_l * sum_l;
        wf scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        wf minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const wi positive = minimum > 0.0f;
        scale = select(positive, sum_xl / sum_l2, scale);
        minimum = select(positive, wf{}, minimum);
        const wf error = asymmetric_error<N, top, mad>(x, w, code, scale, minimum);
        const wi better = (error < best) & (determinant > 0.0f) & ~dead;
        best = select(better, error, best);
        fit.scale = select(better, scale, fit.scale);
        fit.inverse = select(better, inverse, fit.inverse);
        fit.origin = select(better, low, fit.origin);
        low = select(better, minimum, low);
        fit.stepped |= better;
    }
    fit.minimum = low;
    fit.scale = select(dead, wf{}, fit.scale);
    fit.inverse = select(dead, wf{}, fit.inverse);
    return fit;
}

struct SymmetricFit {
    wf scale, inverse;  // x ~ scale * code, code = round(inverse * x) in -top..top-1
    wi dead;            // all weights count as zero: scale 0
};

// The largest (sum w x code)^2 / sum w code^2 among 19 inverse scales around the one that sends the weight of largest
// magnitude to -top.
template <int N, int top>
static inline SymmetricFit fit_symmetric(const wf* x, const wf* w) {
    wf largest = wf{}, magnitude = wf{};
    wf wx[N];
    for (int i = 0; i < N; ++i) {
        const wf a = absolute(x[i]);
        const wi more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
        wx[i] = w[i] * x[i];
    }
    SymmetricFit fit;
    fit.dead = magnitude < no_scale_below;
    largest = select(fit.dead, splat_wide(1.0f), largest);
    fit.inverse = -float(top) / largest;
    wf sum_xl, sum_l2;
    const auto sums = [&](wf inverse) {
        sum_xl = sum_l2 = wf{};
        for (int i = 0; i < N; ++i) {
            const wf l = round_clamped(inverse * x[i], -float(top), float(top - 1));
            sum_xl += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
    };
    sums(fit.inverse);
    fit.scale = select(sum_l2 != 0.0f, sum_xl / sum_l2, wf{});
    wf best = fit.scale * sum_xl;
    for (int s = -9; s <= 9; ++s) {
        if (s == 0) continue;
        const wf inverse = -(float(top) + 0.1f * float(s)) / largest;
        sums(inverse);
        const wi better = (sum_l2 > 0.0f) & (sum_xl * sum_xl > best * sum_l2);
        const wf scale = sum_xl / sum_l2;
        fit.scale = select(better, scale, fit.scale);
        best = select(better, scale * sum_xl, best);
        fit.inverse = select(better, inverse, fit.inverse);
    }
    fit.scale = select(fit.dead, wf{}, fit.scale);
    return fit;
}

// Codes 0..top of N non-negative numbers (scales, or minima, of a superblock; here a lane is a superblock), and their
// common scale: nine inverse scales, then up to five passes that move one code at a time. Codes are bytes in ggml and
// wrap as bytes do.
template <int N, int top>
static inline wf fit_positive(const wf* x, const wf* w, wi* code) {
    wf most = wf{};
    for (int i = 0; i < N; ++i) most = larger(most, x[i]);
    const wi dead = most < no_scale_below;
    most = select(dead, splat_wide(1.0f), most);
    wf inverse = float(top) / most;
    wf best = wf{};
    const wf first_scale = 1.0f / inverse;
    for (int i = 0; i < N; ++i) {
        const wf off = x[i] - first_scale * to_float(nearest(inverse * x[i]) & 0xff);
        best += w[i] * off * off;
    }
    for (int s = -4; s <= 4; ++s) {
        if (s == 0) continue;
        const wf tried = (0.1f * float(s) + float(top)) / most;
        const wf scale = 1.0f / tried;
        wf error = wf{};
        for (int i = 0; i < N; ++i) {
            const wf off = x[i] - scale * to_float(smaller(splat_wide(top), nearest(tried * x[i])));
            error += w[i] * off * off;
        }
        const wi better = error < best;
        best = select(better, error, best);
        inverse = select(better, tried, inverse);
    }
    wf sum_xl = wf{}, sum_l2 = wf{};
    for (int i = 0; i < N; ++i) {
        const wi l = smaller(splat_wide(top), nearest(inverse * x[i]));
        code[i] = l & 0xff;
        sum_xl += w[i] * x[i] * to_float(l);
        sum_l2 += w[i] * to_float(l) * to_float(l);
    }
    for (int pass = 0; pass < 5; ++pass) {
        wi changed = wi{};
        for (int i = 0; i < N; ++i) {
            const wf l = to_float(code[i]);
            wf xl = sum_xl - w[i] * x[i] * l;
            wf l2 = sum_l2 - w[i] * l * l;
            wi moved = (xl > 0.0f) & (l2 > 0.0f);
            const wi next = smaller(splat_wide(top), nearest(x[i] * l2 / xl));
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
    return select((sum_l2 > 0.0f) & ~dead, sum_xl / sum_l2, wf{});
}

// Q3_K without an imatrix: start as fit_symmetric does, then up to five passes that move one code at a time; w = x^2.
template <int N, int top>
static inline wf fit_by_moves(const wf* x, wf* code, wi& dead) {
    wf largest = wf{}, magnitude = wf{};
    for (int i = 0; i < N; ++i) {
        const wf a = absolute(x[i]);
        const wi more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
    }
    dead = magnitude < no_scale_below;
    const wf inverse = -float(top) / select(dead, splat_wide(1.0f), largest);
    wf sum_xl = wf{}, sum_l2 = wf{};
    for (int i = 0; i < N; ++i) {
        const wf w = x[i] * x[i];
        code[i] = round_clamped(inverse * x[i], -float(top), float(top - 1));
        sum_xl += w * x[i] * code[i];
        sum_l2 += w * code[i] * code[i];
    }
    for (int pass = 0; pass < 5; ++pass) {
        wi changed = wi{};
        for (int i = 0; i < N; ++i) {
            const wf w = x[i] * x[i], wx = w * x[i], l = code[i];
            wf xl = sum_xl - wx * l;
            wf l2 = sum_l2 - w * l * l;
            wi moved = xl > 0.0f;
            const wf next = round_wrapping(x[i] * l2 / xl, -top, top - 1);
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
    return select((sum_l2 > 0.0f) & ~dead, sum_xl / sum_l2, wf{});
}

}  // namespace
