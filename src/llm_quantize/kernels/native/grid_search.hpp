// The search of the I-quants that store magnitudes (IQ2_*, IQ3_*): a scale for each sub-block of N weights such that the
// nearest entries of a codebook, one for each `size` weights, fit best.
//
// Rounding and sums run with one sub-block per lane, because ggml's sums are serial. A group of weights whose codes are
// not on the grid is then looked at alone, with one neighbour per lane: each of its weights can only be off by as many
// amounts as there are levels, so these are computed once, and a neighbour's error is a sum of `size` values looked up.
#pragma once

#include "codebook.hpp"
#include "pack.hpp"

namespace {

// Here a word has four bits for each code, as lq::Codebook::neighbour_lookup has them; what is above the code's own two
// or three bits counts for nothing.

// Which groups are rounded again with the scale that was found.
enum class Again { all, off_grid, all_if_off_grid };

template <int group_size>
struct GridOf {
    static constexpr int size = group_size;               // weights per entry
    static constexpr int levels = size == 8 ? 3 : 8;      // codes 0..levels-1 stand for 1, 3, 5, ...
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

// The least of all lanes, in every lane.
LQ_INLINE vf least_of(vf v) {
#if LQ_LANES >= 16
    v = smaller(v, look_up(v, lane_numbers() ^ 8));
#endif
#if LQ_LANES >= 8
    v = smaller(v, look_up(v, lane_numbers() ^ 4));
#endif
    v = smaller(v, look_up(v, lane_numbers() ^ 2));
    return smaller(v, look_up(v, lane_numbers() ^ 1));
}

constexpr float largest_float = 3.402823466e+38f;

// For one group: root * (scale * level - x)^2 at each place of its weights' tables. `scaled`: scale * level there.
template <class Grid>
LQ_INLINE void fill_tables(const float* x, const float* root, const vf* scaled, vf* table) {
    const vi spread = lane_numbers() / Grid::per;
    for (int t = 0; t < Grid::tables; ++t) {
        const int first = t * lanes / Grid::per;
        const vf off = scaled[lanes < Grid::per ? t % 2 : 0] - look_up(load(x + first), spread);
        table[t] = look_up(load(root + first), spread) * off * off;
    }
}

// Errors of the neighbours at `lookup`, ggml's additions in ggml's order; one that is not finite becomes the largest
// float, at which ggml's search begins.
template <class Grid>
LQ_INLINE vf errors_of(const vf* table, const uint32_t* lookup) {
    vi codes;
    __builtin_memcpy(&codes, lookup, sizeof codes);
    vf error;
    for (int i = 0; i < Grid::size; ++i) {
        const vi at = codes >> (4 * i);
        vf term;
        if constexpr (lanes < Grid::per) {
            term = select((at & 4) != 0, look_up(table[2 * i + 1], at), look_up(table[2 * i], at));
        } else {
            term = look_up(table[i * Grid::per / lanes], at);
        }
        error = i == 0 ? term : error + term;
    }
    return smaller(error, splat(largest_float));
}

// Which of `count` neighbours has the least error, the first one of equal ones: `chunks` vectors of them ...
template <class Grid, int chunks>
LQ_INLINE uint32_t nearest_of(const vf* table, const uint32_t* lookup, int32_t count) {
    static_assert(chunks * lanes <= 64, "a bit for each neighbour");
    vf error[chunks];
    for (int c = 0; c < chunks; ++c) error[c] = errors_of<Grid>(table, lookup + c * lanes);
    vf& last = error[chunks - 1];
    last = select(lane_numbers() < count - (chunks - 1) * lanes, last, splat(largest_float));
    vf least = error[0];
    for (int c = 1; c < chunks; ++c) least = smaller(error[c], least);
    least = least_of(least);
    uint64_t hits = 0;
    for (int c = 0; c < chunks; ++c) hits |= uint64_t{equal_bits(error[c], least)} << (c * lanes);
    return static_cast<uint32_t>(__builtin_ctzll(hits));
}

// ... or any number.
template <class Grid>
LQ_INLINE uint32_t nearest_of_many(const vf* table, const uint32_t* lookup, int32_t count) {
    vf best = splat(largest_float);
    vi position = lane_numbers();
    for (int32_t done = 0; done < count; done += lanes) {
        const vf error = errors_of<Grid>(table, lookup + done);
        const vi number = lane_numbers() + done;
        const vi better = (error < best) & (number < count);
        best = select(better, error, best);
        position = select(better, number, position);
    }
    alignas(64) int32_t at[lanes];
    store(at, position);
    uint32_t hits = equal_bits(best, least_of(best));
    int32_t first = at[__builtin_ctz(hits)];
    while ((hits &= hits - 1) != 0) {
        const int32_t other = at[__builtin_ctz(hits)];
        first = other < first ? other : first;
    }
    return static_cast<uint32_t>(first);
}

// A group whose codes are not on the grid, and its neighbours.
struct Task {
    uint32_t begin;
    uint16_t count;
    uint8_t lane, group;
};

template <int N, class Grid>
struct alignas(64) Rounded {
    static constexpr int groups = N / Grid::size;
    static constexpr int kinds = 4;  // tasks of 1, 2, 3, 4 vectors of neighbours, and of more
    int32_t point[groups][lanes];
    int32_t word[groups][lanes];
    int32_t off[lanes];                       // bit g: group g was not on the grid
    Task task[kinds + 2][groups * lanes + 1];  // by vectors of neighbours; the first kind has none: it is on the grid
    int32_t tasks[kinds + 2];
};

template <int kind, int N, class Grid>
LQ_INLINE void do_tasks(const lq::Codebook& book, const Sub<N>& s, const float* scale, Rounded<N, Grid>& r) {
    vf level[2];
    for (int i = 0; i < lanes; ++i) {
        level[0][i] = static_cast<float>(2 * (i % Grid::per) + 1);
        level[1][i] = static_cast<float>(2 * ((i + lanes) % Grid::per) + 1);
    }
    for (int32_t t = 0; t < r.tasks[kind]; ++t) {
        const Task task = r.task[kind][t];
        const vf scaled[2] = {scale[task.lane] * level[0], scale[task.lane] * level[1]};
        const int at = task.group * Grid::size;
        vf table[Grid::tables];
        fill_tables<Grid>(s.row_x[task.lane] + at, s.row_root[task.lane] + at, scaled, table);
        const uint32_t* lookup = book.neighbour_lookup + task.begin;
        uint32_t nearest;
        if constexpr (kind <= r.kinds) {
            nearest = nearest_of<Grid, kind>(table, lookup, task.count);
        } else {
            nearest = nearest_of_many<Grid>(table, lookup, task.count);
        }
        r.word[task.group][task.lane] = static_cast<int32_t>(lookup[nearest]);
    }
}

// Words on the grid for the inverse scales. Only groups with a set bit in `wanted` are brought onto it. The groups off it
// are sorted by the number of their neighbours, so that the processor need not guess it each time.
template <int N, class Grid>
LQ_INLINE void round_to_grid(const lq::Codebook& book, const Sub<N>& s, vf inverse, vf scale, const int32_t* wanted,
                             Rounded<N, Grid>& r) {
    for (int g = 0; g < r.groups; ++g) {
        vi point = vi{}, word = vi{};
        for (int i = Grid::size - 1; i >= 0; --i) {
            const vi code = clamp(nearest(0.5f * (inverse * s.x[g * Grid::size + i] - 1.0f)), 0, Grid::levels - 1);
            word = word << 4 | code;
            point = point * Grid::levels + code;
        }
        store(r.point[g], point);
        store(r.word[g], word);
    }
    for (int32_t& number : r.tasks) number = 0;
    for (int k = 0; k < lanes; ++k) {
        int32_t off = 0;
        for (int g = 0; g < r.groups; ++g) {
            const uint32_t* start = book.start + r.point[g][k];
            const uint32_t count = start[1] - start[0];
            off |= static_cast<int32_t>(count != 0) << g;
            const uint32_t vectors = wanted[k] >> g & 1 ? (count + lanes - 1) / lanes : 0;
            const uint32_t kind = vectors > r.kinds ? r.kinds + 1 : vectors;
            r.task[kind][r.tasks[kind]++] = {start[0], static_cast<uint16_t>(count), static_cast<uint8_t>(k),
                                             static_cast<uint8_t>(g)};
        }
        r.off[k] = off;
    }
    alignas(64) float each_scale[lanes];
    store(each_scale, scale);
    do_tasks<1>(book, s, each_scale, r);
    do_tasks<2>(book, s, each_scale, r);
    do_tasks<3>(book, s, each_scale, r);
    do_tasks<4>(book, s, each_scale, r);
    do_tasks<5>(book, s, each_scale, r);
}

// sum w x level and sum w level^2, in order.
template <int N, class Grid>
LQ_INLINE void fit(const Sub<N>& s, const vi* word, vf& cross, vf& square) {
    constexpr int32_t mask = 2 * (Grid::per - 1);
    cross = square = vf{};
    for (int g = 0; g < N / Grid::size; ++g) {
        const vi doubled = word[g] << 1;
        for (int i = 0; i < Grid::size; ++i) {
            const vf level = to_float((doubled >> (4 * i) & mask) | 1);
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
