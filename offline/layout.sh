. .sweep/lib.sh
nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,clocks_event_reasons.active,temperature.gpu --format=csv,noheader -lms 500 > $OUT/clocks.txt & P=$!
timeout -s INT 90 python3 -W ignore .sweep/layout.py | tee $OUT/layout.txt
kill $P; awk 'NR%4==0' $OUT/clocks.txt | head -60
