. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
att() { (cd $4; PYTHONPATH=/tmp/site:$4 timeout -s INT 70 python3 -W ignore -m chiar_megatron.cli bench attention --no-flex --heads 8 --head-size 128 --commit $3 --output $R/$2.json >$R/$2.log 2>&1); echo "== $2 $? ($(($(date +%s)-T0)) s)"; grep -E "routed|cuDNN" $R/$2.log | grep "| " | cut -c1-130; }
M=$PWD
(pyt big 0 230 tests/gpu/test_cuda.py tests/gpu/test_routed_attention_cuda.py -n 6) &
(pyt rest 0 230 tests/gpu/test_step_cuda.py tests/gpu/test_bias_gelu_cuda.py tests/gpu/test_residual_norm_cuda.py tests/gpu/test_select_rows_cuda.py tests/gpu/test_spectral_cuda.py -n 5) &
wait
att 0 main_d128 f042d2b $M/.sweep/main_tree
att 0 new_d128 $COMMIT $M
att 0 main_d128_again f042d2b $M/.sweep/main_tree
LIMIT=130 TL=110 bench $M 0 2048 step2048 entropy twin,routed --no-repeat-twin
pack
