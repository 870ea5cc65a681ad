#!/usr/bin/env bash
# Checks a machine with NVIDIA GPUs, in one command and in less than nine minutes: builds for this GPU only, runs the
# CUDA tests on it, times every layer, trains GPT-2 124M and compares the speed with PyTorch, times attention from T=1k to
# 32k and compares it with PyTorch's, compares the losses with those of the CPU trainer and those of two GPUs with those of
# one, and runs the tests under compute-sanitizer. Downloads nothing.
#
#   dev/gpu_check.sh         results: gpu_check.md, gpu_check.json and gpu_check.log in $OUT, or out/gpu_check
#   dev/gpu_check.sh --pack  copies the headers and libraries for building from this machine into .deps (45 MB), with a
#                            small dataset. Copy that folder, with the repository, to a machine that lacks them. The
#                            Makefile uses it instead of the system's files
#   dev/gpu_check.sh --sim   the same stages with small sizes on the simulator, to test this script
#
# Needs g++, make, python3 with numpy (and tokenizers, if --pack has made no dataset), nvcc, cudart and cuBLASLt (from the
# toolkit or from PyTorch). The comparisons with PyTorch need torch and safetensors, too. Exit status 0: no stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."
fail() { echo "gpu_check: $*" >&2; exit 1; }
includes() { printf '#include <%s>\n' "$@"; }
soname() { objdump -p "$1" | awk '/SONAME/ { print $2 }'; }
headers="doctest/doctest.h CLI/CLI.hpp nlohmann/json.hpp zlib.h"

pack() {
    local new=.deps-new file name needs
    rm -rf $new && mkdir -p $new/include $new/lib
    # Copies the files that these headers include, but only those of their packages.
    includes $headers oneapi/dnnl/dnnl.hpp | g++ -std=c++20 -x c++ -M - | tr -s ' \\' '\n' |
        grep -E '/(doctest|CLI|nlohmann|oneapi)/|/(zlib|zconf)\.h$' | while read -r file; do
            name=$new/include/$(sed 's|.*/include/\([a-z0-9_]*-linux-gnu/\)\?||' <<<"$file")
            mkdir -p "$(dirname "$name")" && cp "$file" "$name"
        done
    for name in dnnl z; do
        file=$(g++ -print-file-name=lib$name.so)
        [ -e "$file" ] || fail "--pack: lib$name.so not found (dev/setup.sh installs it)"
        ln -s "$(soname "$file")" $new/lib/lib$name.so
        # Copies the library and the libraries that it needs, except those that come with every compiler.
        needs='$3 ~ "/" && $1 !~ /^lib(c|m|stdc[+][+]|gcc_s|gomp)[.]so/ { print $3 }'
        for file in "$file" $(ldd "$file" | awk "$needs"); do
            strip --strip-unneeded "$file" -o "$new/lib/$(soname "$file")"
        done
    done
    .venv/bin/python data/prepare.py text llmc --tokenizer byte --out $new/data
    rm -rf .deps && mv $new .deps && du -sh .deps
}

sim=
case "${1:-}" in
    --pack) set -e && pack && exit ;;
    --sim) sim=1 ;;
    "") ;;
    *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
[ -n "$sim" ] || nvidia-smi -L >/dev/null 2>&1 || fail "needs an NVIDIA GPU, and nvidia-smi finds none"

# Finds what is here and what is missing.
work=$PWD/build/gpu_check out=${OUT:-out/gpu_check} missing=()
rm -rf "$work" "$out"/gpu_check.* && mkdir -p "$work/lib" "$work/include" "$work/tmp" "$out"
has() { "$python" -c "import sys, importlib.util; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
for python in .venv/bin/python python3; do has torch && break; done
has torch || [ ! -x .venv/bin/python ] || python=.venv/bin/python
has numpy || missing+=(numpy)
for header in $headers; do
    includes $header | "${CXX:-g++}" -x c++ -std=c++20 -isystem .deps/include -E - >/dev/null 2>&1 ||
        missing+=("<$header>")
done
nvcc=$(ls -U "${NVCC:-$(command -v nvcc)}" /usr/local/cuda/bin/nvcc .venv/cuda/bin/nvcc 2>/dev/null | head -n 1)
[ -n "$nvcc" ] || missing+=(nvcc)
if [ -z "$sim" ] && [ -n "$nvcc" ]; then
    cuda=$(realpath "$(dirname "$(realpath "$nvcc")")/..")
    nvidia=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia")')
    for lib in cudart cublasLt nccl; do
        file=$(g++ -print-file-name=lib$lib.so)
        file=$(ls -U "$cuda"/lib64/lib$lib.so "$file" "$nvidia"/*/lib/lib$lib.so.* 2>/dev/null | head -n 1)
        [ -n "$file" ] || [ $lib != nccl ] || continue  # it is for several GPUs only
        [ -n "$file" ] || { missing+=(lib$lib); continue; }
        ln -s "$file" "$work/lib/lib$lib.so" && ln -s "$file" "$work/lib/$(soname "$file")"
    done
    if [ ! -e "$cuda/include/cublasLt.h" ]; then
        ln -s "$nvidia"/*/include/cublas*.h "$work/include"
        [ -e "$work/include/cublasLt.h" ] || missing+=("<cublasLt.h>")
    fi
    [ -e "$cuda/include/nccl.h" ] || ln -s "$nvidia"/*/include/nccl.h "$work/include" 2>/dev/null
    export CPATH=$work/include
fi
[ ${#missing[@]} -eq 0 ] || fail "missing here: ${missing[*]} (dev/setup.sh installs it; without a network see --pack)"

# Runs the shell commands in the third argument as a stage, for a limited number of seconds. A stage that fails does not
# stop the others.
deadline=520 slower=1
[ -z "$sim" ] || slower=10
stage() { # name, seconds, commands
    local begin=$SECONDS limit=$(($2 * slower)) left=$((deadline * slower - SECONDS)) outcome=ok status=0
    [ $limit -le $left ] || limit=$left
    if [ $limit -lt 3 ]; then
        outcome="no time left"
    else
        printf '%-12s ' "$1"
        TMPDIR=$work/tmp timeout -k 5 $limit bash -eo pipefail -c "$3" >"$work/$1.log" 2>&1 &
        child=$!
        wait $child || status=$?
        [ $status -eq 0 ] || outcome="failed ($status)"
        [ $status -ne 124 ] && [ $status -ne 137 ] || outcome="stopped after $limit s"
        rm -rf "$work"/tmp/*
    fi
    record "$1" "$outcome" $((SECONDS - begin))
    { echo "==== $1: $outcome"; tail -c 1000000 "$work/$1.log" 2>/dev/null; } >>"$out/gpu_check.log"
}
record() { # name, outcome, seconds, reason
    case $2 in ok | skipped) ;; *) failed=1 ;; esac
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$work/stages.tsv"
    echo "$2, $3 s ${4:+($4)}"
    "$python" dev/bench/gpu_report.py "$work" "$out"
}
skip() { printf '%-12s ' "$1" && record "$1" skipped 0 "$2"; }
failed= child=
trap 'kill $child 2>/dev/null; exit 130' INT TERM

export OMP_WAIT_POLICY=passive python work sim
if [ -n "$sim" ]; then
    export cpu=./train_gpt trainer=./train_gptcu_sim layers=build/cuda_layers_sim quick=--quick device=cpu
    export tests='build/ptxsim/tests -tc="cuda gelu*"' make=make lengths=64,128 heads=2
    export model="--steps 20 --layers 1 --heads 2 --channels 32 --context 32" batch=2 gpus=2
else
    export cpu=build/hardware/train_gpt trainer=build/hardware/train_gptcu layers=build/hardware/cuda_layers quick=
    export tests=build/hardware/gpu-tests lengths=1024,2048,4096,8192,16384,32768 heads=12 device=cuda
    export model="--steps 200 --layers 4 --heads 4 --channels 128 --context 128" batch=8
    gpus=$(nvidia-smi -L | wc -l)
    # Everything, including the tests, has machine code for this GPU only, so that the driver does not compile PTX.
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    code="-gencode=arch=compute_$arch,code=sm_$arch"
    export DISPATCH=0 CUDA_LIB=$work/lib NVCCFLAGS="--threads=0 --split-compile=0"
    export make="make -j$(nproc) BUILD=build/hardware to_gpu=$code to_ptx=$code"
fi

# The most important stages come first. make -k, so that a program that does not build costs only its own stages.
stage build 200 '
$make -k $(basename $trainer) ${tests%% *} $layers train_gpt || status=$?
[ -n "$sim" ] || mv -f train_gptcu train_gpt build/hardware/  # `make` would build other ones
exit ${status:-0}'
stage tests 60 'eval $tests'
stage layers 40 '$layers $quick --json $work/layers.json'
has torch && has safetensors && pytorch=--device=$device || pytorch=--no-pytorch
export pytorch
stage training 170 '$python dev/bench/gpu_training.py --trainer $trainer --json $work/training.json $pytorch $quick'
stage attention 30 '$layers $quick --attention-only --lengths $lengths --json $work/attention.json'
if has torch; then
    stage sdpa 40 '$python dev/bench/sdpa.py --lengths $lengths --heads $heads --device $device --json $work/sdpa.json'
else
    skip sdpa "$python has no torch"
fi
export data=.deps/data
[ -e $data/meta.json ] || data=$work/data
export common="train --data $data $model --lr 1e-3 --val-every 0 --sample-every 0 --checkpoint-every 0"
stage curve 60 '
[ -e $data/meta.json ] || $python data/prepare.py text llmc --tokenizer byte --out $data
status=0
for attention in softmax poly3; do
    train="$common --attention $attention --batch $batch"
    $cpu $train --out $work/cpu_$attention
    for dtype in fp32 bf16; do
        $trainer $train --dtype $dtype --out $work/gpu_${attention}_$dtype
        [ $dtype = fp32 ] && rtol=1e-3 || rtol=2e-2
        $python dev/bench/losses.py {$work/cpu_$attention,$work/gpu_${attention}_$dtype}/metrics.jsonl --rtol $rtol \
            --json $work/curve_${attention}_$dtype.json || status=1
    done
done
exit $status'
# Two GPUs must give the losses of one.
if [ "$gpus" -lt 2 ]; then
    skip ranks "one GPU"
else
    stage ranks 40 '
for zero in 0 1 2; do
    ranks=()
    for rank in 0 1; do
        RANK=$rank WORLD_SIZE=2 LOCAL_RANK=$rank MASTER_ADDR=localhost MASTER_PORT=$((29500 + zero)) \
            $trainer $common --batch $((batch / 2)) --attention poly3 --dtype fp32 --zero $zero --comm-timeout 30 \
            --out $work/ranks_$zero &
        ranks+=($!)
    done
    for rank in ${ranks[@]}; do wait $rank; done
    $python dev/bench/losses.py {$work/gpu_poly3_fp32,$work/ranks_$zero}/metrics.jsonl --rtol 1e-3
done'
fi
sanitizer=$(ls -U "$(command -v compute-sanitizer)" "${cuda:-}/bin/compute-sanitizer" 2>/dev/null | head -n 1)
export sanitizer
for tool in memcheck racecheck initcheck; do
    if [ -z "$sanitizer" ] || [ -n "$sim" ]; then
        skip $tool "no compute-sanitizer"
    else
        export tool
        stage $tool 40 '$sanitizer --tool $tool --error-exitcode 9 $tests -tce="*CUDA model*,ptxsim*,cuda matmul*"'
    fi
done
echo "results: $out/gpu_check.md"
[ -z "$failed" ]
