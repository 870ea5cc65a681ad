# make help lists what there is. Two commands need nothing but make: make quickstart, make test.

CXX      ?= g++
ONEDNN   ?= $(shell printf '\043include <oneapi/dnnl/dnnl.hpp>\n' | $(CXX) -x c++ -E - >/dev/null 2>&1 && echo 1)
SANITIZE ?= 0
# 1: train_gpt has the model three times, for AVX2, AVX-512 and AVX-512 with BF16, and takes the best that the processor
# has (llmc/cpu/isa.h). 0: once, for this processor.
DISPATCH ?= $(if $(filter x86_64-1,$(shell uname -m)-$(if $(filter 0,$(SANITIZE)),1)),1,0)
PYTHON   := .venv/bin/python
BUILD    := build

CXXFLAGS ?= -O3 -Wall -Wextra
# -fno-math-errno lets sqrt be vectorised; -Wno-psabi: vectors wider than the machine's pass through functions here.
flags    := -std=c++20 -fopenmp -fno-math-errno -Wno-psabi -I. -MMD -MP $(CXXFLAGS)
libs     := -lpcre2-8 -lz
ifeq ($(ONEDNN),1)
flags    += -DLLMC_ONEDNN
libs     += -ldnnl
endif
ifeq ($(SANITIZE),1)
flags    += -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif

native   := -march=native
ifeq ($(DISPATCH),1)
main     := -march=x86-64-v3 -DLLMC_ISA=avx2 -DLLMC_DISPATCH -DLLMC_MAIN
more     := $(BUILD)/avx512.o $(BUILD)/avx512_bf16.o
else
main     := $(native) -DLLMC_MAIN
endif
$(BUILD)/avx512.o: isa := -march=x86-64-v4 -DLLMC_ISA=avx512
$(BUILD)/avx512_bf16.o: isa := -march=x86-64-v4 -mavx512bf16 -DLLMC_ISA=avx512_bf16

tests    := $(patsubst tests/%.cpp,$(BUILD)/%.o,$(wildcard tests/*.cpp))
# Those of llmc/cpu, and the lesser instruction sets that they are built for as well where this processor has them.
layers   := $(addprefix $(BUILD)/,main.o $(foreach t,attention attention_linear layers norms tile vector,test_$(t).o))
lesser   := $(if $(filter 1,$(DISPATCH)),avx2 $(if $(filter avx512vl,$(shell cat /proc/cpuinfo)),avx512))

.PHONY: all quickstart test bench bench-quick format clean help
all: train_gpt

# In this order: of an inline function that several objects have, the linker takes the first, which must run on all
# processors.
train_gpt: $(BUILD)/train_gpt.o $(more)
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/train_gpt.o: train_gpt.cpp $(BUILD)/flags
	$(CXX) $(flags) $(main) -c $< -o $@

# What runs before main() would run on processors without this instruction set.
$(BUILD)/avx512.o $(BUILD)/avx512_bf16.o: train_gpt.cpp $(BUILD)/flags
	$(CXX) $(flags) $(isa) -c $< -o $@
	@if nm $@ | grep _GLOBAL__sub_I; then echo '$@: has static initialisers' >&2; rm $@; false; fi

$(BUILD)/%.o: tests/%.cpp $(BUILD)/flags
	$(CXX) $(flags) $(native) -c $< -o $@

$(BUILD)/tests: $(tests)
	$(CXX) $(flags) $^ -o $@ $(libs)

$(BUILD)/attention: dev/bench/attention.cpp $(BUILD)/flags
	$(CXX) $(flags) $(native) $< -o $@ $(libs)

# The layers' tests once more for each lesser instruction set: build/avx2/tests, build/avx512/tests.
$(BUILD)/avx2/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -march=x86-64-v3 -c $< -o $@

$(BUILD)/avx512/%.o: tests/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(flags) -march=x86-64-v4 -c $< -o $@

$(BUILD)/%/tests: $(addprefix $(BUILD)/%/,$(notdir $(layers)))
	$(CXX) $(flags) $^ -o $@ $(libs)

# Changes, and so has everything built again, when the compiler or its flags do.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CXX) $(flags) $(main) $(libs)' | cmp -s - $@ || echo '$(CXX) $(flags) $(main) $(libs)' > $@
FORCE:

# Kills or fails a program at its n-th write, fsync or rename (tests/test_resume.cpp).
$(BUILD)/fault_preload.so: tests/fault_preload.c $(BUILD)/flags
	$(CC) -O2 -Wall -Wextra -fPIC -shared $< -o $@ -ldl

quickstart: ## set up, tokenise Shakespeare, train a small GPT with polynomial attention, sample from it
	@dev/quickstart.sh

test: ## set up, build and run all tests
	@dev/setup.sh
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/tests $(lesser:%=$(BUILD)/%/tests) \
	    $(BUILD)/fault_preload.so
	@tests/run.sh $(BUILD)/tests $(lesser:%=$(BUILD)/%/tests)

bench: ## this trainer against PyTorch on this machine, about 20 minutes (installs torch into .venv)
	@dev/setup.sh torch
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/attention
	$(PYTHON) dev/bench/bench.py --train-gpt ./train_gpt --attention $(BUILD)/attention $(if $(LLMC),--llmc $(LLMC))

bench-quick: ## the same on a small model, under 2 minutes
	@dev/setup.sh torch
	@$(MAKE) --no-print-directory -j$$(nproc) train_gpt $(BUILD)/attention
	$(PYTHON) dev/bench/bench.py --train-gpt ./train_gpt --attention $(BUILD)/attention --quick

format: ## clang-format all C++
	clang-format -i *.cpp llmc/*.h llmc/cpu/*.h tests/*.cpp tests/*.h dev/bench/*.cpp

clean: ## remove what was built (not .venv, data or out)
	rm -rf $(BUILD) train_gpt

help: ## this list
	@echo 'make               build train_gpt (SANITIZE=1: with ASan and UBSan; ONEDNN=0: without oneDNN)'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{ printf "make %-13s %s\n", $$1, $$2 }'

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d)
