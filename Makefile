# make help lists what there is. Two commands need nothing but make: make quickstart, make test.

CXX      ?= g++
# Headers and libraries of the packages in dev/setup.sh, where they are not the system's (dev/gpu_check.sh --pack).
DEPS     ?= $(wildcard .deps)
ONEDNN   ?= $(shell printf '\043include <oneapi/dnnl/dnnl.hpp>\n' | $(CXX) $(DEPS:%=-isystem %/include) -x c++ -E - >/dev/null 2>&1 && echo 1)
SANITIZE ?= 0
# 1: train_gpt has the model three times, for AVX2, AVX-512 and AVX-512 with BF16, and takes the best that the processor
# has (llmc/cpu/isa.h). 0: once, for this processor.
DISPATCH ?= $(if $(filter x86_64-1,$(shell uname -m)-$(if $(filter 0,$(SANITIZE)),1)),1,0)
PYTHON   := .venv/bin/python
BUILD    := build

CXXFLAGS ?= -O3 -Wall -Wextra
# -fno-math-errno lets sqrt be vectorised; -Wno-psabi: vectors wider than the machine's pass through functions here.
flags    := -std=c++20 -fopenmp -fno-math-errno -Wno-psabi -I. -MMD -MP $(CXXFLAGS)
libs     := -lz
ifneq ($(DEPS),)
flags    += -isystem $(DEPS)/include
# Not new: what these libraries need in turn is looked for there too.
libs     += -L$(DEPS)/lib -Wl,--disable-new-dtags,-rpath,$(abspath $(DEPS))/lib
endif
ifeq ($(ONEDNN),1)
flags    += -DLLMC_ONEDNN
libs     += -ldnnl
endif
ifeq ($(SANITIZE),1)
flags    += -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif

native   := -march=native
ifeq ($(DISPATCH),1)
model    := -march=x86-64-v3 -DLLMC_ISA=avx2
models   := $(BUILD)/train_gpt.o $(BUILD)/avx512.o $(BUILD)/avx512_bf16.o
# For tests, those that this processor runs: each takes long to build.
cpu      := $(shell cat /proc/cpuinfo)
tested   := $(BUILD)/train_gpt.o $(if $(filter avx512vl,$(cpu)),$(BUILD)/avx512.o) $(if $(filter avx512_bf16,$(cpu)),$(BUILD)/avx512_bf16.o)
dispatch := -DLLMC_DISPATCH
else
model    := $(native)
models   := $(BUILD)/train_gpt.o
tested   := $(models)
endif
$(BUILD)/avx512.o: isa := -march=x86-64-v4 -DLLMC_ISA=avx512
$(BUILD)/avx512_bf16.o: isa := -march=x86-64-v4 -mavx512bf16 -DLLMC_ISA=avx512_bf16

# Most tests spend no time in themselves, and build fastest at -O0. Those that do, and the oracle, are optimised, and come
# first: of an inline function that several objects have, the linker takes the first.
busy     := $(addprefix $(BUILD)/,reference.o test_attention.o test_attention_linear.o test_norms.o test_tile.o test_tokenizer.o)
tests    := $(busy) $(filter-out $(busy),$(patsubst tests/%.cpp,$(BUILD)/%.o,tests/main.cpp $(wildcard tests/test_*.cpp)))
# Where this processor has AVX-512, what is written for AVX2 and for AVX-512 without BF16 is tested as well.
lesser   := $(if $(filter 1,$(DISPATCH)),$(if $(filter avx512vl,$(cpu)),avx2 avx512))

# dev/ptxsim stands in for cudart, cuBLAS(Lt) and NCCL: CUDA objects with their PTX in them run on this processor. nvcc
# is that of the system, if it knows C++20 (from CUDA 12 on), or the one that dev/setup.sh has put into .venv.
ifndef NVCC
NVCC     := $(shell for n in nvcc /usr/local/cuda/bin/nvcc .venv/cuda/bin/nvcc; do \
              $$n -std=c++20 -x cu -E /dev/null >/dev/null 2>&1 && command -v $$n && break; done)
endif
CUDA     ?= $(if $(NVCC),$(realpath $(dir $(realpath $(NVCC)))..))
comma    := ,
cuda     := -std=c++20 -O3 -lineinfo -I. $(DEPS:%=-isystem %/include) -ccbin $(firstword $(CXX)) -Xcompiler -Wall,-Wextra$(if $(findstring clang,$(CXX)),$(comma)-Wno-unused-function),-fopenmp $(NVCCFLAGS)
CUDA_LIB ?= $(CUDA)/lib64
cudalibs := -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcudart -lcublasLt
# For hardware; the PTX of compute_80, which goes with it, is for the simulator and for what is newer than these.
GPU_ARCH ?= 80 90
to_gpu   := $(foreach a,$(GPU_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80 \
            -Xfatbin -compress=false
to_ptx   := -gencode arch=compute_80,code=compute_80 -Xfatbin -compress=false
sim      := $(patsubst dev/ptxsim/%.cpp,$(BUILD)/ptxsim/%.o,$(wildcard dev/ptxsim/*.cpp))
# The CUDA trainer's objects. Attention is apart because its kernels take longer to build than all the rest.
vpath %.cu llmc/cuda
objects  := attention.o attention_linear.o attention_norms.o train_gpt.o
on_gpu   := $(addprefix $(BUILD)/gpu/,$(objects))
on_sim   := $(addprefix $(BUILD)/ptx/,$(objects))
# Tests of the simulator (ptxsim_*) and of the CUDA trainer (cuda_*), which run on it.
cutests  := $(patsubst tests/%.cu,$(BUILD)/%.o,$(wildcard tests/*.cu))

.PHONY: all quickstart test compare resources bench bench-quick gpu-test gpu-check ptxsim-bench docs format clean help
all: train_gpt

# In this order: of an inline function that several objects have, the linker takes the first, which must run on all
# processors.
train_gpt: $(BUILD)/train_gpt_main.o $(BUILD)/run.o $(BUILD)/version.o $(models)
$(BUILD)/train_gpt: $(BUILD)/train_gpt_main.o $(BUILD)/run.o $(BUILD)/version.o $(tested)
train_gpt $(BUILD)/train_gpt:
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/train_gpt.o: train_gpt.cpp $(BUILD)/flags
	$(CXX) $(flags) $(model) $(dispatch) -c $< -o $@

# Of both trainers all but the model: run.o is the same in both, and takes long.
$(BUILD)/run.o: llmc/run.cpp
$(BUILD)/train_gpt_main.o: llmc/cpu/main.cpp
$(BUILD)/train_gptcu_main.o: llmc/cuda/main.cpp
$(BUILD)/run.o $(BUILD)/train_gpt_main.o $(BUILD)/train_gptcu_main.o: $(BUILD)/flags
	$(CXX) $(flags) -O1 $(dispatch) -c $(filter %.cpp,$^) -o $@

# The commit changes often, so it goes into a small object alone. It is empty in a folder that is no git repository.
commit   := $(if $(wildcard .git),$(shell git describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null))
$(BUILD)/version.o: llmc/version.cpp $(BUILD)/commit $(BUILD)/flags
	$(CXX) $(flags) -DLLMC_COMMIT='"$(commit)"' -c $< -o $@
$(BUILD)/commit: FORCE
	@mkdir -p $(BUILD)
	@echo '$(commit)' | cmp -s - $@ || echo '$(commit)' > $@

# What runs before main() would run on processors without this instruction set.
$(BUILD)/avx512.o $(BUILD)/avx512_bf16.o: train_gpt.cpp $(BUILD)/flags
	$(CXX) $(flags) $(isa) -c $< -o $@
	@if nm $@ | grep _GLOBAL__sub_I; then echo '$@: has static initialisers' >&2; rm $@; false; fi

$(tests): quick := -O0
$(busy): quick := -O1
$(BUILD)/reference.o: quick := -O3

$(BUILD)/%.o: tests/%.cpp $(BUILD)/flags
	$(CXX) $(flags) $(quick) $(native) -c $< -o $@

$(BUILD)/tests: $(tests)
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/attention: dev/bench/attention.cpp $(BUILD)/flags
	$(CXX) $(flags) $(native) $< -o $@ $(libs)

# Tests of layers once more for each lesser instruction set: build/avx2/tests, build/avx512/tests. AVX-512 without BF16
# differs from what runs above in how it converts and multiplies bf16, and needs no more than those that do.
$(BUILD)/avx2/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -O1 -march=x86-64-v3 -c $< -o $@

$(BUILD)/avx512/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -O1 -march=x86-64-v4 -c $< -o $@

$(BUILD)/avx2/tests: $(patsubst %,$(BUILD)/avx2/%.o,reference main test_attention test_attention_linear test_layers test_tile test_vector)
$(BUILD)/avx512/tests: $(patsubst %,$(BUILD)/avx512/%.o,reference main test_attention test_tile test_vector)
$(BUILD)/avx2/tests $(BUILD)/avx512/tests:
	$(CXX) $(flags) $^ -o $@ $(libs)

# Rounding must be that of the PTX, so nothing may be contracted to an fma. -Wno-restrict: GCC 12 warns of an overlap in
# string additions that is not there (its bug 105651).
$(BUILD)/ptxsim/%.o: dev/ptxsim/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) $(native) -ffp-contract=off $(if $(findstring clang,$(CXX)),,-Wno-restrict) -DLLMC_ISA=ptxsim -isystem $(CUDA)/include -c $< -o $@

$(BUILD)/libptxsim.a: $(sim)
	@rm -f $@
	ar rcs $@ $^

# -O1 is for the host alone, and builds faster.
$(cutests): $(BUILD)/%.o: tests/%.cu $(BUILD)/flags
	$(NVCC) $(cuda:-O3=-O1) $(to_ptx) -MMD -MP -c $< -o $@

$(BUILD)/ptxsim_libraries.o $(BUILD)/cuda_model.o: $(BUILD)/%.o: tests/%.cpp $(BUILD)/flags
	$(CXX) $(flags) -O0 $(native) $(dispatch) -isystem $(CUDA)/include -c $< -o $@

$(BUILD)/ptxsim/tests: $(sim) $(on_sim) $(tested) $(BUILD)/reference.o $(BUILD)/main.o $(cutests) \
    $(BUILD)/ptxsim_libraries.o $(BUILD)/cuda_model.o
	$(CXX) $(flags) $^ -o $@ $(libs)

# The same objects on hardware, whose driver compiles their PTX: all but what is about the simulator's own reports.
$(BUILD)/gpu-tests: $(BUILD)/main.o $(BUILD)/reference.o $(filter-out %_faults.o %_races.o %_streams.o %_samples.o %_figures.o,$(cutests)) \
    $(BUILD)/cuda_model.o $(on_gpu) $(tested) $(BUILD)/ptxsim/report.o $(BUILD)/ptxsim/options.o
	$(CXX) $(flags) $^ -o $@ $(libs) $(cudalibs)

# The CUDA trainer for hardware; and for this processor, where the PTX alone is enough and takes half the time.
$(BUILD)/gpu/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(cuda) $(to_gpu) -MMD -MP -c $< -o $@

$(BUILD)/ptx/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(NVCC) $(cuda) $(to_ptx) -MMD -MP -c $< -o $@
$(BUILD)/ptx/cuda_layers.o: cuda := $(cuda:-O3=-O0)

train_gptcu: $(on_gpu) $(BUILD)/train_gptcu_main.o $(BUILD)/run.o $(BUILD)/version.o
	$(CXX) $(flags) $^ -o $@ $(libs) $(cudalibs)

train_gptcu_sim: $(on_sim) $(BUILD)/train_gptcu_main.o $(BUILD)/run.o $(BUILD)/version.o $(BUILD)/libptxsim.a
	$(CXX) $(flags) $^ -o $@ $(libs)

# Every kernel timed alone: on hardware, and on the simulator, where no time means anything.
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

# Changes, and so has everything built again, when the compiler or its flags do.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CXX) $(flags) $(model) $(libs)' | cmp -s - $@ || echo '$(CXX) $(flags) $(model) $(libs)' > $@
FORCE:

# Kills or fails a program at its n-th write, fsync or rename (tests/test_resume.cpp).
$(BUILD)/fault_preload.so: tests/fault_preload.c $(BUILD)/flags
	$(CC) -O2 -Wall -Wextra -fPIC -shared $< -o $@ -ldl

quickstart: ## set up, tokenise Shakespeare, train a small GPT with polynomial attention, sample from it
	@dev/quickstart.sh

test: ## set up, build and run all tests
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) build-tests
	@$(MAKE) --no-print-directory run-tests

programs := $(BUILD)/tests $(lesser:%=$(BUILD)/%/tests) $(if $(NVCC),$(BUILD)/ptxsim/tests)
# What takes longest, first, so that no core waits for it at the end.
long     := $(if $(NVCC),$(on_sim))
.PHONY: build-tests run-tests
build-tests: $(long) $(BUILD)/train_gpt $(if $(NVCC),train_gptcu_sim $(BUILD)/cuda_layers_sim) $(programs) $(BUILD)/fault_preload.so
run-tests:
	$(if $(NVCC),,@echo 'skipped: the tests of CUDA code, for there is no nvcc')
	@tests/run.sh $(programs)

gpu-test: ## the tests of CUDA code on this machine's NVIDIA GPU instead of the simulator
	@dev/setup.sh
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/gpu-tests
	$(BUILD)/gpu-tests

gpu-check: ## all about this machine's NVIDIA GPU: tests, every layer timed, training beside PyTorch; 9 minutes
	@dev/gpu_check.sh

ptxsim-bench: ## how fast CUDA code runs on this processor, with and without the checks
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/ptxsim/bench
	$(BUILD)/ptxsim/bench

resources: ## the table of the CUDA kernels' registers anew, by ptxas: tests/golden/cuda_resources.txt
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) $(on_sim)
	$(PYTHON) dev/ptxsim/resources.py --renew tests/golden/cuda_resources.txt $(on_sim)

# On hardware where there is some.
compared  = train_gptcu$(if $(shell nvidia-smi -L 2>/dev/null),,_sim)
compare: ## the CUDA trainer (and PyTorch's twin, if there) against the CPU's, tensor by tensor; MODEL=DIR DATA=DIR BATCH= SEQ=
	@dev/setup.sh cuda
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(compared)
	@MODEL="$(MODEL)" DATA="$(DATA)" BATCH="$(BATCH)" SEQ="$(SEQ)" dev/compare.sh ./$(compared)

bench: ## this trainer against PyTorch on this machine, about 20 minutes (installs torch into .venv)
	@dev/setup.sh torch
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/attention
	$(PYTHON) dev/bench/bench.py --train-gpt ./train_gpt --attention $(BUILD)/attention $(if $(LLMC),--llmc $(LLMC))

bench-quick: ## the same on a small model, under 2 minutes
	@dev/setup.sh torch
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/attention
	$(PYTHON) dev/bench/bench.py --train-gpt ./train_gpt --attention $(BUILD)/attention --quick

docs: $(BUILD)/train_gpt ## docs/options.md anew, from --help
	python3 dev/options_doc.py $< docs/options.md

format: ## clang-format all C++
	clang-format -i *.cpp *.cu llmc/*.h llmc/*.cpp llmc/*/*.h llmc/*/*.c* tests/*.c* tests/*.h dev/bench/*.c* dev/bench/*.h dev/ptxsim/*.h dev/ptxsim/*.c*

clean: ## remove what was built (not .venv, data or out)
	rm -rf $(BUILD) train_gpt train_gptcu train_gptcu_sim

help: ## this list
	@echo 'make train_gptcu   the CUDA trainer (GPU_ARCH="80 90"); make train_gptcu_sim: the same on this processor'
	@echo 'make               build train_gpt (SANITIZE=1: with ASan and UBSan; ONEDNN=0: without oneDNN)'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{ printf "make %-13s %s\n", $$1, $$2 }'

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d)
