// The grid of iq1_s and iq1_m: codes of eight weights in words of 2 bits each, and the entry that stands for a word.
#pragma once

#include "codebook.hpp"
#include "simd.hpp"

namespace {

typedef uint16_t vw __attribute__((vector_size(2 * LQ_LANES)));

LQ_INLINE vi lanes_from_zero() {
    vi v;
    for (int k = 0; k < lanes; ++k) v[k] = k;
    return v;
}

// Bit k is set where lane k of a mask is.
LQ_INLINE uint32_t bits_of(vi mask) {
#if LQ_LANES == 16 && defined(__AVX512DQ__)
    return static_cast<uint16_t>(__builtin_ia32_cvtd2mask512(mask));
#elif LQ_LANES == 8 && defined(__AVX__)
    return static_cast<uint32_t>(__builtin_ia32_movmskps256(as_float(mask)));
#elif LQ_LANES == 4 && defined(__SSE2__)
    return static_cast<uint32_t>(__builtin_ia32_movmskps(as_float(mask)));
#else
    uint32_t bits = 0;
    for (int k = 0; k < lanes; ++k) bits |= static_cast<uint32_t>(mask[k] & 1) << k;
    return bits;
#endif
}

// What each code of a weight adds to an error, for look-ups by code.
#if LQ_LANES >= 8
struct Terms {
    vf of_code;  // lane k: the term of code k mod 4

    // Code 0, 1 or 2 in the low two bits of each lane of word >> shift; the bits above do not count.
    __attribute__((always_inline)) inline vf at(vi word, int shift) const { return look_up(of_code, word >> shift); }
};
#else
struct Terms {
    vf of_code[3];

    __attribute__((always_inline)) inline vf at(vi word, int shift) const {
        const vf low = select(word << (31 - shift) < 0, of_code[1], of_code[0]);
        return select(word << (30 - shift) < 0, of_code[2], low);
    }
};
#endif

// terms[i] of eight weights: w (scale level - x)^2, level = code + `lowest`.
LQ_INLINE void make_terms(const float* x, const float* w, float scale, float lowest, Terms* terms) {
#if LQ_LANES >= 8
    constexpr int at_once = lanes / 4;
    const vi lane = lanes_from_zero();
    const vf scaled = scale * (to_float(lane & 3) + lowest);
    for (int t = 0; t < 8 / at_once; ++t) {
        vf xs = vf{}, ws = vf{};
        __builtin_memcpy(&xs, x + t * at_once, 4 * at_once);
        __builtin_memcpy(&ws, w + t * at_once, 4 * at_once);
        const vf difference = scaled - look_up(xs, lane >> 2);
        const vf error = look_up(ws, lane >> 2) * difference * difference;
        for (int i = 0; i < at_once; ++i) terms[t * at_once + i].of_code = look_up(error, (lane & 3) | 4 * i);
    }
#else
    for (int first = 0; first < 8; first += lanes) {
        for (int code = 0; code < 3; ++code) {
            const vf difference = scale * (lowest + static_cast<float>(code)) - load(x + first);
            const vf error = load(w + first) * difference * difference;
            for (int i = 0; i < lanes; ++i) terms[first + i].of_code[code] = splat(error[i]);
        }
    }
#endif
}

// The smallest value of all lanes, in every lane.
LQ_INLINE vf least_of_lanes(vf v) {
#if LQ_LANES >= 8
    for (int stride = lanes / 2; stride > 0; stride /= 2) v = smaller(v, look_up(v, lanes_from_zero() ^ stride));
    return v;
#else
    float least = v[0];
    for (int k = 1; k < lanes; ++k) least = v[k] < least ? v[k] : least;
    return splat(least);
#endif
}

// The word of the neighbour of `point` with the least sum of w (scale level - x)^2 over eight weights; of equal ones
// the first. The first of all if every sum overflows (ggml may stop the process then).
static inline uint16_t nearest_neighbour(const lq::Codebook& book, uint32_t point, const float* x, const float* w,
                                         float scale, float lowest) {
    Terms terms[8];
    make_terms(x, w, scale, lowest, terms);
#if LQ_LANES == 16
    // Codes 0 and 1 in one look-up.
    const Terms pair = {look_up(terms[0].of_code, lanes_from_zero() & 3) +
                        look_up(terms[1].of_code, lanes_from_zero() >> 2)};
#endif
    const uint16_t* words = book.neighbour_word + book.start[point];
    const auto count = static_cast<int32_t>(book.start[point + 1] - book.start[point]);
    const vf most = splat(0x1.fffffep127f);
    const vi lane = lanes_from_zero();
    vf best = most;
    vi place = lane;
    for (int32_t first = 0; first < count; first += lanes) {
        vw packed;
        __builtin_memcpy(&packed, words + first, sizeof packed);
        const vi word = __builtin_convertvector(packed, vi), number = lane + first;
#if LQ_LANES == 16
        vf sum = pair.at(word, 0);
#else
        vf sum = terms[0].at(word, 0) + terms[1].at(word, 2);
#endif
        for (int i = 2; i < 8; ++i) sum += terms[i].at(word, 2 * i);
        const vi better = (sum < best) & (number < count);
        best = select(better, sum, best);
        place = select(better, number, place);
    }
    alignas(64) int32_t places[lanes];
    __builtin_memcpy(places, &place, sizeof places);
    uint32_t hits = bits_of(best == least_of_lanes(best));
    int32_t found = places[__builtin_ctz(hits)];
    while ((hits &= hits - 1) != 0) {
        const int32_t other = places[__builtin_ctz(hits)];
        found = other < found ? other : found;
    }
    return words[found];
}

// The number in base 3 whose digits are the eight codes of a word.
LQ_INLINE uint32_t point_of(uint32_t word) {
    const uint32_t pairs = (word & 0x3333u) + 3u * (word >> 2 & 0x3333u);
    const uint32_t fours = (pairs & 0x0f0fu) + 9u * (pairs >> 4 & 0x0f0fu);
    return (fours & 0xffu) + 81u * (fours >> 8);
}

}  // namespace
