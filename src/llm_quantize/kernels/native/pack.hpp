// Codes of one superblock of 256 weights, chosen for its stored scales, and their bit layouts (ggml's K-quants).
#pragma once

#include "simd.hpp"

namespace {

constexpr int superblock = 256;

// Codes 0..top+bottom of one sub-block for the stored scale and offset: round((x + offset) / scale), held to
// -bottom..top, plus bottom. ggml's integers, whatever the values.
template <int N>
LQ_INLINE void encode(const float* x, float scale, float offset, int32_t bottom, int32_t top, uint8_t* code) {
    for (int i = 0; i < N; i += lanes) {
        const vi l = clamp(nearest((load(x + i) + offset) / scale), -bottom, top) + bottom;
        const vb bytes = __builtin_convertvector(l, vb);
        __builtin_memcpy(code + i, &bytes, sizeof bytes);
    }
}

// The same without an offset: x + 0 is not x for x = -0, but its code is the same.
template <int N>
LQ_INLINE void encode(const float* x, float scale, int32_t bottom, int32_t top, uint8_t* code) {
    for (int i = 0; i < N; i += lanes) {
        const vi l = clamp(nearest(load(x + i) / scale), -bottom, top) + bottom;
        const vb bytes = __builtin_convertvector(l, vb);
        __builtin_memcpy(code + i, &bytes, sizeof bytes);
    }
}

// Two bits each: byte l of a half holds weights l, l + 32, l + 64 and l + 96 of that half.
LQ_INLINE void pack_two_bits(const uint8_t* code, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
        for (int l = 0; l < 32; ++l) {
            const uint8_t* c = code + 128 * half + l;
            out[32 * half + l] = static_cast<uint8_t>(c[0] | c[32] << 2 | c[64] << 4 | c[96] << 6);
        }
    }
}

// Low nibbles: byte l of each 64 weights holds weight l below and weight l + 32 above.
LQ_INLINE void pack_nibbles(const uint8_t* code, uint8_t* out) {
    for (int chunk = 0; chunk < 4; ++chunk) {
        for (int l = 0; l < 32; ++l) {
            const uint8_t* c = code + 64 * chunk + l;
            out[32 * chunk + l] = static_cast<uint8_t>((c[0] & 15) | c[32] << 4);
        }
    }
}

// Bit `from` of every code: bit k of byte l is that of weight 32 k + l.
LQ_INLINE void pack_high_bit(const uint8_t* code, int from, uint8_t* out) {
    for (int l = 0; l < 32; ++l) {
        uint32_t byte = 0;
        for (int k = 0; k < 8; ++k) byte |= ((static_cast<uint32_t>(code[32 * k + l]) >> from) & 1u) << k;
        out[l] = static_cast<uint8_t>(byte);
    }
}

// Eight 6-bit scales and eight 6-bit minima in 12 bytes (Q4_K, Q5_K). A value above 63 spills as ggml's does.
LQ_INLINE void pack_scales_and_minima(const uint8_t* scale, const uint8_t* minimum, uint8_t* out) {
    for (int j = 0; j < 4; ++j) {
        out[j] = static_cast<uint8_t>(scale[j] | (scale[j + 4] >> 4) << 6);
        out[j + 4] = static_cast<uint8_t>(minimum[j] | (minimum[j + 4] >> 4) << 6);
        out[j + 8] = static_cast<uint8_t>((scale[j + 4] & 15) | (minimum[j + 4] & 15) << 4);
    }
}

LQ_INLINE void unpack_scale_and_minimum(const uint8_t* packed, int j, uint8_t& scale, uint8_t& minimum) {
    if (j < 4) {
        scale = packed[j] & 63;
        minimum = packed[j + 4] & 63;
    } else {
        scale = static_cast<uint8_t>((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
        minimum = static_cast<uint8_t>(packed[j + 4] >> 4 | (packed[j] >> 6) << 4);
    }
}

// Sixteen 6-bit scales in 12 bytes (Q3_K).
LQ_INLINE void pack_six_bits(const uint8_t* scale, uint8_t* out) {
    for (int j = 0; j < 8; ++j) out[j] = static_cast<uint8_t>((scale[j] & 15) | (scale[j + 8] & 15) << 4);
    for (int j = 0; j < 4; ++j) {
        out[j + 8] = static_cast<uint8_t>(scale[j] >> 4 | (scale[j + 4] >> 4) << 2 | (scale[j + 8] >> 4) << 4 |
                                          (scale[j + 12] >> 4) << 6);
    }
}

// Q6_K: low nibbles of two 128-weight halves (byte l: weights l and l + 64; byte l + 32: l + 32 and l + 96), and the
// two high bits of each code as pack_two_bits lays them.
LQ_INLINE void pack_six_bit_codes(const uint8_t* code, uint8_t* low, uint8_t* high) {
    for (int half = 0; half < 2; ++half) {
        for (int l = 0; l < 32; ++l) {
            const uint8_t* c = code + 128 * half + l;
            low[64 * half + l] = static_cast<uint8_t>((c[0] & 15) | c[64] << 4);
            low[64 * half + 32 + l] = static_cast<uint8_t>((c[32] & 15) | c[96] << 4);
            high[32 * half + l] = static_cast<uint8_t>((c[0] >> 4) | (c[32] >> 4) << 2 | (c[64] >> 4) << 4 |
                                                       (c[96] >> 4) << 6);
        }
    }
}

}  // namespace
