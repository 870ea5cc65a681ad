// The operands of library calls: matrices in device memory, and the checks before they are used.
#pragma once
#include <library_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "dev/ptxsim/stream_work.h"

namespace ptxsim {

// A batch of matrices. A matrix is an array of `outer` lines, which begin `ld` elements apart. A line is
// `inner` neighbouring elements: a column of a column-major matrix, or a row of a row-major one. A vector is
// one line.
struct Operand {
    const char* name = "";  // for reports: "A"
    uint64_t address = 0;
    cudaDataType type = CUDA_R_32F;
    bool row_major = false;
    int64_t inner = 0, outer = 1, ld = 0;
    int64_t stride = 0;  // elements from one matrix of the batch to the next

    uint64_t line(int64_t batch, int64_t outer_index) const;
    size_t line_bytes() const;
    MemoryUse use(Use use, int64_t batches) const;  // from the first byte to the last one
};

size_t size_of(cudaDataType type);       // bytes; 0 where the libraries do not know the type
const char* name_of(cudaDataType type);  // "bf16"

// Each check reports what it finds and names `call` and the operand. False if the memory must not be touched.
bool check_range(const char* call, const Operand& x, int64_t batches);
bool check_range(const char* call, const char* operand, uint64_t address, size_t bytes, size_t alignment);
void check_written(const char* call, const Operand& x, int64_t batches);
void mark_written(const Operand& x, int64_t batches);

// Prints a line on stderr that says why a library refuses a call. refuse() also returns `status`.
void print_refusal(const char* call, const std::string& why);
template <class Status>
Status refuse(Status status, const char* call, const std::string& why) {
    print_refusal(call, why);
    return status;
}

}  // namespace ptxsim
