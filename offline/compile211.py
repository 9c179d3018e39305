import sys, os, time
sys.path.insert(0, "/tmp/tpc")
from tests.parallel.harness import run_ranks
R = {"model": {"hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": 97, "schedule": "D R*2 A", "router": {"kind": "learned", "target": 0.5}, "dropout": 0.0},
 "optimizer": {"lr": 3e-3, "warmup_steps": 2}, "training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "eval_steps": 0},
 "runtime": {"device": "cpu", "collective_timeout_seconds": 300.0, "compile": False}}
def rec(compile, **par):
    r = {k: dict(v) for k, v in R.items()}; r["runtime"]["compile"] = compile; r["parallel"] = par; return r
recipes = {}
which = sys.argv[1:] or ["tp"]
for w in which:
    par = {"tp": {"tensor_model_parallel_size": 2}, "sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "cp": {"context_parallel_size": 2}}[w]
    recipes[w + " eager"] = rec(False, **par); recipes[w + " compiled"] = rec(True, **par)
t = time.time()
out = run_ranks("tests.gpu.workers_layouts:train", 2, {"recipes": recipes, "steps": 4, "evaluate_every": 4}, timeout=900)
for n, tr in out[0].items(): print(n, [f"{x:.7f}" for x in tr.losses], [f"{x:.7f}" for x in tr.gradient_norms])
print(time.time() - t)
