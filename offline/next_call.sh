. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)+cut
G=$(nvidia-smi -L | grep -q H200 && echo h200 || echo h100)
cp -r .sweep/cut_tree /tmp/cut && ln -s $PWD/.sweep /tmp/cut/.sweep
one() { LIMIT=$4 TL=$((LIMIT-20)) RHO=${8:-0.5,0.25} bench /tmp/cut $1 $2 $3_$G ${7:-entropy} "$5" "$6"; cp $R/$3_$G.json $OUT/ || tail -5 $R/$3_$G.log; }
att() { (cd $4; PYTHONPATH=/tmp/site:$4 CUDA_VISIBLE_DEVICES=$1 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --commit $COMMIT --output $OUT/$2_$G.json $3 >$R/$2.log 2>&1); echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c22-100; }
(att 0 cut_attention "" /tmp/cut; att 0 main_attention "" $PWD; one 0 2048 cut_step_T2048 150 twin,routed --no-repeat-twin; one 0 8192 cut_step_T8192 190 twin,routed --no-repeat-twin) &
(cd /tmp/cut; PYTHONPATH=/tmp/site:/tmp/cut pyt attn 1 70 tests/gpu/test_routed_attention_cuda.py -n 8; cd - >/dev/null; one 1 256 cut_step_T256 200 nanogpt,twin,routed --no-repeat-twin; att 1 cut_attention_d128 "--heads 8 --head-size 128" /tmp/cut; one 1 32768 cut_step_T32768 170 twin,routed --no-repeat-twin) &
wait
