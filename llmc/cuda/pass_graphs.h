// CUDA graphs of passes, for --cuda-graph: one launch puts all kernels of a pass into the stream.
#pragma once
#include <map>
#include <tuple>

#include "llmc/cuda/common.h"
#include "llmc/model.h"

namespace gpu {

class PassGraphs {
  public:
    PassGraphs() = default;
    PassGraphs(const PassGraphs&) = delete;
    PassGraphs& operator=(const PassGraphs&) = delete;
    ~PassGraphs() {
        for (auto& [key, graph] : graphs_)
            if (graph) cudaGraphExecDestroy(graph);
    }

    // Runs a pass over batches of B x T. enqueue() puts its kernels into the stream one by one. The first
    // pass of a kind runs like that, because the matrix products still search for their algorithms. The
    // second one is captured as a graph, and from then on that graph is launched.
    template <class Enqueue>
    void launch(int B, int T, const Pass& pass, cudaStream_t stream, Enqueue enqueue) {
        Key key(B, T, pass.backward, pass.loss_scale, pass.first, pass.last);
        auto [found, is_new] = graphs_.try_emplace(key, nullptr);
        if (is_new) return enqueue();
        if (!found->second) {
            cudaGraph_t graph;
            check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            try {
                enqueue();
            } catch (...) {
                // Memory cannot be freed during a capture, and the handling of the exception frees memory.
                if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
                throw;
            }
            check(cudaStreamEndCapture(stream, &graph));
            check(cudaGraphInstantiate(&found->second, graph, 0));
            check(cudaGraphDestroy(graph));
        }
        check(cudaGraphLaunch(found->second, stream));
    }

  private:
    // The kernels of a pass and their arguments depend on this: B, T, backward, loss_scale, first, last.
    using Key = std::tuple<int, int, bool, float, bool, bool>;
    std::map<Key, cudaGraphExec_t> graphs_;
};

}  // namespace gpu
