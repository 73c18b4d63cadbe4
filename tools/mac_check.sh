#!/usr/bin/env bash
# tools/mac_check.sh [--out DIR] [--python PYTHON] [--mlx] [--dry-run]
# for a Mac with Apple silicon: a virtual environment in DIR (default: build/mac_check), nybble built into it, the CPU's
# tests under NEON, tests/mac on the GPU, and bench/metal.py beside fp16 matmul (with --mlx: and MLX, which is installed
# then). Prints one table to paste; whole logs stay in DIR. --dry-run: prints the commands, and runs the bench on small
# CPU tensors with PYTHON as it is. Exit status: 0 all well, 1 a stage failed, 2 wrong arguments or no Mac.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$root/build/mac_check
python=python3
mlx=no
dry=no
while [ $# -gt 0 ]; do
	case $1 in
	--out | --python)
		[ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
		case $1 in --out) out=$2 ;; --python) python=$2 ;; esac
		shift 2
		;;
	--mlx) mlx=yes; shift ;;
	--dry-run) dry=yes; shift ;;
	*) sed -n '2p' "$0" >&2; exit 2 ;;
	esac
done
if [ $dry = no ] && [ "$(uname -sm)" != "Darwin arm64" ]; then
	echo "this is $(uname -sm), not a Mac with Apple silicon (--dry-run shows what would run)" >&2
	exit 2
fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$root" || exit 2
# An operator that torch lacks on MPS is an error, not a detour by way of the CPU.
unset PYTORCH_ENABLE_MPS_FALLBACK
export NYBBLE_REQUIRE_MPS=1
bin=$out/venv/bin
failed=0
: > "$out/table"

# stage NAME COMMAND...: runs it, its output in DIR/NAME.log, and adds a row to the table.
stage() {
	local name=$1 start=$SECONDS result=ok
	shift
	if [ $dry = yes ]; then
		echo "$name: $*"
		return 0
	fi
	echo "== $name" >&2
	"$@" > "$out/$name.log" 2>&1 || { result=FAILED; failed=1; }
	printf '%-8s %-7s %5s s  %s\n' "$name" "$result" "$((SECONDS - start))" \
		"$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -1 | cut -c1-140)" >> "$out/table"
	[ $result = ok ]
}

peer=()
[ $mlx = yes ] && peer=(mlx)
built=yes
{ stage venv "$python" -m venv "$out/venv" &&
	stage build "$bin/python" -m pip install --disable-pip-version-check -c constraints.txt ".[hf]" pytest hypothesis numpy &&
	{ [ $mlx = no ] || stage mlx "$bin/python" -m pip install --disable-pip-version-check "${peer[@]}"; }; } || built=no
if [ $built = yes ]; then
	# A wheel's tests must not find this checkout's package: python/ is not on the path of an installation.
	stage doctor "$bin/python" -m nybble doctor --device mps
	stage cpu "$bin/python" -m pytest -q -p no:cacheprovider -W default tests/kernels tests/codec tests/nn
	stage gpu "$bin/python" -m pytest -q -p no:cacheprovider tests/mac
	stage bench "$bin/python" bench/metal.py
fi
if [ $dry = yes ]; then
	"$python" bench/metal.py --dry-run
	exit
fi
{
	echo "mac_check: $([ $failed = 0 ] && echo all well || echo NOT ALL WELL), $(git rev-parse --short HEAD 2> /dev/null)"
	echo "$(sysctl -n machdep.cpu.brand_string), $(sysctl -n hw.memsize) bytes, macOS $(sw_vers -productVersion)"
	cat "$out/table"
	grep -hE '^(FAILED|ERROR) ' "$out"/{cpu,gpu}.log 2> /dev/null | cut -c1-150 | head -20
	if [ -s "$out/bench.log" ]; then cat "$out/bench.log"; fi
} | tee "$out/summary.txt"
exit $failed
