// MXFP4 with ggml's bytes: E2M1 elements, one E8M0 scale for 32 weights. No search, no imatrix.
#include "legacy_blocks.hpp"

namespace {

// floor(log2f(v)) for v > 0, log2f rounded to the nearest float. Just below a power of two the logarithm rounds up to
// the whole number; that happens only within 90 units in the last place, so the rest is the exponent.
LQ_INLINE int32_t floor_log2(float v) {
    const uint32_t bits = bits_of_float(v);
    const bool subnormal = bits < 0x00800000u;
    if (!subnormal && (bits & 0x007fff80u) != 0x007fff80u) return static_cast<int32_t>(bits >> 23) - 127;
    return static_cast<int32_t>(__builtin_floorf(static_cast<float>(__builtin_log2(static_cast<double>(v)))));
}

// The E8M0 byte: floor(log2 of the largest magnitude) - 2, biased. It wraps for magnitudes below 2^-125, as ggml's does.
LQ_INLINE uint8_t exponent_byte(float largest) {
    return largest > 0.0f ? static_cast<uint8_t>(floor_log2(largest) - 2 + 127) : uint8_t{0};
}

// 2^(e - 128): half of the scale, because the levels below are doubled.
LQ_INLINE float half_scale(uint8_t e) {
    return float_of_bits(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

// Twice the E2M1 magnitudes.
constexpr float levels[8] = {0, 1, 2, 3, 4, 6, 8, 12};

void quantize_mxfp4(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, block, 17>(x, rows * cols / block, out, [](const float* p, uint8_t* q) {
        alignas(64) float largest[lanes];
        float middle[lanes][7];
        store(largest, fold_blocks<Larger, block>(p, [](vf v) { return absolute(v); }));
        for (int b = 0; b < lanes; ++b) {
            const uint8_t e = exponent_byte(largest[b]);
            q[17 * b] = e;
            const float unit = half_scale(e);
            // A level that overflows is infinitely far, so its middle must overflow too.
            for (int i = 0; i < 7; ++i) middle[b][i] = 0.5f * levels[i] * unit + 0.5f * (levels[i + 1] * unit);
        }
        store_codes<4, 17, lanes>(q + 1, [&](int b, int k) {
            const vf v = load(p + b * block + k * lanes);
            const vf a = absolute(v);
            vi index = vi{};
            for (int i = 0; i < 7; ++i) index -= a > middle[b][i];  // on a middle the lower level wins
            const vi negative = (v < 0.0f) & (index > 0);
            return index | (negative & 8);
        });
    });
}

}  // namespace

LQ_FAMILY(mxfp4, {"mxfp4", 32, 17, quantize_mxfp4})
