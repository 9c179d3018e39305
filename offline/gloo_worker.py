"""Two ranks on one GPU, over gloo."""
import os, torch, torch.distributed as dist
init = dist.init_process_group
dist.init_process_group = lambda backend=None, **k: init(backend="gloo", **k)
import chiar_megatron.runtime.distributed as D
select = D.select_device
D.select_device = lambda device, local_rank: select(device, 0)
from tests.gpu.workers_layouts import train

import contextlib
from megatron.core.distributed import param_and_grad_buffer as B
B._coalescing_manager = lambda *a, **k: contextlib.nullcontext()
