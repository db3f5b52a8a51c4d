// MXFP4 and NVFP4 with ggml's bytes: E2M1 elements, one E8M0 scale for 32 weights, or one E4M3 scale for 16, four of
// them before the codes of 64. No search, no imatrix.
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

// The E4M3 byte of a scale that is not negative, as ggml rounds: halves up, from 256 on the largest (448).
LQ_INLINE uint8_t e4m3_byte(float v) {
    if (!(v > 0.0f)) return 0;
    const uint32_t bits = bits_of_float(v < 448.0f ? v : 448.0f);
    const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127 + 7;
    if (exponent <= 0) {
        const auto steps = static_cast<int32_t>(v * 512.0f + 0.5f);
        return static_cast<uint8_t>(steps > 7 ? 7 : steps);
    }
    if (exponent >= 15) return 0x7e;
    const uint32_t byte = (static_cast<uint32_t>(exponent) << 3 | (bits >> 20 & 7)) + (bits >> 19 & 1);
    return static_cast<uint8_t>(byte < 0x78 ? byte : 0x7e);
}

// Half of what the byte stands for, because the levels below are doubled.
LQ_INLINE float half_of_e4m3(uint8_t byte) {
    const auto mantissa = static_cast<float>(byte & 7);
    const uint32_t exponent = byte >> 3;
    if (exponent == 0) return mantissa * 0x1p-10f;
    return (1.0f + mantissa * 0.125f) * float_of_bits((exponent - 7 + 127 - 1) << 23);
}

constexpr int part = 16;  // weights that share a scale of NVFP4
constexpr int parts = 4;  // of a block

void quantize_nvfp4(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, part * parts, 36>(x, rows * cols / (part * parts), out, [](const float* p, uint8_t* q) {
        for (int first = 0; first < lanes * parts; first += lanes) {
            alignas(64) float largest[lanes];
            store(largest, fold_blocks<Larger, part>(p + first * part, [](vf v) { return absolute(v); }));
            for (int i = 0; i < lanes; ++i) {
                const float* from = p + (first + i) * part;
                uint8_t* to = q + (first + i) / parts * 36;
                const int place = (first + i) % parts;
                const uint8_t scale = e4m3_byte(largest[i] / 6.0f);
                to[place] = scale;
                const float unit = half_of_e4m3(scale);
                alignas(64) int32_t code[part];
                for (int k = 0; k < part; k += lanes) {
                    // The first of the nearest levels, by float32 distances: far beyond the levels they are all alike.
                    const vf v = load(from + k), a = absolute(v);
                    vf least = a;
                    vi index = vi{};
                    for (int level = 1; level < 8; ++level) {
                        const vf away = absolute(levels[level] * unit - a);
                        const vi nearer = away < least;
                        least = select(nearer, away, least);
                        index = select(nearer, splat(level), index);
                    }
                    const vi negative = (v < 0.0f) & (index > 0);
                    store(code + k, index | (negative & 8));
                }
                for (int k = 0; k < part / 2; ++k) {
                    to[4 + place * 8 + k] = static_cast<uint8_t>(code[k] | code[k + 8] << 4);
                }
            }
        }
    });
}

}  // namespace

LQ_FAMILY(mxfp4, {"mxfp4", 32, 17, quantize_mxfp4}, {"nvfp4", 64, 36, quantize_nvfp4})
