// Bindings of philox, noising and losses.
#include <limits>

#include "bindings.h"

namespace fastdmd {
namespace {

using torch::stable::parallel_for;

Tensor philox_words(Tensor counter,  // [N, 4]
                    Tensor key /* [2] */) {
  Tensor words = torch::stable::empty_like(counter);
  const auto* from = static_cast<const int64_t*>(counter.const_data_ptr());
  const auto* with = static_cast<const int64_t*>(key.const_data_ptr());
  auto* to = static_cast<int64_t*>(words.mutable_data_ptr());
  parallel_for(
      0, counter.size(0), GRAIN / 4, [&](int64_t begin, int64_t end) { kernels().philox(from, with, to, begin, end); });
  return words;
}

Tensor noised(const Tensor& x,                     // [B, ...]
              const Tensor& sigma,                 // [B]
              const void* noise,                   // [B, ...], or null
              const int64_t* key,                  // [4], if noise is null
              const std::optional<Tensor>& scale,  // [B]
              ScalarType dtype) {
  Tensor out = empty_like(x, dtype);
  if (x.numel() == 0) return out;
  const std::vector<double> sigmas = values(sigma);
  const std::vector<double> scales = values(scale);
  AddNoise a{
      .dtype = dtype_of(x),
      .out_dtype = dtype_of(dtype),
      .x = x.const_data_ptr(),
      .noise = noise,
      .out = out.mutable_data_ptr(),
      .sigma = sigmas.data(),
      .scale = pointer(scales),
      .sample_size = x.numel() / x.size(0),
  };
  if (noise) {
    parallel_for(0, x.numel(), GRAIN, [&](int64_t begin, int64_t end) { kernels().add_noise(a, begin, end); });
    return out;
  }
  a.key = RngKey::read(key);
  a.num_channels = alternating_channels(x);
  parallel_for(0, x.size(0) * a.num_quads(), GRAIN / 4, [&](int64_t begin, int64_t end) {
    kernels().add_noise_rng(a, begin, end);
  });
  return out;
}

Tensor add_noise(Tensor x,                     // [B, ...]
                 Tensor sigma,                 // [B]
                 Tensor noise,                 // [B, ...]
                 std::optional<Tensor> scale,  // [B]
                 ScalarType dtype) {
  return noised(x, sigma, noise.const_data_ptr(), nullptr, scale, dtype);
}

Tensor add_noise_rng(Tensor x,                     // [B, ...]
                     Tensor sigma,                 // [B]
                     Tensor rng_key,               // [4], see RngKey
                     std::optional<Tensor> scale,  // [B]
                     ScalarType dtype) {
  return noised(x, sigma, nullptr, static_cast<const int64_t*>(rng_key.const_data_ptr()), scale, dtype);
}

// A sample is worked on in blocks of fixed size; body(sample, begin, end) of each returns a partial sum. Small samples
// are one block, which finds its second pass in the cache.
struct Blocks {
  int64_t num_samples, sample_size, per_sample;

  explicit Blocks(const Tensor& x)
      : num_samples(x.size(0)),
        sample_size(num_samples > 0 ? x.numel() / num_samples : 0),
        per_sample(sample_size > 2 * BLOCK ? ceil_divide(sample_size, BLOCK) : 1) {}

  template <class Body>
  std::vector<double> sums(Body body) const {
    std::vector<double> partial(num_samples * per_sample);
    const int64_t size = per_sample > 1 ? BLOCK : sample_size;
    const int64_t grain = size > 0 ? ceil_divide(GRAIN, size) : 1;
    parallel_for(0, int64_t(partial.size()), grain, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t sample = block / per_sample;
        const int64_t start = block % per_sample * size;
        const int64_t stop = start + size < sample_size ? start + size : sample_size;
        partial[block] = body(sample, sample * sample_size + start, sample * sample_size + stop);
      }
    });
    return partial;
  }
};

double gradient(const DMLoss& a,
                const Tensor& x_gen,               // [B, ...]
                const std::vector<double>& sigma,  // [B], if a.x_t is given
                double sigma_data,
                double eps) {
  const Blocks blocks(x_gen);
  const auto arguments = [&](int64_t sample) {
    DMLoss of_sample = a;
    if (a.x_t) {
      of_sample.c_skip = c_skip(sigma[sample], sigma_data);
      of_sample.c_out = c_out(sigma[sample], sigma_data);
    }
    return of_sample;
  };
  const auto clamped = [&](double sum) { return at_least(sum / double(blocks.sample_size), eps); };
  std::vector<double> weights;
  if (blocks.per_sample > 1) {
    const std::vector<double> partial = blocks.sums(
        [&](int64_t sample, int64_t begin, int64_t end) { return kernels().dm_weight(arguments(sample), begin, end); });
    for (int64_t sample = 0; sample < blocks.num_samples; ++sample) {
      double sum = 0;
      for (int64_t k = 0; k < blocks.per_sample; ++k) sum += partial[sample * blocks.per_sample + k];
      weights.push_back(clamped(sum));
    }
  }
  return total(blocks.sums([&](int64_t sample, int64_t begin, int64_t end) {
    const DMLoss of_sample = arguments(sample);
    const double w = weights.empty() ? clamped(kernels().dm_weight(of_sample, begin, end)) : weights[size_t(sample)];
    return kernels().dm_gradient(of_sample, begin, end, w);
  }));
}

double mean(double sum, const Tensor& x) {
  return x.numel() > 0 ? sum / double(x.numel()) : std::numeric_limits<double>::quiet_NaN();
}

double inverse_numel(const Tensor& x) { return 1 / double(x.numel() > 0 ? x.numel() : 1); }

Tensor dm_gradient(Tensor x_gen,   // [B, ...]
                   Tensor D_real,  // [B, ...]
                   Tensor D_fake,  // [B, ...]
                   double eps) {
  Tensor grad = empty_like(x_gen, gradient_dtype(x_gen));
  const DMLoss a{
      .dtype = dtype_of(x_gen),
      .grad_dtype = dtype_of(grad),
      .x_gen = x_gen.const_data_ptr(),
      .real = D_real.const_data_ptr(),
      .fake = D_fake.const_data_ptr(),
      .grad = grad.mutable_data_ptr(),
      .factor = 1,
  };
  gradient(a, x_gen, {}, 0, eps);
  return grad;
}

std::tuple<Tensor, Tensor> loss_and_gradient(const Tensor& x_gen,               // [B, ...]
                                             const Tensor& real,                // [B, ...]
                                             const Tensor& fake,                // [B, ...]
                                             const void* x_t,                   // [B, ...], or null
                                             const std::vector<double>& sigma,  // [B], if x_t is given
                                             double sigma_data,
                                             double eps) {
  Tensor grad = empty_like(x_gen, gradient_dtype(x_gen));
  const DMLoss a{
      .dtype = dtype_of(x_gen),
      .grad_dtype = dtype_of(grad),
      .x_gen = x_gen.const_data_ptr(),
      .real = real.const_data_ptr(),
      .fake = fake.const_data_ptr(),
      .x_t = x_t,
      .grad = grad.mutable_data_ptr(),
      .factor = inverse_numel(x_gen),
  };
  const double sum = gradient(a, x_gen, sigma, sigma_data, eps);
  return {scalar(x_gen, wide_dtype(x_gen), 0.5 * mean(sum, x_gen)), grad};
}

std::tuple<Tensor, Tensor> dm_loss(Tensor x_gen,   // [B, ...]
                                   Tensor D_real,  // [B, ...]
                                   Tensor D_fake,  // [B, ...]
                                   double eps) {
  return loss_and_gradient(x_gen, D_real, D_fake, nullptr, {}, 0, eps);
}

std::tuple<Tensor, Tensor> dm_loss_raw(Tensor x_gen,   // [B, ...]
                                       Tensor x_t,     // [B, ...]
                                       Tensor sigma,   // [B]
                                       Tensor F_real,  // [B, ...]
                                       Tensor F_fake,  // [B, ...]
                                       double sigma_data,
                                       double eps) {
  return loss_and_gradient(x_gen, F_real, F_fake, x_t.const_data_ptr(), values(sigma), sigma_data, eps);
}

// complete(of_sample, sample) sets the coefficients of a sample.
template <class Complete>
std::tuple<Tensor, Tensor> weighted_error(const Tensor& output,  // [B, ...]
                                          const Tensor& images,  // [B, ...]
                                          const void* x_t,       // [B, ...], or null
                                          Complete complete) {
  Tensor grad = empty_like(output, gradient_dtype(output));
  const FakeLoss a{
      .dtype = dtype_of(output),
      .grad_dtype = dtype_of(grad),
      .output = output.const_data_ptr(),
      .images = images.const_data_ptr(),
      .x_t = x_t,
      .grad = grad.mutable_data_ptr(),
      .factor = 2 * inverse_numel(output),
      .weight = 1,
  };
  const double sum = total(Blocks(output).sums([&](int64_t sample, int64_t begin, int64_t end) {
    FakeLoss of_sample = a;
    complete(of_sample, sample);
    return kernels().fake_loss(of_sample, begin, end);
  }));
  return {scalar(output, wide_dtype(output), mean(sum, output)), grad};
}

std::tuple<Tensor, Tensor> denoising_loss(Tensor D_x,     // [B, ...]
                                          Tensor images,  // [B, ...]
                                          Tensor weight /* [B] */) {
  const std::vector<double> weights = values(weight);
  return weighted_error(
      D_x, images, nullptr, [&](FakeLoss& of_sample, int64_t sample) { of_sample.weight = weights[sample]; });
}

std::tuple<Tensor, Tensor> fake_loss(Tensor D_fake,  // [B, ...]
                                     Tensor x_gen,   // [B, ...]
                                     Tensor sigma,   // [B]
                                     double sigma_data) {
  const std::vector<double> sigmas = values(sigma);
  return weighted_error(D_fake, x_gen, nullptr, [&](FakeLoss& of_sample, int64_t sample) {
    of_sample.weight = loss_weight(sigmas[sample], sigma_data);
  });
}

std::tuple<Tensor, Tensor> fake_loss_raw(Tensor F_fake,  // [B, ...]
                                         Tensor x_gen,   // [B, ...]
                                         Tensor x_t,     // [B, ...]
                                         Tensor sigma,   // [B]
                                         double sigma_data) {
  const std::vector<double> sigmas = values(sigma);
  return weighted_error(F_fake, x_gen, x_t.const_data_ptr(), [&](FakeLoss& of_sample, int64_t sample) {
    of_sample.c_skip = c_skip(sigmas[sample], sigma_data);
    of_sample.inverse_c_out = 1 / c_out(sigmas[sample], sigma_data);
  });
}

Tensor scale_gradient(Tensor grad,       // [...]
                      Tensor grad_loss,  // []
                      ScalarType dtype) {
  Tensor out = empty_like(grad, dtype);
  if (grad.numel() == 0) return out;
  const double factor = item(grad_loss);
  const void* from = grad.const_data_ptr();
  void* to = out.mutable_data_ptr();
  parallel_for(0, grad.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    kernels().scale_gradient(from, dtype_of(grad), to, dtype_of(dtype), factor, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CPU, m) {
  m.impl("philox", TORCH_BOX(&philox_words));
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_rng", TORCH_BOX(&add_noise_rng));
  m.impl("dm_gradient", TORCH_BOX(&dm_gradient));
  m.impl("dm_loss", TORCH_BOX(&dm_loss));
  m.impl("dm_loss_raw", TORCH_BOX(&dm_loss_raw));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("fake_loss", TORCH_BOX(&fake_loss));
  m.impl("fake_loss_raw", TORCH_BOX(&fake_loss_raw));
  m.impl("scale_gradient", TORCH_BOX(&scale_gradient));
}

}  // namespace fastdmd
