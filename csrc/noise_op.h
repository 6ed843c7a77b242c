// The noise ops as torch calls them, for any device: tensors to a Draw and back. Device::forward<T>(draw, x, y, tensor) and
// Device::backward<T>(draw, dy, dx, tensor) compute, on the device that the tensor is on.
#pragma once
#include <type_traits>

#include "noise.h"
#include "stable_torch.h"

namespace iwsgd {

template <class Device>
struct NoiseOp {
  // What the three ops have in common, in the order of their schemas; x or dy is [O, rows, I].
  static Draw draw_of(const Tensor& x, const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t samples, int64_t stream,
                      int64_t first_example, int64_t positions, int64_t share, int64_t threshold, const std::optional<Tensor>& thresholds,
                      double scale, double shift, double fill, bool expand) {
    return {{x.size(0), expand ? x.size(1) : x.size(1) / samples, x.size(2), positions, share},
            {origin.const_data_ptr<int64_t>(), sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr,
             sample_ids && sample_ids->dim() == 2, stream, first_example},
            samples,
            {static_cast<uint32_t>(threshold), scale, shift, fill, thresholds ? thresholds->const_data_ptr<int32_t>() : nullptr,
             thresholds ? thresholds->size(0) : 0},
            expand};
  }

  static void noise_out(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                        int64_t positions, int64_t share, int64_t threshold, std::optional<Tensor> thresholds, double scale, double shift,
                        double fill, bool expand, Tensor out) {
    x = torch::stable::contiguous(x);
    const Draw draw =
        draw_of(x, origin, sample_ids, samples, stream, first_example, positions, share, threshold, thresholds, scale, shift, fill, expand);
    dispatch_floating(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template forward<T>(draw, data<T>(x), mutable_data<T>(out), x);
    });
  }

  static Tensor noise(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                      int64_t positions, int64_t share, int64_t threshold, std::optional<Tensor> thresholds, double scale, double shift,
                      double fill, bool expand) {
    Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) * (expand ? samples : 1), x.size(2)});
    noise_out(x, origin, sample_ids, samples, stream, first_example, positions, share, threshold, thresholds, scale, shift, fill, expand,
              out);
    return out;
  }

  static Tensor noise_sum(Tensor dy, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                          int64_t first_example, int64_t positions, int64_t share, int64_t threshold, std::optional<Tensor> thresholds,
                          double scale) {
    dy = torch::stable::contiguous(dy);
    Tensor dx = torch::stable::new_empty(dy, {dy.size(0), dy.size(1) / samples, dy.size(2)});
    Draw draw =
        draw_of(dy, origin, sample_ids, samples, stream, first_example, positions, share, threshold, thresholds, scale, 0, 0, false);
    draw.expand = true;
    dispatch_floating(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template backward<T>(draw, data<T>(dy), mutable_data<T>(dx), dy);
    });
    return dx;
  }
};

}  // namespace iwsgd
