// The loops of GPTQ where eight neighbouring codes are chosen together: feedback inside one block of columns, and sweeps
// of descent over whole rows.
//
// Legend: as in feedback.hpp; a word is the codes of eight weights, S its metric, aim = S t for the levels t that it should
// come near to. The meaning is kernels/reference/words.py, equal bit for bit: products and sums are rounded apart, from
// the first weight of a word to the last. Words are searched for one row at a time, with one entry of the book, or one
// pattern of signs, per lane.
#pragma once

#include "feedback.hpp"

namespace {

constexpr int word_size = 8;
constexpr int search_rounds = 2;
constexpr float no_cost = __builtin_inff();

// One row's word while it is searched.
struct alignas(64) Word {
    float metric[word_size][word_size];
    bool apart;  // nothing but zeros off the diagonal: what would be added for them is 0
    float aim[word_size];
    float sign[word_size];
    float level[word_size];
    uint8_t code[word_size];  // of the levels with a positive sign
};

// The least of the costs seen, one lane each, and the first place where it was.
struct Least {
    vf cost = splat(no_cost);
    vi place = vi{};

    [[gnu::always_inline]] void see(vf seen, vi at) {
        const vi better = seen < cost;
        cost = select(better, seen, cost);
        place = select(better, at, place);
    }

    [[gnu::always_inline]] int32_t first() const {
        alignas(64) float costs[lanes];
        alignas(64) int32_t places[lanes];
        store(costs, cost);
        store(places, place);
        int32_t at = 0;
        float least = no_cost;
        for (int i = 0; i < lanes; ++i) {
            if (costs[i] < least || (costs[i] == least && places[i] < at)) {
                least = costs[i];
                at = places[i];
            }
        }
        return least < no_cost ? at : 0;
    }
};

LQ_INLINE vi lane_places() {
    vi v;
    for (int i = 0; i < lanes; ++i) v[i] = i;
    return v;
}

// The entry that costs least in the `size` weights from `first` on.
template <int size, bool apart>
LQ_INLINE int32_t best_entry(const lq::WordBook& book, const Word& word, int first) {
    vf linear[size], pair[size][size];
    for (int i = 0; i < size; ++i) {
        const int at = first + i;
        float own = word.aim[at];
        for (int j = 0; j < word_size; ++j) {
            if (j < first || j >= first + size) own = own - word.metric[at][j] * word.level[j];
        }
        linear[i] = splat(word.sign[at] * (-2.0f * own));
        for (int j = 0; j < i; ++j) {
            pair[i][j] = splat(word.sign[at] * word.sign[first + j] * (2.0f * word.metric[at][first + j]));
        }
        pair[i][i] = splat(word.metric[at][at]);
    }
    Least least;
    const vi places = lane_places();
    for (int64_t entry = 0; entry < book.entry_count; entry += lanes) {
        vf level[size], total = vf{};
        for (int i = 0; i < size; ++i) {
            level[i] = load(book.entries + i * book.entry_count + entry);
            vf term = linear[i];
            for (int j = apart ? i : 0; j <= i; ++j) term += pair[i][j] * level[j];
            total += level[i] * term;
        }
        least.see(total, places + static_cast<int32_t>(entry));
    }
    return least.first();
}

// The pattern of signs that costs least over the magnitudes of the levels.
template <bool apart>
LQ_INLINE int32_t best_signs(const lq::WordBook& book, const Word& word) {
    vf linear[word_size], pair[word_size][word_size];
    for (int i = 0; i < word_size; ++i) {
        const float magnitude = __builtin_fabsf(word.level[i]);
        linear[i] = splat(-2.0f * word.aim[i] * magnitude);
        for (int j = 0; j < i; ++j) {
            pair[i][j] = splat(2.0f * word.metric[i][j] * magnitude * __builtin_fabsf(word.level[j]));
        }
    }
    Least least;
    const vi places = lane_places();
    for (int64_t pattern = 0; pattern < book.sign_count; pattern += lanes) {
        vf sign[word_size], total = vf{};
        for (int i = 0; i < word_size; ++i) {
            sign[i] = load(book.signs + i * book.sign_count + pattern);
            vf term = linear[i];
            for (int j = 0; j < i && !apart; ++j) term += pair[i][j] * sign[j];
            total += sign[i] * term;
        }
        least.see(total, places + static_cast<int32_t>(pattern));
    }
    return least.first();
}

template <int size, bool apart>
LQ_INLINE void take_entry(const lq::WordBook& book, Word& word, int first) {
    const int64_t entry = best_entry<size, apart>(book, word, first);
    for (int i = 0; i < size; ++i) {
        word.level[first + i] = word.sign[first + i] * book.entries[i * book.entry_count + entry];
        word.code[first + i] = book.codes[i * book.entry_count + entry];
    }
}

// By turns the best entry for the signs and the best signs for the entry, from the signs and levels that stand in `word`.
template <bool apart>
static inline void search_rounds_of(const lq::WordBook& book, Word& word) {
    for (int round = 0; round < search_rounds; ++round) {
        if (book.size == word_size) {
            take_entry<word_size, apart>(book, word, 0);
        } else {
            take_entry<word_size / 2, apart>(book, word, 0);
            take_entry<word_size / 2, apart>(book, word, word_size / 2);
        }
        if (book.signs == nullptr) return;
        const int64_t pattern = best_signs<apart>(book, word);
        bool turned = false;
        for (int i = 0; i < word_size; ++i) {
            const float sign = book.signs[i * book.sign_count + pattern];
            turned = turned || sign != word.sign[i];
            word.sign[i] = sign;
            word.level[i] = sign * __builtin_fabsf(word.level[i]);
        }
        if (!turned && (apart || book.size == word_size)) return;  // another round would find the same
    }
}

LQ_INLINE void search_word(const lq::WordBook& book, Word& word) {
    word.apart ? search_rounds_of<true>(book, word) : search_rounds_of<false>(book, word);
}

LQ_INLINE bool is_apart(const float (&metric)[word_size][word_size]) {
    bool apart = true;
    for (int i = 0; i < word_size; ++i) {
        for (int j = 0; j < i; ++j) apart = apart && metric[i][j] == 0.0f && metric[j][i] == 0.0f;
    }
    return apart;
}

// The cost of levels, up to what no word changes.
LQ_INLINE float cost_of(const Word& word, const float* level) {
    float total = 0.0f;
    for (int i = 0; i < word_size; ++i) {
        float term = -2.0f * word.aim[i];
        for (int j = 0; j < i; ++j) term += 2.0f * word.metric[i][j] * level[j];
        term += word.metric[i][i] * level[i];
        total += level[i] * term;
    }
    return total;
}

// aim = S x
LQ_INLINE void aim_at(Word& word, const float* x) {
    for (int i = 0; i < word_size; ++i) {
        float total = 0.0f;
        for (int j = 0; j < word_size; ++j) total += word.metric[i][j] * x[j];
        word.aim[i] = total;
    }
}

LQ_INLINE uint8_t stored_code(const lq::FrozenGrid& grid, const lq::WordBook& book, const Word& word, int i) {
    const bool turned = book.signs != nullptr && word.level[i] < 0.0f;
    return turned ? static_cast<uint8_t>(grid.level_count - 1 - word.code[i]) : word.code[i];
}

LQ_INLINE float value_of(float scale, const float* offset, float level) {
    const float value = scale * level;
    return offset == nullptr ? value : value - *offset;
}

// One word of one row during feedback: columns from `start` on.
LQ_INLINE void feed_word(const lq::FrozenGrid& grid, const lq::WordBook& book, const lq::ColumnBlock& block,
                         const float* metric, int64_t start, int64_t row) {
    const int64_t rows = block.rows, at = grid.group[start] * rows + row;
    const float* offset = grid.offset == nullptr ? nullptr : grid.offset + at;
    float moved[word_size], x[word_size];
    Word word;
    __builtin_memcpy(word.metric, metric, sizeof word.metric);
    word.apart = is_apart(word.metric);
    int32_t clipped = 0;
    for (int i = 0; i < word_size; ++i) {
        const int64_t place = (start + i) * rows + row;
        const float* own = block.coupling + (start + i) * block.coupling_stride + start;
        moved[i] = block.target[place] - block.weight[place];
        for (int j = 0; j < i; ++j) moved[i] -= own[j] * moved[j];
        const float wanted = block.weight[place] + moved[i];
        x[i] = (offset == nullptr ? wanted : wanted + *offset) * grid.inverse[at];
        clipped += x[i] < grid.lowest || x[i] > grid.highest;
        word.level[i] = x[i];
        word.sign[i] = book.signs != nullptr && x[i] < 0.0f ? -1.0f : 1.0f;
    }
    block.counts[row] += clipped;
    aim_at(word, x);
    search_word(book, word);
    for (int i = 0; i < word_size; ++i) {
        const int64_t place = (start + i) * rows + row;
        block.codes[place] = stored_code(grid, book, word, i);
        block.residual[place] = block.weight[place] - value_of(grid.scale[at], offset, word.level[i]);
    }
}

// `metrics`: (words, 8, 8). The target is handed on in place.
void feed_words(const lq::FrozenGrid& grid, const lq::WordBook& book, const float* metrics, float* target,
                const lq::ColumnBlock& block) {
    const int64_t rows = block.rows;
    for (int64_t start = 0; start < block.columns; start += word_size) {
        const float* metric = metrics + start * word_size;
        for (int64_t row = 0; row < rows; ++row) feed_word(grid, book, block, metric, start, row);
        for (int64_t k = start + word_size; k < block.columns; ++k) {
            const float* c = block.coupling + k * block.coupling_stride + start;
            for (int64_t row = 0; row < rows; row += lanes) {
                vf sum = load(target + k * rows + row);
                for (int i = 0; i < word_size; ++i) sum += load(block.residual + (start + i) * rows + row) * c[i];
                store(target + k * rows + row, sum);
            }
        }
    }
}

// p[k] += change[0] * q[0][k] + ... in order
LQ_INLINE void add_multiples(float* p, const float* change, const float* q, int64_t count) {
    int64_t k = 0;
    for (; k + lanes <= count; k += lanes) {
        vf sum = load(p + k);
        for (int i = 0; i < word_size; ++i) sum += load(q + i * count + k) * change[i];
        store(p + k, sum);
    }
    for (; k < count; ++k) {
        for (int i = 0; i < word_size; ++i) p[k] += q[i * count + k] * change[i];
    }
}

// One word of one row during descent; whether it moved.
LQ_INLINE bool descend_word(const lq::FrozenGrid& grid, const lq::WordBook& book, const lq::Descent& work,
                            const DescentRow& row, int64_t start) {
    const int32_t group = grid.group[start];
    const float inverse = row.inverse[group];
    const float* offset = row.offset == nullptr ? nullptr : row.offset + group;
    float now[word_size], change[word_size];
    Word word;
    for (int i = 0; i < word_size; ++i) {
        __builtin_memcpy(word.metric[i], work.hessian + (start + i) * work.columns + start, sizeof word.metric[i]);
        now[i] = grid.levels[row.codes[start + i]];
        word.level[i] = now[i];
        word.sign[i] = book.signs != nullptr && now[i] < 0.0f ? -1.0f : 1.0f;
    }
    word.apart = is_apart(word.metric);
    aim_at(word, now);
    for (int i = 0; i < word_size; ++i) word.aim[i] += row.gradient[start + i] * inverse;
    search_word(book, word);
    if (!(cost_of(word, word.level) < cost_of(word, now))) return false;
    for (int i = 0; i < word_size; ++i) {
        const int64_t j = start + i;
        const float after = row.weight[j] - value_of(row.scale[group], offset, word.level[i]);
        change[i] = after - row.residual[j];
        row.residual[j] = after;
        row.codes[j] = stored_code(grid, book, word, i);
    }
    add_multiples(row.gradient, change, work.hessian + start * work.columns, work.columns);
    return true;
}

// One sweep over the active rows; blocks of columns are the outer loop, as in descend_rows. The loop stands here again:
// shared through a function object it made that of single codes 18 % slower.
void descend_words(const lq::FrozenGrid& grid, const lq::WordBook& book, const lq::Descent& work) {
    for (int64_t from = 0; from < work.columns; from += most_columns) {
        const int64_t to = from + most_columns < work.columns ? from + most_columns : work.columns;
        for (int64_t r = 0; r < work.rows; ++r) {
            if (!work.active[r]) continue;
            const int64_t groups = r * work.groups, at = r * work.columns;
            const DescentRow row{grid.scale + groups, grid.inverse + groups,
                                 grid.offset == nullptr ? nullptr : grid.offset + groups,
                                 work.weight + at, work.gradient + at, work.residual + at, work.codes + at};
            for (int64_t start = from; start < to; start += word_size) {
                work.counts[r] += descend_word(grid, book, work, row, start);
            }
        }
    }
}

}  // namespace
