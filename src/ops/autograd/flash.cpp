// Causal attention within several sequences that lie one after the other, as libtorch's FlashAttention-2 has it; tch
// does not name this operator. torch's own autograd gives the gradient.

#include <ATen/ATen.h>

#include <cstring>

// q [tokens, heads, dim], k and v [tokens, kv_heads, dim], starts i32 [sequences + 1]. Returns null with a new handle in
// *result, or an error text that the caller frees with free().
extern "C" char* temper_flash_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* starts,
                                        int64_t longest, double scale, at::Tensor** result) {
  try {
    auto out = at::_flash_attention_forward(*q, *k, *v, *starts, *starts, longest, longest, /*dropout_p=*/0.0,
                                            /*is_causal=*/true, /*return_debug_mask=*/false, scale);
    *result = new at::Tensor(std::get<0>(out));
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  }
}
