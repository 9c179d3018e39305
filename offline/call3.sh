. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
mkdir -p /tmp/piped; cp -r chiar_megatron tests benchmarks setup.py .sweep /tmp/piped/; (cd /tmp/piped && patch -s -p1 < .sweep/pipes.patch)
tr() { timeout -s KILL $1 python3 -W ignore -m torch.distributed.run --nproc-per-node 2 --master-port "${@:2}"; }
att() { CUDA_VISIBLE_DEVICES=$1 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --commit $COMMIT --output $OUT/$2.json $3 >$R/$2.log 2>&1; echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c22-100; }
att 0 attention_h200 & att 1 attention_d128_h200 "--heads 8 --head-size 128" &
wait
tr 30 29801 .sweep/groups.py eager 2>&1 | grep MiB; tr 30 29802 .sweep/groups.py lazy 2>&1 | grep MiB
echo "groups ($(($(date +%s)-T0)) s)"
(cd /tmp/piped && PYTHONPATH=/tmp/site:/tmp/piped tr 120 29803 benchmarks/plan_layouts.py --only PP=2 --time-limit 70 --json $OUT/pipes.json >$OUT/pipes.log 2>&1; grep -E "PP=2|Error|rror:" $OUT/pipes.log | head -12)
echo "pipes ($(($(date +%s)-T0)) s)"
sed -i 's/^LIMIT_SECONDS = .*/LIMIT_SECONDS = 110.0/' /tmp/piped/tests/gpu/test_layouts_cuda.py
cd /tmp/piped; export PYTHONPATH=/tmp/site:/tmp/piped
pyt layouts 0,1 150 tests/gpu/test_layouts_cuda.py -v; cp $R/layouts.log $OUT/; grep -E " s$" $R/layouts.log | head -30
