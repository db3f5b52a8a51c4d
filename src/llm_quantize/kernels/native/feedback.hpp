// The column loops of GPTQ: error feedback inside one block of columns, and sweeps of coordinate descent over whole rows.
//
// Legend: of column j and one row: w weight, q value of its code, d = w - q residual, t what the code should come near to.
// The meaning is kernels/reference_feedback.py, equal bit for bit: products and sums are rounded apart, in the order of
// the columns. Feedback has rows in the lanes, columns follow each other. Descent has columns in the lanes: few codes
// move, so a row is searched for the next one that does, and only then its whole gradient changes.
#pragma once

#include <cstddef>

#include "simd.hpp"

namespace {

constexpr int most_columns = 128;
constexpr int strip = 8;  // columns whose residuals are handed on together: each target is loaded once for all of them

// What one weight per lane can be: value = scale * level - offset.
struct Numbers {
    vf scale, inverse, offset;
};

// The value nearest to `wanted`, and its code.
template <bool uniform>
LQ_INLINE vf take_nearest(const lq::FrozenGrid& grid, const Numbers& n, vf wanted, vi& code, vi& outside) {
    const bool shifted = grid.offset != nullptr;
    const vf x = (shifted ? wanted + n.offset : wanted) * n.inverse;
    const float low = grid.levels[0], high = grid.levels[grid.level_count - 1];
    outside = (x < grid.lowest) | (x > grid.highest);
    vf level;
    if constexpr (uniform) {
        const vi whole = nearest(smaller(larger(x, splat(low)), splat(high)));
        level = to_float(whole);
        code = whole - static_cast<int32_t>(low);
    } else {
        level = splat(low);
        code = vi{};
        for (int i = 0; i + 1 < grid.level_count; ++i) {
            const vi above = x >= grid.middles[i];
            level = select(above, splat(grid.levels[i + 1]), level);
            code -= above;
        }
    }
    const vf value = n.scale * level;
    return shifted ? value - n.offset : value;
}

LQ_INLINE void store_codes(uint8_t* p, vi code) {
    const vb bytes = __builtin_convertvector(code, vb);
    __builtin_memcpy(p, &bytes, sizeof bytes);
}

// Calls change[j] = step(j, t[j]) column after column; t of later columns grows by change[j] * coupling.
template <class Step>
LQ_INLINE void along_columns(const lq::ColumnBlock& block, vf* t, Step step) {
    const int64_t columns = block.columns;
    vf change[strip];
    for (int64_t first = 0; first < columns; first += strip) {
        const int64_t last = first + strip < columns ? first + strip : columns;
        for (int64_t j = first; j < last; ++j) {
            const vf made = step(j, t[j]);
            change[j - first] = made;
            for (int64_t k = j + 1; k < last; ++k) t[k] += made * block.coupling[k * block.coupling_stride + j];
        }
        if (last == columns) return;
        for (int64_t k = last; k < columns; ++k) {
            const float* c = block.coupling + k * block.coupling_stride + first;
            vf sum = t[k];
            for (int i = 0; i < strip; ++i) sum += change[i] * c[i];
            t[k] = sum;
        }
    }
}

template <bool uniform>
void feedback_rows(const lq::FrozenGrid& grid, const lq::ColumnBlock& block) {
    const int64_t rows = block.rows;
    vf t[most_columns];
    for (int64_t row = 0; row < rows; row += lanes) {
        for (int64_t j = 0; j < block.columns; ++j) t[j] = load(block.target + j * rows + row);
        vi clipped = vi{};
        along_columns(block, t, [&](int64_t j, vf wanted) {
            const int64_t at = grid.group[j] * rows + row;
            const Numbers numbers{load(grid.scale + at), load(grid.inverse + at),
                                  grid.offset == nullptr ? vf{} : load(grid.offset + at)};
            vi code, outside;
            const vf value = take_nearest<uniform>(grid, numbers, wanted, code, outside);
            const vf residual = load(block.weight + j * rows + row) - value;
            clipped -= outside;
            store_codes(block.codes + j * rows + row, code);
            store(block.residual + j * rows + row, residual);
            return residual;
        });
        for (int i = 0; i < lanes; ++i) block.counts[row + i] += clipped[i];
    }
}

// A row of a tile during descent.
struct DescentRow {
    const float *scale, *inverse, *offset;  // of its groups
    const float* weight;
    float *gradient, *residual;
    uint8_t* codes;
};

// `count` <= lanes floats, zeros behind them.
LQ_INLINE vf load_some(const float* p, int64_t count) {
    if (count == lanes) return load(p);
    float padded[lanes] = {};
    __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof(float));
    return load(padded);
}

// Of each column the number of its group; groups do not descend.
LQ_INLINE vf spread_groups(const float* of_group, const int32_t* group, int64_t count) {
    if (group[0] == group[count - 1] && count == lanes) return splat(of_group[group[0]]);
    float spread[lanes] = {};
    for (int64_t i = 0; i < count; ++i) spread[i] = of_group[group[i]];
    return load(spread);
}

// p[k] += factor * q[k]
LQ_INLINE void add_multiple(float* p, float factor, const float* q, int64_t count) {
    int64_t k = 0;
    for (; k + lanes <= count; k += lanes) store(p + k, load(p + k) + load(q + k) * factor);
    for (; k < count; ++k) p[k] += q[k] * factor;
}

// Columns first .. first + count of one row, count <= lanes; how many codes moved.
template <bool uniform>
LQ_INLINE int32_t descend_chunk(const lq::FrozenGrid& grid, const lq::Descent& work, const DescentRow& row,
                                int64_t first, int64_t count) {
    const int32_t* group = grid.group + first;
    const Numbers numbers{spread_groups(row.scale, group, count), spread_groups(row.inverse, group, count),
                          row.offset == nullptr ? vf{} : spread_groups(row.offset, group, count)};
    const vf weight = load_some(row.weight + first, count), reciprocal = load_some(work.reciprocal + first, count);
    const vf before = load_some(row.residual + first, count), kept = weight - before;
    int32_t moved = 0;
    uint32_t open = (1u << count) - 1;  // lanes still to come
    for (;;) {
        vi code, outside;
        const vf wanted = kept + load_some(row.gradient + first, count) * reciprocal;
        const vf after = weight - take_nearest<uniform>(grid, numbers, wanted, code, outside);
        const vf change = after - before;
        const uint32_t moving = open & ~equal_bits(change, vf{});
        if (moving == 0) return moved;
        const int lane = __builtin_ctz(moving);
        open &= ~((2u << lane) - 1);
        const int64_t j = first + lane;
        row.residual[j] = after[lane];
        row.codes[j] = static_cast<uint8_t>(code[lane]);
        add_multiple(row.gradient, change[lane], work.hessian + j * work.columns, work.columns);
        ++moved;
    }
}

// Blocks of columns are the outer loop: their rows of the Hessian stay in the cache for all rows of the tile.
template <bool uniform>
void descend_rows(const lq::FrozenGrid& grid, const lq::Descent& work) {
    for (int64_t from = 0; from < work.columns; from += most_columns) {
        const int64_t to = from + most_columns < work.columns ? from + most_columns : work.columns;
        for (int64_t r = 0; r < work.rows; ++r) {
            if (!work.active[r]) continue;
            const int64_t groups = r * work.groups, at = r * work.columns;
            const DescentRow row{grid.scale + groups, grid.inverse + groups,
                                 grid.offset == nullptr ? nullptr : grid.offset + groups,
                                 work.weight + at, work.gradient + at, work.residual + at, work.codes + at};
            for (int64_t first = from; first < to; first += lanes) {
                const int64_t count = first + lanes < to ? lanes : to - first;
                work.counts[r] += descend_chunk<uniform>(grid, work, row, first, count);
            }
        }
    }
}

void feedback(const lq::FrozenGrid& grid, const lq::ColumnBlock& block) {
    grid.uniform ? feedback_rows<true>(grid, block) : feedback_rows<false>(grid, block);
}

// One sweep over the active rows.
void descend(const lq::FrozenGrid& grid, const lq::Descent& work) {
    grid.uniform ? descend_rows<true>(grid, work) : descend_rows<false>(grid, work);
}

}  // namespace
