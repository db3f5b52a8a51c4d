// F32, F16 and BF16 rows with ggml's rounding: nearest, ties to even, NaN quiet.
#include <cstddef>

#include "legacy_blocks.hpp"

namespace {

typedef uint32_t vu __attribute__((vector_size(4 * LQ_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LQ_LANES)));

LQ_INLINE void store_low_halves(uint8_t* p, vi v) {
    const vh halves = __builtin_convertvector(v, vh);
    __builtin_memcpy(p, &halves, sizeof halves);
}

// Upper half of the bits, rounded; a NaN keeps its upper half and becomes quiet.
LQ_INLINE vi to_bfloat16(vf v) {
    const vu bits = reinterpret_cast<vu>(v);
    const vu upper = bits >> 16;
    const vu rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
    const vi nan = (as_int(v) & 0x7fffffff) > 0x7f800000;
    return select(nan, reinterpret_cast<vi>(upper | 64u), reinterpret_cast<vi>(rounded)) & 0xffff;
}

template <class Narrow>
LQ_INLINE void narrow_rows(const float* x, int64_t count, uint8_t* out, Narrow narrow) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store_low_halves(out + 2 * i, narrow(load(x + i)));
    if (i == count) return;
    float rest[lanes] = {};
    uint8_t packed[2 * lanes];
    __builtin_memcpy(rest, x + i, static_cast<size_t>(count - i) * sizeof(float));
    store_low_halves(packed, narrow(load(rest)));
    __builtin_memcpy(out + 2 * i, packed, static_cast<size_t>(count - i) * 2);
}

void quantize_f16(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    narrow_rows(x, rows * cols, out, [](vf v) { return to_half(v); });
}

void quantize_bf16(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    narrow_rows(x, rows * cols, out, [](vf v) { return to_bfloat16(v); });
}

void quantize_f32(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    __builtin_memcpy(out, x, static_cast<size_t>(rows * cols) * sizeof(float));
}

}  // namespace

LQ_FAMILY(floats, {"f32", 1, 4, quantize_f32}, {"f16", 1, 2, quantize_f16}, {"bf16", 1, 2, quantize_bf16})
