. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
one() { LIMIT=$4 TL=$((LIMIT-20)) RHO=${8:-0.5,0.25} bench $PWD $1 $2 $3 ${7:-entropy} "$5" "$6"; cp $R/$3.json $OUT/ || tail -5 $R/$3.log; }
att() { CUDA_VISIBLE_DEVICES=$1 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --commit $COMMIT --output $OUT/$2.json $3 >$R/$2.log 2>&1; echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c22-100; }
(att 0 attention_h200; pyt attn 0 60 tests/gpu/test_routed_attention_cuda.py -n 8; one 0 8192 step_T8192_h200 190 twin,routed --no-repeat-twin; one 0 32768 step_T32768_h200 175 twin,routed --no-repeat-twin) &
(one 1 2048 step_T2048_h200 150 twin,routed --no-repeat-twin;  one 1 256 step_T256_h200 150 nanogpt,twin,routed --no-repeat-twin; one 1 2048 step_T2048_learned_h200 80 routed --no-repeat-twin learned 0.5; att 1 attention_d128_h200 "--heads 8 --head-size 128") &
wait
