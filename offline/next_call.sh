# Issue 3, what is left: two GPUs, about 580 s. .whl and .sweep carried, lib.sh in .sweep; COMMIT: git rev-parse --short HEAD
. .sweep/lib.sh
small() { CUDA_VISIBLE_DEVICES=1 timeout -s INT $2 python3 -W ignore -m chiar_megatron.cli bench $1 $3 --output $OUT/$1_h200.json --commit $COMMIT >$R/$1.log 2>&1; echo "== $1 ($(($(date +%s)-T0)) s)"; grep "| " $R/$1.log | cut -c1-150 | tail -14; }
one() { LIMIT=$4 TL=$((LIMIT-40)) bench $PWD $1 $2 $3 entropy "$5" "$6"; cp $R/$3.json $OUT/; }   # copied at once: a call cut off loses what lies elsewhere
(pyt gpu 0 400 tests/gpu --ignore tests/gpu/test_layouts_cuda.py; cp $R/gpu.log $OUT/
 one 0 256 step_T256_h200 150 twin,routed) &
(one 1 32768 step_T32768_h200 180 twin,routed --no-repeat-twin
 one 1 2048 step_T2048_h200 180 nanogpt-cudnn,twin,routed
 RHO=0.5 one 1 256 authors 110 twin,routed "--no-repeat-twin --tokens-per-step 65536 --micro-batch-size 64"
 small spectral 40; small attention 70 --no-flex) &
wait
# Then: step at 8192 with nanogpt; learned routers at 2048 (their memory: planned 40.7 GiB at 1/2);
# tests/gpu/test_layouts_cuda.py without -n; benchmarks/plan_layouts.py.
