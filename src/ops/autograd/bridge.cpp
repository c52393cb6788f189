// Lets Rust give torch's autograd an operation with its own backward pass.
//
// The forward result is computed by Rust beforehand; this file only hangs a node behind it. In backward the node
// calls a Rust callback with the saved tensors and the incoming gradients. Everything the callback needs travels in
// the payload or in saved tensors, because on CUDA it runs on one of torch's engine threads. A callback that fails
// returns the number under which the Rust side keeps its error; here it becomes a C++ exception with that number in
// its text, which the engine carries back to the caller of backward.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstring>
#include <stdexcept>
#include <string>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

extern "C" {
// grads_in[i] is null where the gradient is undefined; the callback leaves owned tensors (or null) in grads_out.
typedef int (*temper_backward_fn)(void* payload, Tensor** saved, int n_saved, Tensor** grads_in, int n_grads_in,
                                  const int* needs, Tensor** grads_out, int n_grads_out);
typedef void (*temper_drop_fn)(void* payload);
}

namespace {

struct Payload : torch::CustomClassHolder {
  void* object;
  temper_backward_fn backward;
  temper_drop_fn drop;
  Payload(void* o, temper_backward_fn b, temper_drop_fn d) : object(o), backward(b), drop(d) {}
  ~Payload() override { drop(object); }
};

struct Call {
  variable_list saved;
  variable_list outputs;
  c10::intrusive_ptr<Payload> payload;
};

struct Node : torch::autograd::Function<Node> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, Call* call) {
    ctx->saved_data["payload"] = at::IValue::make_capsule(call->payload);
    ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
    ctx->save_for_backward(call->saved);
    // An output that the loss does not use has no gradient, instead of zeros that would be worked through.
    ctx->set_materialize_grads(false);
    return call->outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads_in) {
    auto capsule = ctx->saved_data["payload"].toCapsule();
    auto* payload = static_cast<Payload*>(capsule.get());
    const auto n_inputs = static_cast<size_t>(ctx->saved_data["inputs"].toInt());
    variable_list saved = ctx->get_saved_variables();

    std::vector<Tensor*> saved_ptr, in_ptr, out_ptr(n_inputs, nullptr);
    std::vector<int> needs(n_inputs);
    for (auto& t : saved) saved_ptr.push_back(&t);
    for (auto& t : grads_in) in_ptr.push_back(t.defined() ? &t : nullptr);
    for (size_t i = 0; i < n_inputs; i++) needs[i] = ctx->needs_input_grad(i);

    const int failed = payload->backward(payload->object, saved_ptr.data(), (int)saved_ptr.size(), in_ptr.data(),
                                         (int)in_ptr.size(), needs.data(), out_ptr.data(), (int)n_inputs);
    variable_list grads(n_inputs + 1);  // one more for the Call* argument, which has no gradient
    for (size_t i = 0; i < n_inputs; i++) {
      if (out_ptr[i] != nullptr) {
        grads[i] = std::move(*out_ptr[i]);
        delete out_ptr[i];
      }
    }
    if (failed) throw std::runtime_error("temper: an operation failed in backward, error " + std::to_string(failed) + ".");
    return grads;
  }
};

}  // namespace

// Hangs a backward node with inputs [n_inputs] behind outputs [n_outputs]; results receives new handles.
// Takes ownership of payload in every case. Returns null, or an error text that the caller frees with free().
extern "C" char* temper_attach_backward(Tensor** inputs, int n_inputs, Tensor** saved, int n_saved, Tensor** outputs,
                                        int n_outputs, void* payload, temper_backward_fn backward, temper_drop_fn drop,
                                        Tensor** results) {
  try {
    Call call;
    call.payload = c10::make_intrusive<Payload>(payload, backward, drop);
    variable_list in;
    for (int i = 0; i < n_inputs; i++) in.push_back(*inputs[i]);
    for (int i = 0; i < n_saved; i++) call.saved.push_back(*saved[i]);
    for (int i = 0; i < n_outputs; i++) call.outputs.push_back(*outputs[i]);
    // As a TensorList: torch would not look for variables inside a std::vector.
    variable_list out = Node::apply(at::TensorList(in), &call);
    for (int i = 0; i < n_outputs; i++) results[i] = new Tensor(out[i]);
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  }
}

// A clean product must be clean: no TF32 in place of f32, no sums rounded to 16 bits inside a product.
extern "C" void temper_exact_products() {
  at::globalContext().setAllowTF32CuBLAS(false);
  at::globalContext().setAllowBF16ReductionCuBLAS(false);
  at::globalContext().setAllowFP16ReductionCuBLAS(false);
}
