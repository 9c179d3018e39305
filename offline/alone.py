"""One rank of a layout by itself on one GPU: transfers are local copies, so what is timed is all else of a step."""
import gc, json, statistics, sys, time
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
new_group = dist.new_group
dist.new_group = lambda *a, **k: new_group(*a, **{**k, "backend": "fake"})
def done(x=None, async_op=False):
    class W:
        def wait(self, *a): return True
        def is_completed(self): return True
    return W() if async_op else None
def gather(out, x, group=None, async_op=False):
    n = dist.get_world_size(group); out.view(n, -1).copy_(x.reshape(1, -1).expand(n, -1)); return done(async_op=async_op)
def scatter(out, x, op=None, group=None, async_op=False):
    n = dist.get_world_size(group); out.view(-1).copy_(x.reshape(n, -1)[dist.get_rank(group)]); return done(async_op=async_op)
def a2a(out, x, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
    out.view(-1).copy_(x.reshape(-1)); return done(async_op=async_op)
def reduce(x, op=None, group=None, async_op=False): return done(async_op=async_op)
dist.all_gather_into_tensor = dist._all_gather_base = gather
dist.reduce_scatter_tensor = dist._reduce_scatter_base = scatter
dist.all_to_all_single, dist.all_reduce = a2a, reduce
import chiar_megatron.runtime.distributed as D
D._join = lambda device, runtime, env: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
sys.path.insert(0, "benchmarks")
import plan_layouts as P
from chiar_megatron.runtime.env import ProcessEnv
import dataclasses
on_gpu = torch.cuda.is_available()
env = dataclasses.replace(ProcessEnv(), world_size=2, local_world_size=1) if dataclasses.is_dataclass(ProcessEnv) else ProcessEnv()
stream_of = P.RandomStream  # the other rank's half of the vocabulary would give states of zero
P.RandomStream = lambda v, *a, **k: stream_of(v // 2 - 64, *a, **k)
P.dist.barrier = lambda *a, **k: None
from megatron.core import parallel_state
rows = []
kept = []
make = P.MegatronEngine
def keep(*a, **k):
    kept[:] = [make(*a, **k)]; return kept[0]
P.MegatronEngine = keep
def profile(config, world, name):
    t = config.training; v = config.model.vocab_size
    stream = P.RandomStream(v, config.model.seq_length, t.global_batch_size, seed=2)
    batches = P.read_ahead(stream, P.BatchLayout(t.global_batch_size, t.micro_batch_size, 0, world.data_parallel_size), 0, 3, 0)
    e = kept[0]
    e.launch_step(next(batches), 20, detailed=False).result()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA] if on_gpu else None) as prof:
        for i in (21, 22): e.launch_step(next(batches), i, detailed=False).result()
    table = prof.key_averages()
    total = {}
    for k in table:
        us = getattr(k, "device_time_total", 0)
        if us: total[k.key] = (us / 2e3, k.count // 2)
    with open(name, "w") as f:
        f.write(f"kernel ms a step {sum(x[0] for x in total.values()):.2f}, kernels {sum(x[1] for x in total.values())}\n")
        for key, (ms, n) in sorted(total.items(), key=lambda i: -i[1][0])[:60]: f.write(f"{ms:9.3f} {n:6d} {key[:150]}\n")

for model in ("routed", "twin"):
    for layout in sys.argv[2].split(","):
        for way in sys.argv[3].split(","):
            runtime = {"compile": "compiled" in way, "cuda_graph": "launched" not in way}
            config = P.recipe(model, layout, on_gpu, runtime)
            t = time.time()
            try:
                world = D.initialize(config.parallel, config.runtime, env)
                peak, seconds = P.measure(config, world)
                rows.append({"model": model, "layout": layout, "way": way, "ms": 1e3 * seconds, "GiB": peak / 2**30})
                if len(sys.argv) > 4: profile(config, world, f"{sys.argv[4]}/{model}_{layout}_{way}.txt".replace(' ', ''))
                print(rows[-1], f"{time.time() - t:.0f} s", flush=True)
            except Exception as e:
                import traceback; traceback.print_exc(limit=-6); print("FAILED", model, layout, way, repr(e)[:300], flush=True)
            for g in list(D.RECORDED_GRAPHS): g.reset()
            D.RECORDED_GRAPHS.clear()
            parallel_state.destroy_model_parallel(); gc.collect()
            kept.clear(); gc.collect(); torch._dynamo.reset()
            if on_gpu: torch.cuda.empty_cache()
json.dump({"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__, "rows": rows}, open(sys.argv[1], "w"), indent=1)
