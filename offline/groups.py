# torchrun: memory and time of groups. argv: eager|lazy
import os, sys, time
sys.path.insert(0, os.getcwd())
import torch, torch.distributed as dist
from megatron.core import parallel_state as ps
from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
from chiar_megatron.runtime.distributed import initialize, shutdown
from chiar_megatron.runtime.env import read_process_env
if sys.argv[1] == "eager":
    init = dist.init_process_group
    dist.init_process_group = lambda *a, **o: init(*a, **o, device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
torch.cuda.set_device(int(os.environ["LOCAL_RANK"])); torch.zeros(1, device="cuda"); torch.cuda.synchronize()
free = torch.cuda.mem_get_info()[0]; t = time.time()
initialize(ParallelConfig(), RuntimeConfig(device="cuda"), read_process_env())
started = time.time() - t
x = torch.ones(1000, device="cuda")
for g in (ps.get_data_parallel_group(), ps.get_data_parallel_group(with_context_parallel=True), dist.group.WORLD): dist.all_reduce(x, group=g)
torch.cuda.synchronize(); used = free - torch.cuda.mem_get_info()[0]; first = time.time() - t
t = time.time(); shutdown()
if os.environ["RANK"] == "0": print(sys.argv[1], f"groups {used/2**20:.0f} MiB, initialize {started:.2f} s, with three used {first:.2f} s, shutdown {time.time()-t:.2f} s", flush=True)
os._exit(0)
