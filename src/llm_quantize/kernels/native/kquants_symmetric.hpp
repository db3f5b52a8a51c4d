// Q3_K and Q6_K: weight = scale * code.
#pragma once

#include "superblocks.hpp"

namespace {

// Codes 0..2*top-1 that the symmetric search ended with, for a sub-block whose stored scale is zero.
[[maybe_unused]] static void searched_codes(const float* x, float inverse, bool dead, int32_t top, uint8_t* code) {
    for (int i = 0; i < 16; ++i) {
        int32_t l = nearest(inverse * x[i]);
        l = l < top - 1 ? l : top - 1;
        code[i] = dead ? 0 : static_cast<uint8_t>((l > -top ? l : -top) + top);
    }
}

// x^2, importance, or importance * sqrt(sigma2 + x^2): the three weights of the symmetric searches.
template <int top>
static inline void search_symmetric(const Batch& b, const float* sigma2, bool weighted, Found& found) {
    for (int first = 0; first < b.count * 16; first += wide) {
        wf x[16], w[16];
        load_sub_blocks<16>(b, first, x);
        if (sigma2) {
            weigh<16>(b, first, sigma2, x, w);
        } else if (weighted) {
            load_importance<16>(b, first, w);
        } else {
            for (int i = 0; i < 16; ++i) put(w[i], x[i] * x[i]);
        }
        wf sum = wf{};
        for (int i = 0; i < 16; ++i) sum += w[i];
        const SymmetricFit<wf> fit = fit_symmetric<16, top>(x, w);
        store(found.scale + first, fit.scale);
        store(found.inverse + first, fit.inverse);
        store(found.flag + first, fit.dead);
        store(found.weight + first, sum);
    }
}

void quantize_q6_k(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    for_batches(x, rows, cols, importance, [=](const Batch& b, int64_t first) {
        Found found;
        search_symmetric<32>(b, nullptr, importance != nullptr, found);
        for (int k = 0; k < b.count; ++k) {
            uint8_t* block = out + (first + k) * 210;
            const float* scales = found.scale + 16 * k;
            float most = 0.0f, magnitude = 0.0f;
            for (int j = 0; j < 16; ++j) {
                const float a = __builtin_fabsf(scales[j]);
                if (a > magnitude) {
                    magnitude = a;
                    most = scales[j];
                }
            }
            if (magnitude < no_scale_below) {
                for (int i = 0; i < 210; ++i) block[i] = 0;
                continue;
            }
            const float inverse = -128.0f / most;
            const uint16_t d = float_to_half(1.0f / inverse);
            const float scale = half_to_float(d);
            uint8_t code[superblock];
            for (int j = 0; j < 16; ++j) {
                const int32_t wide = nearest(inverse * scales[j]);
                const int8_t scale_code = static_cast<int8_t>(wide < 127 ? wide : 127);
                block[192 + j] = static_cast<uint8_t>(scale_code);
                const float sub = scale * float(scale_code);
                const float* xs = b.x + superblock * k + 16 * j;
                const int at = 16 * k + j;
                if (sub != 0.0f) {
                    encode<16>(xs, sub, 32, 31, code + 16 * j);
                } else {
                    searched_codes(xs, found.inverse[at], found.flag[at] != 0, 32, code + 16 * j);
                }
            }
            pack_six_bit_codes(code, block, block + 128);
            store_half(block + 208, d);
        }
    });
}

struct alignas(64) MovedCodes {
    float code[batch * superblock];  // [group of wide][weight][lane]
};

static inline void search_by_moves(const Batch& b, Found& found, MovedCodes& moved) {
    for (int first = 0; first < b.count * 16; first += wide) {
        wf x[16], code[16];
        wi dead;
        load_sub_blocks<16>(b, first, x);
        store(found.scale + first, fit_by_moves<16, 4>(x, code, dead));
        store(found.flag + first, dead);
        for (int i = 0; i < 16; ++i) store(moved.code + first * 16 + i * wide, code[i]);
    }
}

// Q3_K without an imatrix: codes of the 16 scales (+32), and the superscale.
LQ_INLINE float largest_scale_codes(const float* scales, uint8_t* code) {
    float most = 0.0f, magnitude = 0.0f;
    for (int j = 0; j < 16; ++j) {
        const float a = __builtin_fabsf(scales[j]);
        if (a > magnitude) {
            magnitude = a;
            most = scales[j];
        }
    }
    for (int j = 0; j < 16; ++j) code[j] = 0;
    if (most == 0.0f) return 0.0f;
    const float inverse = -32.0f / most;
    for (int j = 0; j < 16; ++j) {
        const int8_t l = static_cast<int8_t>(nearest(inverse * scales[j]));
        code[j] = static_cast<uint8_t>((l > 31 ? 31 : l < -32 ? -32 : l) + 32);
    }
    return 1.0f / inverse;
}

// Q3_K with an imatrix: the same by the symmetric search, one superblock per lane.
static inline void fitted_scale_codes(const Batch& b, const Found& found, uint8_t* code, float* scale) {
    for (int first = 0; first < b.count; first += wide) {
        wf value[16], w[16];
        across<16>(found.scale, first, b.count, 1.0f, value);
        across<16>(found.weight, first, b.count, 1.0f, w);
        const SymmetricFit<wf> fit = fit_symmetric<16, 32>(value, w);
        store(scale + first, fit.scale);
        wi l[16];
        for (int j = 0; j < 16; ++j) l[j] = (clamp(nearest(fit.inverse * value[j]), -32, 31) + 32) & ~fit.dead;
        along<16>(l, first, code);
    }
}

void quantize_q3_k(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    for_batches(x, rows, cols, importance, [=](const Batch& b, int64_t first) {
        Found found;
        Scales s;
        MovedCodes moved;
        if (importance) {
            float sigma2[batch];
            sums_of_squares(b, sigma2);
            for (int k = 0; k < b.count; ++k) sigma2[k] = 2.0f * sigma2[k] / float(superblock);
            search_symmetric<4>(b, sigma2, true, found);
            fitted_scale_codes(b, found, s.scale_code, s.scale);
        } else {
            search_by_moves(b, found, moved);
            for (int k = 0; k < b.count; ++k) {
                s.scale[k] = largest_scale_codes(found.scale + 16 * k, s.scale_code + 16 * k);
            }
        }
        for (int k = 0; k < b.count; ++k) {
            uint8_t* block = out + (first + k) * 110;
            const uint16_t d = float_to_half(s.scale[k]);
            const float scale = half_to_float(d);
            uint8_t code[superblock];
            for (int j = 0; j < 16; ++j) {
                const int at = 16 * k + j;
                const float* xs = b.x + superblock * k + 16 * j;
                const float sub = scale * float(int32_t(s.scale_code[at]) - 32);
                if (sub != 0.0f) {
                    encode<16>(xs, sub, 4, 3, code + 16 * j);
                } else if (importance) {
                    searched_codes(xs, found.inverse[at], found.flag[at] != 0, 4, code + 16 * j);
                } else {
                    const float* kept = moved.code + at / wide * wide * 16 + at % wide;
                    for (int i = 0; i < 16; ++i) {
                        code[16 * j + i] = found.flag[at] ? 0 : static_cast<uint8_t>(int32_t(kept[i * wide]) + 4);
                    }
                }
            }
            pack_high_bit(code, 2, block);
            for (int i = 0; i < superblock; ++i) code[i] &= 3;
            pack_two_bits(code, block + 32);
            pack_six_bits(s.scale_code + 16 * k, block + 96);
            store_half(block + 108, d);
        }
    });
}

}  // namespace
