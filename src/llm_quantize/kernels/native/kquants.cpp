// Q2_K, Q3_K, Q4_K, Q5_K and Q6_K with ggml's bytes, plain and with an imatrix.
//
// Work goes in batches of superblocks: (1) the search, one sub-block per lane; (2) the scales of the superblocks,
// with an imatrix one superblock per lane; (3) the codes for the stored scales, and the packing, one superblock at a
// time. A sub-block whose stored scale is zero keeps the codes of its search, which are made only then.
#include "pack.hpp"
#include "search.hpp"

namespace {

constexpr int batch = 32;  // superblocks; a multiple of `wide`

// Where the batch's superblocks are: rows are packed, so only the importance must know about rows.
struct Batch {
    const float* x;
    int count;
    const float* importance[batch];  // of each superblock; null without an imatrix
};

struct alignas(64) Found {
    float scale[batch * 16];
    float minimum[batch * 16];  // not negated: <= 0
    float inverse[batch * 16];
    float origin[batch * 16];
    float weight[batch * 16];  // sum of the weights of a sub-block
    int32_t flag[batch * 16];  // asymmetric: stepped; symmetric: dead
};

template <int N>
LQ_INLINE void load_sub_blocks(const Batch& b, int first, wf* x) {
    const int last = b.count * (superblock / N) - 1;
    const float* rows[wide];
    for (int k = 0; k < wide; ++k) rows[k] = b.x + (first + k < last ? first + k : last) * N;
    load_transposed(rows, N, x);
}

template <int N>
LQ_INLINE void load_importance(const Batch& b, int first, wf* w) {
    constexpr int per = superblock / N;
    const int last = b.count * per - 1;
    const float* rows[wide];
    for (int k = 0; k < wide; ++k) {
        const int s = first + k < last ? first + k : last;
        rows[k] = b.importance[s / per] + s % per * N;
    }
    load_transposed(rows, N, w);
}

// sum of x^2 over each superblock, in order, one superblock per lane.
static inline void sums_of_squares(const Batch& b, float* sum) {
    for (int first = 0; first < b.count; first += wide) {
        wf total = wf{};
        for (int part = 0; part < superblock; part += lanes) {
            const float* rows[wide];
            for (int k = 0; k < wide; ++k) {
                const int s = first + k < b.count ? first + k : b.count - 1;
                rows[k] = b.x + s * superblock + part;
            }
            wf x[lanes];
            load_transposed(rows, lanes, x);
            for (int i = 0; i < lanes; ++i) total += x[i] * x[i];
        }
        store(sum + first, total);
    }
}

// w = importance * sqrt(sigma2 + x^2), sigma2 the superblock's.
template <int N>
LQ_INLINE void weigh(const Batch& b, int first, const float* sigma2, const wf* x, wf* w) {
    constexpr int per = superblock / N;
    float of_lane[wide];
    for (int k = 0; k < wide; ++k) of_lane[k] = sigma2[(first + k) / per < batch ? (first + k) / per : batch - 1];
    const wf s = load_wide(of_lane);
    load_importance<N>(b, first, w);
    for (int i = 0; i < N; ++i) put(w[i], w[i] * square_root(s + x[i] * x[i]));
}

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

// Values of one superblock per lane: out[j][k] = from[(first + k) * per + j].
template <int per>
LQ_INLINE void across(const float* from, int first, int count, float sign, wf* out) {
    for (int j = 0; j < per; ++j) {
        float value[wide];
        for (int k = 0; k < wide; ++k) {
            const int s = first + k < count ? first + k : count - 1;
            value[k] = sign * from[s * per + j];
        }
        out[j] = load_wide(value);
    }
}

// The other way, for codes: to[(first + k) * per + j] = code[j][k].
template <int per>
LQ_INLINE void along(const wi* code, int first, uint8_t* to) {
    for (int j = 0; j < per; ++j) {
        int32_t value[wide];
        store(value, code[j]);
        for (int k = 0; k < wide; ++k) to[(first + k) * per + j] = static_cast<uint8_t>(value[k]);
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

// Cuts (rows, cols) into batches of superblocks.
template <class Work>
LQ_INLINE void for_batches(const float* x, int64_t rows, int64_t cols, const float* importance, const Work& work) {
    const int64_t per_row = cols / superblock, total = rows * per_row;
    for (int64_t first = 0; first < total; first += batch) {
        Batch b;
        b.x = x + first * superblock;
        b.count = static_cast<int>(total - first < batch ? total - first : batch);
        for (int k = 0; k < b.count; ++k) {
            b.importance[k] = importance ? importance + (first + k) % per_row * superblock : nullptr;
        }
        work(b, first);
    }
}

struct alignas(64) Scales {
    uint8_t scale_code[batch * 16];
    uint8_t min_code[batch * 16];
    float scale[batch];
    float minimum[batch];
};

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

LQ_FAMILY(kquants,
          {"q2_k", 256, 84, quantize_q2_k},
          {"q3_k", 256, 110, quantize_q3_k},
          {"q4_k", 256, 144, quantize_q4_k},
          {"q5_k", 256, 176, quantize_q5_k},
          {"q6_k", 256, 210, quantize_q6_k})
