import copy, sys, time
from tests.gpu import test_layouts_cuda as T
from tests.parallel.harness import run_ranks
dev = sys.argv[1]
def rec(layout, **f):
    r = T.recipe(layout, **f); r["runtime"]["device"] = dev; r["runtime"]["cuda_graph"] = None if not layout else False; r["runtime"]["collective_timeout_seconds"] = 200.0; return r
kinds = {"full": {}, "half": {"training__precision": "bf16"}}
alone = {k: rec({}, **f) for k, f in kinds.items()}
together = {}
for n in ('TP', 'TP SP'):
    for k, f in kinds.items():
        for c in (True,): together[f"{n}|{k}|{'compiled' if c else 'eager'}"] = rec(T.LAYOUTS[n], runtime__compile=c, **f)
ENV = 0
a = {"steps": T.STEPS, "evaluate_every": T.EVALUATE_EVERY}
t = time.time()
one = run_ranks("gloo_worker:train", 1, {"recipes": alone, **a}, timeout=100)[0]
two = run_ranks("gloo_worker:train", 2, {"recipes": together, **a}, timeout=float(sys.argv[2]))
assert two[0] == two[1]
for n, f in two[0].items():
    k = n.split("|")[1]; e = one[k]
    d = max(abs(x - y) for x, y in zip(f.losses, e.losses)); g = max(abs(x / y - 1) for x, y in zip(f.gradient_norms, e.gradient_norms)); v = max(abs(x - y) for x, y in zip(f.validations, e.validations))
    print(f"{n:28s} loss {d:.2e} validation {v:.2e} gradient norm {g:.2e}", T.differences(f, e, k == "half") or "agrees")
print(f"{time.time() - t:.0f} s")
