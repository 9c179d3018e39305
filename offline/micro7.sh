. .sweep/lib.sh
for i in $(seq 0 15); do python3 -W ignore .sweep/micro7.py compile $i 16 & done; wait
echo "compiled ($(($(date +%s)-T0)) s)"
timeout -s INT 60 python3 -W ignore .sweep/micro7.py time 0 1
echo "all ($(($(date +%s)-T0)) s)"
