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
template <class V>
struct Rounding {
    V low, high;

    __attribute__((always_inline)) Rounding(int from, int to) {
        opaque(float(from), low);
        opaque(float(to), high);
    }

    __attribute__((always_inline)) V operator()(V v) const { return round_even(smaller(larger(v, low), high)); }
};

// The same by ggml's integers, for values where those wrap.
template <class V>
LQ_INLINE V round_wrapping(V v, int32_t low, int32_t high) { return to_float(clamp(nearest(v), low, high)); }

template <class V>
struct AsymmetricFit {
    V scale, minimum;    // x ~ scale * code + minimum; minimum <= 0
    V inverse, origin;   // what made the codes
    IntegersOf<V> stepped;           // the codes come from a step of the search, not from the first guess
    V sum_w;
};

template <int N, int top, bool mad, class V>
LQ_INLINE V asymmetric_error(const V* x, const V* w, const V* code, V scale, V minimum) {
    V error = V{};
    for (int i = 0; i < N; ++i) {
        const V off = scale * code[i] + minimum - x[i];
        error += w[i] * (mad ? absolute(off) : off * off);
    }
    return error;
}

// A group of sub-blocks at work. The gaps keep a store to code[i] from sharing its low 12 address bits with a load of
// x[i] or w[i], which processors take for the same address and wait for.
template <int N, class V>
struct alignas(64) Workspace {
    static constexpr int size = N * sizeof(V);
    V x[N];
    char gap_1[256];
    V w[N];
    char gap_2[(3 * 4096 - 512 - 256 - 2 * size) % 4096];
    V code[N];
};

// The search itself. `wild` tells that a lane met inverse scales so large that ggml's integers wrap: then the result
// counts for nothing and the `careful` variant, which wraps as they do, must be run.
template <int N, int top, int steps, bool mad, bool guarded, bool careful, class V>
static inline AsymmetricFit<V> search_grid(Workspace<N, V>& g, float first, float step, IntegersOf<V>& wild) {
    using M = IntegersOf<V>;
    const V* x = g.x;
    const V* w = g.w;
    AsymmetricFit<V> fit;
    const Rounding<V> rounded(0, top);
    V low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        low = smaller(x[i], low);
        high = larger(x[i], high);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    const V smallest = low;
    low = select(low > 0.0f, V{}, low);
    const M dead = high == low;
    const auto range = [&](V minimum) { return select(dead, spread<V>(1.0f), high - minimum); };
    const auto wraps = [&](V inverse, V minimum) {
        const V above = absolute(inverse * (high - minimum)), below = absolute(inverse * (smallest - minimum));
        return ~((above < safe_code) & (below < safe_code));
    };

    fit.inverse = float(top) / range(low);
    fit.scale = 1.0f / fit.inverse;
    fit.origin = low;
    fit.stepped = M{};
    fit.sum_w = sum_w;
    wild = wraps(fit.inverse, low);
    for (int i = 0; i < N; ++i) {
        const V v = fit.inverse * (x[i] - low);
        put(g.code[i], careful ? round_wrapping(v, 0, top) : rounded(v));
    }
    V best = asymmetric_error<N, top, mad>(x, w, g.code, fit.scale, low);

    for (int s = 0; s <= steps; ++s) {
        const V inverse = (first + step * float(s) + float(top)) / range(low);
        if (!guarded) wild |= wraps(inverse, low);
        V sum_l = V{}, sum_l2 = V{}, sum_xl = V{};
        for (int i = 0; i < N; ++i) {
            const V v = inverse * (x[i] - low);
            const V l = careful && !guarded ? round_wrapping(v, 0, top) : rounded(v);
            const V wl = w[i] * l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
            put(g.code[i], l);
        }
        const V determinant = sum_w * sum_l2 - sum_l * sum_l;
        V scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        V minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const M positive = minimum > 0.0f;
        scale = select(positive, sum_xl / sum_l2, scale);
        minimum = select(positive, V{}, minimum);
        const V error = asymmetric_error<N, top, mad>(x, w, g.code, scale, minimum);
        const M better = (error < best) & (determinant > 0.0f) & ~dead;
        best = select(better, error, best);
        fit.scale = select(better, scale, fit.scale);
        fit.inverse = select(better, inverse, fit.inverse);
        fit.origin = select(better, low, fit.origin);
        low = select(better, minimum, low);
        fit.stepped |= better;
    }
    fit.minimum = low;
    fit.scale = select(dead, V{}, fit.scale);
    fit.inverse = select(dead, V{}, fit.inverse);
    return fit;
}

template <int N, int top, int steps, bool mad, bool guarded, class V>
[[gnu::noinline, gnu::cold]] static AsymmetricFit<V> search_grid_carefully(Workspace<N, V>& g, float first, float step) {
    IntegersOf<V> wild;
    return search_grid<N, top, steps, mad, guarded, true>(g, first, step, wild);
}

// Scale and minimum of least error among the codes of steps+1 inverse scales (first + step * s + top) / range.
// Each accepted step moves the minimum, and the next steps start from it. `guarded` is how the search with an
// imatrix treats inverse scales so large that integers would wrap.
template <int N, int top, int steps, bool mad, bool guarded, class V>
static inline AsymmetricFit<V> fit_asymmetric(Workspace<N, V>& g, float first, float step) {
    IntegersOf<V> wild;
    const AsymmetricFit<V> fit = search_grid<N, top, steps, mad, guarded, false>(g, first, step, wild);
    if (__builtin_expect(!any(wild), 1)) return fit;
    return search_grid_carefully<N, top, steps, mad, guarded>(g, first, step);
}

template <int N, int top, int steps, bool mad, bool guarded, class V>
static inline AsymmetricFit<V> fit_asymmetric(const V* x, const V* w, float first, float step) {
    Workspace<N, V> g;
    for (int i = 0; i < N; ++i) {
        put(g.x[i], x[i]);
        put(g.w[i], w[i]);
    }
    return fit_asymmetric<N, top, steps, mad, guarded>(g, first, step);
}

template <class V>
struct SymmetricFit {
    V scale, inverse;  // x ~ scale * code, code = round(inverse * x) in -top..top-1
    IntegersOf<V> dead;            // all weights count as zero: scale 0
};

// The largest (sum w x code)^2 / sum w code^2 among 19 inverse scales around the one that sends the weight of largest
// magnitude to -top.
template <int N, int top, class V>
static inline SymmetricFit<V> fit_symmetric(const V* x, const V* w) {
    using M = IntegersOf<V>;
    V largest = V{}, magnitude = V{};
    V wx[N];
    for (int i = 0; i < N; ++i) {
        const V a = absolute(x[i]);
        const M more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
        put(wx[i], w[i] * x[i]);
    }
    SymmetricFit<V> fit;
    const Rounding<V> rounded(-top, top - 1);
    fit.dead = magnitude < no_scale_below;
    largest = select(fit.dead, spread<V>(1.0f), largest);
    fit.inverse = -float(top) / largest;
    V sum_xl, sum_l2;
    const auto sums = [&](V inverse) {
        sum_xl = sum_l2 = V{};
        for (int i = 0; i < N; ++i) {
            const V l = rounded(inverse * x[i]);
            sum_xl += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
    };
    sums(fit.inverse);
    fit.scale = select(sum_l2 != 0.0f, sum_xl / sum_l2, V{});
    V best = fit.scale * sum_xl;
    for (int s = -9; s <= 9; ++s) {
        if (s == 0) continue;
        const V inverse = -(float(top) + 0.1f * float(s)) / largest;
        sums(inverse);
        const M better = (sum_l2 > 0.0f) & (sum_xl * sum_xl > best * sum_l2);
        const V scale = sum_xl / sum_l2;
        fit.scale = select(better, scale, fit.scale);
        best = select(better, scale * sum_xl, best);
        fit.inverse = select(better, inverse, fit.inverse);
    }
    fit.scale = select(fit.dead, V{}, fit.scale);
    return fit;
}

// Codes 0..top of N non-negative numbers (scales, or minima, of a superblock; here a lane is a superblock), and their
// common scale: nine inverse scales, then up to five passes that move one code at a time. Codes are bytes in ggml and
// wrap as bytes do.
template <int N, int top, class V>
static inline V fit_positive(const V* x, const V* w, IntegersOf<V>* code) {
    using M = IntegersOf<V>;
    V most = V{};
    for (int i = 0; i < N; ++i) most = larger(most, x[i]);
    const M dead = most < no_scale_below;
    most = select(dead, spread<V>(1.0f), most);
    V inverse = float(top) / most;
    V best = V{};
    const V first_scale = 1.0f / inverse;
    for (int i = 0; i < N; ++i) {
        const V off = x[i] - first_scale * to_float(nearest(inverse * x[i]) & 0xff);
        best += w[i] * off * off;
    }
    for (int s = -4; s <= 4; ++s) {
        if (s == 0) continue;
        const V tried = (0.1f * float(s) + float(top)) / most;
        const V scale = 1.0f / tried;
        V error = V{};
        for (int i = 0; i < N; ++i) {
            const V off = x[i] - scale * to_float(smaller(spread<M>(top), nearest(tried * x[i])));
            error += w[i] * off * off;
        }
        const M better = error < best;
        best = select(better, error, best);
        inverse = select(better, tried, inverse);
    }
    V sum_xl = V{}, sum_l2 = V{};
    for (int i = 0; i < N; ++i) {
        const M l = smaller(spread<M>(top), nearest(inverse * x[i]));
        code[i] = l & 0xff;
        sum_xl += w[i] * x[i] * to_float(l);
        sum_l2 += w[i] * to_float(l) * to_float(l);
    }
    for (int pass = 0; pass < 5; ++pass) {
        M changed = M{};
        for (int i = 0; i < N; ++i) {
            const V l = to_float(code[i]);
            V xl = sum_xl - w[i] * x[i] * l;
            V l2 = sum_l2 - w[i] * l * l;
            M moved = (xl > 0.0f) & (l2 > 0.0f);
            const M next = smaller(spread<M>(top), nearest(x[i] * l2 / xl));
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
    return select((sum_l2 > 0.0f) & ~dead, sum_xl / sum_l2, V{});
}

// Q3_K without an imatrix: start as fit_symmetric does, then up to five passes that move one code at a time; w = x^2.
template <int N, int top, class V>
static inline V fit_by_moves(const V* x, V* code, IntegersOf<V>& dead) {
    using M = IntegersOf<V>;
    V largest = V{}, magnitude = V{};
    for (int i = 0; i < N; ++i) {
        const V a = absolute(x[i]);
        const M more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
    }
    dead = magnitude < no_scale_below;
    const Rounding<V> rounded(-top, top - 1);
    const V inverse = -float(top) / select(dead, spread<V>(1.0f), largest);
    V sum_xl = V{}, sum_l2 = V{};
    for (int i = 0; i < N; ++i) {
        const V w = x[i] * x[i];
        put(code[i], rounded(inverse * x[i]));
        sum_xl += w * x[i] * code[i];
        sum_l2 += w * code[i] * code[i];
    }
    for (int pass = 0; pass < 5; ++pass) {
        M changed = M{};
        for (int i = 0; i < N; ++i) {
            const V w = x[i] * x[i], wx = w * x[i], l = code[i];
            V xl = sum_xl - wx * l;
            V l2 = sum_l2 - w * l * l;
            M moved = xl > 0.0f;
            const V next = round_wrapping(x[i] * l2 / xl, -top, top - 1);
            moved &= next != l;
            xl += wx * next;
            l2 += w * next * next;
            moved &= (l2 > 0.0f) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
            put(code[i], select(moved, next, l));
            sum_xl = select(moved, xl, sum_xl);
            sum_l2 = select(moved, l2, sum_l2);
            changed |= moved;
        }
        if (!any(changed & ~dead)) break;
    }
    return select((sum_l2 > 0.0f) & ~dead, sum_xl / sum_l2, V{});
}

}  // namespace
