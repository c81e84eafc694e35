#!/bin/sh
# Everything that needs a CUDA device: the tests, on as many processes as WORKERS says, and the benchmark, whose page it
# writes. PYTHON names an interpreter that has what `pip install .[test]` brings.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=src KINETO_LOG_LEVEL=6 OMP_NUM_THREADS=2
PYTHON="${PYTHON:-python3}"
TESTS="$PYTHON -m pytest -q --numprocesses=${WORKERS:-8} -p no:cacheprovider -p no:benchmark"
$TESTS tests/cuda
$TESTS --device cuda tests/models/test_exactness.py tests/eager/test_exactness.py tests/eager/test_inplace.py \
	tests/eager/test_replay.py tests/eager/test_snapshots.py tests/eager/test_marks.py tests/eager/test_fuzz.py \
	tests/eager/test_checkpoint_promises.py
$PYTHON benchmarks/gpu.py --write
