// The registry of native kernels.
//
// HOW TO ADD A TYPE
//   1. Pick or make a family file `native/<family>.cpp` (a new family is one more word in LLM_QUANTIZE_FAMILIES of
//      CMakeLists.txt). It is compiled once per SIMD level, with LQ_LANES floats per vector.
//   2. Include "simd.hpp" and write, inside `namespace { }`, a function of type QuantizeRows. It sees whole rows:
//      x is (rows, cols) float32, packed; cols is a multiple of the block; importance is null or (cols); out is
//      (rows, cols / block * bytes), and every byte of it must be written. It keeps no state, never fails, and for any
//      values at all (NaN and infinity too) stays inside its arrays and ends. (A type with a codebook: codebook.hpp.)
//   3. Name it at the end of the file:  LQ_FAMILY(family, {"q4_k", 256, 144, quantize_q4_k}, ...)
//   4. Write its meaning in kernels/reference.py (or reference_legacy.py) and its tests in tests/kernels/.
// Everything else (16-bit input, row blocks, the GIL, shape checks, choice of level) is module.cpp's work.
//
// THE ONE RULE: a per-level unit has nothing with external linkage but its Family. Put all code in the anonymous
// namespace and call no inline function of the standard library (<algorithm>, <cmath>, <vector>): the linker keeps one
// copy of such a function for the whole module, and it may be the AVX512 one.
#pragma once

#include <cstdint>

#include "codebook.hpp"

namespace lq {

using QuantizeRows = void (*)(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out);
using QuantizeOnGrid = void (*)(const Codebook& book, const float* x, int64_t rows, int64_t cols,
                                const float* importance, uint8_t* out);
using Widen = void (*)(const uint16_t* source, int64_t count, float* target);

enum class Source { float32, float16, bfloat16 };

struct NonFinite {
    int64_t count;  // of infinities and NaNs
    int64_t first;  // where the first one stands; -1 when there is none
};

using Scan = NonFinite (*)(const void* values, int64_t count, Source source);

// The frozen number grid of a tile of rows: value = scale * level - offset (feedback.hpp).
struct FrozenGrid {
    const float* scale;    // (groups, rows) for feedback, (rows, groups) for descent; so the next two
    const float* inverse;  // 1 / scale, 0 where the scale is (nearly) 0
    const float* offset;   // or null
    const int32_t* group;  // (columns): which group each belongs to; for descent these do not descend
    const float* levels;   // (level_count), ascending
    const float* middles;  // (level_count - 1): from here on the next level is nearer; unused on a uniform grid
    float lowest, highest;  // beyond these a level-space value is clipped
    int32_t level_count;
    bool uniform;  // the levels are consecutive integers
};

// Feedback in one block of columns of a tile; arrays are (columns, rows), packed, rows a multiple of 16, columns at
// most 128.
struct ColumnBlock {
    int64_t columns, rows;
    const float* coupling;  // (columns, columns), below the diagonal; coupling_stride floats between its rows
    int64_t coupling_stride;
    const float* weight;
    const float* target;  // what the codes should come near to
    float* residual;
    uint8_t* codes;
    int32_t* counts;  // (rows) grows by the weights clipped
};

// A sweep of descent over a tile; arrays are (rows, columns), packed.
struct Descent {
    int64_t columns, rows, groups;
    const float* hessian;     // (columns, columns)
    const float* reciprocal;  // (columns): 1 / H[j, j]
    const float* weight;
    float* gradient;  // residual * H
    float* residual;
    uint8_t* codes;
    const bool* active;  // (rows) the others are left alone
    int32_t* counts;     // (rows) grows by the codes moved
};

// Which codes may stand together in words of eight weights (words.hpp); counts are multiples of 16.
struct WordBook {
    int32_t size;                        // weights of an entry: 8 or 4
    int64_t entry_count, sign_count;
    const float* entries;                // (size, entry_count): levels, positive where there are signs
    const uint8_t* codes;                // (size, entry_count)
    const float* signs;                  // (8, sign_count) of +1 and -1, or null
};

// A tile of the sums of x x^T over tokens of bfloat16 (gram.hpp), on or above the diagonal; what lies below is left as it
// is, but for a few numbers beside the diagonal.
struct GramTile {
    int64_t tokens, columns_in_all;
    const uint16_t* inputs;  // (tokens, columns_in_all), packed
    const float* weights;    // (tokens) of bfloat16: how much each token counts; or null, once each
    float* sums;             // (columns_in_all, columns_in_all), packed
    int64_t first_row, rows, first_column, columns;
};

// Groups of weights side by side (scales.hpp): value = scale * (level - zero), levels all integers of a range.
struct ScaleSearch {
    int64_t count, groups, tries;
    const float* weights;     // (count, groups): a group in each lane
    const float* importance;  // (count, groups)
    const float* scale;       // (tries, groups)
    const float* zero;        // (tries, groups), or null
    float lowest, highest;
    float* error;   // (tries, groups)
    float* fitted;  // (tries, groups), or null: then only the error is wanted
};

using FeedbackLoop = void (*)(const FrozenGrid& grid, const ColumnBlock& block);
using DescentLoop = void (*)(const FrozenGrid& grid, const Descent& work);
using WordFeedbackLoop = void (*)(const FrozenGrid& grid, const WordBook& book, const float* metrics, float* target,
                                  const ColumnBlock& block);
using WordDescentLoop = void (*)(const FrozenGrid& grid, const WordBook& book, const Descent& work);

// Codes between the layouts of packed matrices (repack.hpp).
struct Repacking {
    void (*turn_words)(const uint32_t* source, int64_t rows, int64_t columns, uint32_t* target);
    bool (*same_turned)(const uint32_t* one, int64_t rows, int64_t columns, const uint32_t* other);
    void (*from_interleaved)(const uint32_t* source, int64_t high, int64_t wide, bool inputs, uint32_t* target);
    void (*to_interleaved)(const uint32_t* source, int64_t high, int64_t wide, bool inputs, uint32_t* target);
    bool (*same_interleaved)(const uint32_t* one, int64_t high, int64_t wide, bool inputs, const uint32_t* other);
};
using AddGram = void (*)(const GramTile& tile, float* scratch);
using RefitScales = void (*)(const ScaleSearch& work, float* scratch);

struct Kernel {
    const char* name;  // lower-case ggml name
    int32_t block;     // weights per block
    int32_t bytes;     // bytes per block
    QuantizeRows quantize;
    QuantizeOnGrid quantize_on_grid = nullptr;  // for I-quants, in place of `quantize`; see codebook.hpp
};

struct Family {
    const Kernel* kernels;
    int32_t count;
};

struct Level {
    const char* name;
    int32_t lanes;
    const Family* const* families;
    int32_t family_count;
    Widen widen_f16;
    Widen widen_bf16;
    Scan scan_nonfinite;
    FeedbackLoop feedback;
    DescentLoop descend;
    WordFeedbackLoop feed_words;
    WordDescentLoop descend_words;
    AddGram add_gram;
    RefitScales refit_scales;
    Repacking repacking;
};

}  // namespace lq

#define LQ_FAMILY(family, ...)                                                                                \
    namespace {                                                                                               \
    const ::lq::Kernel family_kernels[] = {__VA_ARGS__};                                                      \
    }                                                                                                         \
    namespace lq {                                                                                            \
    namespace LQ_LEVEL {                                                                                      \
    extern const Family family;                                                                               \
    const Family family = {family_kernels, static_cast<int32_t>(sizeof(family_kernels) / sizeof(Kernel))};    \
    }                                                                                                         \
    }
