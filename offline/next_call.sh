# Issue 3, next session's first call (two GPUs, ~500 s). Before: git rev-parse --short HEAD > .sweep/commit
# Blocks that end where sequences do (cut.patch, built, never run on a GPU) against the tree it is for. If it is faster and
# right: apply it, commit, copy the records from $OUT into benchmarks/results (cut_* names lose their prefix).
. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)+cut
git --version >/dev/null; mkdir -p /tmp/cut && cp -r chiar_megatron tests benchmarks setup.py pyproject.toml .sweep /tmp/cut/ && (cd /tmp/cut && patch -s -p1 < .sweep/cut.patch) || exit
one() { LIMIT=$4 TL=$((LIMIT-20)) RHO=${8:-0.5,0.25} bench /tmp/cut $1 $2 $3 ${7:-entropy} "$5" "$6"; cp $R/$3.json $OUT/ || tail -5 $R/$3.log; }
att() { (cd $4; PYTHONPATH=/tmp/site:$4 CUDA_VISIBLE_DEVICES=$1 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --commit $COMMIT --output $OUT/$2.json $3 >$R/$2.log 2>&1); echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c22-100; }
(att 0 cut_attention_h200 "" /tmp/cut; att 0 main_attention_h200 "" $PWD; one 0 2048 cut_step_T2048_h200 150 twin,routed --no-repeat-twin; one 0 8192 cut_step_T8192_h200 190 twin,routed --no-repeat-twin) &
(cd /tmp/cut; PYTHONPATH=/tmp/site:/tmp/cut pyt attn 1 70 tests/gpu/test_routed_attention_cuda.py -n 8; cd - >/dev/null; one 1 256 cut_step_T256_h200 200 nanogpt,twin,routed --no-repeat-twin; att 1 cut_attention_d128_h200 "--heads 8 --head-size 128" /tmp/cut; one 1 32768 cut_step_T32768_h200 170 twin,routed --no-repeat-twin) &
wait
