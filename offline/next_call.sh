# Issue 3, next session's first call (two GPUs, ~560 s). COMMIT: .sweep/commit (git rev-parse --short HEAD > .sweep/commit)
. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
one() { LIMIT=$4 TL=$((LIMIT-20)) bench $PWD $1 $2 $3 ${7:-entropy} "$5" "$6"; cp $R/$3.json $OUT/ || tail -5 $R/$3.log; }
att() { CUDA_VISIBLE_DEVICES=$1 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --commit $COMMIT --output $OUT/$2.json $3 >$R/$2.log 2>&1; echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c1-120; }
(att 0 attention_h200; pyt attn 0 70 tests/gpu/test_routed_attention_cuda.py -n 8; att 0 attention_d128_h200 "--heads 8 --head-size 128"; one 0 8192 step_T8192_h200 150 nanogpt-cudnn,twin,routed --no-repeat-twin) &
(one 1 2048 step_T2048_h200 190 nanogpt,nanogpt-cudnn,twin,routed --no-repeat-twin; one 1 256 step_T256_h200 150 nanogpt,twin,routed --no-repeat-twin) &
wait
sed -i 's/^LIMIT_SECONDS = .*/LIMIT_SECONDS = 130.0/' tests/gpu/test_layouts_cuda.py
pyt layouts 0,1 $((575-($(date +%s)-T0))) tests/gpu/test_layouts_cuda.py -v; cp $R/layouts.log $OUT/; grep -E " s$" $R/layouts.log | head -30
# Second call: 32768; patch -p1 <.sweep/pipes.patch, layouts' tests again, plan_layouts.py --only PP=2 (launched: 656 / 411 ms).
