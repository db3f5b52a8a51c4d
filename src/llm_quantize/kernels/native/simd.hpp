// Vectors of LQ_LANES floats in GNU vector extensions, and the float16 conversions. Included by per-level units only;
// everything is in the anonymous namespace, so that no two levels share a function (see registry.hpp).
#pragma once

#include <cstdint>

#include "registry.hpp"

#define LQ_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace {

constexpr int lanes = LQ_LANES;
typedef float vf __attribute__((vector_size(4 * LQ_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LQ_LANES)));
typedef uint8_t vb __attribute__((vector_size(LQ_LANES)));

LQ_INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

LQ_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

LQ_INLINE void store(int32_t* p, vi v) { __builtin_memcpy(p, &v, sizeof v); }

LQ_INLINE vf splat(float value) { return value - vf{}; }  // x - (+0) is x for every x, -0 included

LQ_INLINE vi splat(int32_t value) { return value + vi{}; }

// A constant that the compiler cannot see through. With a visible one it turns `v > c ? v : c` into a comparison and a
// blend, twice the work of the one instruction for it.
LQ_INLINE vf opaque(float value) {
    vf v = splat(value);
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

// Lane by lane `mask ? a : b`; masks are 0 or -1, as comparisons of vectors give them.
LQ_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

LQ_INLINE vi select(vi mask, vi a, vi b) { return mask ? a : b; }

LQ_INLINE vf as_float(vi v) { return reinterpret_cast<vf>(v); }

LQ_INLINE vi as_int(vf v) { return reinterpret_cast<vi>(v); }

LQ_INLINE bool any(vi mask) {
    int32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= mask[i];
    return bits != 0;
}

// Bit k is set where the lanes k are equal.
LQ_INLINE uint32_t equal_bits(vf a, vf b) {
#if LQ_LANES == 16 && defined(__AVX512F__)
    return __builtin_ia32_cmpps512_mask(a, b, 0, 0xffff, 4);  // ordered, equal; the current rounding
#elif LQ_LANES == 8 && defined(__AVX__)
    return static_cast<uint32_t>(__builtin_ia32_movmskps256(reinterpret_cast<vf>(a == b)));
#elif LQ_LANES == 4 && defined(__SSE2__)
    return static_cast<uint32_t>(__builtin_ia32_movmskps(reinterpret_cast<vf>(a == b)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<uint32_t>(a[i] == b[i]) << i;
    return bits;
#endif
}

// Lane k of the result is lane `index[k] mod lanes` of the table.
LQ_INLINE vf look_up(vf table, vi index) {
#if defined(__clang__)
    vf r;
    for (int i = 0; i < lanes; ++i) r[i] = table[index[i] & (lanes - 1)];
    return r;
#else
    return __builtin_shuffle(table, index);
#endif
}

LQ_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

LQ_INLINE vf absolute(vf v) { return as_float(as_int(v) & 0x7fffffff); }

// ggml's MAX and MIN: the second operand wins when the comparison fails, a NaN included.
// (Written in one expression: only so does the compiler see the one instruction that does it.)
LQ_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

LQ_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }

LQ_INLINE vi larger(vi a, vi b) { return a > b ? a : b; }

LQ_INLINE vi smaller(vi a, vi b) { return a < b ? a : b; }

LQ_INLINE vi clamp(vi v, int32_t low, int32_t high) { return larger(splat(low), smaller(splat(high), v)); }

LQ_INLINE vf square_root(vf v) {
    vf r;
    for (int i = 0; i < lanes; ++i) r[i] = __builtin_sqrtf(v[i]);
    return r;
}

// Nearest integer as a float, ties to even.
LQ_INLINE vf round_even(vf v) {
    vf r;
    for (int i = 0; i < lanes; ++i) r[i] = __builtin_rintf(v[i]);
    return r;
}

// Nearest integer, ties to even, by adding 1.5 * 2^23 and reading the mantissa. Exactly ggml's nearest_int, also
// outside of its domain |v| < 2^22, where both give the same meaningless but bounded number.
LQ_INLINE vi nearest(vf v) { return (as_int(v + 12582912.0f) & 0x007fffff) - 0x00400000; }

LQ_INLINE int32_t nearest(float v) {
    const float shifted = v + 12582912.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

LQ_INLINE float float_of_bits(uint32_t bits) {
    float v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}

LQ_INLINE uint32_t bits_of_float(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    return bits;
}

// IEEE half to float, exact. The exponent is moved by one multiplication, which also normalises subnormals.
LQ_INLINE float half_to_float(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
    const uint32_t bits = magnitude >= 0x0f800000u ? special : finite;
    return float_of_bits(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

// Float to IEEE half, nearest, ties to even; overflow gives infinity, every NaN becomes 0x7e00 with its sign.
LQ_INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Subnormal half: adding 0.5 puts the last kept bit at 2^-24, and the addition rounds.
        const uint32_t rounded = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

LQ_INLINE void store_half(uint8_t* p, uint16_t half) {  // little-endian, whatever the machine
    p[0] = static_cast<uint8_t>(half);
    p[1] = static_cast<uint8_t>(half >> 8);
}

// Transposition of a square tile, in place, by log2(lanes) rounds of two-vector shuffles.
template <int... index>
struct Indices {};
#if LQ_LANES == 16
typedef Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif LQ_LANES == 8
typedef Indices<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#elif LQ_LANES == 4
typedef Indices<0, 1, 2, 3> AllLanes;
#endif

template <int stride, int... k>
LQ_INLINE void exchange(vf& a, vf& b, Indices<k...>) {
#if defined(__clang__) || __GNUC__ >= 12
    const vf low = __builtin_shufflevector(a, b, ((k & stride) ? lanes + k - stride : k)...);
    const vf high = __builtin_shufflevector(a, b, ((k & stride) ? lanes + k : k + stride)...);
#else
    const vf low = __builtin_shuffle(a, b, vi{((k & stride) ? lanes + k - stride : k)...});
    const vf high = __builtin_shuffle(a, b, vi{((k & stride) ? lanes + k : k + stride)...});
#endif
    a = low;
    b = high;
}

template <int stride>
LQ_INLINE void exchange_all(vf* tile) {
    for (int i = 0; i < lanes; ++i) {
        if (!(i & stride)) exchange<stride>(tile[i], tile[i + stride], AllLanes{});
    }
}

LQ_INLINE void transpose(vf* tile) {
    exchange_all<1>(tile);
    exchange_all<2>(tile);
#if LQ_LANES >= 8
    exchange_all<4>(tile);
#endif
#if LQ_LANES >= 16
    exchange_all<8>(tile);
#endif
}

// out[i] lane k = rows[k][i], for `lanes` rows; columns is a multiple of the lanes.
LQ_INLINE void load_transposed(const float* const* rows, int columns, vf* out) {
    for (int first = 0; first < columns; first += lanes) {
        vf tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load(rows[i] + first);
        transpose(tile);
        for (int i = 0; i < lanes; ++i) out[first + i] = tile[i];
    }
}

}  // namespace
