// Q1_0 and Q2_0 with ggml's bytes: one sign for each of 128 weights times their mean magnitude; -1, 0 or +1 times the
// largest magnitude of 64 weights. No search, no imatrix.
#include "legacy_blocks.hpp"

namespace {

constexpr int signs_length = 128;

// Bit j of the result is 1 where weight j of 32 is not below zero; -0 is not, NaN is.
LQ_INLINE uint32_t sign_word(const float* p) {
    vi place;
    for (int i = 0; i < lanes; ++i) place[i] = i;
    vi word = vi{};
    for (int k = 0; k < vectors; ++k) word |= ((load(p + k * lanes) >= 0.0f) & 1) << (place + k * lanes);
    uint32_t all = 0;
    for (int i = 0; i < lanes; ++i) all |= static_cast<uint32_t>(word[i]);
    return all;
}

void quantize_q1_0(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, signs_length, 18>(x, rows * cols / signs_length, out, [](const float* p, uint8_t* q) {
        float sum[lanes] = {};  // each added first to last; side by side, as every addition waits for the one before
        for (int i = 0; i < signs_length; ++i) {
            for (int b = 0; b < lanes; ++b) sum[b] += __builtin_fabsf(p[b * signs_length + i]);
        }
        alignas(64) int32_t half[lanes];
        store(half, to_half(load(sum) * (1.0f / signs_length)));
        for (int b = 0; b < lanes; ++b) {
            store_half(q + 18 * b, static_cast<uint16_t>(half[b]));
            for (int k = 0; k < signs_length / 32; ++k) {
                store_word(q + 18 * b + 2 + 4 * k, sign_word(p + b * signs_length + 32 * k));
            }
        }
    });
}

constexpr int digits_length = 64;

void quantize_q2_0(const float* x, int64_t rows, int64_t cols, const float*, uint8_t* out) {
    for_block_groups<lanes, digits_length, 18>(x, rows * cols / digits_length, out, [](const float* p, uint8_t* q) {
        const vf scale = fold_blocks<Larger, digits_length>(p, [](vf v) { return absolute(v); });
        alignas(64) float inverse[lanes];
        alignas(64) int32_t half[lanes];
        store(inverse, reciprocal(scale));
        store(half, to_half(scale));
        for (int b = 0; b < lanes; ++b, p += digits_length, q += 18) {
            alignas(64) int32_t code[digits_length];
            for (int k = 0; k < digits_length; k += lanes) {
                const vf v = load(p + k) * inverse[b];
                // Infinite or NaN where the inverse of a tiny scale is: ggml then clamps to the lowest code.
                store(code + k, (round_half_away(v) + 1) & (absolute(v) < 2.0f));
            }
            store_half(q, static_cast<uint16_t>(half[b]));
            for (int j = 0; j < digits_length / 4; ++j) {
                const int32_t* c = code + 4 * j;
                q[2 + j] = static_cast<uint8_t>(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
            }
        }
    });
}

}  // namespace

LQ_FAMILY(few_bits, {"q1_0", 128, 18, quantize_q1_0}, {"q2_0", 64, 18, quantize_q2_0})
