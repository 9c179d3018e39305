# torchrun --nproc-per-node 2 .sweep/hang.py VARIANT: do process groups end?
import faulthandler, gc, os, subprocess, sys, threading, time
sys.path.insert(0, os.getcwd())
import torch, torch.distributed as dist
from tests.gpu import test_layouts_cuda as L
from tests.gpu import workers_layouts as W
from chiar_megatron.runtime import distributed as D
if not torch.cuda.is_available(): torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None; L.RECIPE["runtime"]["device"] = "cpu"
name = sys.argv[1]; rank = os.environ["RANK"]
t0 = time.time()
def say(*w): print(f"[{name} {rank} {time.time()-t0:5.1f}]", *w, flush=True)
if "lazy" in name:
    init = dist.init_process_group
    def lazy(*a, **o): o.pop("device_id", None); return init(*a, **o)
    dist.init_process_group = lazy
graph = False if "eager" in name else None
lists = {"DP": ["DP"], "TP": ["TP"], "PP": ["PP"], "CP": ["CP"], "two": ["DP", "TP"], "PPTP": ["PP", "TP"], "VPP": ["PP VPP"],
         "all": ["DP", "DP overlapped", "TP", "TP SP", "CP", "PP", "PP VPP", "TP SP overlapped", "PP overlapped"]}
names = lists[name.split("-")[0]]
recipes = {n: L.recipe(L.LAYOUTS[n], runtime__cuda_graph=graph) for n in names}
engine = None
for n, r in recipes.items():
    del engine
    gc.collect(); torch.cuda.empty_cache()
    if "leave" in name and dist.is_initialized():
        D.shutdown()
    engine, trained = W._one(r, 6, 3)
    say(n, [round(x, 5) for x in trained.losses], [round(x, 4) for x in trained.gradient_norms[-2:]], "graph" if len(D.RECORDED_GRAPHS) else "")
if "drop" in name:
    engine = None; gc.collect()
if "sync" in name:
    torch.cuda.synchronize(); dist.barrier(); torch.cuda.synchronize()
torch.cuda.synchronize()
say("graphs", len(D.RECORDED_GRAPHS), "groups", len(dist.distributed_c10d._world.pg_names))
def watch():
    time.sleep(float(os.environ.get("WAIT", "18")))
    say("HANGS")
    faulthandler.dump_traceback(all_threads=False)
    if "-" in name or "two" in name: os._exit(7)
    p = subprocess.run(["cuda-gdb", "-batch", "-p", str(os.getpid()), "-ex", "set pagination off", "-ex", "thread apply all bt 12"], capture_output=True, text=True, timeout=90)
    open(f"{os.environ['R']}/gdb_{name}_{rank}", "w").write(p.stdout + p.stderr)
    os._exit(7)
w = threading.Thread(target=watch, daemon=True); w.start()
pg_order = sorted(dist.distributed_c10d._world.pg_names.items(), key=lambda x: x[1], reverse=True)
if "trace" in name:
    for graph_ in list(D.RECORDED_GRAPHS): graph_.reset()
    D.RECORDED_GRAPHS.clear()
    for pg, pgname in pg_order:
        s = time.time(); print(f"<{pgname} n{pg.size()}", end=" ", flush=True)
        pg.shutdown(); print(f"{time.time()-s:.2f}>", end=" ", flush=True)
    say("all groups shut")
else:
    D.shutdown()
say("ENDED")
os._exit(0)
