// The tiles that conv3x3 works on, a block at a time: which they are, their transformed inputs, and bringing them
// nearer.
#pragma once

#include "winograd.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// Up to TILE_STEP tiles of a kind.
struct Step {
  const Conv3x3::Tiles* kind = nullptr;
  int64_t first = 0, count = 0;  // of the kind's tiles, those of all images in a row
  uint64_t matrices = 0;         // which there are: bit row * IN + column
};

// The steps from `first` on that are computed at once, before step `end`: at most TILES tiles.
template <class F, int64_t TILES>
struct Block {
  static constexpr int64_t SIZE = Conv3x3::TILE_STEP, MAX_STEPS = TILES / SIZE;
  static constexpr int64_t PRODUCTS = TILES * WIDTH + PAD;  // floats from a matrix of a panel's products to the next
  static constexpr uint64_t ALL = (uint64_t(1) << F::IN * F::IN) - 1;
  const Conv3x3& a;
  Step steps[MAX_STEPS];
  int64_t num_steps = 0;

  Block(const Conv3x3& a, int64_t first, int64_t end) : a(a) {
    const int64_t of_set = a.steps(Conv3x3::SET);
    int64_t image = first / of_set * Conv3x3::SET, before = first / of_set * of_set;  // steps of those before
    for (; num_steps < MAX_STEPS && first + num_steps < end; image += Conv3x3::SET) {
      const int64_t images = image + Conv3x3::SET < a.num_images ? Conv3x3::SET : a.num_images - image;
      for (int k = 0; k < a.num_kinds; ++k) {
        const Conv3x3::Tiles& kind = a.kinds[k];
        const int64_t tiles = images * kind.per_image(), count = a.steps(kind, images);
        for (int64_t step = first + num_steps; num_steps < MAX_STEPS && step < end && step < before + count; ++step) {
          const int64_t start = (step - before) * SIZE;
          steps[num_steps++] = {
              &kind, image * kind.per_image() + start, tiles - start < SIZE ? tiles - start : SIZE, matrices(kind)};
        }
        before += count;
      }
    }
  }

  // visit(has, step, row in the matrices, number of the pixel of all images that it starts at, its row, its column) for
  // all tiles, where has(step, e) says whether a step has matrix e, which of whole tiles is a constant.
  template <class Visit>
  FASTDMD_INLINE void each_tile(Visit visit) const {
    for (int64_t s = 0; s < num_steps; ++s)
      for (int64_t t = 0; t < steps[s].count; ++t)
        at(steps[s], t, [&](int64_t pixel, int64_t top, int64_t left) {
          const int64_t row = s * SIZE + t;
          if (steps[s].matrices == ALL)
            visit([](const Step&, int) { return true; }, steps[s], row, pixel, top, left);
          else
            visit([](const Step& of, int e) { return of.matrices >> e & 1; }, steps[s], row, pixel, top, left);
        });
  }

  // visit(first row, number of rows) for the rows of matrix e that follow each other
  template <class Visit>
  FASTDMD_INLINE void each_run(int e, Visit visit) const {
    for (int64_t s = 0; s < num_steps;) {
      const int64_t first = s * SIZE;
      int64_t count = 0;
      while (s < num_steps && steps[s].matrices >> e & 1 && first + count == s * SIZE) count += steps[s++].count;
      if (count > 0)
        visit(first, count);
      else
        ++s;
    }
  }

  // visit(number of the pixel of all images that tile t of a step starts at, its row, its column)
  template <class Visit>
  FASTDMD_INLINE void at(const Step& step, int64_t t, Visit visit) const {
    const Conv3x3::Tiles& kind = *step.kind;
    const int64_t image = (step.first + t) / kind.per_image(), tile = (step.first + t) % kind.per_image();
    const int64_t top = kind.top + tile / kind.across * F::OUT, left = kind.left + tile % kind.across * F::OUT;
    visit((image * a.height + top) * a.width + left, top, left);
  }

 private:
  static uint64_t matrices(const Conv3x3::Tiles& kind) {
    uint64_t all = 0;
    for (int row = 0; row < F::IN; ++row)
      if (F::points(kind.rows) >> row & 1) all |= F::points(kind.columns) << row * F::IN;
    return all;
  }
};

int64_t rounded_up(int64_t count) { return (count + ROWS - 1) / ROWS * ROWS; }

// The IN^2 matrices of a block of tiles, zeros up to a whole number of ROWS of each step; of a step those that it has.
// Channels that products take at once, `group`, are beside each other. T: of the images.
template <class F, class T>
struct Inputs {
  static constexpr int IN = F::IN;
  const Conv3x3& a;
  const int64_t group, step;  // step: from a matrix to the next
  Scratch matrices;           // [in_channels / group, IN^2, tiles, group], but for what `step` leaves between them
  Scratch zeros;              // [in_channels], of T, whose zero is no bits

  Inputs(const Conv3x3& a, int64_t tiles, int64_t group)
      : a(a),
        group(group),
        step(tiles * group + PAD),
        matrices((a.in_channels + group - 1) / group * IN * IN * step),
        zeros(a.in_channels) {
    for (int64_t i = 0; i < a.in_channels; ++i) zeros.data[i] = 0;
  }

  FASTDMD_INLINE float* at(int e, int64_t tile, int64_t channel) const {
    return matrices.data + (channel / group * IN * IN + e) * step + tile * group + channel % group;
  }

  template <class Tiles>
  void fill(const Tiles& block) {
    const T *x = static_cast<const T*>(a.x), *nothing = reinterpret_cast<const T*>(zeros.data);
    const int64_t depth = a.in_channels, height = a.height, width = a.width, group = this->group, step = this->step;
    block.each_tile([=, this](auto has, const Step& of, int64_t t, int64_t pixel, int64_t top, int64_t left) {
      const T* from[IN][IN];
      for (int64_t y = 0; y < IN; ++y)
        for (int64_t k = 0; k < IN; ++k) {
          const int64_t row = top + y - 1, column = left + k - 1;
          const bool inside = row >= 0 && row < height && column >= 0 && column < width;
          from[y][k] = inside ? x + (pixel + (y - 1) * width + k - 1) * depth : nothing;
        }
      const int64_t rows = of.kind->rows, columns = of.kind->columns;
      const auto channels = [&](int64_t c, float* to) {
        V d[IN][IN], transformed[IN][IN];
#pragma GCC unroll 36
        for (int e = 0; e < IN * IN; ++e) d[e / IN][e % IN] = load_vector(from[e / IN][e % IN] + c);
        if (columns < F::OUT)
#pragma GCC unroll 6
          for (int y = 0; y < IN; ++y) F::complete(columns, d[y]);
        if (rows < F::OUT)
#pragma GCC unroll 6
          for (int k = 0; k < IN; ++k) {
            V column[IN];
#pragma GCC unroll 6
            for (int y = 0; y < IN; ++y) column[y] = d[y][k];
            F::complete(rows, column);
#pragma GCC unroll 6
            for (int y = 0; y < IN; ++y) d[y][k] = column[y];
          }
        on_both_axes<F::input>(d, transformed);
#pragma GCC unroll 36
        for (int e = 0; e < IN * IN; ++e)
          if (has(of, e)) store_vector(to + e * step, transformed[e / IN][e % IN]);
      };
      for (int64_t first = 0; first < depth; first += group) {
        float* to = at(0, t, first);
        for (int64_t c = first; c < depth && c < first + group; c += LANES, to += LANES) channels(c, to);
      }
    });
    for (int64_t s = 0; s < block.num_steps; ++s)
      for (int64_t t = block.steps[s].count; t < rounded_up(block.steps[s].count); ++t)
        for (int e = 0; e < IN * IN; ++e)
          for (int64_t c = 0; c < depth; c += LANES) store_vector(at(e, s * block.SIZE + t, c), V{});
  }
};

// Brings `channels` of the pixels of a block of tiles, and of as many around each as `halo` says, nearer: a few lines
// of the cache at a time, `calls` times.
template <class Tiles, class T>
struct Prefetch {
  static constexpr int64_t LINE = 64;  // bytes
  const Tiles block;
  const char* const images;                // [.., pixel_channels], of T
  const int64_t halo, pixel_bytes, bytes;  // of a pixel, and what of it is meant
  const char* pixel = nullptr;
  int64_t step = 0, tile = 0, row = 0, column = 0, at = 0, at_once = 0;  // the next line; lines

  Prefetch(const Tiles& block, const T* images, int64_t pixel_channels, int64_t channels, int64_t halo, int64_t calls)
      : block(block),
        images(reinterpret_cast<const char*>(images)),
        halo(halo),
        pixel_bytes(pixel_channels * sizeof(T)),
        bytes(channels * sizeof(T)) {
    int64_t pixels = 0;
    for (int64_t s = 0; s < block.num_steps; ++s)
      pixels +=
          block.steps[s].count * (block.steps[s].kind->rows + 2 * halo) * (block.steps[s].kind->columns + 2 * halo);
    at_once = pixels * ((bytes + LINE - 1) / LINE) / calls + 1;
    locate();
  }
  FASTDMD_INLINE void lines() {
    for (int64_t i = 0; i < at_once && step < block.num_steps; ++i) {
      __builtin_prefetch(pixel + at, 0, 2);
      at += LINE;
      if (at >= bytes) next_pixel();
    }
  }

 private:
  FASTDMD_INLINE void next_pixel() {
    const Conv3x3::Tiles& kind = *block.steps[step].kind;
    at = 0;
    pixel += pixel_bytes;
    if (++column < kind.columns + 2 * halo) return;
    column = 0;
    pixel += (block.a.width - kind.columns - 2 * halo) * pixel_bytes;
    if (++row < kind.rows + 2 * halo) return;
    row = 0;
    if (++tile == block.steps[step].count) {
      tile = 0;
      ++step;
    }
    locate();
  }
  void locate() {
    if (step < block.num_steps)
      block.at(block.steps[step], tile, [&](int64_t number, int64_t, int64_t) {
        pixel = images + (number - halo * (block.a.width + 1)) * pixel_bytes;
      });
  }
};

// visit(block, prefetch) for the blocks of up to TILES tiles of steps [begin, end): prefetch brings the next one nearer
// over so many calls.
template <class F, class T, int64_t TILES, class Visit>
FASTDMD_INLINE void each_block(const Conv3x3& a, int64_t begin, int64_t end, int64_t calls, Visit visit) {
  using Tiles = Block<F, TILES>;
  for (int64_t first = begin; first < end; first += Tiles::MAX_STEPS) {
    const Tiles next(a, first + Tiles::MAX_STEPS, end);
    Prefetch<Tiles, T> x(next, static_cast<const T*>(a.x), a.in_channels, a.in_channels, 1, calls);
    Prefetch<Tiles, T> y(next, static_cast<const T*>(a.y), a.y_channels, a.out_channels, 0, calls);
    visit(Tiles(a, first, end), [&] {
      x.lines();
      y.lines();
    });
  }
}

// Calls body<F4 or F2, T>(), as the argument says.
template <class Body>
FASTDMD_INLINE void with_tiles(const Conv3x3& a, Body body) {
  const auto with_filter = [&]<class F>() {
    if (a.dtype == Dtype::bfloat16)
      body.template operator()<F, BFloat16>();
    else
      body.template operator()<F, float>();
  };
  if (a.tile == F4::OUT)
    with_filter.template operator()<F4>();
  else
    with_filter.template operator()<F2>();
}

}  // namespace
}  // namespace fastdmd::FASTDMD_ISA
