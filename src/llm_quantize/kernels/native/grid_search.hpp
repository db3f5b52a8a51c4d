// The search of the I-quants that store magnitudes (IQ2_*, IQ3_*): a scale for each sub-block of N weights such that the
// nearest entries of a codebook, one for each `size` weights, fit best.
//
// Rounding and sums run with one sub-block per lane, because ggml's sums are serial. A group of weights whose codes are
// not on the grid is then looked at alone, with one neighbour per lane: each of its weights can only be off by as many
// amounts as there are levels, so these are computed once, and a neighbour's error is a sum of `size` looked-up values.
#pragma once

#include "pack.hpp"

namespace {

// Which groups are rounded again with the scale that was found.
enum class Again { all, off_grid, all_if_off_grid };

template <int group_size>
struct GridOf {
    static constexpr int size = group_size;               // weights per entry
    static constexpr int levels = size == 8 ? 3 : 8;      // codes 0..levels-1 stand for 1, 3, 5, ...
    static constexpr int bits = size == 8 ? 2 : 3;        // of a code in a word
    static constexpr int per = size == 8 ? 4 : 8;         // places of a code in the tables
    static constexpr int tables = 32 / lanes;             // vectors that hold size * per values
};

// The sub-blocks at work, one per lane. Rows are the same values sub-block by sub-block, with room to read over the end.
template <int N>
struct alignas(64) Sub {
    vf x[N];  // magnitudes; one in eight may be negative (signs with parity)
    vf w[N];  // importance
    float row_x[lanes][N + 16];
    float row_root[lanes][N + 16];  // square roots of the importance
};

template <int N>
LQ_INLINE void store_transposed(const vf* from, float (*rows)[N + 16]) {
    for (int first = 0; first < N; first += lanes) {
        vf tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = from[first + i];
        transpose(tile);
        for (int k = 0; k < lanes; ++k) store(rows[k] + first, tile[k]);
    }
}

LQ_INLINE vi lane_numbers() {
    vi v;
    for (int i = 0; i < lanes; ++i) v[i] = i;
    return v;
}

// Of all lanes the least value, and of equal ones the first position.
LQ_INLINE int32_t first_least(vf value, vi position) {
    vf least = value;
#if LQ_LANES >= 16
    least = smaller(least, look_up(least, lane_numbers() ^ 8));
#endif
#if LQ_LANES >= 8
    least = smaller(least, look_up(least, lane_numbers() ^ 4));
#endif
    least = smaller(least, look_up(least, lane_numbers() ^ 2));
    least = smaller(least, look_up(least, lane_numbers() ^ 1));
    uint32_t hits = lane_bits(value == least);
    alignas(64) int32_t at[lanes];
    store(at, position);
    int32_t first = at[__builtin_ctz(hits | 1u << (lanes - 1))];
    while ((hits &= hits - 1) != 0) {
        const int32_t other = at[__builtin_ctz(hits)];
        first = other < first ? other : first;
    }
    return first;
}

// The word of the neighbour of a point with the least sum of root * (scale * level - x)^2, ggml's additions in ggml's
// order; the first one where no error is finite. `scaled`: scale * level at each place of a table.
template <class Grid>
LQ_INLINE uint32_t nearest_neighbour(const lq::Codebook& book, uint32_t begin, uint32_t end, const float* x,
                                     const float* root, const vf* scaled) {
    vf table[Grid::tables];
    const vi spread = lane_numbers() / Grid::per;
    for (int t = 0; t < Grid::tables; ++t) {
        const int first = t * lanes / Grid::per;
        const vf off = scaled[lanes < Grid::per ? t % 2 : 0] - look_up(load(x + first), spread);
        table[t] = look_up(load(root + first), spread) * off * off;
    }
    const auto count = static_cast<int32_t>(end - begin);
    vf best = splat(3.402823466e+38f);
    vi position = lane_numbers();
    for (int32_t done = 0; done < count; done += lanes) {
        vi lookup;
        __builtin_memcpy(&lookup, book.neighbour_lookup + begin + done, sizeof lookup);
        vf error;
        for (int i = 0; i < Grid::size; ++i) {
            const vi at = lookup >> (4 * i);
            vf term;
            if constexpr (lanes < Grid::per) {
                term = select((at & 4) != 0, look_up(table[2 * i + 1], at), look_up(table[2 * i], at));
            } else {
                term = look_up(table[i * Grid::per / lanes], at);
            }
            error = i == 0 ? term : error + term;
        }
        const vi number = lane_numbers() + done;
        const vi better = (error < best) & (number < count);
        best = select(better, error, best);
        position = select(better, number, position);
    }
    return book.neighbour_word[begin + static_cast<uint32_t>(first_least(best, position))];
}

template <int N, class Grid>
struct alignas(64) Rounded {
    static constexpr int groups = N / Grid::size;
    int32_t point[groups][lanes];
    int32_t word[groups][lanes];
    int32_t off[lanes];  // bit g: group g was not on the grid
};

// Words on the grid for the inverse scales. Only groups with a set bit in `wanted` are brought onto it.
template <int N, class Grid>
LQ_INLINE void round_to_grid(const lq::Codebook& book, const Sub<N>& s, vf inverse, vf scale, const int32_t* wanted,
                             Rounded<N, Grid>& r) {
    for (int g = 0; g < r.groups; ++g) {
        vi point = vi{}, word = vi{};
        for (int i = Grid::size - 1; i >= 0; --i) {
            const vi code = clamp(nearest(0.5f * (inverse * s.x[g * Grid::size + i] - 1.0f)), 0, Grid::levels - 1);
            word = word << Grid::bits | code;
            if (Grid::levels == 3) point = point * 3 + code;
        }
        store(r.point[g], Grid::levels == 3 ? point : word);
        store(r.word[g], word);
    }
    alignas(64) float each_scale[lanes];
    store(each_scale, scale);
    vf level[2];
    for (int i = 0; i < lanes; ++i) {
        level[0][i] = static_cast<float>(2 * (i % Grid::per) + 1);
        level[1][i] = static_cast<float>(2 * ((i + lanes) % Grid::per) + 1);
    }
    for (int k = 0; k < lanes; ++k) {
        const vf scaled[2] = {each_scale[k] * level[0], each_scale[k] * level[1]};
        int32_t off = 0;
        for (int g = 0; g < r.groups; ++g) {
            const uint32_t* start = book.start + r.point[g][k];
            if (start[0] == start[1] || !(wanted[k] >> g & 1)) continue;
            off |= 1 << g;
            r.word[g][k] = static_cast<int32_t>(nearest_neighbour<Grid>(
                book, start[0], start[1], s.row_x[k] + g * Grid::size, s.row_root[k] + g * Grid::size, scaled));
        }
        r.off[k] = off;
    }
}

// sum w x level and sum w level^2, in order.
template <int N, class Grid>
LQ_INLINE void fit(const Sub<N>& s, const vi* word, vf& cross, vf& square) {
    constexpr int32_t mask = 2 * ((1 << Grid::bits) - 1);
    cross = square = vf{};
    for (int g = 0; g < N / Grid::size; ++g) {
        const vi doubled = word[g] << 1;
        for (int i = 0; i < Grid::size; ++i) {
            const vf level = to_float((doubled >> (Grid::bits * i) & mask) | 1);
            const int at = g * Grid::size + i;
            cross += s.w[at] * s.x[at] * level;
            square += s.w[at] * level * level;
        }
    }
}

// Tries the inverse scales (largest level + step * t) / top, t = -tries..tries, then refines once. `scale` holds what is
// the scale where none fits, then the result (NaN where ggml gives up); `word` one word per group and lane.
template <int N, class Grid, int tries, Again again>
static inline void search_grid(const lq::Codebook& book, const Sub<N>& s, vf top, float step, vi alive, vf& scale,
                               vi* word) {
    constexpr int groups = N / Grid::size;
    constexpr int32_t every = (1 << groups) - 1;
    Rounded<N, Grid> r;
    alignas(64) int32_t wanted[lanes];
    store(wanted, alive & every);
    vf best = vf{}, cross, square;
    vi off = splat(again == Again::off_grid ? 0 : every);
    for (int g = 0; g < groups; ++g) word[g] = vi{};
    vi trial[groups];
    for (int t = -tries; t <= tries; ++t) {
        const vf inverse = (float(2 * Grid::levels - 1) + float(t) * step) / top;
        round_to_grid(book, s, inverse, 1.0f / inverse, wanted, r);
        for (int g = 0; g < groups; ++g) __builtin_memcpy(&trial[g], r.word[g], sizeof trial[g]);
        fit<N, Grid>(s, trial, cross, square);
        const vi better = (square > 0.0f) & (cross * cross > best * square);
        const vf found = cross / square;
        scale = select(better, found, scale);
        best = select(better, found * cross, best);
        for (int g = 0; g < groups; ++g) word[g] = select(better, trial[g], word[g]);
        vi now_off;
        __builtin_memcpy(&now_off, r.off, sizeof now_off);
        off = select(better, now_off, off);
    }
    vi redo = alive & (scale > 0.0f);
    if (again == Again::all) off = splat(every);
    if (again == Again::all_if_off_grid) off = (off != 0) & every;
    redo &= off != 0;
    store(wanted, off & redo);
    round_to_grid(book, s, 1.0f / scale, scale, wanted, r);
    for (int g = 0; g < groups; ++g) {
        vi again_word;
        __builtin_memcpy(&again_word, r.word[g], sizeof again_word);
        word[g] = select(redo & ((off >> g & 1) != 0), again_word, word[g]);
    }
    fit<N, Grid>(s, word, cross, square);
    scale = select(redo & (square > 0.0f), cross / square, scale);
}

}  // namespace
