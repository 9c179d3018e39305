. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
which cuda-gdb
export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT
P=29600
hang() { P=$((P+1)); (cd ${TREE:-$PWD} && NCCL_DEBUG_FILE=$R/nccl_$1_%p timeout -s KILL ${LIM:-110} python3 -W ignore -m torch.distributed.run --nproc-per-node 2 --master-port $P .sweep/hang.py $1 >$R/hang_$1${TREE:+_graph}.log 2>&1) & }
mkdir -p /tmp/piped && cp -r chiar_megatron tests benchmarks setup.py .sweep /tmp/piped/; mkdir -p /tmp/old_tree; tar xzf .sweep/old.tgz -C /tmp/old_tree && (cd /tmp/piped && patch -s -p1 < .sweep/pipes.patch && ls >/dev/null)
for v in DP TP PP CP two PPTP all-trace all-eager-trace all-lazy all-leave DP-drop all-sync; do hang $v; done
TREE=/tmp/piped; for v in PP VPP; do hang $v; done; unset TREE
wait
unset NCCL_DEBUG NCCL_DEBUG_SUBSYS
echo "hang variants: $(($(date +%s)-T0)) s"
for f in $R/hang_*; do echo "== $f"; grep -E "ENDED|HANGS|graphs|all groups|rror" $f | head -8; done
tar czf $OUT/hang.tgz -C /tmp res
att() { CUDA_VISIBLE_DEVICES=$1 timeout -s INT 80 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --commit $COMMIT --output $OUT/$2.json $3 >$R/$2.log 2>&1; echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c22-120; }
att 0 attention_h200 &
(cd /tmp/old_tree 2>/dev/null && att 1 attention_old) &
wait
cd /tmp/piped && PYTHONPATH=/tmp/site:/tmp/piped timeout -s KILL 110 python3 -W ignore -m torch.distributed.run --nproc-per-node 2 --master-port 29700 benchmarks/plan_layouts.py --only PP=2 --time-limit 60 --json $OUT/pipes.json 2>&1 | grep -vE "^\[rank|^W1|\*\*\*" | cut -c1-200 | tail -30
echo "plan_layouts ($(($(date +%s)-T0)) s)"
