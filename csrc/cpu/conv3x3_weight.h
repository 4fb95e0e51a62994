// The weight of a 3x3 convolution between memory, whatever its layout, and registers.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// body(from, to) for the elements (y, x) of LANES output channels from o on and LANES input channels from i on: `at`
// their first, w[y][x] what it is in registers.
template <class T, class W, class Body>
FASTDMD_INLINE void each_element(const Conv3x3& a, int64_t o, int64_t i, W (&w)[3][3][LANES], Body body) {
  T* first = static_cast<T*>(a.weight) + o * a.weight_out + i * a.weight_in;
  for (int y = 0; y < 3; ++y)
    for (int x = 0; x < 3; ++x)
      body(first + (a.flipped ? 2 - y : y) * a.weight_y + (a.flipped ? 2 - x : x) * a.weight_x, w[y][x]);
}

// w[y][x][k] = elements (y, x) of LANES output channels from o on and input channel i + k.
template <class T>
void load_weights(const Conv3x3& a, int64_t o, int64_t i, V (&w)[3][3][LANES]) {
  each_element<T>(a, o, i, w, [&](const T* at, V(&out)[LANES]) {
    if (a.weight_in == 1) {
      for (int lane = 0; lane < LANES; ++lane) out[lane] = load_vector(at + lane * a.weight_out);
      transpose(out);
      return;
    }
    for (int k = 0; k < LANES; ++k, at += a.weight_in)
      if (a.weight_out == 1)
        out[k] = load_vector(at);
      else
        for (int lane = 0; lane < LANES; ++lane) out[k][lane] = load(at[lane * a.weight_out]);
  });
}

// What load_weights loads. Overwrites w.
template <class T>
void store_weights(const Conv3x3& a, int64_t o, int64_t i, V (&w)[3][3][LANES]) {
  each_element<T>(a, o, i, w, [&](T* at, V(&in)[LANES]) {
    if (a.weight_in == 1) {
      transpose(in);
      for (int lane = 0; lane < LANES; ++lane) store_vector(at + lane * a.weight_out, in[lane]);
      return;
    }
    for (int k = 0; k < LANES; ++k, at += a.weight_in) {
      T lanes[LANES];
      store_vector(lanes, in[k]);
      for (int lane = 0; lane < LANES; ++lane) at[lane * a.weight_out] = lanes[lane];
    }
  });
}

}  // namespace
}  // namespace fastdmd::FASTDMD_ISA
