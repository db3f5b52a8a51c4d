// IQ4_NL and IQ4_XS with ggml's bytes: 16 uneven levels, plain and with an imatrix.
//
// The scale search runs with one block of 32 weights per lane, because ggml's sums are serial; then the codes are made
// along the weights of each block.
#include "legacy_blocks.hpp"
#include "wide.hpp"

namespace {

// The levels of the format (ggml's kvalues_iq4nl), and where the next level becomes the nearest one. Middles are exact
// in float32; a value on a middle takes the upper level.
constexpr float levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float middle(int i) { return (levels[i] + levels[i + 1]) / 2; }

constexpr float vanishing = 1e-15f;
constexpr int tries = 7;
constexpr int superblock = 256;

#if LQ_LANES == 16
// Nearest level by table: the line is cut in 32 cells of width 9 around the multiples of 9, none of which holds more than
// one middle. Valid for |v| <= 139: the search stays below 135.
struct Cells {
    float middle[32], below[32], above[32];
};

constexpr Cells make_cells() {
    Cells cells{};
    for (int cell = 0; cell < 32; ++cell) {
        // One hundredth more on both sides, for the rounding of v / 9.
        const float low = 9.0f * float(cell - 16) - 4.51f, high = 9.0f * float(cell - 16) + 4.51f;
        int next = 0;  // first middle in or above the cell
        while (next < 15 && middle(next) < low) ++next;
        const bool cut = next < 15 && middle(next) <= high;
        cells.middle[cell] = cut ? middle(next) : 1e30f;
        cells.below[cell] = levels[next];
        cells.above[cell] = cut ? levels[next + 1] : levels[next];
    }
    return cells;
}

constexpr bool cells_are_narrow() {
    for (int i = 0; i < 14; ++i) {
        if (middle(i + 1) - middle(i) < 9.1f) return false;
    }
    return true;
}
static_assert(cells_are_narrow(), "two middles in one cell");

constexpr Cells cells = make_cells();

LQ_INLINE vf nearest_level(vf v) {
    const vi cell = as_int(v * (1.0f / 9.0f) + (12582912.0f + 16.0f));
    const auto look_up = [&](const float* table) { return __builtin_shuffle(load(table), load(table + 16), cell); };
    return v >= look_up(cells.middle) ? look_up(cells.above) : look_up(cells.below);
}
#else
LQ_INLINE vf nearest_level(vf v) {
    vf level = splat(levels[0]);
    for (int i = 0; i < 15; ++i) level = select(v >= middle(i), splat(levels[i + 1]), level);
    return level;
}
#endif

// The number of the nearest level for any value; a NaN takes the last.
LQ_INLINE vi nearest_index(vf v) {
    vi index = splat(15);
    for (int i = 0; i < 15; ++i) index += v < middle(i);
    return index;
}

LQ_INLINE wf nearest_level(wf v) { return {nearest_level(v.a), nearest_level(v.b)}; }

// Of 16 scales around the one that sends the weight of largest magnitude to an outer level, the one with the largest
// (sum w level x)^2 / sum w level^2. 0 for a block of vanishing weights.
static inline wf search_scale(const wf* x, const wf* w) {
    wf largest = wf{}, magnitude = wf{};
    for (int i = 0; i < block; ++i) {
        const wf a = absolute(x[i]);
        const wi more = a > magnitude;
        magnitude = select(more, a, magnitude);
        largest = select(more, x[i], largest);
    }
    const wi dead = magnitude < vanishing;
    largest = select(dead, spread<wf>(1.0f), largest);
    wf sum_xl, sum_l2;
    const auto sums = [&](wf inverse) {
        sum_xl = sum_l2 = wf{};
        for (int i = 0; i < block; ++i) {
            const wf level = nearest_level(inverse * x[i]);
            const wf wl = w[i] * level;
            sum_xl += wl * x[i];
            sum_l2 += wl * level;
        }
    };
    sums(1.0f / (largest / -levels[0]));
    wf scale = select(sum_l2 > 0.0f, sum_xl / sum_l2, wf{});
    wf best = scale * sum_xl;
    for (int attempt = -tries; attempt <= tries; ++attempt) {
        sums((float(attempt) + levels[0]) / largest);
        const wi better = (sum_l2 > 0.0f) & (sum_xl * sum_xl > best * sum_l2);
        const wf found = sum_xl / sum_l2;
        scale = select(better, found, scale);
        best = select(better, found * sum_xl, best);
    }
    return select(dead, wf{}, scale);
}

// The importance of block after block, row after row.
struct Importance {
    const float* values;
    int64_t per_row;
    int64_t number;

    const float* next() {
        const float* p = values + number * block;
        if (++number == per_row) number = 0;
        return p;
    }
};

// Scales of `wide` blocks from p on. Weights: x^2, or importance * sqrt(sigma2 + x^2), where sigma2 is twice the mean
// square of the block, or what `sigma2` gives.
LQ_INLINE void search_blocks(const float* p, Importance& importance, const float* sigma2, float* scale) {
    const float* rows[wide];
    wf x[block], w[block];
    for (int b = 0; b < wide; ++b) rows[b] = p + b * block;
    load_transposed(rows, block, x);
    if (importance.values == nullptr) {
        for (int i = 0; i < block; ++i) w[i] = x[i] * x[i];
    } else {
        for (int b = 0; b < wide; ++b) rows[b] = importance.next();
        load_transposed(rows, block, w);
        wf mean = wf{};
        if (sigma2 != nullptr) {
            mean = load_wide(sigma2);
        } else {
            for (int i = 0; i < block; ++i) mean += x[i] * x[i];
            mean = mean * (2.0f / block);
        }
        for (int i = 0; i < block; ++i) w[i] = w[i] * square_root(mean + x[i] * x[i]);
    }
    store(scale, search_scale(x, w));
}

void quantize_iq4_nl(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    Importance weights{importance, cols / block, 0};
    for_block_groups<wide, block, 18>(x, rows * cols / block, out, [&](const float* p, uint8_t* q) {
        alignas(64) float scale[wide], inverse[wide];
        alignas(64) int32_t half[wide];
        search_blocks(p, weights, nullptr, scale);
        for (int b = 0; b < wide; b += lanes) {
            store(half + b, to_half(load(scale + b)));
            store(inverse + b, reciprocal(load(scale + b)));
        }
        store_halves<18>(q, half);
        store_codes<4, 18, wide>(q + 2, [&](int b, int k) {
            return nearest_index(inverse[b] * load(p + b * block + k * lanes));
        });
    });
}

// Header of one superblock from the scales of its 8 blocks, and what makes their codes.
LQ_INLINE void write_header(const float* scale, uint8_t* q, float* inverse) {
    float largest = 0.0f, magnitude = 0.0f;
    for (int b = 0; b < 8; ++b) {
        const float a = __builtin_fabsf(scale[b]);
        if (a > magnitude) {
            magnitude = a;
            largest = scale[b];
        }
    }
    const float unit = -largest / 32.0f;
    const float per_unit = unit != 0.0f ? 1.0f / unit : 0.0f;
    uint32_t high = 0, low = 0;
    for (int b = 0; b < 8; ++b) {
        int32_t step = nearest(per_unit * scale[b]);
        step = step < -32 ? -32 : step > 31 ? 31 : step;
        const float local = unit * static_cast<float>(step);
        inverse[b] = local != 0.0f ? 1.0f / local : 0.0f;
        const auto stored = static_cast<uint32_t>(step + 32);
        low |= (stored & 15u) << (4 * b);
        high |= (stored >> 4) << (2 * b);
    }
    store_half(q, float_to_half(unit));
    store_half(q + 2, static_cast<uint16_t>(high));
    store_word(q + 4, low);
}

void quantize_iq4_xs(const float* x, int64_t rows, int64_t cols, const float* importance, uint8_t* out) {
    constexpr int per = superblock / block;
    constexpr int group = wide / per;
    static_assert(wide % per == 0, "a group is whole superblocks");
    Importance weights{importance, cols / block, 0};
    for_block_groups<group, superblock, 136>(x, rows * cols / superblock, out, [&](const float* p, uint8_t* q) {
        alignas(64) float scale[wide], inverse[wide], sigma2[wide];
        if (importance != nullptr) {
            float sums[group];
            serial_squares(p, group, superblock, superblock, sums);
            for (int b = 0; b < wide; ++b) sigma2[b] = sums[b / per] * (2.0f / superblock);
        }
        search_blocks(p, weights, sigma2, scale);
        for (int s = 0; s < group; ++s) write_header(scale + s * per, q + s * 136, inverse + s * per);
        for (int b = 0; b < wide; ++b) {
            uint8_t* codes = q + b / per * 136 + 8 + b % per * 16;
            vi c[vectors];
            for (int k = 0; k < vectors; ++k) c[k] = nearest_index(inverse[b] * load(p + b * block + k * lanes));
            for (int k = 0; k < vectors / 2; ++k) store_bytes(codes + k * lanes, c[k] | c[k + vectors / 2] << 4);
        }
    });
}

}  // namespace

LQ_FAMILY(iq4, {"iq4_nl", 32, 18, quantize_iq4_nl}, {"iq4_xs", 256, 136, quantize_iq4_xs})
