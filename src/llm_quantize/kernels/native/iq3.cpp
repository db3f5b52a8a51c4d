// IQ3_XXS and IQ3_S with ggml's bytes: four weights are signs and an entry of a grid of magnitudes 1, 3, .. 15.
#include "grid_blocks.hpp"

namespace {

struct Iq3Xxs {
    using Grid = GridOf<4>;
    static constexpr int N = 32, bytes = 98, tries = 15;
    static constexpr Again again = Again::off_grid;
    static constexpr bool even_signs = true;
    static constexpr float step = 0.2f, vanishing = 1e-8f, factor = 2.0f, fudge = 1.0125f;

    static vf weight(vf, vf x) { return x * x; }

    static void start(const Sub<N>&, vf& top, vf& scale, vi&) { scale = top / 15.0f; }

    static void pack(const uint16_t* entry, const uint8_t* sign, const int32_t* code, const bool*, bool any, uint8_t* q) {
        for (int g = 0; g < 64; ++g) q[2 + g] = any ? static_cast<uint8_t>(entry[g]) : uint8_t{0};
        for (int b = 0; b < 8; ++b) {
            store_little(q + 66 + 4 * b, any ? signs_and_scale(sign + 4 * b, code[b]) : 0, 4);
        }
    }
};

struct Iq3S {
    using Grid = GridOf<4>;
    static constexpr int N = 32, bytes = 110, tries = 9;
    static constexpr Again again = Again::all_if_off_grid;
    static constexpr bool even_signs = false;
    static constexpr float step = 0.2f, vanishing = 0.0f, factor = 2.0f, fudge = 1.033f;

    static vf weight(vf, vf x) { return x * x; }

    static void start(const Sub<N>&, vf& top, vf& scale, vi&) { scale = top / 15.0f; }

    // A sub-block of zeros keeps its place (see reference_iq3.py on what ggml does).
    static void pack(const uint16_t* entry, const uint8_t* sign, const int32_t* code, const bool* dead, bool, uint8_t* q) {
        __builtin_memset(q + 2, 0, bytes - 2);
        for (int b = 0; b < 8; ++b, entry += 8, sign += 4) {
            if (dead[b]) continue;
            uint32_t high = 0;
            for (int g = 0; g < 8; ++g) {
                q[2 + 8 * b + g] = static_cast<uint8_t>(entry[g]);
                high |= static_cast<uint32_t>(entry[g] >> 8) << g;
            }
            q[66 + b] = static_cast<uint8_t>(high);
            for (int j = 0; j < 4; ++j) q[74 + 4 * b + j] = sign[j];
        }
        store_nibbles(code, 8, q + 106);
    }
};

}  // namespace

LQ_FAMILY(iq3, {"iq3_xxs", 256, 98, nullptr, quantize_type<Iq3Xxs>}, {"iq3_s", 256, 110, nullptr, quantize_type<Iq3S>})
