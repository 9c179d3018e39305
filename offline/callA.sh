. .sweep/lib.sh
for i in $(seq 0 14); do CUDA_VISIBLE_DEVICES=$((i%2)) python3 -W ignore .sweep/micro6.py compile $i 15 & done; wait
echo "compiled ($(($(date +%s)-T0)) s)"
(CUDA_VISIBLE_DEVICES=0 timeout -s INT 60 ncu --metrics gpu__time_duration.sum,lts__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_bytes.sum.per_second,l1tex__m_xbar2l1tex_read_bytes.sum.per_second,sm__inst_executed_pipe_tensor.sum,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__cycles_active.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active -k regex:"_forward_kernel|_key_gradient_kernel|_query_gradient_kernel" --clock-control none python3 -W ignore .sweep/ncu6.py > $OUT/ncu.txt 2>&1; grep -E "_kernel|duration|throughput|per_second|pct" $OUT/ncu.txt | cut -c1-120; echo "ncu ($(($(date +%s)-T0)) s)") &
CUDA_VISIBLE_DEVICES=1 timeout -s INT 60 python3 -W ignore .sweep/micro6.py time 0 1 > $OUT/micro.txt 2>&1
wait; cat $OUT/micro.txt; echo "all ($(($(date +%s)-T0)) s)"
