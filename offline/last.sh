. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
G=$(nvidia-smi -L | grep -q H200 && echo h200 || echo h100)
pyt layouts 0,1,2,3 170 tests/gpu/test_layouts_cuda.py -v
grep -E "SKIP|PASS|FAIL" $R/layouts.log | cut -c1-110
one() { LIMIT=$(($3+20)) TL=$3 RHO=$6 bench $PWD $1 $2 $4_$G ${7:-entropy} "$5" "--no-repeat-twin $8"; cp $R/$4_$G.json $OUT/ || tail -5 $R/$4_$G.log; }
nvidia-smi --query-gpu=timestamp,index,clocks.sm,power.draw,clocks_event_reasons.active,temperature.gpu --format=csv,noheader -lms 500 > $OUT/clocks.txt & P=$!
(one 0 2048 290 step_T2048_plain nanogpt,nanogpt-cudnn,twin,routed 0.5,0.25) & A=$!
(one 1 8192 270 step_T8192_plain nanogpt-cudnn,twin,routed 0.5,0.25) & B=$!
(one 2 256 200 step_T256 nanogpt,twin,routed 0.5,0.25; one 2 2048 100 step_T2048_learned routed 0.5 learned) & C=$!
(one 3 256 100 step_T256_65536 twin,routed 0.5 entropy "--tokens-per-step 65536 --micro-batch-size 64"; CUDA_VISIBLE_DEVICES=3 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --commit $COMMIT --output $OUT/attention_$G.json >$R/att.log 2>&1; echo "== attention $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN|lex" $R/att.log | grep "| " | cut -c1-100; CUDA_VISIBLE_DEVICES=3 timeout -s INT 60 python3 -W ignore -m chiar_megatron.cli bench spectral --commit $COMMIT --output $OUT/spectral_$G.json >$R/spe.log 2>&1; echo "== spectral $?"; grep -E "kernel" $R/spe.log | cut -c1-120) & D=$!
wait $A $B $C $D; kill $P
