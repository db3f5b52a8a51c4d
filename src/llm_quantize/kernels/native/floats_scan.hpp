// The search for infinities and NaNs among source values: a value is one of them when all bits of its exponent are set.
#pragma once

#include "simd.hpp"

namespace {

// Chunks are first tested as a whole, without branches; only a chunk with a hit is looked at value by value.
template <class Bits>
LQ_INLINE lq::NonFinite scan_bits(const Bits* values, int64_t count, Bits exponent) {
    constexpr int64_t chunk = 2048;
    lq::NonFinite found{0, -1};
    for (int64_t from = 0; from < count; from += chunk) {
        const int64_t to = from + chunk < count ? from + chunk : count;
        Bits hit = 0;
        for (int64_t i = from; i < to; ++i) {
            hit |= static_cast<Bits>((values[i] & exponent) == exponent ? 1 : 0);
        }
        if (__builtin_expect(hit == 0, 1)) continue;
        for (int64_t i = from; i < to; ++i) {
            if ((values[i] & exponent) != exponent) continue;
            if (found.count++ == 0) found.first = i;
        }
    }
    return found;
}

lq::NonFinite scan_nonfinite(const void* values, int64_t count, lq::Source source) {
    switch (source) {
        case lq::Source::float32:
            return scan_bits(static_cast<const uint32_t*>(values), count, uint32_t{0x7f800000u});
        case lq::Source::float16:
            return scan_bits(static_cast<const uint16_t*>(values), count, uint16_t{0x7c00u});
        case lq::Source::bfloat16:
            return scan_bits(static_cast<const uint16_t*>(values), count, uint16_t{0x7f80u});
    }
    return {0, -1};
}

}  // namespace
