// The codebook of an I-quant, as kernels see it: kernels/iq_grids.py says what it means. Plain data, no functions: the
// arrays belong to the module (codebook_build.hpp) and outlive the call.
//
// HOW A KERNEL GETS IT: write a function of type QuantizeOnGrid instead of QuantizeRows, and name it in LQ_FAMILY as
// {"iq2_xs", 256, 74, nullptr, quantize_iq2_xs}; the Python side hands over the codebook of that type.
#pragma once

#include <cstdint>

namespace lq {

// A point is the number made of its codes as digits in base `levels`, the first code the lowest. A word holds the codes
// in fields of 2 bits (8 codes of 3 levels) or 3 bits (4 codes of 8 levels), the first code the lowest.
struct Codebook {
    int32_t size;    // entries of the grid
    int32_t codes;   // per entry: 8 or 4
    int32_t levels;  // 3 or 8
    int32_t points;  // levels ^ codes
    const uint16_t* entry_word;      // [size]
    const int16_t* index;            // [points]: number of the entry, -1 off the grid
    const uint16_t* word;            // [points]
    const uint32_t* start;           // [points + 1]: where the neighbours of a point begin; none on the grid
    const uint16_t* neighbour_word;  // their words, nearest first; 32 more elements may be read after the last
    // The same neighbours for tables of `lanes` floats: four bits for code i, the first the lowest. With 4 levels to a
    // code (three, and one unused) they are code | (i % 4) * 4, with 8 levels code | (i % 2) * 8.
    const uint32_t* neighbour_lookup;
};

}  // namespace lq
