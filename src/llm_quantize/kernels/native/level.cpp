// One SIMD level: the list of its families, and the widening of 16-bit rows. Compiled once per level.
#include "feedback.hpp"
#include "floats_scan.hpp"
#include "gram.hpp"
#include "repack.hpp"
#include "scales.hpp"
#include "simd.hpp"
#include "words.hpp"

namespace {

void widen_f16(const uint16_t* source, int64_t count, float* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = half_to_float(source[i]);
}

void widen_bf16(const uint16_t* source, int64_t count, float* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = float_of_bits(static_cast<uint32_t>(source[i]) << 16);
}

}  // namespace

namespace lq {
namespace LQ_LEVEL {

#define LQ_X(family) extern const Family family;
LQ_FAMILIES
#undef LQ_X

namespace {
#define LQ_X(family) &family,
const Family* const families[] = {LQ_FAMILIES nullptr};
#undef LQ_X
}  // namespace

extern const Level level;
const Level level = {
    LQ_LEVEL_NAME, LQ_LANES, families, static_cast<int32_t>(sizeof(families) / sizeof(families[0])) - 1,
    widen_f16, widen_bf16, scan_nonfinite, feedback, descend, feed_words, descend_words, add_gram, refit_scales,
    {turn_words, same_turned, from_interleaved, to_interleaved, same_interleaved},
};

}  // namespace LQ_LEVEL
}  // namespace lq
