// The Python face of the kernels: checks shapes, widens 16-bit rows block by block, calls the kernel without the GIL.
// It holds no state: the level is an argument, buffers live on the caller's stack or in the call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "codebook_build.hpp"
#include "registry.hpp"

namespace nb = nanobind;

namespace lq {
#define LQ_X(level_name)             \
    namespace level_name {           \
    extern const Level level;        \
    }
LQ_LEVELS
#undef LQ_X
}  // namespace lq

namespace {

const lq::Level* const all_levels[] = {
#define LQ_X(level_name) &lq::level_name::level,
    LQ_LEVELS
#undef LQ_X
};

bool supported(const std::string& level) {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return false;
    if (level == "x86-64-v2") return true;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) {
        return false;
    }
    if (level == "x86-64-v3") return true;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
    return level == "baseline";
#endif
}

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const lq::Level* level : all_levels) {
        if (supported(level->name)) names.emplace_back(level->name);
    }
    return names;
}

const lq::Level& find_level(const std::string& name) {
    for (const lq::Level* level : all_levels) {
        if (name == level->name && supported(name)) return *level;
    }
    throw nb::value_error(("this processor or build has no SIMD level " + name).c_str());
}

const lq::Kernel& find_kernel(const lq::Level& level, const std::string& qtype) {
    for (int32_t f = 0; f < level.family_count; ++f) {
        const lq::Family& family = *level.families[f];
        for (int32_t k = 0; k < family.count; ++k) {
            if (qtype == family.kernels[k].name) return family.kernels[k];
        }
    }
    throw nb::value_error(("no native kernel for type " + qtype).c_str());
}

std::vector<std::tuple<std::string, int, int>> qtypes() {
    std::vector<std::tuple<std::string, int, int>> rows;
    const lq::Level& level = *all_levels[0];
    for (int32_t f = 0; f < level.family_count; ++f) {
        const lq::Family& family = *level.families[f];
        for (int32_t k = 0; k < family.count; ++k) {
            rows.emplace_back(family.kernels[k].name, family.kernels[k].block, family.kernels[k].bytes);
        }
    }
    return rows;
}

using Rows = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Importance = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

using Values = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

template <class Array>
lq::Source source_of(const Array& values) {
    const nb::dlpack::dtype half{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    if (values.dtype() == nb::dtype<float>()) return lq::Source::float32;
    if (values.dtype() == nb::dtype<uint16_t>()) return lq::Source::bfloat16;
    if (values.dtype() == half) return lq::Source::float16;
    throw nb::value_error("values must be float32, float16 or uint16 (bfloat16 bits)");
}

std::tuple<int64_t, int64_t> scan_nonfinite(const std::string& level_name, Values values) {
    const lq::Level& level = find_level(level_name);
    const lq::Source source = source_of(values);
    const void* data = values.data();
    const auto count = static_cast<int64_t>(values.size());
    nb::gil_scoped_release unlocked;
    const lq::NonFinite found = level.scan_nonfinite(data, count, source);
    return {found.count, found.first};
}

using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void widen_f16(const std::string& level_name, Halves values, FloatsOut out) {
    const lq::Level& level = find_level(level_name);
    if (values.shape(0) != out.shape(0)) throw nb::value_error("out must have as many values");
    const uint16_t* from = values.data();
    float* to = out.data();
    const auto count = static_cast<int64_t>(values.shape(0));
    nb::gil_scoped_release unlocked;
    level.widen_f16(from, count, to);
}

using Words = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WordsOut = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Array>
void check_words(const Array& words, int64_t rows, int64_t columns) {
    if (static_cast<int64_t>(words.shape(0)) != rows || static_cast<int64_t>(words.shape(1)) != columns) {
        throw nb::value_error("the words of the two layouts are not of one matrix");
    }
}

void turn_words(const std::string& level_name, Words source, WordsOut target) {
    const lq::Level& level = find_level(level_name);
    const auto rows = static_cast<int64_t>(source.shape(0)), columns = static_cast<int64_t>(source.shape(1));
    check_words(target, columns, rows);
    const uint32_t* from = source.data();
    uint32_t* to = target.data();
    nb::gil_scoped_release unlocked;
    level.repacking.turn_words(from, rows, columns, to);
}

bool same_turned(const std::string& level_name, Words one, Words other) {
    const lq::Level& level = find_level(level_name);
    const auto rows = static_cast<int64_t>(one.shape(0)), columns = static_cast<int64_t>(one.shape(1));
    check_words(other, columns, rows);
    const uint32_t *left = one.data(), *right = other.data();
    nb::gil_scoped_release unlocked;
    return level.repacking.same_turned(left, rows, columns, right);
}

// Interleaved (8 high, wide) and the same codes as rows (8 wide, high), or turned (high, 8 wide).
template <class Array>
std::tuple<int64_t, int64_t> check_interleaved(int64_t inputs, int64_t wide, const Array& other, bool turned) {
    if (inputs % 8) throw nb::value_error("inputs of interleaved codes are whole words of 8");
    const int64_t high = inputs / 8;
    if (turned) check_words(other, high, 8 * wide);
    else check_words(other, 8 * wide, high);
    return {high, wide};
}

void from_interleaved(const std::string& level_name, Words source, bool inputs, WordsOut target) {
    const lq::Level& level = find_level(level_name);
    const auto [high, wide] = check_interleaved(static_cast<int64_t>(source.shape(0)),
                                                static_cast<int64_t>(source.shape(1)), target, inputs);
    const int64_t along = high, across = wide;
    const uint32_t* from = source.data();
    uint32_t* to = target.data();
    nb::gil_scoped_release unlocked;
    level.repacking.from_interleaved(from, along, across, inputs, to);
}

void to_interleaved(const std::string& level_name, Words source, bool inputs, WordsOut target) {
    const lq::Level& level = find_level(level_name);
    const auto [high, wide] = check_interleaved(static_cast<int64_t>(target.shape(0)),
                                                static_cast<int64_t>(target.shape(1)), source, inputs);
    const int64_t along = high, across = wide;
    const uint32_t* from = source.data();
    uint32_t* to = target.data();
    nb::gil_scoped_release unlocked;
    level.repacking.to_interleaved(from, along, across, inputs, to);
}

bool same_interleaved(const std::string& level_name, Words one, bool inputs, Words other) {
    const lq::Level& level = find_level(level_name);
    const auto [high, wide] = check_interleaved(static_cast<int64_t>(one.shape(0)),
                                                static_cast<int64_t>(one.shape(1)), other, inputs);
    const int64_t along = high, across = wide;
    const uint32_t *left = one.data(), *right = other.data();
    nb::gil_scoped_release unlocked;
    return level.repacking.same_interleaved(left, along, across, inputs, right);
}

using Codes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A codebook and its arrays, immutable: any number of threads may quantize with it.
class OwnedCodebook {
public:
    OwnedCodebook(const uint8_t* codes, int32_t size, int32_t per, int32_t levels, int32_t wanted)
        : arrays_(codes, size, per, levels, wanted), view_(arrays_.view()) {}
    OwnedCodebook(const OwnedCodebook&) = delete;
    OwnedCodebook& operator=(const OwnedCodebook&) = delete;

    const lq::Codebook& view() const { return view_; }

private:
    lq::CodebookArrays arrays_;
    lq::Codebook view_;
};

void make_codebook(OwnedCodebook* self, Codes codes, int levels, int wanted) {
    const auto size = static_cast<int64_t>(codes.shape(0));
    const auto per = static_cast<int64_t>(codes.shape(1));
    if (!(per == 8 && levels == 3) && !(per == 4 && levels == 8)) {
        throw nb::value_error("a grid is of 8 codes of 3 levels, or of 4 codes of 8");
    }
    if (size < 1 || size > 32767 || wanted < 1) throw nb::value_error("a grid has 1 to 32767 entries");
    const uint8_t* data = codes.data();
    for (int64_t i = 0; i < size * per; ++i) {
        if (data[i] >= levels) throw nb::value_error("a code is not below the number of levels");
    }
    nb::gil_scoped_release unlocked;
    new (self) OwnedCodebook(data, static_cast<int32_t>(size), static_cast<int32_t>(per), levels, wanted);
}

// Copies of (index, start, neighbour words), for tests.
nb::tuple codebook_arrays(const OwnedCodebook& book) {
    const lq::Codebook& b = book.view();
    const auto count = static_cast<size_t>(b.points);
    std::vector<int> index(b.index, b.index + count), start(b.start, b.start + count + 1);
    std::vector<int> words(b.neighbour_word, b.neighbour_word + b.start[count]);
    return nb::make_tuple(index, start, words);
}

constexpr int64_t widened_floats = 1 << 15;  // rows are widened about 128 KiB at a time: they stay in the L2 cache

void quantize(const std::string& level_name, const std::string& qtype, Rows rows, std::optional<Importance> importance,
              Out out, const OwnedCodebook* codebook) {
    const lq::Level& level = find_level(level_name);
    const lq::Kernel& kernel = find_kernel(level, qtype);
    const auto count = static_cast<int64_t>(rows.shape(0));
    const auto columns = static_cast<int64_t>(rows.shape(1));
    if (columns % kernel.block != 0) throw nb::value_error("columns are not a multiple of the block size");
    const int64_t row_bytes = columns / kernel.block * kernel.bytes;
    if (static_cast<int64_t>(out.shape(0)) != count || static_cast<int64_t>(out.shape(1)) != row_bytes) {
        throw nb::value_error("out has the wrong shape");
    }
    if (importance && static_cast<int64_t>(importance->shape(0)) != columns) {
        throw nb::value_error("importance has the wrong length");
    }
    if (kernel.quantize_on_grid != nullptr && codebook == nullptr) throw nb::value_error("the type needs a codebook");
    const auto run = [&](const float* x, int64_t n, const float* weight, uint8_t* to) {
        if (kernel.quantize_on_grid != nullptr) {
            kernel.quantize_on_grid(codebook->view(), x, n, columns, weight, to);
        } else {
            kernel.quantize(x, n, columns, weight, to);
        }
    };
    const lq::Source type = source_of(rows);
    const void* source = rows.data();
    const float* weights = importance ? importance->data() : nullptr;
    uint8_t* target = out.data();
    if (count == 0 || columns == 0) return;

    nb::gil_scoped_release unlocked;
    if (type == lq::Source::float32) {
        run(static_cast<const float*>(source), count, weights, target);
        return;
    }
    const lq::Widen widen = type == lq::Source::bfloat16 ? level.widen_bf16 : level.widen_f16;
    const int64_t step = columns >= widened_floats ? 1 : widened_floats / columns;
    const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>((step < count ? step : count) * columns)]);
    for (int64_t first = 0; first < count; first += step) {
        const int64_t taken = first + step <= count ? step : count - first;
        widen(static_cast<const uint16_t*>(source) + first * columns, taken * columns, buffer.get());
        run(buffer.get(), taken, weights, target + first * row_bytes);
    }
}

using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using GroupIndex = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class Array>
void check_shape(const Array& array, int64_t first, int64_t second, const char* name) {
    if (static_cast<int64_t>(array.shape(0)) != first || static_cast<int64_t>(array.shape(1)) != second) {
        throw nb::value_error((std::string(name) + " has the wrong shape").c_str());
    }
}

template <class Array>
void check_length(const Array& array, int64_t length, const char* name) {
    if (static_cast<int64_t>(array.shape(0)) != length) {
        throw nb::value_error((std::string(name) + " has the wrong length").c_str());
    }
}

// A grid whose scale, inverse and offset are (first, second), for so many columns of `groups` groups.
lq::FrozenGrid frozen_grid(const FloatMatrix& scale, const FloatMatrix& inverse, const std::optional<FloatMatrix>& offset,
                           const GroupIndex& group, const FloatVector& levels, const FloatVector& middles,
                           std::tuple<float, float> edges, bool uniform, int64_t columns, int64_t groups) {
    const auto first = static_cast<int64_t>(scale.shape(0)), second = static_cast<int64_t>(scale.shape(1));
    const auto count = static_cast<int64_t>(levels.shape(0));
    check_shape(inverse, first, second, "inverse");
    if (offset) check_shape(*offset, first, second, "offset");
    check_length(group, columns, "group");
    for (int64_t j = 0; j < columns; ++j) {
        if (group.data()[j] < 0 || group.data()[j] >= groups) throw nb::value_error("no such group");
    }
    if (count < 2 || count > 256) throw nb::value_error("a grid has 2 to 256 levels");
    if (!uniform) check_length(middles, count - 1, "middles");
    return {scale.data(),  inverse.data(),  offset ? offset->data() : nullptr, group.data(),
            levels.data(), middles.data(),  std::get<0>(edges),                std::get<1>(edges),
            static_cast<int32_t>(count), uniform};
}

// Error feedback in one block of columns of a tile of rows (feedback.hpp); matrices are (columns, rows).
void feedback(const std::string& level_name, FloatMatrix scale, FloatMatrix inverse, std::optional<FloatMatrix> offset,
              GroupIndex group, FloatVector levels, FloatVector middles, std::tuple<float, float> edges, bool uniform,
              FloatRows coupling, FloatMatrix weight, FloatMatrix target, FloatOut residual, Out codes, Counts counts) {
    const lq::Level& level = find_level(level_name);
    const auto columns = static_cast<int64_t>(weight.shape(0)), rows = static_cast<int64_t>(weight.shape(1));
    const auto groups = static_cast<int64_t>(scale.shape(0));
    if (columns > 128 || rows % 16 != 0) throw nb::value_error("a block is at most 128 columns of 16, 32, ... rows");
    check_shape(scale, groups, rows, "scale");
    check_shape(coupling, columns, columns, "coupling");
    if (columns > 1 && coupling.stride(1) != 1) throw nb::value_error("rows of coupling must be packed");
    check_shape(target, columns, rows, "target");
    check_shape(residual, columns, rows, "residual");
    check_shape(codes, columns, rows, "codes");
    check_length(counts, rows, "counts");
    const lq::FrozenGrid grid =
        frozen_grid(scale, inverse, offset, group, levels, middles, edges, uniform, columns, groups);
    const lq::ColumnBlock block{columns,       rows,          coupling.data(),  columns > 1 ? coupling.stride(0) : 1,
                                weight.data(), target.data(), residual.data(), codes.data(), counts.data()};
    nb::gil_scoped_release unlocked;
    level.feedback(grid, block);
}

// Up to `sweeps` times `once` over a tile of rows. A row that did not move in one sweep is left alone in the next.
template <class Once>
void sweep(int64_t columns, int64_t rows, int64_t groups, const float* hessian, const float* reciprocal,
           const float* weight, float* gradient, float* residual, uint8_t* codes, int sweeps, int32_t* total, Once once) {
    const std::unique_ptr<bool[]> active(new bool[static_cast<size_t>(rows) + 1]);
    const std::unique_ptr<int32_t[]> moved(new int32_t[static_cast<size_t>(rows) + 1]);
    for (int64_t r = 0; r < rows; ++r) active[static_cast<size_t>(r)] = true;
    const lq::Descent work{columns, rows, groups, hessian, reciprocal, weight, gradient, residual, codes, active.get(),
                           moved.get()};
    for (int done = 0; done < sweeps; ++done) {
        for (int64_t r = 0; r < rows; ++r) moved[static_cast<size_t>(r)] = 0;
        once(work);
        bool any = false;
        for (int64_t r = 0; r < rows; ++r) {
            const auto at = static_cast<size_t>(r);
            active[at] = moved[at] != 0;
            total[r] += moved[at];
            any = any || active[at];
        }
        if (!any) return;
    }
}

// Up to `sweeps` sweeps of coordinate descent over a tile of rows; matrices are (rows, columns).
void descend(const std::string& level_name, FloatMatrix scale, FloatMatrix inverse, std::optional<FloatMatrix> offset,
             GroupIndex group, FloatVector levels, FloatVector middles, std::tuple<float, float> edges, bool uniform,
             FloatMatrix hessian, FloatVector reciprocal, FloatMatrix weight, FloatOut gradient, FloatOut residual,
             Out codes, int sweeps, Counts counts) {
    const lq::Level& level = find_level(level_name);
    const auto rows = static_cast<int64_t>(weight.shape(0)), columns = static_cast<int64_t>(weight.shape(1));
    const auto groups = static_cast<int64_t>(scale.shape(1));
    check_shape(scale, rows, groups, "scale");
    check_shape(hessian, columns, columns, "hessian");
    check_length(reciprocal, columns, "reciprocal");
    check_shape(gradient, rows, columns, "gradient");
    check_shape(residual, rows, columns, "residual");
    check_shape(codes, rows, columns, "codes");
    check_length(counts, rows, "counts");
    const lq::FrozenGrid grid =
        frozen_grid(scale, inverse, offset, group, levels, middles, edges, uniform, columns, groups);
    for (int64_t j = 1; j < columns; ++j) {
        if (grid.group[j] < grid.group[j - 1]) throw nb::value_error("groups must not descend");
    }
    int32_t* total = counts.data();
    nb::gil_scoped_release unlocked;
    sweep(columns, rows, groups, hessian.data(), reciprocal.data(), weight.data(), gradient.data(), residual.data(),
          codes.data(), sweeps, total, [&](const lq::Descent& work) { level.descend(grid, work); });
}

using Cube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
constexpr int64_t word_columns = 8;

// The book of a type whose grid has so many levels, and groups of whole words.
lq::WordBook word_book(const lq::FrozenGrid& grid, const FloatMatrix& entries, const Codes& codes,
                       const std::optional<FloatMatrix>& signs, int64_t columns) {
    const auto size = static_cast<int64_t>(entries.shape(0)), count = static_cast<int64_t>(entries.shape(1));
    if ((size != 8 && size != 4) || count < 16 || count % 16 != 0) {
        throw nb::value_error("entries are of 8 or 4 weights, 16, 32, ... of them");
    }
    check_shape(codes, size, count, "the codes of the entries");
    for (int64_t i = 0; i < size * count; ++i) {
        if (codes.data()[i] >= grid.level_count) throw nb::value_error("a code is not below the number of levels");
    }
    const int64_t patterns = signs ? static_cast<int64_t>(signs->shape(1)) : 0;
    if (signs && (signs->shape(0) != 8 || patterns < 16 || patterns % 16 != 0)) {
        throw nb::value_error("patterns of signs are of 8 weights, 16, 32, ... of them");
    }
    if (columns % word_columns != 0) throw nb::value_error("columns are not whole words of eight");
    for (int64_t j = 0; j < columns; j += word_columns) {
        for (int64_t i = 1; i < word_columns; ++i) {
            if (grid.group[j + i] != grid.group[j]) throw nb::value_error("a word lies in two groups");
        }
    }
    return {static_cast<int32_t>(size), count, patterns, entries.data(), codes.data(), signs ? signs->data() : nullptr};
}

// Error feedback, word by word, in one block of columns of a tile of rows (words.hpp); matrices are (columns, rows).
void feed_words(const std::string& level_name, FloatMatrix scale, FloatMatrix inverse, std::optional<FloatMatrix> offset,
                GroupIndex group, FloatVector levels, std::tuple<float, float> edges, FloatMatrix entries,
                Codes entry_codes, std::optional<FloatMatrix> signs, FloatRows coupling, Cube metrics, FloatMatrix weight,
                FloatOut target, FloatOut residual, Out codes, Counts counts) {
    const lq::Level& level = find_level(level_name);
    const auto columns = static_cast<int64_t>(weight.shape(0)), rows = static_cast<int64_t>(weight.shape(1));
    const auto groups = static_cast<int64_t>(scale.shape(0));
    if (columns > 128 || rows % 16 != 0) throw nb::value_error("a block is at most 128 columns of 16, 32, ... rows");
    check_shape(scale, groups, rows, "scale");
    check_shape(coupling, columns, columns, "coupling");
    if (columns > 1 && coupling.stride(1) != 1) throw nb::value_error("rows of coupling must be packed");
    check_shape(target, columns, rows, "target");
    check_shape(residual, columns, rows, "residual");
    check_shape(codes, columns, rows, "codes");
    check_length(counts, rows, "counts");
    const lq::FrozenGrid grid =
        frozen_grid(scale, inverse, offset, group, levels, levels, edges, true, columns, groups);
    const lq::WordBook book = word_book(grid, entries, entry_codes, signs, columns);
    check_length(metrics, columns / word_columns, "metrics");
    if (metrics.shape(1) != word_columns || metrics.shape(2) != word_columns) {
        throw nb::value_error("metrics has the wrong shape");
    }
    const lq::ColumnBlock block{columns,       rows,          coupling.data(),  columns > 1 ? coupling.stride(0) : 1,
                                weight.data(), target.data(), residual.data(), codes.data(), counts.data()};
    float* moved = target.data();
    const float* metric = metrics.data();
    nb::gil_scoped_release unlocked;
    level.feed_words(grid, book, metric, moved, block);
}

// Up to `sweeps` sweeps of descent, word by word, over a tile of rows; matrices are (rows, columns).
void descend_words(const std::string& level_name, FloatMatrix scale, FloatMatrix inverse,
                   std::optional<FloatMatrix> offset, GroupIndex group, FloatVector levels,
                   std::tuple<float, float> edges, FloatMatrix entries, Codes entry_codes,
                   std::optional<FloatMatrix> signs, FloatMatrix hessian, FloatMatrix weight, FloatOut gradient,
                   FloatOut residual, Out codes, int sweeps, Counts counts) {
    const lq::Level& level = find_level(level_name);
    const auto rows = static_cast<int64_t>(weight.shape(0)), columns = static_cast<int64_t>(weight.shape(1));
    const auto groups = static_cast<int64_t>(scale.shape(1));
    check_shape(scale, rows, groups, "scale");
    check_shape(hessian, columns, columns, "hessian");
    check_shape(gradient, rows, columns, "gradient");
    check_shape(residual, rows, columns, "residual");
    check_shape(codes, rows, columns, "codes");
    check_length(counts, rows, "counts");
    const lq::FrozenGrid grid =
        frozen_grid(scale, inverse, offset, group, levels, levels, edges, true, columns, groups);
    const lq::WordBook book = word_book(grid, entries, entry_codes, signs, columns);
    for (int64_t i = 0; i < rows * columns; ++i) {
        if (codes.data()[i] >= grid.level_count) throw nb::value_error("a code is not below the number of levels");
    }
    int32_t* total = counts.data();
    nb::gil_scoped_release unlocked;
    sweep(columns, rows, groups, hessian.data(), nullptr, weight.data(), gradient.data(), residual.data(), codes.data(),
          sweeps, total, [&](const lq::Descent& work) { level.descend_words(grid, book, work); });
}

struct AlignedFloats {  // of vectors, for scratch space
    explicit AlignedFloats(int64_t count)
        : data(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t{64}))) {}
    ~AlignedFloats() { ::operator delete(data, std::align_val_t{64}); }
    AlignedFloats(const AlignedFloats&) = delete;
    AlignedFloats& operator=(const AlignedFloats&) = delete;
    float* data;
};

using Bfloat16Rows = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A tile of sums of products of bfloat16 inputs (gram.hpp).
void add_gram(const std::string& level_name, Bfloat16Rows inputs, std::optional<FloatVector> weights, FloatOut sums,
              std::tuple<int64_t, int64_t> rows, std::tuple<int64_t, int64_t> columns) {
    const lq::Level& level = find_level(level_name);
    const auto tokens = static_cast<int64_t>(inputs.shape(0)), width = static_cast<int64_t>(inputs.shape(1));
    check_shape(sums, width, width, "sums");
    if (weights) check_length(*weights, tokens, "weights");
    for (const auto& range : {rows, columns}) {
        if (std::get<0>(range) < 0 || std::get<0>(range) >= std::get<1>(range) || std::get<1>(range) > width) {
            throw nb::value_error("a tile has rows and columns of the sums");
        }
    }
    const lq::GramTile tile{tokens, width, inputs.data(), weights ? weights->data() : nullptr, sums.data(),
                            std::get<0>(rows), std::get<1>(rows) - std::get<0>(rows),
                            std::get<0>(columns), std::get<1>(columns) - std::get<0>(columns)};
    nb::gil_scoped_release unlocked;
    const AlignedFloats scratch(128 * (tile.rows + tile.columns + 64));
    level.add_gram(tile, scratch.data);
}

// Tries of a scale for each group (scales.hpp): errors, and unless `fitted` is None the refitted scales.
void refit_scales(const std::string& level_name, FloatMatrix weights, FloatMatrix importance, FloatMatrix scale,
                  std::optional<FloatMatrix> zero, float lowest, float highest, FloatOut error,
                  std::optional<FloatOut> fitted) {
    const lq::Level& level = find_level(level_name);
    const auto count = static_cast<int64_t>(weights.shape(0)), groups = static_cast<int64_t>(weights.shape(1));
    const auto tries = static_cast<int64_t>(scale.shape(0));
    if (count < 1) throw nb::value_error("a group has weights");
    check_shape(importance, count, groups, "importance");
    check_shape(scale, tries, groups, "scale");
    if (zero) check_shape(*zero, tries, groups, "zero");
    check_shape(error, tries, groups, "error");
    if (fitted) check_shape(*fitted, tries, groups, "fitted");
    const lq::ScaleSearch work{count, groups, tries, weights.data(), importance.data(), scale.data(),
                               zero ? zero->data() : nullptr, lowest, highest, error.data(),
                               fitted ? fitted->data() : nullptr};
    nb::gil_scoped_release unlocked;
    const AlignedFloats scratch(5 * count * level.lanes);
    level.refit_scales(work, scratch.data);
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Quantization kernels; llm_quantize.kernels is their public face.";
    module.def("levels", &levels, "SIMD levels that this processor can run, slowest first.");
    module.def("qtypes", &qtypes, "(name, weights per block, bytes per block) of every native type.");
    module.def("scan_nonfinite", &scan_nonfinite, nb::arg("level"), nb::arg("values"),
               "How many values are infinite or NaN, and the flat index of the first (-1: none).");
    module.def("widen_f16", &widen_f16, nb::arg("level"), nb::arg("values"), nb::arg("out"),
               "float16, as bits, to float32.");
    module.def("turn_words", &turn_words, nb::arg("level"), nb::arg("source"), nb::arg("target"),
               "Words (R, C) to words (C, R); kernels/repack.py is the face of this and the next four.");
    module.def("same_turned", &same_turned, nb::arg("level"), nb::arg("one"), nb::arg("other"),
               "Whether words (R, C) are words (C, R), turned.");
    module.def("from_interleaved", &from_interleaved, nb::arg("level"), nb::arg("source"), nb::arg("inputs"),
               nb::arg("target"), "AWQ's words (K, N / 8) to rows (N, K / 8), or turned (K / 8, N).");
    module.def("to_interleaved", &to_interleaved, nb::arg("level"), nb::arg("source"), nb::arg("inputs"),
               nb::arg("target"), "The way back.");
    module.def("same_interleaved", &same_interleaved, nb::arg("level"), nb::arg("one"), nb::arg("inputs"),
               nb::arg("other"), "Whether AWQ's words hold the codes of rows, or of turned words, one by one.");
    module.def("feedback", &feedback, nb::arg("level"), nb::arg("scale"), nb::arg("inverse"), nb::arg("offset").none(),
               nb::arg("group"), nb::arg("levels"), nb::arg("middles"), nb::arg("edges"), nb::arg("uniform"),
               nb::arg("coupling"), nb::arg("weight"), nb::arg("target"), nb::arg("residual"), nb::arg("codes"),
               nb::arg("counts"), "Error feedback inside one block of columns; kernels/feedback.py is its face.");
    module.def("descend", &descend, nb::arg("level"), nb::arg("scale"), nb::arg("inverse"), nb::arg("offset").none(),
               nb::arg("group"), nb::arg("levels"), nb::arg("middles"), nb::arg("edges"), nb::arg("uniform"),
               nb::arg("hessian"), nb::arg("reciprocal"), nb::arg("weight"), nb::arg("gradient"), nb::arg("residual"),
               nb::arg("codes"), nb::arg("sweeps"), nb::arg("counts"),
               "Sweeps of coordinate descent over a tile of rows; kernels/feedback.py is its face.");
    module.def("feed_words", &feed_words, nb::arg("level"), nb::arg("scale"), nb::arg("inverse"),
               nb::arg("offset").none(), nb::arg("group"), nb::arg("levels"), nb::arg("edges"), nb::arg("entries"),
               nb::arg("entry_codes"), nb::arg("signs").none(), nb::arg("coupling"), nb::arg("metrics"),
               nb::arg("weight"), nb::arg("target"), nb::arg("residual"), nb::arg("codes"), nb::arg("counts"),
               "Error feedback word by word inside one block of columns; kernels/words.py is its face.");
    module.def("descend_words", &descend_words, nb::arg("level"), nb::arg("scale"), nb::arg("inverse"),
               nb::arg("offset").none(), nb::arg("group"), nb::arg("levels"), nb::arg("edges"), nb::arg("entries"),
               nb::arg("entry_codes"), nb::arg("signs").none(), nb::arg("hessian"), nb::arg("weight"),
               nb::arg("gradient"), nb::arg("residual"), nb::arg("codes"), nb::arg("sweeps"), nb::arg("counts"),
               "Sweeps of descent word by word over a tile of rows; kernels/words.py is its face.");
    module.def("add_gram", &add_gram, nb::arg("level"), nb::arg("inputs"), nb::arg("weights").none(),
               nb::arg("sums"), nb::arg("rows"), nb::arg("columns"), "Adds a tile of sums of products; kernels/gram.py is its face.");
    module.def("refit_scales", &refit_scales, nb::arg("level"), nb::arg("weights"), nb::arg("importance"),
               nb::arg("scale"), nb::arg("zero").none(), nb::arg("lowest"), nb::arg("highest"), nb::arg("error"),
               nb::arg("fitted").none(), "Tries of scales for groups of weights; kernels/scales.py is its face.");
    nb::class_<OwnedCodebook>(module, "Codebook", "The grid of an I-quant and the neighbours of every point off it.")
        .def("__init__", &make_codebook, nb::arg("codes"), nb::arg("levels"), nb::arg("wanted"))
        .def("arrays", &codebook_arrays, "(index, start, neighbour words), as kernels/native/codebook.hpp has them.");
    module.def("quantize", &quantize, nb::arg("level"), nb::arg("qtype"), nb::arg("rows"),
               nb::arg("importance").none(), nb::arg("out"), nb::arg("codebook").none() = nb::none(),
               "Quantizes rows (R, C) into out (R, C / block * bytes) at a SIMD level; I-quants need their codebook.");
}
