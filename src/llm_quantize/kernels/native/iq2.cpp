// IQ2_XXS, IQ2_XS and IQ2_S with ggml's bytes: eight weights are signs and an entry of a grid of magnitudes 1, 3, 5.
#include "grid_blocks.hpp"
#include "search.hpp"

namespace {

struct Iq2Xxs {
    using Grid = GridOf<8>;
    static constexpr int N = 32, bytes = 66, tries = 6;
    static constexpr Again again = Again::all;
    static constexpr bool even_signs = true;
    static constexpr float step = 0.1f, vanishing = 1e-15f, factor = 1.0f, fudge = 1.0f;

    static vf weight(vf, vf x) { return x * x; }  // never asked for: the type needs an imatrix

    // The largest level is to meet three times the scale of a search on evenly spaced levels.
    static void start(const Sub<N>& s, vf& top, vf& scale, vi& dead) {
        vi code[N];
        scale = fit_positive<N, 4>(s.x, s.w, code);
        top = scale * 3.0f;
        dead |= top <= 0.0f;
    }

    static void pack(const uint16_t* entry, const uint8_t* sign, const int32_t* code, const bool*, bool any, uint8_t* q) {
        for (int b = 0; b < 8; ++b, entry += 4, sign += 4) {
            const uint32_t grid = uint32_t{entry[0]} | uint32_t{entry[1]} << 8 | uint32_t{entry[2]} << 16 |
                                  uint32_t{entry[3]} << 24;
            store_little(q + 2 + 8 * b, any ? grid : 0, 4);
            store_little(q + 6 + 8 * b, any ? signs_and_scale(sign, code[b]) : 0, 4);
        }
    }
};

struct Iq2Xs {
    using Grid = GridOf<8>;
    static constexpr int N = 16, bytes = 74, tries = 9;
    static constexpr Again again = Again::off_grid;
    static constexpr bool even_signs = true;
    static constexpr float step = 0.1f, vanishing = 1e-15f, factor = 1.0f, fudge = 1.0f;

    static vf weight(vf, vf x) { return x * x; }

    static void start(const Sub<N>&, vf& top, vf& scale, vi&) { scale = top / 5.0f; }

    static void pack(const uint16_t* entry, const uint8_t* sign, const int32_t* code, const bool*, bool any, uint8_t* q) {
        for (int g = 0; g < 32; ++g) store_little(q + 2 + 2 * g, any ? entry[g] | uint32_t{sign[g]} << 9 : 0, 2);
        store_nibbles(code, 16, q + 66);
    }
};

struct Iq2S {
    using Grid = GridOf<8>;
    static constexpr int N = 16, bytes = 82, tries = 9;
    static constexpr Again again = Again::off_grid;
    static constexpr bool even_signs = false;
    static constexpr float step = 0.1f, vanishing = 1e-8f, factor = 2.0f, fudge = 0.9875f;

    static vf weight(vf mean, vf x) { return 0.25f * mean + x * x; }

    static void start(const Sub<N>&, vf& top, vf& scale, vi&) { scale = top / 5.0f; }

    static void pack(const uint16_t* entry, const uint8_t* sign, const int32_t* code, const bool*, bool, uint8_t* q) {
        for (int j = 0; j < 8; ++j) {
            uint32_t high = 0;
            for (int g = 0; g < 4; ++g) high |= static_cast<uint32_t>(entry[4 * j + g] >> 8) << (2 * g);
            q[66 + j] = static_cast<uint8_t>(high);
        }
        for (int g = 0; g < 32; ++g) {
            q[2 + g] = static_cast<uint8_t>(entry[g]);
            q[34 + g] = sign[g];
        }
        store_nibbles(code, 16, q + 74);
    }
};

}  // namespace

LQ_FAMILY(iq2,
          {"iq2_xxs", 256, 66, nullptr, quantize_type<Iq2Xxs>},
          {"iq2_xs", 256, 74, nullptr, quantize_type<Iq2Xs>},
          {"iq2_s", 256, 82, nullptr, quantize_type<Iq2S>})
