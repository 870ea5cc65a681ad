#include "dev/ptxsim/operand.h"

#include <cstdio>
#include <cstring>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"

namespace ptxsim {
namespace {

void found(Fault fault, std::string text) {
    Report r;
    r.fault = fault;
    r.text = std::move(text);  // begins with the call's name, because reports without a kernel differ by it
    report(std::move(r));
}

std::string words(const char* call, const Operand& x) {
    std::string size = std::to_string(x.inner) + " " + name_of(x.type);
    if (x.outer > 1) {
        int64_t rows = x.row_major ? x.outer : x.inner, cols = x.row_major ? x.inner : x.outer;
        size = std::to_string(rows) + " x " + std::to_string(cols) + " " + name_of(x.type) + ", ld " +
               std::to_string(x.ld) + (x.row_major ? ", row-major" : "");
    }
    return std::string(call) + ": " + x.name + " (" + size + ")";
}

std::string outside(uint64_t address, size_t bytes) {
    return " needs " + std::to_string(bytes) + " bytes at " + hex(address) +
           ", which is not all allocated: it is " + memory::describe(address);
}

// The number of matrices to check: with a stride of 0, all matrices of the batch are the same.
int64_t distinct(const Operand& x, int64_t batches) {
    return x.stride == 0 && batches > 1 ? 1 : batches;
}

std::string in_batch(int64_t batch) {
    return batch ? " of batch " + std::to_string(batch) : "";
}

}  // namespace

uint64_t Operand::line(int64_t batch, int64_t outer_index) const {
    return address + (uint64_t)(batch * stride + outer_index * ld) * size_of(type);
}

size_t Operand::line_bytes() const {
    return (size_t)inner * size_of(type);
}

MemoryUse Operand::use(Use use, int64_t batches) const {
    if (inner == 0 || outer == 0 || batches == 0) return {address, 0, use};
    return {address, line(batches - 1, outer - 1) + line_bytes() - address, use};
}

size_t size_of(cudaDataType type) {
    switch (type) {
        case CUDA_R_32F:
            return 4;
        case CUDA_R_16BF:
        case CUDA_R_16F:
            return 2;
        default:
            return 0;
    }
}

const char* name_of(cudaDataType type) {
    switch (type) {
        case CUDA_R_32F:
            return "float32";
        case CUDA_R_16BF:
            return "bf16";
        case CUDA_R_16F:
            return "f16";
        default:
            return "unknown type";
    }
}

bool check_range(const char* call, const Operand& x, int64_t batches) {
    if (x.inner == 0 || x.outer == 0) return true;
    if (x.address % size_of(x.type)) {
        found(Fault::misaligned, words(call, x) + " begins at " + hex(x.address) + ", not a multiple of " +
                                     std::to_string(size_of(x.type)));
        return false;
    }
    for (int64_t i = 0; i < distinct(x, batches); i++) {
        uint64_t begin = x.line(i, 0);
        size_t bytes = (size_t)(x.outer - 1) * x.ld * size_of(x.type) + x.line_bytes();
        if (memory::contains(begin, bytes)) continue;
        found(memory::was_freed(begin) ? Fault::use_after_free : Fault::out_of_bounds,
              words(call, x) + in_batch(i) + outside(begin, bytes));
        return false;
    }
    return true;
}

bool check_range(const char* call, const char* operand, uint64_t address, size_t bytes, size_t alignment) {
    if (bytes == 0) return true;
    std::string what = std::string(call) + ": " + operand;
    if (address % alignment) {
        found(Fault::misaligned,
              what + " begins at " + hex(address) + ", not a multiple of " + std::to_string(alignment));
        return false;
    }
    if (memory::contains(address, bytes)) return true;
    found(memory::was_freed(address) ? Fault::use_after_free : Fault::out_of_bounds,
          what + outside(address, bytes));
    return false;
}

void check_written(const char* call, const Operand& x, int64_t batches) {
    if (!options().uninit || x.inner == 0) return;
    for (int64_t i = 0; i < distinct(x, batches); i++) {
        for (int64_t o = 0; o < x.outer; o++) {
            const uint8_t* written = memory::written(x.line(i, o));
            if (!written) return;
            const void* hole = std::memchr(written, 0, x.line_bytes());
            if (!hole) continue;
            int64_t at = ((const uint8_t*)hole - written) / (int64_t)size_of(x.type);
            int64_t row = x.row_major ? o : at, column = x.row_major ? at : o;
            std::string place = x.outer > 1
                                    ? "row " + std::to_string(row) + ", column " + std::to_string(column)
                                    : "element " + std::to_string(at);
            found(Fault::uninitialized, words(call, x) + ": " + place + in_batch(i) + " was never written (" +
                                            memory::describe(x.line(i, o)) + ")");
            return;
        }
    }
}

void mark_written(const Operand& x, int64_t batches) {
    for (int64_t i = 0; i < distinct(x, batches); i++)
        for (int64_t o = 0; o < x.outer; o++) memory::mark_written(x.line(i, o), x.line_bytes());
}

void print_refusal(const char* call, const std::string& why) {
    std::fprintf(stderr, "ptxsim: %s: %s\n", call, why.c_str());
}

}  // namespace ptxsim
