#!/usr/bin/env bash
# Everything that wants a GPU, in one call, on a machine without network:
#   tools/gpu_check.sh [--out DIR] [--budget SECONDS] [--stages LIST] [--without-gpu]
# builds nybble with its CUDA kernels into a scratch folder (not into this checkout), runs the GPU tests, compute-sanitizer
# and the benches, and prints one table of less than 12,000 characters; whole logs go to DIR (default: build/gpu_check).
# A stage that fails or runs out of its time is named in the table and stops only what needs it.
# Exit status: 0 all well, 1 a stage failed, 2 wrong arguments.
#
# PYTHON (default python3) needs torch, pybind11, scikit-build-core, cmake, ninja, pytest, hypothesis, numpy, safetensors,
# typer, rich; transformers and peft for whole models. A folder .peer here (tools/gpu_peer.sh) is where bitsandbytes is
# taken from. BUILD_DIR keeps what was compiled for another run. --without-gpu does what can be done anywhere with nvcc:
# build, report, and the benches' dry runs.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=$root/build/gpu_check
budget=570
gpu=yes
# By what is lost least if time runs out.
stages=build,smoke,tests,bench,memcheck,racecheck,step,sweep,report
while [ $# -gt 0 ]; do
	case $1 in
	--out | --budget | --stages)
		[ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
		case $1 in --out) out=$2 ;; --budget) budget=$2 ;; --stages) stages=$2 ;; esac
		shift 2
		;;
	--without-gpu) gpu=no; shift ;;
	*) sed -n '2,3p' "$0" >&2; exit 2 ;;
	esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
prefix=$scratch/site
cd "$root" || exit 2
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export PYTHONPATH=$prefix${PYTHONPATH:+:$PYTHONPATH}
[ -d "$root/.peer" ] && PYTHONPATH=$PYTHONPATH:$root/.peer
if [ "$gpu" = yes ]; then export NYBBLE_REQUIRE_GPU=1; dry=(); else dry=(--dry-run); fi

rm -f "$out"/{build,tests,sanitizer,bench}.log "$out"/{summary.txt,numbers.json}
: > "$scratch/table"
failed=0

# note NAME RESULT SECONDS TEXT: one row of the table of stages.
note() { printf '%-10s %-8s %5s s  %s\n' "$1" "$2" "$3" "$4" | cut -c1-180 >> "$scratch/table"; }

# stage NAME LIMIT LOG COMMAND...: runs it, at most LIMIT seconds and what is left of the budget; its output goes to
# $scratch/NAME.out and is appended to DIR/LOG. `said NAME` tells what the row says.
stage() {
	local name=$1 limit=$2 log=$3 start=$SECONDS rc result
	shift 3
	case ,$stages, in *,"$name",*) ;; *) return 0 ;; esac
	[ $((budget - SECONDS)) -lt "$limit" ] && limit=$((budget - SECONDS))
	if [ "$limit" -lt 5 ]; then
		note "$name" skipped 0 "no time left of $budget s"
		failed=1
		return 1
	fi
	echo "== $name: $*" >> "$out/$log"
	timeout -k 5 "$limit" "$@" > "$scratch/$name.out" 2>&1
	rc=$?
	cat "$scratch/$name.out" >> "$out/$log"
	# pytest's 5: it found no test to run, which is so where all are skipped for want of a GPU.
	[ "$name$rc$gpu" = tests5no ] && rc=0
	result=ok
	if [ $rc = 124 ] || [ $rc = 137 ]; then result=TIMEOUT; elif [ $rc != 0 ]; then result=FAILED; fi
	[ $result = ok ] || failed=1
	note "$name" $result $((SECONDS - start)) "$(said "$name" $result)"
	[ $result = ok ]
}

said() {
	local file=$scratch/$1.out
	case $1-$2 in
	build-ok) sizes ;;
	build-*) grep -E "error|Error|FAILED" "$file" | head -1 ;;
	tests-*) grep -E "(passed|failed|error|skipped)" "$file" | tail -1 | tr -d '=' ;;
	memcheck-* | racecheck-*) grep -E "SUMMARY|WRONG|^[0-9]+ wrong|rror:" "$file" | tail -2 | tr -s '=' ' ' | tr '\n' ';' ;;
	bench-ok) grep -E "^targets" "$file" | tail -1 ;;
	step-ok) grep -E "^nybble" "$file" | tail -1 | tr -s ' ' ;;
	sweep-ok) grep -cE "^(linear|grad_input)" "$file" | sed 's/$/ curves/' ;;
	*) tail -1 "$file" ;;
	esac
}

sizes() { (cd "$prefix/nybble" && stat -c '%n %s bytes' ./_*.so) | sed 's/^\.\///; s/\.[^ ]*so//' | tr '\n' ';'; }

# What the compilers say, while the build runs: it needs no GPU and nothing of the build.
report=
case ,$stages, in
*,report,*)
	timeout -k 5 $((budget < 300 ? budget : 300)) "$python" tools/cuda_report.py --brief \
		--jobs "$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))" --json "$scratch/report.json" > "$scratch/report.out" 2>&1 &
	report=$!
	;;
esac

built=yes
stage build 280 build.log "$python" -m pip install --disable-pip-version-check --no-index --no-deps \
	--no-build-isolation --target "$prefix" -v -C cmake.define.NYBBLE_CUDA=ON -C build-dir="${BUILD_DIR:-$scratch/build}" . || built=no
case ,$stages, in *,build,*) ;; *) prefix= ;; esac

if [ $built = yes ]; then
	stage smoke 60 build.log "$python" tools/gpu_smoke.py "$prefix" "$gpu" || [ "$gpu" = no ] || built=no
fi
if [ $built = yes ]; then
	extra=()
	"$python" -c 'import pytest_timeout' 2> /dev/null && extra+=(--timeout=120)
	"$python" -c 'import xdist' 2> /dev/null && [ "$gpu" = yes ] && extra+=(-n 6)
	stage tests 170 tests.log "$python" -m pytest tests/gpu -v -p no:cacheprovider --durations=10 "${extra[@]}"
	stage bench 170 bench.log "$python" bench/cuda_kernels.py --limit 145 --json "$scratch/targets.json" "${dry[@]}"
	if [ "$gpu" = no ]; then
		note memcheck skipped 0 "no GPU"
		note racecheck skipped 0 "no GPU"
	elif command -v compute-sanitizer > /dev/null; then
		# Only nybble's kernels: torch's own take most of the time.
		sanitizer=(compute-sanitizer --error-exitcode 9 --print-limit 30)
		compute-sanitizer --help 2>&1 | grep -q -- --kernel-name && sanitizer+=(--kernel-name kernel_substring=nybble)
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck 90 sanitizer.log \
			"${sanitizer[@]}" --tool memcheck "$python" tools/gpu_sanitize.py
		stage racecheck 90 sanitizer.log "${sanitizer[@]}" --tool racecheck "$python" tools/gpu_sanitize.py --racecheck
	else
		note memcheck FAILED 0 "compute-sanitizer is not on PATH"
		failed=1
	fi
	stage step 80 bench.log "$python" bench/cuda_kernels.py --step --json "$scratch/step.json" "${dry[@]}"
	stage sweep 90 bench.log "$python" bench/cuda_kernels.py --sweep --limit 70 --seconds 0.03 --json "$scratch/sweep.json" "${dry[@]}"
else
	failed=1
	note "the rest" skipped 0 "there is nothing to run: see build.log"
fi
if [ -n "$report" ]; then
	wait "$report"
	rc=$?
	cat "$scratch/report.out" >> "$out/build.log"
	if [ $rc = 0 ]; then result=ok; else result=FAILED; failed=1; fi
	note report $result - "$(grep -E '^[0-9]+ kernels' "$scratch/report.out" | tail -1)"
fi

"$python" - "$scratch" "$out/numbers.json" << 'END'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
parts = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
pathlib.Path(sys.argv[2]).write_text(json.dumps(parts, indent=1))
END

# section NAME LINES: what a stage printed, from the head, where it ran.
section() {
	[ -s "$scratch/$1.out" ] || return 0
	echo
	echo "-- $1"
	local left="^(GPU:|== |Failed to load CPU|\s*$)"
	[ "$1" = bench ] || left="$left|^ceilings" # which the first of them told
	grep -vE "$left" "$scratch/$1.out" | cut -c1-170 | head -"$2"
}
{
	echo "gpu_check: $([ $failed = 0 ] && echo all well || echo NOT ALL WELL), $SECONDS s, $(git rev-parse --short HEAD 2> /dev/null)"
	cat "$scratch/table"
	grep -hE "^(FAILED|ERROR) " "$scratch/tests.out" 2> /dev/null | cut -c1-150 | head -15
	section bench 55
	section step 10
	section sweep 20
	if [ -s "$scratch/report.out" ]; then
		echo
		echo "-- ptxas: registers and spills (most of all instances)"
		grep -vE "^\s*$" "$scratch/report.out" | cut -c1-150 | head -32
	fi
	echo
	if [ "$gpu" = yes ]; then
		nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -2
	else
		echo "no GPU was asked for (--without-gpu): nothing of this has run on one"
	fi
	nvcc --version 2> /dev/null | grep release
	"$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
} > "$out/summary.txt"
# What the end says is never cut off.
if [ "$(wc -c < "$out/summary.txt")" -lt 11900 ]; then
	cat "$out/summary.txt"
else
	head -c 8400 "$out/summary.txt"
	echo
	echo "... ($out/summary.txt has it all)"
	tail -c 3300 "$out/summary.txt"
fi
exit $failed
