// Distribution matching in C++, on memory of one's own: the library of the kernels alone, without torch or Python.
// It draws the noise that `ops.add_noise` draws with the same key on a CPU, bit for bit, and computes what
// `ops.dm_loss` does. The kernels take pieces [begin, end) of the work: threads are the caller's. Headers are of the
// same version.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/instruction_set.h"

using Images = std::vector<float>;  // [B * C * H * W], dense, samples one after the other

constexpr int64_t NUM_SAMPLES = 2, SAMPLE_SIZE = 3 * 32 * 32, SIZE = NUM_SAMPLES * SAMPLE_SIZE;

// x + sigma * noise, the noise a function of the key, as that of `ops.rng_key` is.
Images add_noise(const Images& x, const std::vector<double>& sigma, const fastdmd::RngKey& key) {
  Images x_t(x.size());
  const fastdmd::AddNoise arguments{
      .dtype = fastdmd::Dtype::float32,
      .out_dtype = fastdmd::Dtype::float32,
      .x = x.data(),
      .out = x_t.data(),
      .sigma = sigma.data(),
      .sample_size = SAMPLE_SIZE,
      .key = key,
      .num_channels = 1,  // planes, one after the other
  };
  fastdmd::kernels().add_noise_rng(arguments, 0, NUM_SAMPLES * arguments.num_quads());
  return x_t;
}

// 0.5 * mean(grad^2), grad = (D_fake - D_real) / w, w = mean|x_gen - D_real| of each sample; its gradient is grad /
// SIZE.
double dm_loss(const Images& x_gen, const Images& D_real, const Images& D_fake, Images& gradient) {
  const fastdmd::DMLoss arguments{
      .dtype = fastdmd::Dtype::float32,
      .grad_dtype = fastdmd::Dtype::float32,
      .x_gen = x_gen.data(),
      .real = D_real.data(),
      .fake = D_fake.data(),
      .grad = gradient.data(),
      .factor = 1.0 / SIZE,
  };
  double sum = 0;
  for (int64_t begin = 0; begin < SIZE; begin += SAMPLE_SIZE) {
    const double w = fastdmd::kernels().dm_weight(arguments, begin, begin + SAMPLE_SIZE) / SAMPLE_SIZE;
    sum += fastdmd::kernels().dm_gradient(arguments, begin, begin + SAMPLE_SIZE, std::fmax(w, 1e-6));
  }
  return 0.5 * sum / SIZE;
}

int main() {
  Images x_gen(SIZE), D_real(SIZE), D_fake(SIZE), gradient(SIZE);
  for (int64_t i = 0; i < SIZE; ++i) x_gen[i] = float(std::sin(0.01 * double(i)));
  const Images x_t = add_noise(x_gen, {0.5, 2.0}, {.seed = 7});  // stream, iteration and first sample 0
  for (int64_t i = 0; i < SIZE; ++i) {                           // yours: networks that denoise x_t
    D_real[i] = 0.5f * x_t[i];
    D_fake[i] = 0.75f * x_t[i];
  }
  const double loss = dm_loss(x_gen, D_real, D_fake, gradient);
  std::printf("%s %.9g %.9g %.9g\n", fastdmd::instruction_set(), x_t[SIZE - 1], loss, gradient[SIZE - 1]);

  double w = 0;  // by hand, for the last sample
  for (int64_t i = SAMPLE_SIZE; i < SIZE; ++i) w += std::fabs(x_gen[i] - D_real[i]) / SAMPLE_SIZE;
  const double expected = (D_fake[SIZE - 1] - D_real[SIZE - 1]) / w / SIZE;
  return std::fabs(gradient[SIZE - 1] - expected) < 1e-5 * std::fabs(expected) ? EXIT_SUCCESS : EXIT_FAILURE;
}
