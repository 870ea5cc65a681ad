# `make help` lists the commands. `make quickstart` and `make test` also install what they need.

CXX      ?= g++
# A folder with the headers and libraries that dev/setup.sh would install into the system (dev/gpu_check.sh --pack).
DEPS     ?= $(wildcard .deps)
ONEDNN   ?= $(shell printf '\043include <oneapi/dnnl/dnnl.hpp>\n' | $(CXX) $(DEPS:%=-isystem %/include) -x c++ -E - >/dev/null 2>&1 && echo 1)
# 1: train_gpt can train on several ranks (llmc/cpu/mpi.h).
MPI      ?= $(shell pkg-config --exists ompi-c 2>/dev/null && echo 1)
SANITIZE ?= 0
# 1: train_gpt has the model three times, for AVX2, AVX-512 and AVX-512 with BF16, and runs the best one that the
# processor supports (llmc/cpu/isa.h). 0: it has the model once, for this processor.
DISPATCH ?= $(if $(filter x86_64-1,$(shell uname -m)-$(if $(filter 0,$(SANITIZE)),1)),1,0)
PYTHON   := .venv/bin/python
BUILD    := build

CXXFLAGS ?= -O3 -Wall -Wextra
# -fno-math-errno, because otherwise sqrt is not vectorised. -Wno-psabi, because functions here pass vectors that are wider
# than those of the machine.
flags    := -std=c++20 -fopenmp -fno-math-errno -Wno-psabi -I. -MMD -MP $(CXXFLAGS)
libs     := -lz
ifneq ($(DEPS),)
flags    += -isystem $(DEPS)/include
# --disable-new-dtags, so that the libraries that these libraries need are also searched there.
libs     += -L$(DEPS)/lib -Wl,--disable-new-dtags,-rpath,$(abspath $(DEPS))/lib
endif
ifeq ($(ONEDNN),1)
flags    += -DLLMC_ONEDNN
libs     += -ldnnl
endif
ifeq ($(MPI),1)
mpi      := -DLLMC_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $(patsubst -I%,-isystem %,$(shell pkg-config --cflags ompi-c))
libs     += $(shell pkg-config --libs ompi-c)
endif
ifeq ($(SANITIZE),1)
flags    += -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif

native   := -march=native
ifeq ($(DISPATCH),1)
model    := -march=x86-64-v3 -DLLMC_ISA=avx2
models   := $(BUILD)/train_gpt.o $(BUILD)/avx512.o $(BUILD)/avx512_bf16.o
# The tests use only the copies that this processor can run, because each copy takes long to build.
cpu      := $(shell cat /proc/cpuinfo)
tested   := $(BUILD)/train_gpt.o $(if $(filter avx512vl,$(cpu)),$(BUILD)/avx512.o) $(if $(filter avx512_bf16,$(cpu)),$(BUILD)/avx512_bf16.o)
dispatch := -DLLMC_DISPATCH
else
model    := $(native)
models   := $(BUILD)/train_gpt.o
tested   := $(models)
endif
models   += $(BUILD)/mpi.o
tested   += $(BUILD)/mpi.o
$(BUILD)/avx512.o: isa := -march=x86-64-v4 -DLLMC_ISA=avx512
$(BUILD)/avx512_bf16.o: isa := -march=x86-64-v4 -mavx512bf16 -DLLMC_ISA=avx512_bf16

# Most tests need little time of their own, so they are built at -O0, which is fastest. The others and the oracle (`busy`)
# are optimised. They come first, because the linker uses the first copy of an inline function that several objects have.
busy     := $(patsubst %,$(BUILD)/test/%.o,reference cpu/attention cpu/attention_linear cpu/norms cpu/tile data/tokenizer data/unicode)
tests    := $(busy) $(filter-out $(busy),$(patsubst tests/%.cpp,$(BUILD)/test/%.o,tests/main.cpp \
            $(wildcard tests/cpu/*.cpp tests/data/*.cpp tests/cli/*.cpp tests/dist/*.cpp)))
# If this processor has AVX-512, the code for AVX2 and for AVX-512 without BF16 is tested as well.
lesser   := $(if $(filter 1,$(DISPATCH)),$(if $(filter avx512vl,$(cpu)),avx2 avx512))

# dev/ptxsim replaces cudart, cuBLAS(Lt) and NCCL, so that CUDA objects that contain PTX run on this processor. nvcc is the
# one of the system if it supports C++20 (CUDA 12 or newer), otherwise the one that dev/setup.sh has put into .venv.
ifndef NVCC
NVCC     := $(shell for n in nvcc /usr/local/cuda/bin/nvcc .venv/cuda/bin/nvcc; do \
              $$n -std=c++20 -x cu -E /dev/null >/dev/null 2>&1 && command -v $$n && break; done)
endif
CUDA     ?= $(if $(NVCC),$(realpath $(dir $(realpath $(NVCC)))..))
comma    := ,
cuda     := -std=c++20 -O3 -lineinfo -I. $(DEPS:%=-isystem %/include) -ccbin $(firstword $(CXX)) -Xcompiler -Wall,-Wextra$(if $(findstring clang,$(CXX)),$(comma)-Wno-unused-function),-fopenmp $(NVCCFLAGS)
CUDA_LIB ?= $(CUDA)/lib64
# 1: train_gptcu can train on several GPUs (llmc/cuda/nccl.h). The simulator has an NCCL of its own and needs only nccl.h.
ifndef NCCL
NCCL     := $(shell printf '\043include <nccl.h>\nint main() { return ncclGetVersion(0); }\n' | \
              $(CXX) $(DEPS:%=-isystem %/include) -isystem $(CUDA)/include -x c++ - $(DEPS:%=-L%/lib) -L$(CUDA_LIB) \
              -lnccl -o /dev/null 2>/dev/null && echo 1)
endif
ifeq ($(NCCL),1)
nccl     := -lnccl
else
nonccl   := -DLLMC_NO_NCCL
endif
cudalibs := -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcudart -lcublasLt $(nccl)
# Machine code for these GPUs. The PTX of compute_80 is added for the simulator and for newer GPUs.
GPU_ARCH ?= 80 90
to_gpu   := $(foreach a,$(GPU_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80 \
            -Xfatbin -compress=false
to_ptx   := -gencode arch=compute_80,code=compute_80 -Xfatbin -compress=false
sim      := $(patsubst dev/ptxsim/%.cpp,$(BUILD)/ptxsim/%.o,$(wildcard dev/ptxsim/*.cpp))
# The objects of the CUDA trainer. Attention has its own, because its kernels take longer to build than everything else.
vpath %.cu llmc/cuda/attention
objects  := attention.o gated.o linear.o cached.o state.o norms.o train_gpt.o
on_gpu   := $(addprefix $(BUILD)/gpu/,$(objects))
on_sim   := $(addprefix $(BUILD)/ptx/,$(objects))
# Tests of the CUDA trainer, which run on the simulator, and of the simulator itself. `hosttests` need no nvcc.
cutests  := $(patsubst tests/%.cu,$(BUILD)/test/%.o,$(wildcard tests/cuda/*.cu tests/ptxsim/*.cu))
hosttests := $(patsubst tests/%.cpp,$(BUILD)/test/%.o,$(wildcard tests/cuda/*.cpp tests/ptxsim/*.cpp))

.PHONY: all quickstart test test-thorough test-distributed compare resources bench bench-quick experiments gpu-test gpu-check ptxsim-bench docs format clean help
all: train_gpt

# The order matters: the linker uses the first copy of an inline function that several objects have, and this one must run
# on all processors.
train_gpt: $(BUILD)/train_gpt_main.o $(BUILD)/run.o $(BUILD)/version.o $(models)
$(BUILD)/train_gpt: $(BUILD)/train_gpt_main.o $(BUILD)/run.o $(BUILD)/version.o $(tested)
train_gpt $(BUILD)/train_gpt $(BUILD)/train_gpt_other:
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/train_gpt.o: train_gpt.cpp $(BUILD)/flags
	$(CXX) $(flags) $(model) $(dispatch) -c $< -o $@

# Everything in both trainers except the model. Both use the same run.o, because it takes long to build.
$(BUILD)/run.o: llmc/run.cpp
$(BUILD)/train_gpt_main.o: llmc/cpu/main.cpp
$(BUILD)/train_gptcu_main.o: llmc/cuda/main.cpp
$(BUILD)/run.o $(BUILD)/train_gpt_main.o $(BUILD)/train_gptcu_main.o: $(BUILD)/flags
	$(CXX) $(flags) -O1 $(dispatch) -c $(filter %.cpp,$^) -o $@

$(BUILD)/mpi.o: llmc/cpu/mpi.cpp $(BUILD)/flags
	$(CXX) $(flags) $(mpi) -O1 -c $< -o $@

# The commit changes often, so it has a small object of its own. It is empty in a folder that is not a git repository.
commit   := $(if $(wildcard .git),$(shell git describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null))
$(BUILD)/version.o: llmc/version.cpp $(BUILD)/commit $(BUILD)/flags
	$(CXX) $(flags) -DLLMC_COMMIT='"$(commit)"' -c $< -o $@
# The same program from another commit, for tests of several ranks.
$(BUILD)/train_gpt_other: $(BUILD)/train_gpt_main.o $(BUILD)/run.o $(BUILD)/version_other.o $(tested)
$(BUILD)/version_other.o: llmc/version.cpp $(BUILD)/flags
	$(CXX) $(flags) -DLLMC_COMMIT='"another"' -c $< -o $@
$(BUILD)/commit: FORCE
	@mkdir -p $(BUILD)
	@echo '$(commit)' | cmp -s - $@ || echo '$(commit)' > $@

# A static initialiser would run before main(), even on processors without this instruction set, so there must be none.
$(BUILD)/avx512.o $(BUILD)/avx512_bf16.o: train_gpt.cpp $(BUILD)/flags
	$(CXX) $(flags) $(isa) -c $< -o $@
	@if nm $@ | grep _GLOBAL__sub_I; then echo '$@: has static initialisers' >&2; rm $@; false; fi

$(tests): quick := -O0
$(busy): quick := -O1
$(BUILD)/test/reference.o: quick := -O3

$(BUILD)/test/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) $(quick) $(native) -c $< -o $@

$(BUILD)/tests: $(tests) $(BUILD)/mpi.o
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/attention: dev/bench/attention.cpp $(BUILD)/flags
	$(CXX) $(flags) $(native) $< -o $@ $(libs)

# The tests of layers again, for each older instruction set: build/avx2/tests, build/avx512/tests. AVX-512 without BF16
# differs only in how it converts and multiplies bf16, so only the tests that do this run for it. The oracle is that of
# build/tests. It comes last, so that the linker takes the inline functions of the tests' own objects.
$(BUILD)/avx2/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -O1 -march=x86-64-v3 -c $< -o $@

$(BUILD)/avx512/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -O1 -march=x86-64-v4 -c $< -o $@

$(BUILD)/avx2/tests: $(patsubst %,$(BUILD)/avx2/cpu/%.o,adamw attention attention_linear layers output_gate tile vector)
$(BUILD)/avx512/tests: $(patsubst %,$(BUILD)/avx512/cpu/%.o,attention tile vector)
$(BUILD)/avx2/tests $(BUILD)/avx512/tests: $(BUILD)/test/main.o $(BUILD)/test/reference.o
	$(CXX) $(flags) $^ -o $@ $(libs)

# Rounding must be that of the PTX, so no operations may be contracted to an fma. -Wno-restrict, because GCC 12 warns about
# an overlap in string additions that does not exist (its bug 105651).
$(BUILD)/ptxsim/%.o: dev/ptxsim/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) $(native) -ffp-contract=off $(if $(findstring clang,$(CXX)),,-Wno-restrict) -DLLMC_ISA=ptxsim -isystem $(CUDA)/include -c $< -o $@

$(BUILD)/libptxsim.a: $(sim)
	@rm -f $@
	ar rcs $@ $^

# -O1 applies only to the host code and builds faster.
$(cutests): $(BUILD)/test/%.o: tests/%.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(cuda:-O3=-O1) $(to_ptx) -MMD -MP -c $< -o $@

$(hosttests): $(BUILD)/test/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -O0 $(native) $(dispatch) -isystem $(CUDA)/include -c $< -o $@

$(BUILD)/ptxsim/tests: $(sim) $(on_sim) $(BUILD)/ptx/nccl.o $(BUILD)/version.o $(tested) $(BUILD)/test/reference.o $(BUILD)/test/main.o $(cutests) $(hosttests)
	$(CXX) $(flags) $^ -o $@ $(libs)

# The same objects on hardware, where the driver compiles their PTX. Tests of the simulator's own reports are left out.
simulated := $(patsubst %,$(BUILD)/test/%.o,cuda/figures $(addprefix ptxsim/,faults nccl races samples streams))
$(BUILD)/gpu-tests: $(BUILD)/test/main.o $(BUILD)/test/reference.o $(filter-out $(simulated),$(cutests)) \
    $(BUILD)/test/cuda/model.o $(on_gpu) $(BUILD)/gpu/nccl.o $(BUILD)/version.o $(tested) $(BUILD)/ptxsim/report.o $(BUILD)/ptxsim/options.o
	$(CXX) $(flags) $^ -o $@ $(libs) $(cudalibs)

# The CUDA trainer for hardware, and for this processor. The latter needs only PTX, which takes half the time to build.
$(BUILD)/gpu/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(cuda) $(to_gpu) -MMD -MP -c $< -o $@

$(BUILD)/ptx/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(cuda) $(to_ptx) -MMD -MP -c $< -o $@
$(BUILD)/ptx/cuda_layers.o: cuda := $(cuda:-O3=-O0)

$(BUILD)/gpu/nccl.o: without := $(nonccl)
$(BUILD)/gpu/nccl.o $(BUILD)/ptx/nccl.o: llmc/cuda/nccl.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -O1 -isystem $(CUDA)/include $(without) -c $< -o $@

train_gptcu: $(on_gpu) $(BUILD)/gpu/nccl.o $(BUILD)/train_gptcu_main.o $(BUILD)/run.o $(BUILD)/version.o
	$(CXX) $(flags) $^ -o $@ $(libs) $(cudalibs)

train_gptcu_sim: $(on_sim) $(BUILD)/ptx/nccl.o $(BUILD)/train_gptcu_main.o $(BUILD)/run.o $(BUILD)/version.o $(BUILD)/libptxsim.a
	$(CXX) $(flags) $^ -o $@ $(libs)

# Times every kernel on its own, on hardware or on the simulator. The times on the simulator mean nothing.
vpath %.cu dev/bench
$(BUILD)/cuda_layers_main.o: dev/bench/cuda_layers.cpp $(BUILD)/flags
	$(CXX) $(flags) -O1 -c $< -o $@

$(BUILD)/cuda_layers: $(BUILD)/cuda_layers_main.o $(BUILD)/gpu/cuda_layers.o $(filter-out %/train_gpt.o,$(on_gpu))
	$(CXX) $(flags) $^ -o $@ $(libs) $(cudalibs)

$(BUILD)/cuda_layers_sim: $(BUILD)/cuda_layers_main.o $(BUILD)/ptx/cuda_layers.o $(filter-out %/train_gpt.o,$(on_sim)) \
    $(BUILD)/libptxsim.a
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/ptxsim/bench: dev/ptxsim/bench.cu $(BUILD)/libptxsim.a
	$(NVCC) $(cuda) $(to_ptx) -c $< -o $@.o
	$(CXX) $(flags) $@.o $(BUILD)/libptxsim.a -o $@ $(libs)

# This file changes when the compiler or its flags change, and then everything is built again.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CXX) $(flags) $(mpi) $(model) $(libs) $(nccl)' | cmp -s - $@ || \
	  echo '$(CXX) $(flags) $(mpi) $(model) $(libs) $(nccl)' > $@
FORCE:

# Kills a program at its n-th write, fsync or rename, or makes that call fail (tests/cli/resume.cpp).
$(BUILD)/fault_preload.so: tests/cli/fault_preload.c $(BUILD)/flags
	$(CC) -O2 -Wall -Wextra -fPIC -shared $< -o $@ -ldl

quickstart: ## set up, tokenise Shakespeare, train a small GPT with polynomial attention, and let it write text
	@dev/quickstart.sh

test: ## set up, build and run all tests
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) build-tests
	@$(MAKE) --no-print-directory run-tests

test-thorough: ## the same tests, also with the kinds, sizes and branches of kernels that `make test` leaves out; 20 minutes
	@LLMC_THOROUGH=1 $(MAKE) --no-print-directory test

test-distributed: ## the tests of several ranks alone, also those that take long; 5 minutes
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) run-distributed

# The programs that the tests start, and the tests.
trainers := $(BUILD)/train_gpt $(BUILD)/train_gpt_other $(if $(NVCC),train_gptcu_sim)
programs := $(BUILD)/tests $(lesser:%=$(BUILD)/%/tests) $(if $(NVCC),$(BUILD)/ptxsim/tests)
# What takes longest is built first, so that no core waits for it at the end.
long     := $(if $(NVCC),$(on_sim))
.PHONY: build-tests run-tests run-distributed
build-tests: $(long) $(trainers) $(if $(NVCC),$(BUILD)/cuda_layers_sim) $(programs) $(BUILD)/fault_preload.so
run-tests:
	$(if $(NVCC),,@echo 'skipped: the tests of CUDA code, because there is no nvcc')
	@tests/run.sh $(programs)

run-distributed: $(trainers) $(BUILD)/tests $(BUILD)/fault_preload.so
	OMP_WAIT_POLICY=passive LLMC_THOROUGH=1 LLMC_TRAIN_GPT=$(BUILD)/train_gpt LLMC_FAULT_PRELOAD=$(BUILD)/fault_preload.so \
	    $(if $(NVCC),LLMC_TRAIN_GPTCU=./train_gptcu_sim) $(BUILD)/tests -sf='*tests/dist/*'

gpu-test: ## run the tests of CUDA code on this machine's NVIDIA GPU instead of the simulator
	@dev/setup.sh
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/gpu-tests
	$(BUILD)/gpu-tests

gpu-check: ## check this machine's NVIDIA GPU: tests, times of every layer, training compared with PyTorch; 9 minutes
	@dev/gpu_check.sh

ptxsim-bench: ## measure how fast CUDA code runs on the simulator, with and without its checks
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/ptxsim/bench
	$(BUILD)/ptxsim/bench

resources: ## write the table of the CUDA kernels' registers again, from ptxas: tests/golden/cuda_resources.txt
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) $(on_sim)
	$(PYTHON) dev/ptxsim/resources.py --renew tests/golden/cuda_resources.txt $(on_sim)

# On a GPU if there is one, otherwise on the simulator.
compared  = train_gptcu$(if $(shell nvidia-smi -L 2>/dev/null),,_sim)
compare: ## compare the CUDA trainer (and the PyTorch twin, if torch is there) with the CPU trainer; MODEL=DIR DATA=DIR BATCH= SEQ=
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(compared)
	@MODEL="$(MODEL)" DATA="$(DATA)" BATCH="$(BATCH)" SEQ="$(SEQ)" dev/compare.sh ./$(compared)

bench: ## compare the speed of this trainer and PyTorch on this machine, about 20 minutes (installs torch into .venv)
	@dev/setup.sh torch
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/attention
	$(PYTHON) dev/bench/bench.py --train-gpt ./train_gpt --attention $(BUILD)/attention $(if $(LLMC),--llmc $(LLMC))

bench-quick: ## the same with a small model, less than 2 minutes
	@dev/setup.sh torch
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/attention
	$(PYTHON) dev/bench/bench.py --train-gpt ./train_gpt --attention $(BUILD)/attention --quick

experiments: ## train what is missing in the studies of dev/experiments (hours), then write their tables and plots
	@dev/setup.sh
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt
	$(PYTHON) dev/experiments/run.py
	$(PYTHON) dev/experiments/report.py

docs: $(BUILD)/train_gpt ## write docs/options.md again, from --help
	python3 dev/options_doc.py $< docs/options.md

format: ## run clang-format on all C++ files
	clang-format -i $$(git ls-files '*.cpp' '*.cu' '*.c' '*.h' ':!docs/tiny.cpp')

clean: ## remove everything that was built (not .venv, data or out)
	rm -rf $(BUILD) train_gpt train_gptcu train_gptcu_sim

help: ## print this list
	@echo 'make train_gptcu   build the CUDA trainer (GPU_ARCH="80 90"); make train_gptcu_sim: the same for the simulator'
	@echo 'make               build train_gpt (SANITIZE=1: with ASan and UBSan; ONEDNN=0: without oneDNN)'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{ printf "make %-13s %s\n", $$1, $$2 }'

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d $(BUILD)/*/*/*.d)
