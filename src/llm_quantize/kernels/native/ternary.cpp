// TQ1_0 and TQ2_0 with ggml's bytes: -1, 0 or +1 times the largest magnitude of 256 weights. No search, no imatrix.
#include "legacy_blocks.hpp"

namespace {

constexpr int length = 256;

// Float16 scales, and the reciprocals, of `lanes` blocks.
struct alignas(64) Scales {
    float inverse[lanes];
    int32_t half[lanes];
};

LQ_INLINE Scales find_scales(const float* p) {
    Scales s;
    const vf scale = fold_blocks<Larger, length>(p, [](vf v) { return absolute(v); });
    store(s.inverse, reciprocal(scale));
    store(s.half, to_half(scale));
    return s;
}

// 0, 1, 2 for -1, 0, +1.
LQ_INLINE vi digit(const float* p, float inverse) { return round_half_away(load(p) * inverse) + 1; }

void quantize_tq2_0(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, length, 66>(x, rows * cols / length, out, [](const float* p, uint8_t* q) {
        const Scales scales = find_scales(p);
        for (int b = 0; b < lanes; ++b, p += length, q += 66) {
            for (int half = 0; half < 2; ++half) {
                for (int k = 0; k < 32; k += lanes) {
                    const float* first = p + 128 * half + k;
                    vi byte = vi{};
                    for (int n = 0; n < 4; ++n) byte |= (digit(first + 32 * n, scales.inverse[b]) & 3) << (2 * n);
                    store_bytes(q + 32 * half + k, byte);
                }
            }
            store_half(q + 64, static_cast<uint16_t>(scales.half[b]));
        }
    });
}

// Five digits, most significant first, as a fraction of 3^5 in 256ths, rounded up: (256 v + 242) / 243. The product is the
// exact quotient for every dividend below 2^16.
LQ_INLINE vi fraction(vi value) { return (((value & 255) * 256 + 242) * 17261) >> 22; }

// Width digits side by side, five or four (the fifth is zero) of them `width` apart.
template <int width, int places>
LQ_INLINE void store_fractions(const float* p, float inverse, uint8_t* q) {
    if constexpr (width % lanes == 0) {
        for (int k = 0; k < width; k += lanes) {
            vi value = vi{};
            for (int n = 0; n < places; ++n) value = value * 3 + digit(p + n * width + k, inverse);
            store_bytes(q + k, fraction(places == 4 ? value * 3 : value));
        }
    } else {
        // Fewer weights than lanes: the place of each weight is worth a power of three, and the digits are added up.
        constexpr int32_t worth[] = {81, 27, 9, 3};
        alignas(64) int32_t digits[16];
        for (int k = 0; k < 16; k += lanes) store(digits + k, digit(p + k, inverse));
        for (int k = 0; k < width; ++k) {
            int32_t value = 0;
            for (int n = 0; n < places; ++n) value += digits[n * width + k] * worth[n];
            q[k] = static_cast<uint8_t>(((value & 255) * 256 + 242) / 243);
        }
    }
}

void quantize_tq1_0(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, length, 54>(x, rows * cols / length, out, [](const float* p, uint8_t* q) {
        const Scales scales = find_scales(p);
        for (int b = 0; b < lanes; ++b, p += length, q += 54) {
            store_fractions<32, 5>(p, scales.inverse[b], q);
            store_fractions<16, 5>(p + 160, scales.inverse[b], q + 32);
            store_fractions<4, 4>(p + 240, scales.inverse[b], q + 48);
            store_half(q + 52, static_cast<uint16_t>(scales.half[b]));
        }
    });
}

}  // namespace

LQ_FAMILY(ternary, {"tq1_0", 256, 54, quantize_tq1_0}, {"tq2_0", 256, 66, quantize_tq2_0})
