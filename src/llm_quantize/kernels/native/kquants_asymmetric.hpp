// Q2_K, Q4_K and Q5_K: weight = scale * code - minimum.
#pragma once

#include "superblocks.hpp"

namespace {

template <int N, int top, bool mad, int steps>
static inline void search_asymmetric(const Batch& b, float first_step, float step, Found& found) {
    Workspace<N, wf> g;
    for (int first = 0; first < b.count * (superblock / N); first += wide) {
        wf* const x = g.x;
        wf* const w = g.w;
        load_sub_blocks<N>(b, first, x);
        if (mad) {
            for (int i = 0; i < N; ++i) put(w[i], absolute(x[i]));
        } else {
            wf sum = wf{};
            for (int i = 0; i < N; ++i) sum += x[i] * x[i];
            const wf mean = square_root(sum / float(N));
            for (int i = 0; i < N; ++i) put(w[i], mean + absolute(x[i]));
        }
        const AsymmetricFit<wf> fit = fit_asymmetric<N, top, steps, mad, false>(g, first_step, step);
        store(found.scale + first, fit.scale);
        store(found.minimum + first, fit.minimum);
        store(found.inverse + first, fit.inverse);
        store(found.origin + first, fit.origin);
        store(found.flag + first, wi{});
    }
}

template <int N, int top>
static inline void search_asymmetric_weighted(const Batch& b, float factor, Found& found) {
    float sigma2[batch];
    sums_of_squares(b, sigma2);
    for (int k = 0; k < b.count; ++k) sigma2[k] = factor * sigma2[k] / float(superblock);
    Workspace<N, wf> g;
    for (int first = 0; first < b.count * (superblock / N); first += wide) {
        wf* const x = g.x;
        wf* const w = g.w;
        load_sub_blocks<N>(b, first, x);
        weigh<N>(b, first, sigma2, x, w);
        const AsymmetricFit<wf> fit = fit_asymmetric<N, top, 36, false, true>(g, -0.9f, 0.05f);
        store(found.scale + first, fit.scale);
        store(found.minimum + first, fit.minimum);
        store(found.inverse + first, fit.inverse);
        store(found.origin + first, fit.origin);
        store(found.weight + first, fit.sum_w);
        store(found.flag + first, fit.stepped);
    }
}

// The codes that the asymmetric search ended with, for a sub-block whose stored scale is zero.
template <int N, int top>
[[maybe_unused]] static void searched_codes(const float* x, float inverse, float origin, bool guarded, uint8_t* code) {
    for (int i = 0; i < N; ++i) {
        const float v = inverse * (x[i] - origin);
        int32_t l = guarded ? (v > 0.0f ? nearest(v < float(top) ? v : float(top)) : 0) : nearest(v);
        l = l < top ? l : top;
        code[i] = static_cast<uint8_t>(l > 0 ? l : 0);
    }
}

// Step 2 of the asymmetric types with an imatrix: codes of the scales and of the minima, and the two superscales.
template <int per, int top>
static inline void fit_superblocks(const Batch& b, const Found& found, uint8_t* scale_code, uint8_t* min_code,
                                   float* scale, float* minimum) {
    for (int first = 0; first < b.count; first += wide) {
        wf value[per], w[per];
        wi code[per];
        across<per>(found.weight, first, b.count, 1.0f, w);
        for (int which = 0; which < 2; ++which) {
            across<per>(which ? found.minimum : found.scale, first, b.count, which ? -1.0f : 1.0f, value);
            store((which ? minimum : scale) + first, fit_positive<per, top>(value, w, code));
            along<per>(code, first, which ? min_code : scale_code);
        }
    }
}

// Step 2 of the asymmetric types without one: the largest scale and the largest minimum get the top code.
template <int per, int top, bool byte_clamped>
static inline void fit_superblock(const float* scales, const float* minima, uint8_t* scale_code, uint8_t* min_code,
                                  float& scale, float& minimum) {
    float most_scale = 0.0f, most_minimum = 0.0f;
    for (int j = 0; j < per; ++j) {
        if (scales[j] > most_scale) most_scale = scales[j];
        if (-minima[j] > most_minimum) most_minimum = -minima[j];
    }
    const float s = most_scale > 0.0f ? float(top) / most_scale : 0.0f;
    const float m = most_minimum > 0.0f ? float(top) / most_minimum : 0.0f;
    for (int j = 0; j < per; ++j) {
        scale_code[j] = most_scale > 0.0f || byte_clamped ? static_cast<uint8_t>(nearest(s * scales[j])) : 0;
        min_code[j] = most_minimum > 0.0f || byte_clamped ? static_cast<uint8_t>(nearest(m * -minima[j])) : 0;
        if (byte_clamped && scale_code[j] > top) scale_code[j] = top;
        if (byte_clamped && min_code[j] > top) min_code[j] = top;
    }
    scale = most_scale > 0.0f || byte_clamped ? most_scale / float(top) : 0.0f;
    minimum = most_minimum > 0.0f || byte_clamped ? most_minimum / float(top) : 0.0f;
}

void quantize_q2_k(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    for_batches(x, rows, cols, importance, [=](const Batch& b, int64_t first) {
        Found found;
        Scales s;
        if (importance) {
            search_asymmetric_weighted<16, 3>(b, 1.0f, found);
            fit_superblocks<16, 15>(b, found, s.scale_code, s.min_code, s.scale, s.minimum);
        } else {
            search_asymmetric<16, 3, true, 15>(b, -0.5f, 0.1f, found);
            for (int k = 0; k < b.count; ++k) {
                fit_superblock<16, 15, false>(found.scale + 16 * k, found.minimum + 16 * k, s.scale_code + 16 * k,
                                              s.min_code + 16 * k, s.scale[k], s.minimum[k]);
            }
        }
        for (int k = 0; k < b.count; ++k) {
            uint8_t* block = out + (first + k) * 84;
            const uint16_t d = float_to_half(s.scale[k]), dmin = float_to_half(s.minimum[k]);
            const float scale = half_to_float(d), minimum = half_to_float(dmin);
            uint8_t code[superblock];
            for (int j = 0; j < 16; ++j) {
                const int at = 16 * k + j;
                const float* xs = b.x + superblock * k + 16 * j;
                block[j] = static_cast<uint8_t>(s.scale_code[at] | s.min_code[at] << 4);
                const float sub = scale * float(block[j] & 15);
                if (sub != 0.0f) {
                    encode<16>(xs, sub, minimum * float(block[j] >> 4), 0, 3, code + 16 * j);
                } else {
                    searched_codes<16, 3>(xs, found.inverse[at], found.origin[at], found.flag[at] != 0, code + 16 * j);
                }
            }
            pack_two_bits(code, block + 16);
            store_half(block + 80, d);
            store_half(block + 82, dmin);
        }
    });
}

// Q4_K and Q5_K differ in the number of code bits and in the grid of the plain search.
template <int top, int steps>
LQ_INLINE void quantize_q45_k(const Batch& b, float first_step, bool weighted, int bytes, uint8_t* out) {
    Found found;
    Scales s;
    if (weighted) {
        search_asymmetric_weighted<32, top>(b, 2.0f, found);
        fit_superblocks<8, 63>(b, found, s.scale_code, s.min_code, s.scale, s.minimum);
    } else {
        search_asymmetric<32, top, false, steps>(b, first_step, 0.1f, found);
        for (int k = 0; k < b.count; ++k) {
            fit_superblock<8, 63, true>(found.scale + 8 * k, found.minimum + 8 * k, s.scale_code + 8 * k,
                                        s.min_code + 8 * k, s.scale[k], s.minimum[k]);
        }
    }
    for (int k = 0; k < b.count; ++k) {
        uint8_t* block = out + k * bytes;
        const uint16_t d = float_to_half(s.scale[k]), dmin = float_to_half(s.minimum[k]);
        const float scale = half_to_float(d), minimum = half_to_float(dmin);
        store_half(block, d);
        store_half(block + 2, dmin);
        if (top == 31 && weighted) {  // only Q5_K holds wrapped codes to 63 here
            for (int j = 8 * k; j < 8 * k + 8; ++j) {
                if (s.scale_code[j] > 63) s.scale_code[j] = 63;
                if (s.min_code[j] > 63) s.min_code[j] = 63;
            }
        }
        pack_scales_and_minima(s.scale_code + 8 * k, s.min_code + 8 * k, block + 4);
        uint8_t code[superblock];
        for (int j = 0; j < 8; ++j) {
            const int at = 8 * k + j;
            const float* xs = b.x + superblock * k + 32 * j;
            uint8_t scale_code, min_code;
            unpack_scale_and_minimum(block + 4, j, scale_code, min_code);
            const float sub = scale * float(scale_code);
            if (sub != 0.0f) {
                encode<32>(xs, sub, minimum * float(min_code), 0, top, code + 32 * j);
            } else {
                searched_codes<32, top>(xs, found.inverse[at], found.origin[at], found.flag[at] != 0, code + 32 * j);
            }
        }
        if (top == 31) pack_high_bit(code, 4, block + 16);
        pack_nibbles(code, block + (top == 31 ? 48 : 16));
    }
}

void quantize_q4_k(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    for_batches(x, rows, cols, importance, [=](const Batch& b, int64_t first) {
        quantize_q45_k<15, 20>(b, -1.0f, importance != nullptr, 144, out + first * 144);
    });
}

void quantize_q5_k(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    for_batches(x, rows, cols, importance, [=](const Batch& b, int64_t first) {
        quantize_q45_k<31, 15>(b, -0.5f, importance != nullptr, 176, out + first * 176);
    });
}

}  // namespace
