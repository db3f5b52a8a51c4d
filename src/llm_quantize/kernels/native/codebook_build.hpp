// Builds codebooks: for every point that is not on the grid, the entries at the `wanted` smallest distances, nearest
// first and of equally near ones the lower number first. Compiled once, not per level (registry.hpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "codebook.hpp"

namespace lq {

class CodebookArrays {
public:
    // `codes` (size, per): size <= 32767 and every code below `levels`; (per, levels) is (8, 3) or (4, 8).
    CodebookArrays(const uint8_t* codes, int32_t size, int32_t per, int32_t levels, int32_t wanted) {
        const int32_t bits = levels == 3 ? 2 : 3;
        const int32_t half = per / 2, half_points = power(levels, half);
        points_ = half_points * half_points;
        size_ = size;
        per_ = per;
        levels_ = levels;
        entry_word_.assign(static_cast<size_t>(size), 0);
        index_.assign(static_cast<size_t>(points_), -1);
        word_.assign(static_cast<size_t>(points_), 0);
        start_.assign(static_cast<size_t>(points_) + 1, 0);
        for (int32_t k = 0; k < size; ++k) {
            int32_t point = 0;
            uint32_t word = 0;
            for (int32_t i = per - 1; i >= 0; --i) {
                point = point * levels + codes[k * per + i];
                word = word << bits | codes[k * per + i];
            }
            entry_word_[static_cast<size_t>(k)] = static_cast<uint16_t>(word);
            index_[static_cast<size_t>(point)] = static_cast<int16_t>(k);
        }
        for (int32_t point = 0; point < points_; ++point) {
            uint32_t word = 0;
            for (int32_t i = 0, rest = point; i < per; ++i, rest /= levels) word |= uint32_t(rest % levels) << (bits * i);
            word_[static_cast<size_t>(point)] = static_cast<uint16_t>(word);
        }
        // The distance of a point is that of its first half of codes plus that of its second half.
        const std::vector<uint8_t> low = distances(codes, 0, half), high = distances(codes, half, half);
        std::vector<uint8_t> distance(static_cast<size_t>(size));
        for (int32_t point = 0; point < points_; ++point) {
            if (index_[static_cast<size_t>(point)] < 0) {
                const uint8_t* a = low.data() + point % half_points * size;
                const uint8_t* b = high.data() + point / half_points * size;
                for (int32_t k = 0; k < size; ++k) distance[static_cast<size_t>(k)] = static_cast<uint8_t>(a[k] + b[k]);
                append(distance, wanted);
            }
            start_[static_cast<size_t>(point) + 1] = static_cast<uint32_t>(neighbour_word_.size());
        }
        neighbour_word_.resize(neighbour_word_.size() + 32, 0);
        const uint32_t mask = (1u << bits) - 1;
        neighbour_lookup_.reserve(neighbour_word_.size());
        for (const uint16_t word : neighbour_word_) {
            uint32_t lookup = 0;
            for (int32_t i = 0; i < per; ++i) {
                const uint32_t place = bits == 2 ? uint32_t(i % 4) << 2 : uint32_t(i % 2) << 3;
                lookup |= ((uint32_t{word} >> (bits * i) & mask) | place) << (4 * i);
            }
            neighbour_lookup_.push_back(lookup);
        }
    }

    Codebook view() const {
        return {size_,         per_,         levels_,       points_,
                entry_word_.data(), index_.data(), word_.data(), start_.data(), neighbour_word_.data(),
                neighbour_lookup_.data()};
    }

private:
    static int32_t power(int32_t base, int32_t exponent) {
        int32_t result = 1;
        for (int32_t i = 0; i < exponent; ++i) result *= base;
        return result;
    }

    // [half point][entry]: sum of the squared differences of the codes first, first + 1, ... At most 4 * 49 in all.
    std::vector<uint8_t> distances(const uint8_t* codes, int32_t first, int32_t count) const {
        const int32_t half_points = power(levels_, count);
        std::vector<uint8_t> result(static_cast<size_t>(half_points) * static_cast<size_t>(size_));
        for (int32_t p = 0; p < half_points; ++p) {
            uint8_t* const of_point = result.data() + static_cast<size_t>(p) * static_cast<size_t>(size_);
            for (int32_t i = 0, rest = p; i < count; ++i, rest /= levels_) {
                const int32_t code = rest % levels_;
                for (int32_t k = 0; k < size_; ++k) {
                    const int32_t off = codes[k * per_ + first + i] - code;
                    of_point[k] = static_cast<uint8_t>(of_point[k] + off * off);
                }
            }
        }
        return result;
    }

    void append(const std::vector<uint8_t>& distance, int32_t wanted) {
        const uint8_t* const begin = distance.data();
        const uint8_t* const end = begin + distance.size();
        uint8_t base = 0;  // distances below are done with
        for (int32_t round = 0; round < wanted; ++round) {
            // The smallest distance from `base` on; smaller ones wrap around to large ones. (No distance is above 196.)
            uint8_t least = 255;
            for (const uint8_t* p = begin; p != end; ++p) {
                const auto above = static_cast<uint8_t>(*p - base);
                least = above < least ? above : least;
            }
            if (least >= 255 - base) return;
            const auto next = static_cast<uint8_t>(base + least);
            const uint8_t* p = begin;
            while (p != end && (p = static_cast<const uint8_t*>(std::memchr(p, next, static_cast<size_t>(end - p))))) {
                neighbour_word_.push_back(entry_word_[static_cast<size_t>(p++ - begin)]);
            }
            base = static_cast<uint8_t>(next + 1);
        }
    }

    int32_t size_ = 0, per_ = 0, levels_ = 0, points_ = 0;
    std::vector<uint16_t> entry_word_, word_, neighbour_word_;
    std::vector<int16_t> index_;
    std::vector<uint32_t> start_, neighbour_lookup_;
};

}  // namespace lq
