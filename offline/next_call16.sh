# Issue 3, next session's call (two GPUs, ~500 s): compiled layers beside other ranks and in float32 have run on CPUs only.
# Before: git rev-parse --short HEAD > .sweep/commit; git apply .sweep/plan_compile.patch; cp .sweep/d128.patch stays; carry .whl .sweep
. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
att() { (cd $4; PYTHONPATH=/tmp/site:$4 CUDA_VISIBLE_DEVICES=$1 timeout -s INT 60 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --heads 8 --head-size 128 --commit $COMMIT$3 --output $OUT/$2.json >$R/$2.log 2>&1); echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c22-100; }
(pyt step 0 170 tests/gpu/test_step_cuda.py -n 3) &
# .sweep/d128_tree: the tree with d128.patch (git archive, then patch), since `patch` may not be there.
(att 1 main_d128 "" $PWD; cp -r .sweep/d128_tree /tmp/d128; att 1 new_d128 "+d128" /tmp/d128; cd /tmp/d128; PYTHONPATH=/tmp/site:/tmp/d128 pyt attn 1 70 tests/gpu/test_routed_attention_cuda.py -n 8) &
wait
pyt layouts 0,1 230 tests/gpu/test_layouts_cuda.py -v; grep -E "SKIP|PASS|FAIL" $R/layouts.log | cut -c1-110
for w in "routed, TP=2" "twin, TP=2" "routed, CP=2" "twin, CP=2"; do for c in "" --compile; do n=$(echo "$w$c" | tr -c 'A-Za-z0-9\n' _); timeout -s INT 100 python3 -W ignore -m torch.distributed.run --nproc-per-node 2 benchmarks/plan_layouts.py --only "$w" $c --json $R/$n.json 2>&1 | grep -v "^\*\|OMP\|^W" | tail -1; done; done
pack
