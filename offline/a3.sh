# a3.sh OUT KERNEL CODE  in $TREE
mkdir -p $1; cd ${TREE:-/work/main}; PYTHONPATH=. /tmp/v211/bin/python -W ignore /tmp/off/offline/asm.py $1 "$3" 2>&1| grep "$2\|rror"; python3 /tmp/off/cnt.py $1/$2_1.cubin ; python3 /tmp/off/offline/flow.py $1/$2_1.cubin
D=/tmp/v211/lib/python3.11/site-packages/triton/backends/nvidia/bin; $D/nvdisasm -c $1/$2_1.cubin > $1/$2.sass; grep -c "WARPGROUP.ARRIVE" $1/$2.sass; $D/ptxas -v -arch=sm_90a $1/$2_1.ptx -o /dev/null 2>&1 | grep -i "C7515\|wgmma\|warn"
