// The schemas of the native ops, for CPU and CUDA alike, in torch's stable ABI. The public ops are defined in Python
// (fastdmd/ops), which validates, differentiates and calls these.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastdmd_native, m) {
  m.def("philox(Tensor counter, Tensor key) -> Tensor");
  m.def("add_noise(Tensor x, Tensor sigma, Tensor noise, Tensor? scale, ScalarType dtype) -> Tensor");
  m.def("add_noise_rng(Tensor x, Tensor sigma, Tensor rng_key, Tensor? scale, ScalarType dtype) -> Tensor");
  m.def("dm_gradient(Tensor x_gen, Tensor D_real, Tensor D_fake, float eps) -> Tensor");
  m.def("dm_loss(Tensor x_gen, Tensor D_real, Tensor D_fake, float eps) -> (Tensor, Tensor)");
  m.def(
      "dm_loss_raw(Tensor x_gen, Tensor x_t, Tensor sigma, Tensor F_real, Tensor F_fake, float sigma_data, float eps)"
      " -> (Tensor, Tensor)");
  m.def("denoising_loss(Tensor D_x, Tensor images, Tensor weight) -> (Tensor, Tensor)");
  m.def("fake_loss(Tensor D_fake, Tensor x_gen, Tensor sigma, float sigma_data) -> (Tensor, Tensor)");
  m.def("fake_loss_raw(Tensor F_fake, Tensor x_gen, Tensor x_t, Tensor sigma, float sigma_data) -> (Tensor, Tensor)");
  m.def("scale_gradient(Tensor grad, Tensor grad_loss, ScalarType dtype) -> Tensor");
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? offset,"
      " int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
      " Tensor? scale, Tensor? shift, Tensor? offset, int num_groups, bool silu)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv1x1(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "conv1x1_backward(Tensor grad_y, Tensor x, Tensor weight, bool of_input, bool of_parameters)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "conv3x3_backward(Tensor grad_y, Tensor x, Tensor weight, bool of_input, bool of_parameters)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "adamw_ema_(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) step,"
      " Tensor learning_rate, Tensor(f!)? ema, Tensor(g!)? shadow, float beta1, float beta2, float eps,"
      " float weight_decay, float max_grad_norm, float ema_decay, float ema_warmup, bool zero_grad) -> Tensor");
}
