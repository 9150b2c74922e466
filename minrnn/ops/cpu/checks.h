// What a direct call of torch.ops could use to reach memory that is not its own, refused: every tensor
// of an operator passes through `check_readable`, and its sizes are compared where they are known.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace minrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// `x` is dense and on the CPU, and its storage holds every number that its sizes and strides span. A
// storage may be freed while its tensors live (`untyped_storage().resize_(0)`).
inline void check_readable(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.defined(), "`", name, "` must be a tensor, got None");
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided() && x.is_cpu(), "`", name,
                  "` must be a dense tensor on the CPU");
  if (x.numel() == 0) return;
  int64_t bytes = 0, last = x.storage_offset();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  for (int64_t axis = 0; axis < x.dim(); ++axis) last += (x.size(axis) - 1) * x.stride(axis);
  STD_TORCH_CHECK(last < bytes / static_cast<int64_t>(x.element_size()), "`", name,
                  "` must have its numbers in memory: its storage is too small for its shape");
}

inline bool is_floating(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz:
      return true;
    default:
      return false;
  }
}

}  // namespace minrnn
