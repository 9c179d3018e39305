. .sweep/lib.sh
export PYTHONPATH=$PWD/.sweep:$PYTHONPATH
timeout -s INT 250 python3 -W ignore .sweep/two_on_one.py cuda 160 >$R/two.log 2>&1; echo "two $? $(($(date +%s)-T0))"; grep -E "agrees|\[|rror" $R/two.log | tail -20 | cut -c1-220
timeout -s INT 290 python3 -W ignore .sweep/alone.py $R/alone.json "TP=2 SP,CP=2,one GPU" eager,compiled >$R/alone.log 2>&1; echo "alone $? $(($(date +%s)-T0))"; grep -E "^\{|FAILED|rror" $R/alone.log | cut -c1-200
pack
