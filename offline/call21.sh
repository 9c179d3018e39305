. .sweep/lib.sh
M=$PWD
export PYTHONPATH=$PWD/.sweep:$PYTHONPATH
mkdir -p $R/prof
timeout -s INT 130 python3 -W ignore .sweep/alone.py $R/alone.json "TP=2 SP,CP=2" compiled $R/prof >$R/alone.log 2>&1; echo "alone $? $(($(date +%s)-T0))"; grep -E "^\{|FAILED|rror" $R/alone.log | cut -c1-200
(timeout -s INT 170 python3 -W ignore .sweep/two_on_one.py cuda 160 >$R/two.log 2>&1; echo "two $? $(($(date +%s)-T0))"; grep -E "agrees|^\[|rror|loss" $R/two.log | tail -8 | cut -c1-220) &
(pyt cuda 0 175 tests/gpu/test_cuda.py -n 5) &
(pyt step 0 175 tests/gpu/test_step_cuda.py tests/gpu/test_bias_gelu_cuda.py tests/gpu/test_residual_norm_cuda.py -n 3) &
wait
pack
