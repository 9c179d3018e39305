# sourced on the device
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
export R=/tmp/res; mkdir -p $R
bench() { # folder, GPU, length, name, routers, sides, extra
  (cd "$1" && export PYTHONPATH=/tmp/site:$1 CUDA_VISIBLE_DEVICES=$2
   timeout -s INT ${LIMIT:-280} python3 -W ignore -m chiar_megatron.cli bench step --seq-length "$3" --rho ${RHO:-0.5,0.25} \
     --router "$5" --sides "$6" --time-limit ${TL:-200} --profile "$R/profile_$4.txt" \
     --output "$R/$4.json" --commit "${COMMIT:-$4}" $7 >"$R/$4.log" 2>&1
   echo "== $4 ($(($(date +%s)-T0)) s)"; grep -v select_algo "$R/$4.log" | grep -E "×|\| |rror" | tail -9 | cut -c1-170)
}
pyt() { # name, gpu, limit, files
  n=$1; l=$3; export CUDA_VISIBLE_DEVICES=$2; shift 3
  timeout -s INT $l python3 -W ignore -m pytest -p no:warnings -p no:cacheprovider -q --tb=short --durations=6 "$@" >"$R/$n.log" 2>&1
  echo "== tests $n $? ($(($(date +%s)-T0)) s)"; tail -1 "$R/$n.log"; grep -E "^(FAILED|ERROR|E  )" "$R/$n.log" | cut -c1-200 | head -20
}
pack() { cd /tmp && tar czf "$OUT/res.tgz" res; }
T0=$(date +%s)
nvidia-smi -L
