// The searches of iq1_s and iq1_m, one block per lane: the block is sorted, and every pair of cuts makes three groups
// of it, with the levels -1, 0 and 1 plus or minus 1/8. Then each eight codes become an entry of the grid.
#pragma once

#include "iq1_grid.hpp"
#include "superblocks.hpp"

namespace {

// Batcher's merge exchange: pairs (a, b), a < b, that sort n values when each pair is put in order.
template <int n>
struct Network {
    int count = 0;
    uint8_t low[n * 6] = {}, high[n * 6] = {};

    constexpr Network() {
        for (int p = 1; p < n; p *= 2) {
            for (int k = p; k >= 1; k /= 2) {
                for (int j = k % p; j + k < n; j += 2 * k) {
                    for (int i = 0; i < k && i + j + k < n; ++i) {
                        if ((i + j) / (2 * p) != (i + j + k) / (2 * p)) continue;
                        low[count] = static_cast<uint8_t>(i + j);
                        high[count++] = static_cast<uint8_t>(i + j + k);
                    }
                }
            }
        }
    }
};

template <int n>
constexpr Network<n> network = Network<n>();

// Blocks in ascending order, one per lane; equal weights in the order in which they came.
template <int n>
struct Sorted {
    vf x[n], w[n];
    vi from[n];

    void sort(const vf* values, const vf* weights) {
        for (int i = 0; i < n; ++i) {
            x[i] = values[i];
            w[i] = weights[i];
            from[i] = splat(i);
        }
        for (int c = 0; c < network<n>.count; ++c) {
            const int a = network<n>.low[c], b = network<n>.high[c];
            const vf xa = x[a], xb = x[b], wa = w[a], wb = w[b];
            const vi fa = from[a], fb = from[b];
            const vi swap = (xa > xb) | ((xa == xb) & (fa > fb));
            x[a] = select(swap, xb, xa);
            x[b] = select(swap, xa, xb);
            w[a] = select(swap, wb, wa);
            w[b] = select(swap, wa, wb);
            from[a] = select(swap, fb, fa);
            from[b] = select(swap, fa, fb);
        }
    }
};

// The best candidate so far. A candidate is (sum w l x) = cross and (sum w l l) = square; its score cross^2 / square is
// compared as ggml does, one candidate after the other.
struct Best {
    vf score, scale;
    vi choice;  // first cut, second cut and shift code, or -1

    // Without `checked` every square must be positive.
    template <bool checked>
    __attribute__((always_inline)) inline vi better(vf cross, vf square) const {
        const vi more = cross * cross > score * square;
        return checked ? more & (square > 0.0f) : more;
    }

    template <bool checked>
    __attribute__((always_inline)) inline void consider(vf cross, vf square, int32_t candidate) {
        const vi more = better<checked>(cross, square);
        const vf found = cross / square;
        scale = select(more, found, scale);
        score = select(more, found * cross, score);
        choice = select(more, splat(candidate), choice);
    }
};

// Sums over the first i weights of a sorted block of 32; one shift for the block: candidates 0 for plus, 1 for minus.
struct Whole {
    static constexpr int n = 32, shifts = 2;
    vf x[n + 1], w[n + 1];
    vf cross_p[n + 1], cross_m[n + 1], square_p[n + 1], square_m[n + 1];  // of what is above the second cut

    explicit Whole(const Sorted<n>& block) {
        x[0] = w[0] = vf{};
        for (int i = 0; i < n; ++i) {
            x[i + 1] = x[i] + block.w[i] * block.x[i];
            w[i + 1] = w[i] + block.w[i];
        }
        for (int i = 0; i <= n; ++i) {
            const vf xs = x[n] - x[i], ws = w[n] - w[i];
            cross_p[i] = xs * 1.125f;
            cross_m[i] = xs * 0.875f;
            square_p[i] = ws * 1.125f * 1.125f;
            square_m[i] = ws * 0.875f * 0.875f;
        }
    }

    __attribute__((always_inline)) inline vf total() const { return w[n]; }

    __attribute__((always_inline)) inline void at(int first, int second, vf* cross, vf* square) const {
        const vf middle = (x[second] - x[first]) * 0.125f, middle2 = (w[second] - w[first]) * 0.125f * 0.125f;
        cross[0] = x[first] * -0.875f + middle + cross_p[second];
        cross[1] = x[first] * -1.125f - middle + cross_m[second];
        square[0] = w[first] * 0.875f * 0.875f + middle2 + square_p[second];
        square[1] = w[first] * 1.125f * 1.125f + middle2 + square_m[second];
    }
};

// The same of a block of 16 with a shift for each half: bit 1 of a candidate is the first half's, bit 0 the second's.
struct Halves {
    static constexpr int n = 16, shifts = 4;
    vf x[2][n + 1], w[2][n + 1];

    explicit Halves(const Sorted<n>& block) {
        for (int h = 0; h < 2; ++h) x[h][0] = w[h][0] = vf{};
        for (int i = 0; i < n; ++i) {
            const vi upper = block.from[i] >= 8;
            const vf ws = block.w[i], xs = ws * block.x[i];
            x[0][i + 1] = select(upper, x[0][i], x[0][i] + xs);
            x[1][i + 1] = select(upper, x[1][i] + xs, x[1][i]);
            w[0][i + 1] = select(upper, w[0][i], w[0][i] + ws);
            w[1][i + 1] = select(upper, w[1][i] + ws, w[1][i]);
        }
    }

    __attribute__((always_inline)) inline vf total() const { return w[0][n] + w[1][n]; }

    __attribute__((always_inline)) inline void at(int first, int second, vf* cross, vf* square) const {
        constexpr float p1 = 0.875f * 0.875f - 0.125f * 0.125f, p2 = 0.125f * 0.125f - 1.125f * 1.125f;
        constexpr float m1 = 1.125f * 1.125f - 0.125f * 0.125f, m2 = 0.125f * 0.125f - 0.875f * 0.875f;
        vf p[2], m[2], pp[2], mm[2];
        for (int h = 0; h < 2; ++h) {
            const vf before = x[h][first] + x[h][second];
            p[h] = x[h][n] * 1.125f - before;
            m[h] = x[h][n] * 0.875f - before;
            pp[h] = w[h][n] * 1.125f * 1.125f + w[h][first] * p1 + w[h][second] * p2;
            mm[h] = w[h][n] * 0.875f * 0.875f + w[h][first] * m1 + w[h][second] * m2;
        }
        for (int k = 0; k < 4; ++k) {
            cross[k] = (k & 2 ? m[0] : p[0]) + (k & 1 ? m[1] : p[1]);
            square[k] = (k & 2 ? mm[0] : pp[0]) + (k & 1 ? mm[1] : pp[1]);
        }
    }
};

template <bool checked, class Sums>
static inline Best search_cuts(const Sums& sums) {
    Best best = {splat(-0x1.fffffep127f), vf{}, splat(-1)};
    for (int first = 0; first <= Sums::n; ++first) {
        for (int second = first; second <= Sums::n; ++second) {
            vf cross[Sums::shifts], square[Sums::shifts];
            sums.at(first, second, cross, square);
            vi more = best.better<checked>(cross[0], square[0]);
            for (int k = 1; k < Sums::shifts; ++k) more |= best.better<checked>(cross[k], square[k]);
            if (__builtin_expect(bits_of(more) != 0, 0)) {
                for (int k = 0; k < Sums::shifts; ++k) {
                    best.consider<checked>(cross[k], square[k], first << 16 | second << 8 | k);
                }
            }
        }
    }
    return best;
}

// Weights whose sum is of ordinary size make every square positive.
template <class Sums>
static inline Best search(const Sums& sums) {
    const vf total = sums.total();
    const bool ordinary = bits_of(~((total > 1e-30f) & (total < 1e30f))) == 0;
    return ordinary ? search_cuts<false>(sums) : search_cuts<true>(sums);
}

}  // namespace
