#!/usr/bin/env bash
# What this branch needs before it can be merged: one call on four GPUs of one host, about 500 s.
#
#   here:       git archive main chiar_megatron > .sweep/main.tar       (.sweep and .whl ignored, both carried)
#   on device:  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
#                 --target /tmp/site .whl/*.whl || exit; bash first_call.sh
# GPU 0: kernels' tests, whole layers among them, then T=8192.  GPU 1: T=256, main and this branch.
# GPU 2: T=2048, main and this branch, learned routers too.  GPU 3: block sizes of routed attention at T=256,
# then T=256 with cuBLASLt.
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
mkdir -p /tmp/main && cp -r . /tmp/main/ && rm -rf /tmp/main/chiar_megatron && tar -xf .sweep/main.tar -C /tmp/main

bench() { # folder, GPU, length, name, routers
  (cd "$1" && export PYTHONPATH=/tmp/site:$1 CUDA_VISIBLE_DEVICES=$2
   timeout -s INT 270 python3 -W ignore -m chiar_megatron.cli bench step --seq-length "$3" --rho 0.5,0.25 \
     --router "$5" --sides twin,routed --no-repeat-twin --time-limit 200 --profile "$OUT/profile_$4.txt" \
     --output "$OUT/$4.json" --commit "$4" >"/tmp/$4.log" 2>&1
   grep -v select_algo "/tmp/$4.log" | grep -E "×|\| |rror" | tail -7 | cut -c1-150)
}
tests() {
  export CUDA_VISIBLE_DEVICES=0
  timeout -s INT 200 python3 -W ignore -m pytest -p no:warnings -p no:cacheprovider -q --tb=short \
    tests/gpu/test_residual_norm_cuda.py tests/gpu/test_select_rows_cuda.py tests/gpu/test_bias_gelu_cuda.py \
    tests/gpu/test_routed_attention_cuda.py tests/gpu/test_spectral_cuda.py >"$OUT/tests.log" 2>&1
  echo "tests $?"; grep -E "^(FAILED|ERROR|E  )" "$OUT/tests.log" | cut -c1-200 | head -20
}
(tests; bench "$PWD" 0 8192 branch8192 entropy) &
(bench /tmp/main 1 256 main256 entropy; bench "$PWD" 1 256 branch256 entropy) &
(bench /tmp/main 2 2048 main2048 entropy; bench "$PWD" 2 2048 branch2048 entropy,learned) &
(CUDA_VISIBLE_DEVICES=3 timeout -s INT 260 python3 -W ignore benchmarks/sweep_routed_attention.py >"$OUT/sweep.log" 2>&1
 tail -20 "$OUT/sweep.log"
 # Do the products' memsets (8 a layer) go away with the other library?
 export TORCH_BLAS_PREFER_CUBLASLT=1; bench "$PWD" 3 256 cublaslt256 entropy) &
wait
grep -h -A12 "between" "$OUT"/profile_*256.txt | cut -c1-140
