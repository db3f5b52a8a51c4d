// IQ1_S and IQ1_M with ggml's bytes: 1.56 and 1.75 bits per weight, ternary codes on a grid of 2048 points.
//
// (1) blocks of 32 or 16 weights, one per lane: the search for scale, shift and codes; (2) each eight codes, one at a
// time: the entry of the grid; (3) one block per lane again: the scale for those that had to move; (4) the superblocks.
#include "iq1_search.hpp"

namespace {

constexpr int eights = superblock / 8;

// What the searches say of a batch of superblocks.
struct alignas(64) Fitted {
    float weight[batch * superblock];
    float scale[batch * 16];
    int32_t shift[batch * 16];
    uint16_t word[batch * eights];   // codes of the entries
    uint16_t entry[batch * eights];  // their numbers
};

// The level of code c is c plus this.
LQ_INLINE float lowest_level(int32_t minus) { return minus ? -1.125f : -0.875f; }

// Weights of the batch: x^2, or importance * sqrt(twice the mean square of the superblock + x^2).
static inline void weigh_all(const Batch& b, float* weight) {
    if (b.importance[0] == nullptr) {
        for (int i = 0; i < b.count * superblock; i += lanes) store(weight + i, load(b.x + i) * load(b.x + i));
        return;
    }
    alignas(64) float sum[batch];
    sums_of_squares(b, sum);
    for (int s = 0; s < b.count; ++s) {
        const vf mean = splat(2.0f * sum[s] / 256.0f);
        const float *x = b.x + s * superblock, *importance = b.importance[s];
        float* to = weight + s * superblock;
        for (int i = 0; i < superblock; i += lanes) {
            store(to + i, load(importance + i) * square_root(mean + load(x + i) * load(x + i)));
        }
    }
}

// Codes of sorted blocks as words of 2 bits per weight, in the order in which the weights came: 16 in each vector.
template <int n>
LQ_INLINE void code_words(const Sorted<n>& sorted, vi choice, vi* word) {
    const vi first = choice >> 16, second = choice >> 8 & 255;
    for (int k = 0; k < n / 16; ++k) word[k] = vi{};
    for (int i = 0; i < n; ++i) {
        const vi code = -((first <= i) + (second <= i));
        const vi placed = code << (sorted.from[i] * 2 & 31);
        if (n == 16) {
            word[0] |= placed;
        } else {
            const vi upper = sorted.from[i] >= 16;
            word[0] |= placed & ~upper;
            word[n / 16 - 1] |= placed & upper;
        }
    }
}

// (3) of `lanes` blocks: the least-squares scale for the words, where it is positive.
template <int n>
LQ_INLINE vf refit(const vf* x, const vf* w, const vi* word, const vf* lowest, vf scale) {
    vf cross = vf{}, square = vf{};
    for (int i = 0; i < n; ++i) {
        const vf level = to_float(word[i / 16] >> (i % 16 * 2) & 3) + lowest[i / (n == 32 ? 32 : 8)];
        const vf wl = w[i] * level;
        cross += wl * x[i];
        square += wl * level;
    }
    return select((cross > 0.0f) & (square > 0.0f), cross / square, scale);
}

// (2) of `lanes` blocks: words that are not on the grid become those of their nearest neighbours. Gives -1 if there is
// such a word, and says in which lanes.
template <int n>
static inline int32_t move_to_grid(const lq::Codebook& book, const float* const* x, const float* const* w,
                                   const float* scale, const int32_t* shift, const int32_t* dead,
                                   int32_t (*words)[lanes], int32_t* off_grid) {
    int32_t moved = 0;
    for (int k = 0; k < lanes; ++k) {
        off_grid[k] = 0;
        for (int g = 0; g < n / 8 && !dead[k]; ++g) {
            const auto codes = static_cast<uint32_t>(words[g / 2][k]) >> (g % 2 * 16) & 0xffffu;
            const uint32_t point = point_of(codes);
            if (book.index[point] >= 0) continue;
            const float lowest = lowest_level(n == 32 ? shift[k] : shift[k] >> (1 - g) & 1);
            const uint32_t nearest = nearest_neighbour(book, point, x[k] + 8 * g, w[k] + 8 * g, scale[k], lowest);
            words[g / 2][k] ^= static_cast<int32_t>((codes ^ nearest) << (g % 2 * 16));
            off_grid[k] = -1;
        }
        moved |= off_grid[k];
    }
    return moved;
}

// Searches `lanes` blocks of n weights from number `first` of the batch on. n = 32: one shift bit; 16: one per half.
template <class Sums>
static inline void fit_blocks(const lq::Codebook& book, const Batch& b, int first, float smallest, Fitted& out) {
    constexpr int n = Sums::n, per = n / 8, groups = n / 16;
    const int last = b.count * (superblock / n) - 1;
    const float *x_rows[lanes], *w_rows[lanes];
    for (int k = 0; k < lanes; ++k) {
        const int block = first + k < last ? first + k : last;
        x_rows[k] = b.x + block * n;
        w_rows[k] = out.weight + block * n;
    }
    vf x[n], w[n];
    load_transposed(x_rows, n, x);
    load_transposed(w_rows, n, w);
    vf largest = vf{};
    for (int i = 0; i < n; ++i) largest = larger(largest, absolute(x[i]));

    Sorted<n> sorted;
    sorted.sort(x, w);
    const Best best = search(Sums(sorted));
    const vi dead = (largest < smallest) | (best.choice < 0);
    const vi flipped = best.scale < 0.0f;
    vf scale = select(dead, vf{}, absolute(best.scale));
    const vi shift = select(dead, vi{}, (best.choice & 255) ^ (flipped & (n == 32 ? 1 : 3)));
    vi word[groups];
    code_words(sorted, best.choice, word);
    // 2 - code: the high bit changes where the low one is not set.
    for (int k = 0; k < groups; ++k) word[k] = select(flipped, word[k] ^ ((~word[k] & 0x55555555) << 1), word[k]);

    alignas(64) int32_t words[groups][lanes], off_grid[lanes], shifts[lanes], dead_lane[lanes];
    alignas(64) float scales[lanes];
    for (int k = 0; k < groups; ++k) __builtin_memcpy(words[k], &word[k], sizeof words[k]);
    __builtin_memcpy(shifts, &shift, sizeof shifts);
    __builtin_memcpy(dead_lane, &dead, sizeof dead_lane);
    store(scales, scale);
    const int32_t moved = move_to_grid<n>(book, x_rows, w_rows, scales, shifts, dead_lane, words, off_grid);
    if (moved != 0) {
        vi off;
        __builtin_memcpy(&off, off_grid, sizeof off);
        for (int k = 0; k < groups; ++k) __builtin_memcpy(&word[k], words[k], sizeof words[k]);
        vf lowest[2];
        for (int h = 0; h < 2; ++h) {
            const vi minus = n == 32 ? -(shift & 1) : -(shift >> (1 - h) & 1);
            lowest[h] = select(minus, splat(-1.125f), splat(-0.875f));
        }
        scale = select(off, refit<n>(x, w, word, lowest, scale), scale);
    }
    store(scales, select(scale == scale, scale, vf{}));
    for (int k = 0; k < lanes && first + k <= last; ++k) {
        out.scale[first + k] = scales[k];
        out.shift[first + k] = shifts[k];
        for (int g = 0; g < per; ++g) {
            const auto codes = static_cast<uint32_t>(words[g / 2][k]) >> (g % 2 * 16) & 0xffffu;
            const int to = (first + k) * per + g;
            out.word[to] = dead_lane[k] ? book.entry_word[0] : static_cast<uint16_t>(codes);
            out.entry[to] = dead_lane[k] ? uint16_t{0} : static_cast<uint16_t>(book.index[point_of(codes)]);
        }
    }
}

// The steps 0..7 of the sub-scales of one superblock and their unit; false if all of them are 0.
template <int count>
LQ_INLINE bool take_steps(const float* scale, int32_t* step, float& unit) {
    float most = 0.0f;
    for (int i = 0; i < count; ++i) most = most > scale[i] ? most : scale[i];
    for (int i = 0; i < count; ++i) step[i] = 0;
    unit = 0.0f;
    if (most == 0.0f) return false;
    unit = most / 15.0f;
    const float inverse = 1.0f / unit;
    for (int i = 0; i < count; ++i) {
        const int32_t l = nearest(0.5f * (inverse * scale[i] - 1.0f));
        step[i] = l < 0 ? 0 : l > 7 ? 7 : l;
    }
    return true;
}

void quantize_iq1_s(const lq::Codebook& book, const float* x, int64_t rows, int64_t cols, const float* importance,
                    uint8_t* out) {
    constexpr int per = superblock / 32;
    for_batches(x, rows, cols, importance, [&](const Batch& b, int64_t from) {
        Fitted f;
        weigh_all(b, f.weight);
        for (int first = 0; first < b.count * per; first += lanes) fit_blocks<Whole>(book, b, first, 1e-12f, f);
        for (int s = 0; s < b.count; ++s) {
            uint8_t* q = out + (from + s) * 50;
            int32_t step[per];
            float unit;
            const bool some = take_steps<per>(f.scale + s * per, step, unit);
            store_half(q, float_to_half(unit * 1.125f));
            for (int block = 0; block < per; ++block) {
                const uint16_t* entry = f.entry + s * eights + block * 4;
                uint32_t word = some ? static_cast<uint32_t>(step[block] | f.shift[s * per + block] << 3) << 12 : 0u;
                for (int g = 0; g < 4; ++g) {
                    q[2 + 4 * block + g] = static_cast<uint8_t>(entry[g]);
                    word |= static_cast<uint32_t>(entry[g] >> 8) << (3 * g);
                }
                store_half(q + 34 + 2 * block, static_cast<uint16_t>(word));
            }
        }
    });
}

// The least-squares unit of `lanes` superblocks for their codes and steps (a step of 2 s + 1 units), one per lane.
LQ_INLINE vf refit_units(const Batch& b, const Fitted& f, const int32_t* step, int first, vf unit) {
    int superblocks[lanes];
    for (int k = 0; k < lanes; ++k) superblocks[k] = first + k < b.count ? first + k : b.count - 1;
    vf cross = vf{}, square = vf{};
    for (int block = 0; block < 16; ++block) {
        const float *x_rows[lanes], *w_rows[lanes];
        vi odd, words, minus;
        for (int k = 0; k < lanes; ++k) {
            const int number = superblocks[k] * 16 + block;
            x_rows[k] = b.x + number * 16;
            w_rows[k] = f.weight + number * 16;
            odd[k] = 2 * step[number] + 1;
            words[k] = f.word[2 * number] | f.word[2 * number + 1] << 16;
            minus[k] = f.shift[number];
        }
        vf x[16], w[16];
        load_transposed(x_rows, 16, x);
        load_transposed(w_rows, 16, w);
        for (int i = 0; i < 16; ++i) {
            const vf lowest = select(-(minus >> (1 - i / 8) & 1), splat(-1.125f), splat(-0.875f));
            const vf level = (to_float(words >> (2 * i) & 3) + lowest) * to_float(odd);
            const vf wl = w[i] * level;
            cross += wl * x[i];
            square += wl * level;
        }
    }
    return select(square > 0.0f, cross / square, unit);
}

void quantize_iq1_m(const lq::Codebook& book, const float* x, int64_t rows, int64_t cols, const float* importance,
                    uint8_t* out) {
    constexpr int per = superblock / 16;
    for_batches(x, rows, cols, importance, [&](const Batch& b, int64_t from) {
        Fitted f;
        alignas(64) int32_t step[batch * per];
        alignas(64) float unit[batch] = {};
        bool some[batch];
        weigh_all(b, f.weight);
        for (int first = 0; first < b.count * per; first += lanes) fit_blocks<Halves>(book, b, first, 1e-7f, f);
        for (int s = 0; s < b.count; ++s) some[s] = take_steps<per>(f.scale + s * per, step + s * per, unit[s]);
        for (int first = 0; first < b.count; first += lanes) {
            store(unit + first, refit_units(b, f, step, first, load(unit + first)));
        }
        for (int s = 0; s < b.count; ++s) {
            uint8_t* q = out + (from + s) * 56;
            const uint16_t* entry = f.entry + s * eights;
            const uint32_t half = some[s] ? float_to_half(unit[s] * 1.1125f) : 0u;
            uint32_t word[4];
            for (int k = 0; k < 4; ++k) word[k] = (half >> (4 * k) & 15u) << 12;
            for (int block = 0; block < per; ++block) {
                const int32_t minus = some[s] ? f.shift[s * per + block] : 0;
                word[block / 4] |= static_cast<uint32_t>(step[s * per + block]) << (3 * (block % 4));
                q[2 * block] = static_cast<uint8_t>(entry[2 * block]);
                q[2 * block + 1] = static_cast<uint8_t>(entry[2 * block + 1]);
                q[32 + block] = static_cast<uint8_t>(entry[2 * block] >> 8 | (entry[2 * block + 1] >> 8) << 4 |
                                                     (minus & 2) << 2 | (minus & 1) << 7);
            }
            for (int k = 0; k < 4; ++k) store_half(q + 48 + 2 * k, static_cast<uint16_t>(word[k]));
        }
    });
}

}  // namespace

LQ_FAMILY(iq1, {"iq1_s", 256, 50, nullptr, quantize_iq1_s}, {"iq1_m", 256, 56, nullptr, quantize_iq1_m})
