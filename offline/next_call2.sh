# Second call, on the tree that is to stay: the rest of tests/gpu (one GPU each), layouts last.
. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
ls tests/gpu/test_*.py
(pyt a 0 330 tests/gpu/test_cuda.py tests/gpu/test_routed_attention_cuda.py -n 6) &
(pyt b 1 330 $(ls tests/gpu/test_*.py | grep -v "test_cuda.py\|attention_cuda\|layouts") -n 5) &
wait
pyt layouts 0,1 $((570-($(date +%s)-T0))) tests/gpu/test_layouts_cuda.py -v
cp $R/*.log $OUT/
