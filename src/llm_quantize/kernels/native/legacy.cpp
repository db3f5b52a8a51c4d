// Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 with ggml's bytes, plain and with an imatrix.
//
// Plain: the extremes of `lanes` blocks are folded together, so that scales, reciprocals and float16 cost one vector
// operation for all of them; then each block is coded along its weights. With an imatrix the scale search runs with one
// block per lane (search.hpp), because ggml's sums are serial; the codes are made along the weights again.
#include "legacy_blocks.hpp"
#include "search.hpp"

namespace {

// Numbers of one group of blocks.
template <int count>
struct alignas(64) Group {
    float low[count];
    float inverse[count];
    int32_t scale[count];    // float16 bits
    int32_t minimum[count];  // float16 bits
    int32_t mask[count];     // of a search: see the coders
};

LQ_INLINE vf identity(vf v) { return v; }

void quantize_q8_0(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, block, 34>(x, rows * cols / block, out, [](const float* p, uint8_t* q) {
        Group<lanes> g;
        const vf scale = fold_blocks<Larger, block>(p, [](vf v) { return absolute(v); }) / 127.0f;
        store(g.inverse, reciprocal(scale));
        store(g.scale, to_half(scale));
        store_halves<34>(q, g.scale);
        for (int b = 0; b < lanes; ++b, p += block, q += 34) {
            for (int k = 0; k < vectors; ++k) {
                store_bytes(q + 2 + k * lanes, round_half_away(load(p + k * lanes) * g.inverse[b]));
            }
        }
    });
}

// Of each block the weight of largest magnitude, the first one where several have it.
LQ_INLINE vf first_extremes(const float* x) {
    const vf low = fold_blocks<Smaller, block>(x, identity), high = fold_blocks<Larger, block>(x, identity);
    vf extreme = select(high > -low, high, low);
    const vi tied = (high == -low) & (high != 0.0f);
    if (__builtin_expect(any(tied), 0)) {
        for (int b = 0; b < lanes; ++b) {
            if (!tied[b]) continue;
            const float* p = x + b * block;
            int i = 0;
            while (i < block - 1 && __builtin_fabsf(p[i]) != high[b]) ++i;
            extreme[b] = p[i];
        }
    }
    return select(extreme == 0.0f, vf{}, extreme);
}

// Symmetric grids: code = trunc(x / scale + levels + 0.5), scale = -extreme / levels.
template <int levels, int bytes>
LQ_INLINE void symmetric_group(const float* p, uint8_t* q) {
    Group<lanes> g;
    const vf scale = first_extremes(p) * (-1.0f / float(levels));
    store(g.inverse, reciprocal(scale));
    store(g.scale, to_half(scale));
    store_halves<bytes>(q, g.scale);
    store_codes<levels == 8 ? 4 : 5, bytes, lanes>(q + 2, [&](int b, int k) {
        const vf x = load(p + b * block + k * lanes);
        const vi c = to_int(x * g.inverse[b] + (float(levels) + 0.5f));
        return smaller(c, splat(2 * levels - 1)) & (2 * levels - 1);
    });
}

// Asymmetric grids: code = trunc((x - low) / scale + 0.5), scale = (high - low) / top.
template <int top, int bytes>
LQ_INLINE void asymmetric_group(const float* p, uint8_t* q) {
    Group<lanes> g;
    vf low = fold_blocks<Smaller, block>(p, identity), high = fold_blocks<Larger, block>(p, identity);
    const vi zero = low == 0.0f;
    if (any(zero)) {
        // The stored minimum has the sign of the first zero of the block.
        for (int b = 0; b < lanes; ++b) {
            int i = 0;
            while (i < block - 1 && p[b * block + i] != 0.0f) ++i;
            if (zero[b]) low[b] = p[b * block + i];
        }
        high = select(zero & (high == 0.0f), low, high);
    }
    const vf scale = (high - low) / float(top);
    store(g.low, low);
    store(g.inverse, reciprocal(scale));
    store(g.scale, to_half(scale));
    store(g.minimum, to_half(low));
    store_halves<bytes>(q, g.scale);
    store_halves<bytes>(q + 2, g.minimum);
    store_codes<top == 15 ? 4 : 5, bytes, lanes>(q + 4, [&](int b, int k) {
        const vf x = load(p + b * block + k * lanes);
        const vi c = to_int((x - g.low[b]) * g.inverse[b] + 0.5f);
        return (top == 15 ? smaller(c, splat(top)) : c) & top;
    });
}

// With an imatrix: weight = importance * sqrt(mean square of the row + x^2). `coder` searches the blocks of a group, one
// per lane, and writes them.
template <int bytes, class Coder>
LQ_INLINE void quantize_weighted(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out,
                                 Coder coder) {
    constexpr int64_t batch = 8;  // rows whose mean squares are known at a time
    const int64_t per_row = cols / block;
    for (int64_t top = 0; top < rows; top += batch) {
        const int64_t count = rows - top < batch ? rows - top : batch;
        float sums[batch];
        serial_squares(x + top * cols, count, cols, cols, sums);
        int64_t number = 0, row = 0;  // of the next block: where in its row, and which row of the batch
        for_block_groups<wide, block, bytes>(x + top * cols, count * per_row, out + top * per_row * bytes,
                                             [&](const float* group, uint8_t* q) {
            const float *x_rows[wide], *w_rows[wide];
            alignas(64) float mean[wide];
            for (int b = 0; b < wide; ++b) {
                const bool present = row < count;  // the padding of the last group takes any importance
                x_rows[b] = group + b * block;
                w_rows[b] = importance + number * block;
                mean[b] = present ? sums[row] / static_cast<float>(cols) : 0.0f;
                if (++number == per_row) {
                    number = 0;
                    ++row;
                }
            }
            wf xs[block], ws[block];
            load_transposed(x_rows, block, xs);
            load_transposed(w_rows, block, ws);
            const wf means = load_wide(mean);
            for (int i = 0; i < block; ++i) ws[i] = ws[i] * square_root(means + xs[i] * xs[i]);
            coder(group, xs, ws, q);
        });
    }
}

LQ_INLINE wi to_half(wf v) { return {to_half(v.a), to_half(v.b)}; }

template <int levels, int bytes>
void quantize_symmetric(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    if (importance == nullptr) {
        for_block_groups<lanes, block, bytes>(x, rows * cols / block, out,
                                              [](const float* p, uint8_t* q) { symmetric_group<levels, bytes>(p, q); });
        return;
    }
    const auto coder = [](const float* p, const wf* xs, const wf* ws, uint8_t* q) {
        Group<wide> g;
        const auto fit = fit_symmetric<block, levels>(xs, ws);
        store(g.inverse, fit.inverse);
        store(g.scale, to_half(fit.scale));
        store(g.mask, ~fit.dead);  // a vanishing block has code 0 throughout, not the code of zero
        store_halves<bytes>(q, g.scale);
        const auto code = [&](int b, int k) {
            const vf v = load(p + b * block + k * lanes) * g.inverse[b];
            return (clamp(nearest(v), -levels, levels - 1) + levels) & g.mask[b];
        };
        store_codes<levels == 8 ? 4 : 5, bytes, wide>(q + 2, code);
    };
    quantize_weighted<bytes>(x, rows, cols, importance, out, coder);
}

template <int top, int bytes>
void quantize_asymmetric(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    if (importance == nullptr) {
        for_block_groups<lanes, block, bytes>(x, rows * cols / block, out,
                                              [](const float* p, uint8_t* q) { asymmetric_group<top, bytes>(p, q); });
        return;
    }
    const auto coder = [](const float* p, const wf* xs, const wf* ws, uint8_t* q) {
        Group<wide> g;
        const auto fit = fit_asymmetric<block, top, 36, false, true>(xs, ws, -0.9f, 0.05f);
        store(g.low, fit.origin);
        store(g.inverse, fit.inverse);
        store(g.scale, to_half(fit.scale));
        store(g.minimum, to_half(fit.minimum));
        store(g.mask, fit.stepped);
        store_halves<bytes>(q, g.scale);
        store_halves<bytes>(q + 2, g.minimum);
        const auto code = [&](int b, int k) {
            const vf v = g.inverse[b] * (load(p + b * block + k * lanes) - g.low[b]);
            // ggml holds the codes of a step to the range before it rounds them, those of the first guess afterwards.
            return g.mask[b] ? nearest(smaller(larger(v, vf{}), splat(float(top)))) : clamp(nearest(v), 0, top);
        };
        store_codes<top == 15 ? 4 : 5, bytes, wide>(q + 4, code);
    };
    quantize_weighted<bytes>(x, rows, cols, importance, out, coder);
}

}  // namespace

LQ_FAMILY(legacy, {"q8_0", 32, 34, quantize_q8_0}, {"q4_0", 32, 18, quantize_symmetric<8, 18>},
          {"q4_1", 32, 20, quantize_asymmetric<15, 20>}, {"q5_0", 32, 22, quantize_symmetric<16, 22>},
          {"q5_1", 32, 24, quantize_asymmetric<31, 24>})
