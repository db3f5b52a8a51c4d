// The column loops of GPTQ inside one block of columns: error feedback, and coordinate descent on codes that exist.
//
// Legend: rows of the weight stand in the lanes, columns follow each other. Of column j and one row: w weight, q value of
// its code, d = w - q residual, t what the code should come near to. coupling (columns, columns): how much of the residual
// of column j (second index) a later column k (first index) takes over. The meaning is kernels/reference_feedback.py,
// equal bit for bit: products and sums are rounded apart, in the order of the columns.
#pragma once

#include "simd.hpp"

namespace {

constexpr int most_columns = 128;
constexpr int strip = 8;  // columns whose residuals are handed on together: each target is loaded once for all of them

LQ_INLINE vf load_if(const float* p, int64_t at) { return p == nullptr ? vf{} : load(p + at); }

// The code nearest to `wanted` on the grid of column j, for the rows from `row` on.
template <bool uniform>
LQ_INLINE vf take_nearest(const lq::FrozenGrid& grid, int64_t j, int64_t row, int64_t rows, vf wanted, vi& code,
                          vi& outside) {
    const int64_t at = grid.group[j] * rows + row;
    const bool shifted = grid.offset != nullptr;
    const vf offset = load_if(grid.offset, at);
    const vf x = (shifted ? wanted + offset : wanted) * load(grid.inverse + at);
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
    const vf value = load(grid.scale + at) * level;
    return shifted ? value - offset : value;
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
            vi code, outside;
            const vf value = take_nearest<uniform>(grid, j, row, rows, wanted, code, outside);
            const vf residual = load(block.weight + j * rows + row) - value;
            clipped -= outside;
            store_codes(block.codes + j * rows + row, code);
            store(block.residual + j * rows + row, residual);
            return residual;
        });
        for (int i = 0; i < lanes; ++i) block.counts[row + i] += clipped[i];
    }
}

template <bool uniform>
void descend_rows(const lq::FrozenGrid& grid, const lq::ColumnBlock& block) {
    const int64_t rows = block.rows;
    vf t[most_columns];
    for (int64_t row = 0; row < rows; row += lanes) {
        for (int64_t j = 0; j < block.columns; ++j) t[j] = load(block.target + j * rows + row);
        vi moved = vi{};
        along_columns(block, t, [&](int64_t j, vf gradient) {
            float* place = block.residual + j * rows + row;
            const vf weight = load(block.weight + j * rows + row), before = load(place);
            const vf wanted = (weight - before) + gradient * block.reciprocal[j];
            vi code, outside;
            const vf after = weight - take_nearest<uniform>(grid, j, row, rows, wanted, code, outside);
            const vf change = after - before;
            moved -= change != 0.0f;
            store_codes(block.codes + j * rows + row, code);
            store(place, after);
            return change;
        });
        for (int i = 0; i < lanes; ++i) block.counts[row + i] += moved[i];
    }
}

void feedback(const lq::FrozenGrid& grid, const lq::ColumnBlock& block) {
    grid.uniform ? feedback_rows<true>(grid, block) : feedback_rows<false>(grid, block);
}

void descend(const lq::FrozenGrid& grid, const lq::ColumnBlock& block) {
    grid.uniform ? descend_rows<true>(grid, block) : descend_rows<false>(grid, block);
}

}  // namespace
