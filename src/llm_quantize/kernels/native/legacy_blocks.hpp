// Steps shared by the grids of 32-weight blocks (legacy, iq4, ternary, mxfp4): extremes of many blocks at once, codes
// packed into bytes, vectors of float16, serial sums of squares.
#pragma once

#include <cstddef>

#include "simd.hpp"

namespace {

constexpr int block = 32;
constexpr int vectors = block / lanes;  // vectors per block

typedef uint8_t vb __attribute__((vector_size(LQ_LANES)));

// The low byte of every lane.
LQ_INLINE void store_bytes(uint8_t* p, vi v) {
    const vb bytes = __builtin_convertvector(v, vb);
    __builtin_memcpy(p, &bytes, sizeof bytes);
}

LQ_INLINE vi to_int(vf v) { return __builtin_convertvector(v, vi); }  // towards zero

// C's roundf, to an integer: nearest, ties away from zero, for |v| < 2^22. The constant is the float below 0.5: with 0.5
// itself the float below 0.5 would round up.
LQ_INLINE vi round_half_away(vf v) {
    return to_int(v + as_float((as_int(v) & INT32_MIN) | as_int(splat(0.49999997f))));
}

// 1 / v, and 0 for v = 0.
LQ_INLINE vf reciprocal(vf v) { return select(v == 0.0f, vf{}, 1.0f / v); }

// float_to_half (simd.hpp) of every lane, in the low 16 bits.
LQ_INLINE vi to_half(vf v) {
    const vi sign = (as_int(v) >> 16) & 0x8000;
    const vi magnitude = as_int(v) & 0x7fffffff;
    const vi normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const vi subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
    vi half = select(magnitude < 0x38800000, subnormal, normal);
    half = select(magnitude >= 0x477ff000, splat(0x7c00), half);
    half = select(magnitude > 0x7f800000, splat(0x7e00), half);
    return half | sign;
}

struct Smaller {
    static inline __attribute__((always_inline)) vf of(vf a, vf b) { return smaller(a, b); }
};
struct Larger {
    static inline __attribute__((always_inline)) vf of(vf a, vf b) { return larger(a, b); }
};

struct Either {  // the bits of one or the other
    static inline __attribute__((always_inline)) vf of(vf a, vf b) { return as_float(as_int(a) | as_int(b)); }
};

// Halves of two vectors folded: the first half of the result is `a` (pairs of lanes), the second is `b`.
template <class Fold, int... k>
LQ_INLINE vf fold_pair(vf a, vf b, Indices<k...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return Fold::of(__builtin_shufflevector(a, b, (2 * k)...), __builtin_shufflevector(a, b, (2 * k + 1)...));
#else
    return Fold::of(__builtin_shuffle(a, b, vi{(2 * k)...}), __builtin_shuffle(a, b, vi{(2 * k + 1)...}));
#endif
}

// Lane k of the result is the fold of all lanes of parts[k]. `parts` is used up.
template <class Fold>
LQ_INLINE vf fold_lanes(vf (&parts)[lanes]) {
    for (int count = lanes; count > 1; count /= 2) {
        for (int i = 0; i < count; i += 2) parts[i / 2] = fold_pair<Fold>(parts[i], parts[i + 1], AllLanes{});
    }
    return parts[0];
}

// The fifth bits of the codes of one block, on their way to one word per block: bit j of the word is that of weight j,
// and the OR of the lanes of the result (fold_lanes) is the word.
LQ_INLINE vf fifth_bits(const vi (&code)[vectors]) {
    vi place;
    for (int i = 0; i < lanes; ++i) place[i] = i;
    vi word = vi{};
    for (int k = 0; k < vectors; ++k) word |= ((code[k] >> 4) & 1) << (place + k * lanes);
    return as_float(word);
}

LQ_INLINE void store_word(uint8_t* p, uint32_t word) {  // little-endian, whatever the machine
    for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(word >> (8 * i));
}

// Codes of `count` blocks, a multiple of the lanes, made by code(b, k) for vector k of block b. Grids of five bits have 4
// bytes of fifth bits before the nibbles.
template <int bits, int bytes, int count, class Code>
LQ_INLINE void store_codes(uint8_t* out, Code code) {
    for (int first = 0; first < count; first += lanes) {
        vf fifth[lanes];
        for (int b = 0; b < lanes; ++b) {
            vi c[vectors];
            for (int k = 0; k < vectors; ++k) c[k] = code(first + b, k);
            uint8_t* q = out + (first + b) * bytes + (bits == 5 ? 4 : 0);
            for (int k = 0; k < vectors / 2; ++k) {
                store_bytes(q + k * lanes, (c[k] & 15) | (c[k + vectors / 2] & 15) << 4);
            }
            if constexpr (bits == 5) fifth[b] = fifth_bits(c);
        }
        if constexpr (bits == 5) {
            alignas(64) int32_t words[lanes];
            store(words, as_int(fold_lanes<Either>(fifth)));
            for (int b = 0; b < lanes; ++b) store_word(out + (first + b) * bytes, static_cast<uint32_t>(words[b]));
        }
    }
}

// Sums of squares of `count` runs of `length` floats, `stride` apart, each run added first to last in float32.
static inline void serial_squares(const float* x, int64_t count, int64_t length, int64_t stride, float* sum) {
    constexpr int together = 8;  // independent chains hide the latency of the additions
    int64_t first = 0;
    for (; first + together <= count; first += together) {
        float s[together] = {};
        const float* p = x + first * stride;
        for (int64_t i = 0; i < length; ++i) {
            for (int k = 0; k < together; ++k) s[k] += p[k * stride + i] * p[k * stride + i];
        }
        for (int k = 0; k < together; ++k) sum[first + k] = s[k];
    }
    for (; first < count; ++first) {
        float s = 0.0f;
        for (int64_t i = 0; i < length; ++i) s += x[first * stride + i] * x[first * stride + i];
        sum[first] = s;
    }
}

// Runs body(x, out) over all blocks, `group` at a time; the last group is padded with zeros. The body must write `bytes`
// bytes for each of the `group` blocks of `length` floats.
template <int group, int length, int bytes, class Body>
LQ_INLINE void for_block_groups(const float* x, int64_t blocks, uint8_t* out, Body body) {
    int64_t first = 0;
    for (; first + group <= blocks; first += group) body(x + first * length, out + first * bytes);
    if (first == blocks) return;
    alignas(64) float padded[group * length] = {};
    uint8_t packed[group * bytes];
    const auto left = static_cast<size_t>(blocks - first);
    __builtin_memcpy(padded, x + first * length, left * length * sizeof(float));
    body(padded, packed);
    __builtin_memcpy(out + first * bytes, packed, left * bytes);
}

// Float16 numbers of consecutive blocks, given as integers.
template <int bytes, int count>
LQ_INLINE void store_halves(uint8_t* q, const int32_t (&half)[count]) {
    for (int b = 0; b < count; ++b) store_half(q + b * bytes, static_cast<uint16_t>(half[b]));
}

// Per lane, one block of `block` floats each, from p on: fold of all weights.
template <class Fold, int length, class Part>
LQ_INLINE vf fold_blocks(const float* p, Part part) {
    vf folded[lanes];
    for (int b = 0; b < lanes; ++b, p += length) {
        vf v = part(load(p));
        for (int k = lanes; k < length; k += lanes) v = Fold::of(part(load(p + k)), v);
        folded[b] = v;
    }
    return fold_lanes<Fold>(folded);
}

}  // namespace
