#!/usr/bin/env bash
# Runs the C++ tests, which are the programs given as arguments, and the Python tests. The last line is: N passed, N failed.
# `make test` builds the programs first and then calls this. LLMC_TEST_DATA is a folder with tinyshakespeare.txt, wikitext2/
# and gpt2/ for tests on real text. If it is not set, these tests are skipped with a notice.
set -uo pipefail
cd "$(dirname "$0")/.."
# Without this, waiting threads would use the processor, and the tests would take minutes longer beside other programs.
export OMP_WAIT_POLICY=passive
export LLMC_TRAIN_GPT=build/train_gpt LLMC_FAULT_PRELOAD=build/fault_preload.so
[ ! -e train_gptcu_sim ] || export LLMC_TRAIN_GPTCU=./train_gptcu_sim
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

# The first program starts other programs and waits for them, and its tests of several ranks wait most. So these and everything
# else run at the same time as the rest of the first one, and each writes to a file of its own.
passed=0 failed=0
declare -A beside
run_beside() { # name, command
    "${@:2}" >"$log/${1//\//_}" 2>&1 &
    beside[$1]=$!
}
for tests in "${@:2}"; do run_beside "$tests" "$tests"; done
ranks="$1 of several ranks"
run_beside "$ranks" "$1" -sf='*tests/dist/*'
run_beside python .venv/bin/python -m unittest tests/*/test_*.py
trap 'kill "${beside[@]}" 2>/dev/null; rm -rf "$log"' EXIT
finish() { # name: waits for it, puts its output into $log/output and its exit status into $status
    echo "== $1"
    wait "${beside[$1]}"
    status=$?
    tee "$log/output" <"$log/${1//\//_}"
}
for tests in "$@" "$ranks"; do
    if [ -n "${beside[$tests]:-}" ]; then
        finish "$tests"
    else
        echo "== $tests"
        "$tests" -sfe='*tests/dist/*' 2>&1 | tee "$log/output"
        status=${PIPESTATUS[0]}
    fi
    # "[doctest] test cases: 50 | 49 passed | 1 failed | 0 skipped". A crash prints no such line and counts as one failure.
    counts=$(sed -n 's/^\[doctest\] test cases: *[0-9]* *| *\([0-9]*\) passed *| *\([0-9]*\) failed.*/\1 \2/p' "$log/output")
    read -r good bad <<<"${counts:-0 1}"
    [ "$status" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1  # a sanitizer has reported an error after the summary
    passed=$((passed + good)) failed=$((failed + bad))
done

finish python
# "Ran 20 tests in 9s", then "OK (skipped=1)" or "FAILED (failures=1, errors=1)".
count() { sed -n "s/^\(OK\|FAILED\).*$1=\([0-9]*\).*/\2/p" "$log/output"; }
ran=$(sed -n 's/^Ran \([0-9]*\) tests\{0,1\} in.*/\1/p' "$log/output")
broken=$(($(count failures || true)+0 + $(count errors || true)+0))
skipped=$(($(count skipped || true)+0))
[ -n "$ran" ] || { ran=0; broken=1; }
[ "$ran" -ge $((broken + skipped)) ] && passed=$((passed + ran - broken - skipped))
[ "$status" -eq 0 ] || [ "$broken" -gt 0 ] || broken=1
failed=$((failed + broken))

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
