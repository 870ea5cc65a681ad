// What llmc/trainer.h and llmc/inference.h ask of a model, a class of its own for each backend (`GPT` in
// train_gpt.cpp and in train_gpt.cu). Pointers are to host memory; sizes and layouts of tensors are those of
// llmc/parameters.h.
//
//   GPT(config, purpose, B, T)               plans its memory for batches of up to B x T tokens, allocates
//   nothing memory() -> std::vector<MemoryGroup>     what allocate() will allocate allocate() everything at
//   once, weights and state zero forward(inputs, targets, B, T, dloss)    mean loss; dloss != 0: gradients of
//   dloss * loss will follow backward(inputs, B, T)                   adds them into the gradients
//   zero_gradients(), gradient_norm()
//   update(adamw, learning_rate, grad_scale, step)
//   read(store, tensor, out)                 copies a tensor of the table out, and in
//   write(store, tensor, in)
//   clear_cache(), decode(tokens, n)         logits (V) after n more tokens
//   all_logits(out, inputs, B, T)            (B,T,V)
//   first_nonfinite()                        the name of the first tensor with a NaN or Inf in it, or ""
//   static set_threads(n), measured_peak(), backend()
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
