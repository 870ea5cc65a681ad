// What llmc/trainer.h and llmc/inference.h ask of a model, a class of its own for each backend (`GPT` in
// train_gpt.cpp and in train_gpt.cu). Pointers are to host memory; sizes and layouts of tensors are those of
// llmc/parameters.h.
//
// clang-format off
//   GPT(config, purpose, B, T)              plans its memory for batches of up to B x T tokens, allocates nothing
//   memory() -> vector<MemoryGroup>         what allocate() will allocate
//   allocate()                              everything at once; weights and moments are zero
//   forward(inputs, targets, B, T, dloss)   mean loss; dloss != 0: the gradient of dloss * loss follows
//   backward(inputs, B, T)                  adds it into the gradients
//   zero_gradients(), gradient_norm()
//   update(adamw, learning_rate, grad_scale, step)
//   read(store, tensor, out)                copies a tensor of the table out,
//   write(store, tensor, in)                and in
//   clear_cache(), decode(tokens, n)        logits (V) after n more tokens
//   all_logits(out, inputs, B, T)           (B,T,V)
//   first_nonfinite()                       the name of the first tensor with a NaN or Inf in it, or ""
//   static set_threads(n), measured_peak(), backend()
// clang-format on
#pragma once
#include <cstddef>
#include <string>

struct AdamW {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

enum class Store { weights, gradients, m, v };  // m, v: AdamW's moments

enum class Purpose { training, inference };

struct MemoryGroup {
    std::string name;
    size_t bytes;
};
