#!/usr/bin/env bash
# Runs the C++ tests, the programs given as arguments, and the Python tests, and ends with one line: N passed, N failed.
# `make test` calls it, after building what it needs. LLMC_TEST_DATA names a folder with tinyshakespeare.txt, wikitext2/
# and gpt2/ for tests on real text. If it is not set, these tests are skipped with a notice.
set -uo pipefail
cd "$(dirname "$0")/.."
# If threads waited in a loop, the tests would take minutes longer while other programs run beside them.
export OMP_WAIT_POLICY=passive
export LLMC_TRAIN_GPT=build/train_gpt LLMC_FAULT_PRELOAD=build/fault_preload.so
[ ! -e train_gptcu_sim ] || export LLMC_TRAIN_GPTCU=./train_gptcu_sim
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

# The first program starts others and waits for them. All other tests run beside it, each with its output in a file.
passed=0 failed=0
declare -A beside
run_beside() { # name, command
    "${@:2}" >"$log/${1//\//_}" 2>&1 &
    beside[$1]=$!
}
for tests in "${@:2}"; do run_beside "$tests" "$tests"; done
run_beside python .venv/bin/python -m unittest discover -s tests
trap 'kill "${beside[@]}" 2>/dev/null; rm -rf "$log"' EXIT
finish() { # name: its output into $log/output, its exit status into $status
    echo "== $1"
    wait "${beside[$1]}"
    status=$?
    tee "$log/output" <"$log/${1//\//_}"
}
for tests in "$@"; do
    if [ -n "${beside[$tests]:-}" ]; then
        finish "$tests"
    else
        echo "== $tests"
        "$tests" 2>&1 | tee "$log/output"
        status=${PIPESTATUS[0]}
    fi
    # "[doctest] test cases: 50 | 49 passed | 1 failed | 0 skipped"; a crash prints no such line, and is one failure.
    counts=$(sed -n 's/^\[doctest\] test cases: *[0-9]* *| *\([0-9]*\) passed *| *\([0-9]*\) failed.*/\1 \2/p' "$log/output")
    read -r good bad <<<"${counts:-0 1}"
    [ "$status" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1  # a sanitizer's report after the summary
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
